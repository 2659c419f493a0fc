"""The three products of a linear map, forward and for both gradients, against torch.mm.

    python benchmarks/linear.py

Each in float32 and bfloat16, interleaved: what `linear` runs, and torch.mm into memory that is
there (and conversion to float32, for the gradient of a weight). `gemm_choices` in
transformer_ext/ops/linear.py holds the outcome, shown by `python -m transformer_ext.info`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import arguments, median_seconds

from transformer_ext.ops.linear import product, product_input, product_weight

# rows, outputs, inputs
CASES = (
    (1, 2048, 512),
    (8, 2048, 512),
    (64, 512, 512),
    (256, 2048, 512),
    (2048, 768, 256),
    (4096, 512, 512),
    (4096, 2048, 512),
    (4096, 512, 2048),
)


def _forward(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    ours, theirs = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    converted = weight.to(x.dtype).t()
    return {
        "ours": lambda: product(x, weight, out=ours),
        "torch": lambda: torch.mm(x, converted, out=theirs),
    }


def _input(grad: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    ours, theirs = (grad.new_empty(grad.shape[0], weight.shape[1]) for _ in range(2))
    converted = weight.to(grad.dtype)
    return {
        "ours": lambda: product_input(grad, weight, out=ours),
        "torch": lambda: torch.mm(grad, converted, out=theirs),
    }


def _weight(grad: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    ours, theirs = (torch.empty(grad.shape[1], x.shape[1]) for _ in range(2))

    def peer() -> None:
        if x.dtype == torch.float32:
            torch.mm(grad.t(), x, out=theirs)
        else:
            theirs.copy_(torch.mm(grad.t(), x))

    return {"ours": lambda: product_weight(grad, x, out=ours), "torch": peer}


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    print(f"{'product':8} {'dtype':9} {'shape':>16} {'ours':>8} {'torch':>8} GFLOP/s {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, out, inputs in CASES:
            x = torch.randn(rows, inputs).to(dtype)
            weight = torch.randn(out, inputs) * inputs**-0.5
            grad = torch.randn(rows, out).to(dtype)
            products = {"forward": _forward(x, weight)}
            if rows >= 64:
                products["input"] = _input(grad, weight)
                products["weight"] = _weight(grad, x)
            for name, functions in products.items():
                times = median_seconds(functions, options.seconds)
                speed = {k: 2e-9 * rows * out * inputs / s for k, s in times.items()}
                print(
                    f"{name:8} {str(dtype).removeprefix('torch.'):9} "
                    f"{f'{rows}x{out}x{inputs}':>16} {speed['ours']:8.0f} {speed['torch']:8.0f} "
                    f"        {speed['ours'] / speed['torch']:6.2f}"
                )


if __name__ == "__main__":
    main()
