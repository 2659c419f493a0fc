"""The stream of batches: which sentences each optimizer step of each rank reads.

The order is a pure function of (seed, epoch), so the place in it, an epoch and the index of the
next batch, is all that a resumed training needs. With W ranks and A accumulation steps an optimizer
step takes W * A batches of the one global order: micro-batch ``a`` of rank ``r`` is the one at
``a * W + r``. So W ranks see in one step what one rank with W times the accumulation sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transformer_ext.packed import Packed

__all__ = [
    "BatchStream",
    "DeviceBatch",
    "EpochSampler",
    "Position",
    "Step",
    "recurring_rows",
    "to_device",
]

#: Label of a row that is no token: the loss passes it over.
_NO_LABEL = -100


class EpochSampler(Protocol):
    """Gives the batches of an epoch, as arrays of example numbers."""

    def epoch(self, epoch: int) -> Sequence[np.ndarray]: ...


@dataclass(frozen=True)
class Position:
    """The next batch of the global order: its epoch and its index there, both from 0."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the device, without padding.

    The rows may be more than the tokens: those past the last sentence have no effect.

    Attributes:
        src_ids: ``[source tokens]`` int64, each sentence ending with end-of-sentence.
        src: Where the source sentences lie.
        tgt_ids: ``[target tokens]`` int64, each sentence beginning with the start token.
        tgt: Where the target sentences lie.
        labels: ``[target tokens]`` int64, each sentence ending with end-of-sentence.
        target_tokens: Number of labels.
        sentences: Number of sentence pairs.
    """

    src_ids: Tensor
    src: Packed
    tgt_ids: Tensor
    tgt: Packed
    labels: Tensor
    target_tokens: int
    sentences: int


def recurring_rows(rows: int) -> int:
    """The number of rows, rounded up to one of at most 32 between a power of 2 and the next.

    oneDNN, which multiplies bfloat16 for torch on a CPU, compiles a program for each shape it has
    not seen: 0.4 ms and 0.5 MB for each of the 30 shapes of a step of ``small``, where one product
    takes 0.2 to 1 ms. With a new number of tokens in each batch that was a tenth of the time, and
    1 GB after 60 steps. Rounding costs 1.5 % of the rows.
    """
    quantum = max(16, 1 << max(0, rows.bit_length() - 6))
    return -(-rows // quantum) * quantum


def to_device(batch: Any, device: torch.device, *, recurring: bool = False) -> DeviceBatch:
    """Moves a batch of ``transformer_ext.data`` to the device, without waiting for it.

    Args:
        batch: numpy arrays as ``collate`` makes them.
        device: where to.
        recurring: adds rows without effect up to :func:`recurring_rows`.
    """
    pin = device.type == "cuda"

    def move(values: Any, rows: int, filler: int) -> Tensor:
        tensor = torch.as_tensor(values)
        if rows > len(tensor):
            tensor = functional.pad(tensor, (0, rows - len(tensor)), value=filler)
        return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)

    def packed(lengths: Any, rows: int) -> Packed:
        lengths = torch.as_tensor(lengths)
        return Packed.from_lengths(lengths, rows).to(device, non_blocking=True)

    src_rows, tgt_rows = len(batch.src_ids), len(batch.tgt_ids)
    if recurring:
        src_rows, tgt_rows = recurring_rows(src_rows), recurring_rows(tgt_rows)
    return DeviceBatch(
        src_ids=move(batch.src_ids, src_rows, 0),
        src=packed(batch.src_lengths, src_rows),
        tgt_ids=move(batch.tgt_ids, tgt_rows, 0),
        tgt=packed(batch.tgt_lengths, tgt_rows),
        labels=move(batch.labels, tgt_rows, _NO_LABEL),
        target_tokens=int(batch.target_tokens),
        sentences=int(batch.sentences),
    )


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        batches: Micro-batches of this rank; fewer than ``accum_steps`` never.
        microsteps: Number of each in the step, over all ranks: the third word of the dropout rng.
        target_tokens: Labels in the step over all ranks: what the loss is divided by.
        after: Position behind this step.
    """

    batches: list[Any]
    microsteps: list[int]
    target_tokens: int
    after: Position


class BatchStream:
    """Endless optimizer steps from a position on.

    Args:
        collate: Makes a batch from example numbers.
        sampler: Gives the batches of an epoch.
        label_counts: ``[examples]`` labels (target tokens + 1) of each example, so that each rank
            knows the size of the whole step without asking the others.
        accum_steps: Micro-batches of a rank in an optimizer step.
        rank: Number of this process.
        world_size: Number of processes.
        start: Where to begin.

    Raises:
        ValueError: An epoch without a batch, or a position behind the end of its epoch.
    """

    def __init__(
        self,
        collate: Callable[[np.ndarray], Any],
        sampler: EpochSampler,
        label_counts: np.ndarray,
        *,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: Position | None = None,
    ) -> None:
        if accum_steps < 1:
            raise ValueError(f"accum_steps: got {accum_steps}, expected 1 or more")
        self._collate = collate
        self._sampler = sampler
        self._label_counts = label_counts
        self._accum_steps = accum_steps
        self._rank = rank
        self._world_size = world_size
        self.position = start or Position()
        self._load(self.position.epoch)
        if self.position.batch > len(self._batches):
            raise ValueError(
                f"position: epoch {self.position.epoch} has {len(self._batches)} batches, got "
                f"batch {self.position.batch}; the training data or max_tokens changed"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in the current epoch."""
        return len(self._batches) / (self._accum_steps * self._world_size)

    def _load(self, epoch: int) -> None:
        self._batches = self._sampler.epoch(epoch)
        if not len(self._batches):
            raise ValueError(
                "training data: no sentence pair is left to train on (all empty or too long)"
            )

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        epoch, index = self.position.epoch, self.position.batch
        mine: list[np.ndarray] = []
        microsteps: list[int] = []
        target_tokens = 0
        for micro in range(self._accum_steps * self._world_size):
            if index >= len(self._batches):
                epoch, index = epoch + 1, 0
                self._load(epoch)
            examples = self._batches[index]
            index += 1
            target_tokens += int(self._label_counts[examples].sum())
            if micro % self._world_size == self._rank:
                mine.append(examples)
                microsteps.append(micro)
        self.position = Position(epoch, index)
        return Step([self._collate(e) for e in mine], microsteps, target_tokens, self.position)
