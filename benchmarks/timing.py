"""What the benchmarks share: interleaved timing, and the bandwidth of a copy as the ceiling."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from processes import append_json, say

from transformer_ext.training.device_step import CudaGraphs
from transformer_ext.training.environment import choose_device, keep_freed_memory

Shape = tuple[int, ...]

# A turn lasts at least so long, so that the clock and the caches of the one before do not count.
_TURN = 0.5e-3
# At most so many calls, and about so long, are one CUDA graph: launched one by one from Python, a
# small kernel would be measured by how long its launch takes.
_GRAPHED = 20
_GRAPH_SECONDS = 2e-3
# Numbers in shapes with --quick.
_QUICK_SIZE = 96
# Bytes that a copy on a GPU reads and writes at least: an H200 has 60 MB of cache.
_LEAST_COPY = 1 << 29

_least_turns = 5
_save: Path | None = None


class Times(dict[str, float]):
    """Seconds by name.

    Attributes:
        op_by_op: names of those that could not be recorded as a CUDA graph, on a GPU.
    """

    op_by_op: tuple[str, ...] = ()


def median_seconds(functions: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> Times:
    """The median time of a call of each function.

    They take turns, so that a busy moment hits all alike. A turn is one call that is not counted,
    which brings back to the caches what fits there, and calls for at least half a millisecond. On a
    GPU the calls are replayed as a CUDA graph and timed by its events, and what fits stays in its
    cache, but for a copy.

    Args:
        functions: by name.
        seconds: about how long to measure, all together.
    """
    on_gpu = torch.get_default_device().type == "cuda"
    make = _turn_on_gpu if on_gpu else _turn_on_cpu
    turns = {name: make(name, function) for name, function in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < _least_turns:
        for name, turn in turns.items():
            found[name].append(turn())
    times = Times()
    for name, function in functions.items():
        share = function.share if isinstance(function, _Copy) else 1.0
        times[name] = median(found[name]) * share
    times.op_by_op = tuple(name for name, turn in turns.items() if isinstance(turn, _OpByOp))
    return times


def _turn_on_cpu(name: str, function: Callable[[], object]) -> Callable[[], float]:
    def turn(calls: int) -> float:
        function()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    calls = max(1, round(_TURN / max(turn(3), 1e-7)))
    return lambda: turn(calls)


def _turn_on_gpu(name: str, function: Callable[[], object]) -> Callable[[], float]:
    def turn(run: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first call is under way when the start is queued: no launch is waited for.
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    for _ in range(3):
        function()
    calls = max(1, min(_GRAPHED, round(_GRAPH_SECONDS / max(turn(function, 3), 1e-7))))

    def work() -> None:
        for _ in range(calls):
            function()

    # On this stream: what was computed before is differentiated where it was computed.
    stream = torch.cuda.current_stream()
    try:
        # What waits for the device, as some of torch's own ops do, is found more safely before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = CudaGraphs(stream.device, stream).record(work)
    except RuntimeError as error:
        say(f"{name}: not recorded as a CUDA graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return _OpByOp(lambda: turn(function, calls))
    replays = max(1, round(_TURN / max(turn(graph.replay, 3), 1e-7)))
    return lambda: turn(graph.replay, replays) / calls


@dataclass(frozen=True)
class _OpByOp:
    """A turn of what could not be recorded."""

    turn: Callable[[], float]

    def __call__(self) -> float:
        return self.turn()


class _Copy:
    """Copies; a call counts as ``share`` of its time."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        on_gpu = torch.get_default_device().type == "cuda"
        # A few bytes stand for a launch.
        copied = max(size, _LEAST_COPY) if on_gpu and size >= 1 << 20 else size
        self.share = size / copied
        self._source = torch.ones(max(copied // 2 // dtype.itemsize, 1), dtype=dtype)
        self._target = torch.zeros_like(self._source)

    def __call__(self) -> object:
        return self._target.copy_(self._source)


def copier(size: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A function that copies ``size / 2`` bytes: it reads and writes ``size`` bytes in all.

    Its memory is used again at every call. On a GPU a copy of a MiB or more is one of more than the
    caches hold, and counts for the part that was asked for.
    """
    return _Copy(size, dtype)


def arguments(description: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """The options that all benchmarks of kernels have; sets threads, device and allocator.

    Args:
        description: of the program.
        more: options of this program, by name: what ``add_argument`` is given.

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
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), help="these alone"
    )
    parser.add_argument("--save", type=Path, help="add a JSON line for each row to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    options = parser.parse_args()
    set_up(parser, options)
    return options


def set_up(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What :func:`arguments` does beside reading them."""
    global _least_turns, _save
    _save = options.save
    if options.quick:
        options.seconds, _least_turns = 0.0, 1
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        device = choose_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.set_default_device(device)


def dtypes(options: argparse.Namespace) -> tuple[torch.dtype, ...]:
    """Those that the compiled kernels take on the device, or that were asked for."""
    names = ["float32", "bfloat16"]
    if torch.device(options.device).type != "cpu":
        names.append("float16")
    return tuple(getattr(torch, name) for name in options.dtypes or names)


def by_device(
    options: argparse.Namespace, cpu: Sequence[Shape], cuda: Sequence[Shape]
) -> Sequence[Shape]:
    """The shapes for the device; with --quick one, and small."""
    shapes = cpu if torch.device(options.device).type == "cpu" else cuda
    if options.quick:
        return [tuple(min(number, _QUICK_SIZE) for number in shapes[-1])]
    return shapes


def save_row(**facts: Any) -> None:
    """Adds a line to the file of ``--save``, if there is one."""
    append_json(_save, {"benchmark": Path(sys.argv[0]).stem, **facts})


def print_row(name: str, times: Mapping[str, float], size: int) -> None:
    """One line: time of ``ours``, bytes a second, share of ``copy``, ratio to all other entries.

    Args:
        name: of the case.
        times: seconds by name: ``ours``, ``copy`` (of ``size`` bytes) and the peers.
        size: bytes that have to be read and written.
    """
    ours = times["ours"]
    op_by_op = list(getattr(times, "op_by_op", ()))
    peers = "  ".join(
        f"{peer}{' (op by op)' if peer in op_by_op else ''} {seconds * 1e6:9.1f} us = {seconds / ours:6.2f}x"
        for peer, seconds in times.items()
        if peer not in ("ours", "copy")
    )
    print(
        f"{name:44s} {ours * 1e6:9.1f} us  {size / ours / 1e9:6.1f} GB/s  "
        f"{times['copy'] / ours:4.0%} of copy   {peers}",
        flush=True,
    )
    save_row(case=name, seconds=dict(times), bytes=size, op_by_op=op_by_op)
