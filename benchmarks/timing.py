"""What the benchmarks share: interleaved timing, and the bandwidth of a copy as the ceiling."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from transformer_ext.training.environment import keep_freed_memory

# A turn lasts at least so long, so that the clock and the caches of the one before do not count.
_TURN = 0.5e-3


def median_seconds(
    functions: Mapping[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, float]:
    """The median time of a call of each function.

    They take turns, so that a busy moment hits all alike. A turn is one call that is not counted,
    which brings back to the caches what fits there, and calls for about half a millisecond.

    Args:
        functions: by name.
        seconds: about how long to measure, all together.
    """

    def turn(function: Callable[[], object], calls: int) -> float:
        function()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    calls = {
        name: max(1, round(_TURN / max(turn(function, 3), 1e-7)))
        for name, function in functions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            times[name].append(turn(function, calls[name]))
    return {name: median(values) for name, values in times.items()}


def copier(size: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A function that copies ``size / 2`` bytes: it reads and writes ``size`` bytes in all.

    Its memory is used again at every call.
    """
    source = torch.ones(max(size // 2 // dtype.itemsize, 1), dtype=dtype)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def arguments(description: str | None) -> argparse.Namespace:
    """The options that all benchmarks of kernels have; sets threads and allocator.

    The allocator keeps freed pages, as it does in ``train``, for all competitors alike: otherwise
    page faults are most of what is measured on tensors above 32 MiB.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    return options


def print_row(name: str, times: Mapping[str, float], size: int) -> None:
    """One line: time of ``ours``, bytes a second, share of ``copy``, ratio to all other entries.

    Args:
        name: of the case.
        times: seconds by name: ``ours``, ``copy`` (of ``size`` bytes) and the peers.
        size: bytes that have to be read and written.
    """
    ours = times["ours"]
    peers = "  ".join(
        f"{peer} {seconds * 1e6:9.1f} us = {seconds / ours:6.2f}x"
        for peer, seconds in times.items()
        if peer not in ("ours", "copy")
    )
    print(
        f"{name:44s} {ours * 1e6:9.1f} us  {size / ours / 1e9:6.1f} GB/s  "
        f"{times['copy'] / ours:4.0%} of copy   {peers}",
        flush=True,
    )
