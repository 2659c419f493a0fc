"""Runs every kernel of the package once, forward and backward, on small odd shapes.

    compute-sanitizer --tool memcheck python benchmarks/every_kernel.py --device cuda
    compute-sanitizer --tool racecheck python benchmarks/every_kernel.py --device cuda
    ncu --clock-control none -k regex:.*transformer_ext.* --kernel-name-base demangled \\
        python benchmarks/every_kernel.py --device cuda --large --dtypes bfloat16

For tools that look into kernels, which PyTorch's allocator would hide errors from: set
PYTORCH_NO_CUDA_MEMORY_CACHING=1. That results are right is what the tests are for; here they must be
finite. With --large the shapes are those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import arguments, dtypes

from transformer_ext import ops
from transformer_ext.ops.activation import KINDS, is_gated
from transformer_ext.packed import Packed

LENGTHS = [1, 7, 33, 64, 20, 129]
LARGE_LENGTHS = [27, 40, 18, 30] * 217

#: Name, function, its arguments, and its options.
Case = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def cases(dtype: torch.dtype, large: bool) -> Iterator[Case]:
    """A call of each op; what wants a gradient is among the arguments."""
    dropped: dict[str, Any] = {"dropout_p": 0.1, "rng": torch.tensor([1, 2, 3])}
    rows = 25000 if large else 37

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(shape).requires_grad_()

    for columns in (512, 1024) if large else (5, 64, 520, 2056):
        x, residual = make(rows, columns), make(rows, columns)
        weight, bias = parameter(columns), parameter(columns)
        yield "residual_norm", ops.residual_norm, (x, residual, weight, bias), dropped
        yield "norm", ops.norm, (x, weight, None, "rms"), {}
        yield "residual_dropout", ops.residual_dropout, (x, residual), dropped
        yield "dropout", ops.dropout, (x, 0.1, dropped["rng"]), {}
        ids = torch.arange(rows) ** 2 % 101
        yield "embedding", ops.embedding, (ids, parameter(101, columns)), dropped | {"dtype": dtype}
        wide = 1000 if large else 71
        yield "linear", ops.linear, (x, parameter(wide, columns), parameter(wide)), {}
    for kind in KINDS:
        columns = (2048 if large else 72) * (2 if is_gated(kind) else 1)
        args = make(rows, columns), parameter(columns)
        yield f"activation {kind}", ops.activation, args, dropped | {"kind": kind}
    for columns in (128,) if large else (3, 128, 1100):
        shape = (256, 8, 128, columns) if large else (2, 3, 5, columns)
        yield "softmax", ops.masked_softmax, (make(*shape),), {"causal": True}
    for words in (37000,) if large else (3, 1001, 9000):
        features = 512 if large else 24
        targets = torch.arange(rows) % words
        targets[::5] = -100
        args = make(rows, features), parameter(words, features), targets
        yield "linear_cross_entropy", ops.linear_cross_entropy, args, {"normalizer": 7.0}
        if not large:
            yield "label_smoothing_loss", ops.label_smoothing_loss, (make(rows, words), targets), {}
    lengths = LARGE_LENGTHS if large else LENGTHS
    here, there = (Packed.from_lengths(n).to(targets.device) for n in (lengths, lengths[::-1]))
    for head_dim in (64,) if large else (32, 64, 80, 128):
        heads = 8 if large else 2
        width, total = heads * head_dim, sum(lengths)
        for causal in (False, True):
            qkv = make(total, 3 * width)
            args = qkv, heads, heads, here, causal
            yield f"self-attention {head_dim}", ops.self_attention_packed, args, dropped
        args = make(total, width), make(total, 2 * width), heads, heads, here, there
        yield f"cross-attention {head_dim}", ops.cross_attention_packed, args, {}
        if not large:
            padded = tuple(make(3, heads, 37, head_dim) for _ in range(3))
            keep = torch.rand(3, 1, 37, 37) < 0.9
            yield f"attention {head_dim}", ops.attention, padded, {"mask": keep}


def run(case: Case) -> None:
    """Forward and backward.

    Raises:
        ArithmeticError: something is not finite.
    """
    name, function, args, settings = case
    result = function(*args, **settings)
    if isinstance(result, tuple):
        # Of a loss the first matters; of residual and norm the second depends on everything.
        result = result.loss if isinstance(result, ops.LossOutput) else result[1]
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    for value in (result, *torch.autograd.grad(result, leaves, torch.ones_like(result))):
        if not value.isfinite().all():
            raise ArithmeticError(f"{name}: a result is not finite")


def main() -> None:
    options = arguments(__doc__, large={"action": "store_true", "help": "the shapes of training"})
    torch.manual_seed(0)
    count = 0
    with ops.set_backend("compiled"):
        for dtype in dtypes(options):
            for case in cases(dtype, options.large):
                run(case)
                count += 1
    print(f"{count} cases, all finite")


if __name__ == "__main__":
    main()
