"""The three products of a linear map, forward and for both gradients, against torch.mm.

    python benchmarks/linear.py
    python benchmarks/linear.py --device cuda

Each type interleaved: what `linear` runs, and torch.mm into memory that is
there (and conversion to float32, for the gradient of a weight). `gemm_choices` in
transformer_ext/ops/linear.py holds the outcome, shown by `python -m transformer_ext.info`. On a GPU
both are torch's, except that ours need not convert the gradient of a weight; there the table is the
ceiling of each product, beside that of a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import (
    arguments,
    by_device,
    copier,
    dtypes,
    median_seconds,
    save_row,
)

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
# Of base and of big at 25,000 tokens, a chunk of the loss included; the last two at 4,096.
CUDA_CASES = (
    (25000, 1536, 512),
    (25000, 512, 512),
    (25000, 2048, 512),
    (25000, 512, 2048),
    (8336, 37000, 512),
    (25000, 3072, 1024),
    (25000, 4096, 1024),
    (25000, 1024, 4096),
    (8336, 37000, 1024),
    (4096, 2048, 512),
    (4096, 4096, 1024),
)
#: Bytes read and written.
COPIES = (64 << 20, 512 << 20, 4 << 30)


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
    on_cpu = torch.device(options.device).type == "cpu"
    for size in COPIES[: 1 if options.quick else None] if options.quick or not on_cpu else ():
        (seconds,) = median_seconds({"copy": copier(size)}, options.seconds).values()
        print(f"copy of {size >> 20} MiB, read and written: {size / seconds / 1e12:.2f} TB/s")
        save_row(case=f"copy {size >> 20} MiB", seconds={"copy": seconds}, bytes=size)
    print(f"{'product':8} {'dtype':9} {'shape':>16} {'ours':>8} {'torch':>8} GFLOP/s {'ratio':>6}")
    for dtype in dtypes(options):
        for rows, out, inputs in by_device(options, CASES, CUDA_CASES):
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
                    f"        {speed['ours'] / speed['torch']:6.2f}",
                    flush=True,
                )
                save_row(
                    case=f"{name} {rows}x{out}x{inputs} {str(dtype).removeprefix('torch.')}",
                    seconds=times,
                    operations=2 * rows * out * inputs,
                )


if __name__ == "__main__":
    main()
