"""What the tests of the kernels share: the rule of precision, thread counts, instruction sets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from transformer_ext._native import load_ops
from transformer_ext.ops._backend import set_backend

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

needs_compiled = pytest.mark.skipif(not load_ops(), reason="no compiled ops in this environment")

# Parameters of a test that runs with both implementations of an op.
BACKENDS = (pytest.param("compiled", marks=needs_compiled), "reference")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def max_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Greatest absolute difference; equal infinities differ by 0."""
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape
    difference = torch.where(got == exact, 0.0, got - exact).abs()
    assert not difference.isnan().any(), "NaN in the result"
    return difference.max().item() if difference.numel() else 0.0


def assert_as_precise(
    got: torch.Tensor,
    exact: torch.Tensor,
    peer: torch.Tensor,
    *,
    factor: float = 2.0,
    roundings: float = 1.0,
) -> None:
    """The error of ``got`` is at most ``factor`` times that of a plain PyTorch composition.

    Args:
        got: what the kernel gave. exact: the same in float64. peer: the composition's result in
            the precision of the kernel.
        factor: of the peer's error.
        roundings: of the greatest result, allowed besides: the peer may be exact by chance.
    """
    assert got.dtype == peer.dtype
    rounding = torch.finfo(got.dtype).eps / 2
    finite = exact.detach().double().abs()
    finite = finite[finite.isfinite()]
    allowed = factor * max_error(peer, exact)
    allowed += roundings * rounding * (finite.max().item() if finite.numel() else 0.0)
    error = max_error(got, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_all_as_precise(
    got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], peer: Sequence[torch.Tensor]
) -> None:
    """:func:`assert_as_precise` for each, less strict where few numbers make the errors chance."""
    for ours, true, plain in zip(got, exact, peer, strict=True):
        if ours.numel() >= 16:
            assert_as_precise(ours, true, plain, factor=2.0 if ours.numel() >= 512 else 4.0)
        else:
            assert_as_precise(ours, true, plain, factor=32.0, roundings=32.0)


def rerun_at_isa(isa: str, test_file: str, select: str) -> None:
    """Run the selected tests of a file anew, in a process held to an instruction set."""
    if ISAS.index(isa) > ISAS.index(torch.ops.transformer_ext.isa()):
        pytest.skip(f"this machine does not have {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, test_file, "-k", select],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRANSFORMER_EXT_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


__all__ = [
    "BACKENDS",
    "ISAS",
    "assert_all_as_precise",
    "assert_as_precise",
    "max_error",
    "needs_compiled",
    "rerun_at_isa",
    "set_backend",
    "threads",
]
