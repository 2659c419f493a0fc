"""Several processes under ``torchrun``: one a GPU (NCCL), or several on the CPU (gloo).

Without torchrun's environment variables everything here does nothing for a world of one.

A process that dies ends the training: the others find out in their next exchange with it, and say
which rank it was and, if it could still tell them, why.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

__all__ = ["GradientSum", "World", "describe_loss", "leave", "local_rank", "tell_others"]

#: The other ranks wait while the first one decodes the held-out and the test text.
_LONGEST_WAIT = timedelta(hours=2)
#: Seconds in which the ranks that are left report, after an exchange with a lost one has failed.
_TIME_TO_REPORT = 2.0
#: What torch's backends say when another process is no longer there. They have no class of their own.
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (?:closed|reset|refused)|broken pipe|peer|socket|recvvalue|sendbytes|tcpstore",
    re.IGNORECASE,
)


def local_rank() -> int:
    """Number of this process on its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class World:
    """The processes that train one model together.

    Attributes:
        rank: Number of this process, from 0; the first one reports and writes.
        size: How many there are.
        device: Device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: torch.device) -> World:
        """Joins the group that torchrun describes; a world of one without it."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World(0, 1, device)
        if not dist.is_initialized():
            store, rank, size = next(rendezvous("env://"))
            # torchrun keeps the store when it starts all ranks again: what those before them have
            # written there must not be read.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt-{attempt}", store)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=_LONGEST_WAIT,
            )
            _Board.current = _Board(store, rank, size)
        return World(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process reports and writes files."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all ranks; waits for the device."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank; waits for the device."""
        return bool(self._reduce((float(value),), dist.ReduceOp.MAX)[0])

    def _reduce(self, values: tuple[float, ...], kind: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, kind)
        return [float(v) for v in tensor.tolist()]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Values of each rank, exactly, by rank; waits for the device."""
        rows = [[0.0] * len(values) for _ in range(self.size)]
        rows[self.rank] = list(values)
        flat = self.sum(*(value for row in rows for value in row))
        return [flat[i : i + len(values)] for i in range(0, len(flat), len(values))]

    def broadcast(self, value: str) -> str:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box: list[object] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        assert isinstance(box[0], str)
        return box[0]

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Runs the block on the first rank, then on the others, which find what it has written."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier()


class GradientSum:
    """The gradients of all ranks, added up in one piece of memory that stays.

    For steps that are CUDA graphs, in place of DistributedDataParallel: the exchange has the same
    size and address for every shape of a batch, and lies between two graphs, in none of them. So
    ranks whose batches have other shapes, or that compute op by op, still exchange the same.

    - Recorded, NCCL's kernels could hang without anybody noticing: its watchdog looks only after
      exchanges that are queued one by one. These it notices as it always does.
    - The watchdog's thread asks CUDA for the events of past exchanges, also while this one records;
      graphs are recorded with ``capture_error_mode="thread_local"``, to which what other threads
      ask is no error. No exchange is under way then: ``torch.cuda.graph`` waits for the device
      first. It waits for exchanges that this rank has queued, and every rank queues the one of a
      step before it waits for anything of the next: no rank waits in a circle.
    - An exchange that is not asynchronous is queued on the current stream, which replays the graphs,
      and so between them; the host does not wait for it.
    - All at once, after the backward pass. Autograd's tensors are copied here by one kernel, 8 bytes
      a parameter; adding into this memory instead would read and write it, 16 bytes with the
      clearing, and be a kernel for each parameter.

    Args:
        module: Its parameters become those of the first rank.
        parameters: Of them those that are trained, by name.
        world: The processes.

    Raises:
        ValueError: The ranks train other parameters.
    """

    #: Where a gradient begins, in numbers: 256 bytes, as what torch's allocator gives.
    _ALIGNMENT = 64

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], world: World
    ) -> None:
        self._parameters = dict(parameters)
        shapes = repr([(name, tuple(p.shape)) for name, p in parameters.items()])
        if len({row[0] for row in world.gather([zlib.crc32(shapes.encode())])}) > 1:
            raise ValueError(
                "parameters: got other names or shapes on some ranks than on the first, expected "
                "the same model on all of them"
            )
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), 0)
        begins, end = [], 0
        for parameter in self._parameters.values():
            begins.append(end)
            end += -(-parameter.numel() // self._ALIGNMENT) * self._ALIGNMENT
        self._all = torch.zeros(end, device=world.device)
        self._parts = [
            self._all[begin : begin + parameter.numel()].view_as(parameter)
            for begin, parameter in zip(begins, self._parameters.values(), strict=True)
        ]

    def collect(self) -> None:
        """Flattens the gradients of this rank: moves them from the parameters into one tensor.

        Raises:
            RuntimeError: A parameter has none.
        """
        gradients = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                # DistributedDataParallel refuses it too, one step later.
                raise RuntimeError(
                    f"{name}: got no gradient, expected the loss to depend on every parameter that "
                    "is trained, where several processes add up their gradients"
                )
            gradients.append(parameter.grad)
            parameter.grad = None
        torch._foreach_copy_(self._parts, gradients)

    def exchange(self) -> None:
        """Queues the all-reduce of the flattened gradients: their sum over all ranks.

        The only part that the ranks do together.
        """
        dist.all_reduce(self._all)

    def hand_out(self) -> None:
        """Gives each parameter its sum as its gradient."""
        for parameter, part in zip(self._parameters.values(), self._parts, strict=True):
            parameter.grad = part


class _Board:
    """What the ranks tell each other when the training breaks off, in the store they met by."""

    current: _Board | None = None

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store = dist.PrefixStore("ends", store)
        self.rank, self.size = rank, size
        self._write("process", {"pid": os.getpid(), "host": socket.gethostname()})
        #: Read now: the store may be gone with the rank that is lost.
        self.processes: dict[int, dict[str, Any]] = {}
        dist.barrier()
        for other in range(size):
            self.processes[other] = self._read("process", other) or {}

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        self.store.set(f"{kind}/{self.rank}", json.dumps(values))

    def _read(self, kind: str, rank: int) -> dict[str, Any] | None:
        key = f"{kind}/{rank}"
        if not self.store.check([key]):
            return None
        values: dict[str, Any] = json.loads(self.store.get(key))
        return values

    def others(self, kind: str) -> dict[int, dict[str, Any]]:
        """What other ranks have written; nothing where the store is gone."""
        found = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                values = self._read(kind, rank) if rank != self.rank else None
                if values is not None:
                    found[rank] = values
        return found

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Tells the others, if they can still be reached."""
        with contextlib.suppress(RuntimeError):
            self._write(kind, values)

    def may_speak(self, alive: Sequence[int]) -> bool:
        """Whether it is for this rank to say what happened: one is enough."""
        try:
            return bool(self.store.add("spoken", 1) == 1)
        except RuntimeError:
            # The store is gone, with the rank that had it.
            return all(rank > self.rank for rank in alive)

    def is_dead(self, rank: int) -> bool:
        """Whether the process of a rank on this machine has ended."""
        process = self.processes.get(rank, {})
        if process.get("host") != socket.gethostname():
            return False
        try:
            os.kill(process["pid"], 0)
            state = Path(f"/proc/{process['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return state in "ZX"

    def name(self, rank: int) -> str:
        """A rank for people."""
        process = self.processes.get(rank, {})
        return f"rank {rank} (process {process.get('pid', '?')} on {process.get('host', '?')})"


def tell_others(error: BaseException) -> None:
    """Lets the other ranks, and torchrun's own report, know why this one ends; in a world of one,
    nothing."""
    board = _Board.current
    if board is None or board.size == 1:
        return
    # What the input is wrong with, that rank says itself, and no checkpoint mends it.
    wrong_input = isinstance(error, (ValueError, ImportError))
    message = f"{error}" or type(error).__name__
    board.write("failed", {"message": message, "wrong_input": wrong_input})
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def describe_loss(error: BaseException) -> str | None:
    """What happened to the training if the error is that of an exchange with a lost rank.

    Returns:
        None if the error is another one: this rank is the one that fails. Empty if another rank says
        it.
    """
    board = _Board.current
    if board is None or board.size == 1 or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not _LOST_PEER.search(str(error)):
        return None
    with contextlib.suppress(ValueError):
        # torchrun ends the ranks that are left at once; what is lost is to be said first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A rank that is lost does not say so; who is silent is lost, on other machines too.
    board.write("here", {})
    deadline = time.monotonic() + _TIME_TO_REPORT
    failed: dict[int, dict[str, Any]] = {}
    dead: list[int] = []
    others = [rank for rank in range(board.size) if rank != board.rank]
    while not failed and not dead and time.monotonic() < deadline:
        time.sleep(0.1)
        dead = [rank for rank in others if board.is_dead(rank)]
        # After the look at the processes: one that ends has written before.
        failed = board.others("failed")
    if not board.may_speak([rank for rank in others if rank not in dead]):
        return ""
    here = board.others("here")
    if any(values.get("wrong_input") for values in failed.values()):
        return ""
    if failed:
        reasons = [
            f"{board.name(rank)} failed: {failed[rank]['message']}" for rank in sorted(failed)
        ]
    else:
        silent = dead or [rank for rank in others if rank not in here]
        reasons = [
            f"{board.name(rank)} is gone without a word: killed, perhaps for want of memory"
            for rank in silent
        ]
    if not reasons:
        reasons = [f"an exchange between the ranks failed: {error}"]
    return "; ".join(reasons)


def leave() -> None:
    """Leaves the group, if this process joined one.

    The trainer must be gone by then. DistributedDataParallel holds the group too, and if it is the
    last to let go of it, it waits for gloo's threads with Python's lock held. Such a thread, late in
    dropping an exchange that Python began, waits for that lock: neither would ever end.
    """
    _Board.current = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
