"""What the tests of the kernels share: the rule of precision, thread counts, instruction sets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from transformer_ext._native import load_ops
from transformer_ext.ops import _check
from transformer_ext.ops._backend import set_backend
from transformer_ext.packed import Packed

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

needs_compiled = pytest.mark.skipif(not load_ops(), reason="no compiled ops in this environment")

# Parameters of a test that runs with both implementations of an op.
BACKENDS = (pytest.param("compiled", marks=needs_compiled), "reference")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")

# Where compiled kernels run, and in which precision: parameters "device" and "dtype" of a test.
PLACES = (
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    *(
        pytest.param("cuda", dtype, marks=needs_gpu)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
)


def moved(value: Any, device: str) -> Any:
    """``value`` with all tensors in it on the device; lists, tuples and dicts are gone through."""
    if isinstance(value, (torch.Tensor, Packed)):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


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
    assert got.shape == exact.shape
    error = _check.max_error(got, exact)
    assert error == error, "NaN in the result"
    return error


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
    assert got.shape == peer.shape
    allowed = _check.allowed_error(exact, peer, factor=factor, roundings=roundings)
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


def assert_graph_safe(
    results: Callable[[], Sequence[torch.Tensor]], rng: torch.Tensor | None = None
) -> None:
    """On a GPU: the same bits each time, and from a CUDA graph, which sees a new step of ``rng``.

    Args:
        results: runs forward and backward.
        rng: what it draws dropout from, if it does; its step is changed, and changed back.
    """
    random = rng is not None
    rng = torch.zeros(3, dtype=torch.int64) if rng is None else rng
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), set_backend("compiled"):
        first = [x.clone() for x in results()]
        again = [x.clone() for x in results()]
        rng[1] += 1
        other = [x.clone() for x in results()]
        rng[1] -= 1
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            recorded = results()
        graph.replay()
        replayed = [x.clone() for x in recorded]
        rng[1] += 1
        graph.replay()
        rng[1] -= 1
        torch.cuda.synchronize()
    for a, b, c in zip(first, again, replayed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(other, recorded, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first[0], other[0]) != random


__all__ = [
    "BACKENDS",
    "ISAS",
    "PLACES",
    "assert_all_as_precise",
    "assert_as_precise",
    "assert_graph_safe",
    "max_error",
    "moved",
    "needs_compiled",
    "needs_gpu",
    "set_backend",
    "threads",
]
