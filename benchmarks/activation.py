"""Bias + activation + dropout against PyTorch's composition, forward and backward.

python benchmarks/activation.py --threads 2
python benchmarks/activation.py --device cuda
"""

import torch
from timing import arguments, by_device, copier, dtypes, median_seconds, print_row
from torch.nn import functional

from transformer_ext.ops import activation
from transformer_ext.ops.activation import is_gated

options = arguments(__doc__)
rng = torch.tensor([1, 2, 3])

FUNCTIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "swiglu": lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}

shapes = by_device(
    options, ((256, 2048), (4096, 2048)), ((4096, 2048), (25000, 2048), (25000, 4096))
)
for rows, columns in shapes:
    for dtype in dtypes(options):
        for kind, function in FUNCTIONS.items():
            wide = columns * (2 if is_gated(kind) else 1)
            x = torch.randn(rows, wide).to(dtype).requires_grad_()
            bias = torch.randn(wide, requires_grad=True)
            grad = torch.randn(rows, columns).to(dtype)
            for p in (0.0, 0.1):

                def ours(x=x, bias=bias, kind=kind, p=p):
                    return activation(x, bias, kind=kind, dropout_p=p, rng=rng, site=1)

                def peer(x=x, bias=bias, function=function, p=p):
                    y = function(x + bias.to(x.dtype))
                    return functional.dropout(y, p, training=p > 0)

                def backward(y, x=x, bias=bias, grad=grad):
                    return torch.autograd.grad(y, (x, bias), grad, retain_graph=True)

                name = f"{rows}x{columns} {str(dtype).removeprefix('torch.')} {kind} p={p}"
                size = (x.numel() + grad.numel()) * x.element_size()
                with torch.no_grad():
                    times = median_seconds(
                        {"ours": ours, "torch": peer, "copy": copier(size, dtype)}, options.seconds
                    )
                print_row(f"forward {name}", times, size)
                results = ours(), peer()
                size = (2 * x.numel() + grad.numel()) * x.element_size()
                times = median_seconds(
                    {
                        "ours": lambda results=results, f=backward: f(results[0]),
                        "torch": lambda results=results, f=backward: f(results[1]),
                        "copy": copier(size, dtype),
                    },
                    options.seconds,
                )
                print_row(f"backward {name}", times, size)
