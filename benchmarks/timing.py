"""What the benchmarks share: interleaved timing, and the bandwidth of a copy as the ceiling."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

from transformer_ext.training.environment import keep_freed_memory

Shapes = TypeVar("Shapes")

# A turn lasts at least so long, so that the clock and the caches of the one before do not count.
_TURN = 0.5e-3
# So many calls are one CUDA graph: launched one by one from Python, a small kernel would be measured
# by how long its launch takes.
_GRAPHED = 20


def median_seconds(
    functions: Mapping[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, float]:
    """The median time of a call of each function.

    They take turns, so that a busy moment hits all alike. A turn is one call that is not counted,
    which brings back to the caches what fits there, and calls for about half a millisecond. On a GPU
    the calls are replayed as a CUDA graph, and what fits stays in its cache.

    Args:
        functions: by name.
        seconds: about how long to measure, all together.
    """

    on_gpu = torch.get_default_device().type == "cuda"
    if on_gpu:
        seconds_of = median_seconds_of_graphs(functions, seconds)
        return {name: time / _GRAPHED for name, time in seconds_of.items()}
    return _median_seconds(functions, seconds, lambda: None)


def median_seconds_of_graphs(
    functions: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, float]:
    """The median time of ``_GRAPHED`` calls of each function, as a CUDA graph."""
    replays = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(_GRAPHED):
                function()
        replays[name] = graph.replay
    return _median_seconds(replays, seconds, torch.cuda.synchronize)


def _median_seconds(
    functions: Mapping[str, Callable[[], object]], seconds: float, finish: Callable[[], None]
) -> dict[str, float]:
    def turn(function: Callable[[], object], calls: int) -> float:
        function()
        finish()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        finish()
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
    """The options that all benchmarks of kernels have; sets threads, device and allocator.

    The allocator keeps freed pages, as it does in ``train``, for all competitors alike: otherwise
    page faults are most of what is measured on tensors above 32 MiB. Tensors made from now on are
    on ``--device``; on a GPU all work is on a stream of its own, which a graph can record.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: got cuda, but torch finds no GPU")
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.set_default_device(device)
    return options


def dtypes(options: argparse.Namespace) -> tuple[torch.dtype, ...]:
    """Those that the compiled kernels take on the device."""
    both = (torch.float32, torch.bfloat16)
    return both if torch.device(options.device).type == "cpu" else (*both, torch.float16)


def by_device(options: argparse.Namespace, cpu: Shapes, cuda: Shapes) -> Shapes:
    """The shapes for the device."""
    return cpu if torch.device(options.device).type == "cpu" else cuda


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
