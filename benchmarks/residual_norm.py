"""Residual + dropout + norm against PyTorch's composition, forward and backward.

python benchmarks/residual_norm.py --threads 2
python benchmarks/residual_norm.py --device cuda
"""

import torch
from timing import arguments, by_device, copier, dtypes, median_seconds, print_row
from torch.nn import functional

from transformer_ext.ops import norm, residual_norm

options = arguments(__doc__)
rng = torch.tensor([1, 2, 3])

shapes = by_device(
    options,
    ((256, 512), (1024, 512), (4096, 256), (4096, 512), (32768, 512)),
    ((4096, 512), (100000, 512), (50000, 1024), (25000, 2048)),
)
for rows, columns in shapes:
    for dtype in dtypes(options):
        x, residual, grad = (torch.randn(rows, columns).to(dtype) for _ in range(3))
        x.requires_grad_()
        residual.requires_grad_()
        weight = torch.ones(columns, requires_grad=True)
        bias = torch.zeros(columns, requires_grad=True)
        inputs = (x, residual, weight, bias)
        kind = str(dtype).removeprefix("torch.")
        for p in (0.0, 0.1):

            def ours(p=p, inputs=inputs):
                return residual_norm(*inputs, dropout_p=p, rng=rng, site=1)[1]

            def peer(p=p, inputs=inputs, columns=columns):
                x, residual, weight, bias = inputs
                total = residual + functional.dropout(x, p, training=p > 0)
                if x.is_cuda:  # which takes parameters of the type of x alone
                    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
                return functional.layer_norm(total, (columns,), weight, bias)

            def backward(y, inputs=inputs, grad=grad):
                return torch.autograd.grad(y, inputs, grad, retain_graph=True)

            size = 4 * x.numel() * x.element_size()
            with torch.no_grad():
                times = median_seconds(
                    {"ours": ours, "torch": peer, "copy": copier(size, dtype)}, options.seconds
                )
            print_row(f"forward {rows}x{columns} {kind} p={p}", times, size)
            results = ours(), peer()
            size = (4 if p else 3) * x.numel() * x.element_size()
            times = median_seconds(
                {
                    "ours": lambda results=results, f=backward: f(results[0]),
                    "torch": lambda results=results, f=backward: f(results[1]),
                    "copy": copier(size, dtype),
                },
                options.seconds,
            )
            print_row(f"backward {rows}x{columns} {kind} p={p}", times, size)

x = torch.randn(1, 8)
weight = torch.ones(8)
with torch.no_grad():
    times = median_seconds({"ours": lambda: norm(x, weight), "copy": copier(64)}, options.seconds)
print_row("overhead of a call: norm 1x8", times, 64)
x.requires_grad_()
times = median_seconds(
    {"ours": lambda: residual_norm(x, x, weight), "copy": copier(64)}, options.seconds
)
print_row("overhead of a call: residual_norm, recording", times, 64)
