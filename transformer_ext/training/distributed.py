"""Several processes under ``torchrun``: one a GPU (NCCL), or several on the CPU (gloo).

Without torchrun's environment variables everything here does nothing for a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["World", "leave", "local_rank"]

#: The other ranks wait while the first one decodes the held-out and the test text.
_LONGEST_WAIT = timedelta(hours=2)


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
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World(0, 1, device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT
            )
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

    @contextmanager
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


def leave() -> None:
    """Leaves the group, if this process joined one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
