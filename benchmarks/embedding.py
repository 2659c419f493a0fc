"""Embedding + positions + dropout against PyTorch's composition, forward and backward.

python benchmarks/embedding.py --threads 2
python benchmarks/embedding.py --device cuda
"""

import torch
from timing import arguments, by_device, copier, dtypes, median_seconds, print_row
from torch.nn import functional

from transformer_ext.ops import embedding, sinusoidal_positions

options = arguments(__doc__)
rng = torch.tensor([1, 2, 3])

shapes = by_device(
    options,
    ((4096, 8000, 256), (4096, 32000, 512)),
    ((4096, 37000, 512), (25000, 37000, 512), (120000, 37000, 1024)),
)
for tokens, words, columns in shapes:
    # Ids as in text: the k-th most frequent word about as often as 1 / k.
    ids = torch.multinomial(1.0 / torch.arange(1, words + 1), tokens, replacement=True)
    positions = (torch.arange(tokens) % 50).int()
    weight = torch.randn(words, columns, requires_grad=True)
    table = sinusoidal_positions(50, columns)
    for dtype in dtypes(options):
        for p in (0.0, 0.1):

            def ours(p=p, dtype=dtype, ids=ids, weight=weight, positions=positions, table=table):
                return embedding(
                    ids,
                    weight,
                    scale=16.0,
                    positions=positions,
                    position_table=table,
                    dropout_p=p,
                    rng=rng,
                    dtype=dtype,
                )

            def peer(p=p, dtype=dtype, ids=ids, weight=weight, positions=positions, table=table):
                y = functional.embedding(ids, weight) * 16.0 + table[positions]
                return functional.dropout(y, p, training=p > 0).to(dtype)

            grad = torch.randn(tokens, columns).to(dtype)

            def backward(y, weight=weight, grad=grad):
                return torch.autograd.grad(y, weight, grad, retain_graph=True)

            kind = str(dtype).removeprefix("torch.")
            name = f"{tokens} of {words}x{columns} {kind} p={p}"
            # A row that many tokens have is read once.
            size = (len(ids.unique()) * 4 + tokens * dtype.itemsize) * columns
            with torch.no_grad():
                times = median_seconds(
                    {"ours": ours, "torch": peer, "copy": copier(size, dtype)}, options.seconds
                )
            print_row(f"forward {name}", times, size)
            results = ours(), peer()
            size = words * columns * 4 + tokens * columns * dtype.itemsize
            times = median_seconds(
                {
                    "ours": lambda results=results, f=backward: f(results[0]),
                    "torch": lambda results=results, f=backward: f(results[1]),
                    "copy": copier(size, dtype),
                },
                options.seconds,
            )
            print_row(f"backward {name}", times, size)
