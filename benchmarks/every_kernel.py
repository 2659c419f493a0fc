"""Runs every kernel of the package once, forward and backward, on small odd shapes.

    compute-sanitizer --tool memcheck python benchmarks/every_kernel.py --device cuda
    compute-sanitizer --tool racecheck python benchmarks/every_kernel.py --device cuda
    ncu --clock-control none -k regex:.*transformer_ext.* --kernel-name-base demangled \\
        python benchmarks/every_kernel.py --device cuda --large --dtypes bfloat16

For tools that look into kernels, which PyTorch's allocator would hide errors from: set
PYTORCH_NO_CUDA_MEMORY_CACHING=1. That results are right is what the tests are for; here they must be
numbers. With --large the shapes are those of training.
"""

from __future__ import annotations

import torch
from timing import arguments, dtypes

from transformer_ext import ops
from transformer_ext.ops._check import SMALL, Case, Sizes, cases, results

LARGE = Sizes(
    rows=25000,
    columns=(512, 1024),
    outputs=1000,
    inner=2048,
    scores=((256, 8, 128, 128),),
    words=(37000,),
    features=512,
    lengths=(27, 40, 18, 30) * 217,
    heads=8,
    head_dims=(64,),
)


def run(case: Case) -> None:
    """Forward and backward.

    Raises:
        ArithmeticError: something is not a number.
    """
    for name, value in results(case.function, case, torch.get_default_device()).items():
        if value.isnan().any():
            raise ArithmeticError(f"{case.op}: {name} is not a number")


def main() -> None:
    options = arguments(__doc__, large={"action": "store_true", "help": "the shapes of training"})
    count = 0
    with ops.set_backend("compiled"):
        for dtype in dtypes(options):
            for case in cases(dtype, LARGE if options.large else SMALL):
                run(case)
                count += 1
    print(f"{count} cases, all of them numbers")


if __name__ == "__main__":
    main()
