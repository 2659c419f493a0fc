"""What the benchmarks share: interleaved timing, and the bandwidth of a copy as the ceiling."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch


def best_seconds(
    functions: Mapping[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, float]:
    """The fastest call of each function; they take turns, so that a busy moment hits all alike.

    Args:
        functions: by name.
        seconds: about how long to measure, all together.
    """
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def copier(size: int) -> Callable[[], object]:
    """A function that copies ``size / 2`` bytes: it reads and writes ``size`` bytes in all."""
    source = torch.ones(max(size // 8, 1))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def arguments(description: str | None) -> argparse.Namespace:
    """The options that all benchmarks of kernels have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def print_row(name: str, best: Mapping[str, float], size: int) -> None:
    """One line: time of ``ours``, bytes a second, share of ``copy``, ratio to all other entries.

    Args:
        name: of the case.
        best: seconds by name: ``ours``, ``copy`` (of ``size`` bytes) and the peers.
        size: bytes that have to be read and written.
    """
    ours = best["ours"]
    peers = "  ".join(
        f"{peer} {seconds * 1e6:9.1f} us = {seconds / ours:6.2f}x"
        for peer, seconds in best.items()
        if peer not in ("ours", "copy")
    )
    print(
        f"{name:44s} {ours * 1e6:9.1f} us  {size / ours / 1e9:6.1f} GB/s  "
        f"{best['copy'] / ours:4.0%} of copy   {peers}",
        flush=True,
    )
