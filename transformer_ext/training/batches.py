"""The stream of batches: which sentences each optimizer step of each rank reads.

The order is a pure function of (seed, epoch), so the place in it, an epoch and the index of the
next batch, is all that a resumed training needs. With W ranks and A accumulation steps an optimizer
step takes W * A batches of the one global order: micro-batch ``a`` of rank ``r`` is the one at
``a * W + r``. So W ranks see in one step what one rank with W times the accumulation sees.

The batches of the next steps are read by threads while a step is computed. Not by processes: reading
is a few calls of numpy, which let go of the interpreter's lock for large batches, and cost less than
sending the result to another process (``benchmarks/data.py``); threads start at once, share the
order of the epoch and the map of the files, cannot die alone, and do not fork beside OpenMP's.
"""

from __future__ import annotations

import dataclasses
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    "Layout",
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
        inputs: What the model's ``forward_packed`` takes: for each side of the batch its ids,
            ``[tokens]`` int64, and where its sentences lie.
        labels: int64, what the states that it returns have to predict: one for each row of the last
            side, or one for each text.
        target_tokens: Number of labels; 0 where the tensors are filled anew.
        sentences: Number of sentence pairs, or of texts; 0 likewise.
    """

    inputs: tuple[Tensor | Packed, ...]
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


def to_device(
    batch: Any, device: torch.device, *, recurring: bool = False, longest: int | None = None
) -> DeviceBatch:
    """Moves a batch of ``transformer_ext.data`` to the device, without waiting for it.

    To a GPU it goes as one copy from pinned memory, in the shapes of :class:`Layout`.

    Args:
        batch: numpy arrays as ``collate``, ``collate_text`` or ``collate_labelled`` make them.
        device: where to.
        recurring: on a CPU, adds rows without effect up to :func:`recurring_rows`.
        longest: on a GPU, length of the longest sentence that the model takes; None: there is none.
    """
    if device.type == "cuda":
        layout = Layout.of([batch], longest)
        block = layout.fill(batch, layout.block("cpu", pinned=True))
        views = layout.views(block.to(device, non_blocking=True))
        return dataclasses.replace(
            views, target_tokens=int(batch.target_tokens), sentences=int(batch.sentences)
        )

    def move(values: Any, rows: int, filler: int) -> Tensor:
        tensor = torch.as_tensor(values)
        if rows > len(tensor):
            tensor = functional.pad(tensor, (0, rows - len(tensor)), value=filler)
        return tensor.to(device)

    inputs: list[Tensor | Packed] = []
    for ids, lengths in _sides(batch):
        rows = recurring_rows(len(ids)) if recurring else len(ids)
        packed = Packed.from_lengths(torch.as_tensor(lengths), rows).to(device)
        inputs += [move(ids, rows, 0), packed]
    labels = len(batch.labels)
    return DeviceBatch(
        inputs=tuple(inputs),
        labels=move(batch.labels, rows if labels == len(ids) else labels, _NO_LABEL),
        target_tokens=int(batch.target_tokens),
        sentences=int(batch.sentences),
    )


def _sides(batch: Any) -> list[tuple[Any, Any]]:
    """Ids and lengths of each side."""
    if hasattr(batch, "src_ids"):
        return [(batch.src_ids, batch.src_lengths), (batch.tgt_ids, batch.tgt_lengths)]
    return [(batch.ids, batch.lengths)]


#: Where a tensor begins in a block: 256 bytes, as what torch's allocator gives.
_ALIGNMENT = 256
#: A CUDA graph serves batches of one shape. At 25,000 tokens a batch and lengths like those of WMT
#: these give 30 shapes, at 4,096 tokens 77, for 0.4 % more target rows and 2 to 3 % more source
#: rows; the empty tiles of attention that a bound on lengths and number of sequences brings end at
#: once.
_LEAST_LENGTH, _LEAST_SEQUENCES = 32, 16


@dataclass(frozen=True)
class Layout:
    """Fixed shapes for a batch, and where its tensors lie in one block of memory.

    What a batch has less is filled up: rows past the last sentence, sentences of no token, rows
    without a label. None of it has an effect. Where each text has one label, a text of no token would
    have no vector: these have one token.

    Attributes:
        rows: Rows of each side.
        longest: A bound on the sentences of each side.
        sequences: Number of sentences.
        labels: Number of labels.
        of_texts: Whether there is one label for each text, not for each row of the last side.
    """

    rows: tuple[int, ...]
    longest: tuple[int, ...]
    sequences: int
    labels: int
    of_texts: bool = False

    @staticmethod
    def of(batches: Sequence[Any], most: int | None = None) -> Layout:
        """The shapes that hold each of the batches.

        Args:
            batches: As :func:`to_device` takes them.
            most: Length of the longest sentence that the model takes; None: there is none.
        """
        sides = [_sides(batch) for batch in batches]
        count = max(len(lengths) for side in sides for _, lengths in side)
        of_texts = any(
            len(b.labels) != len(side[-1][0]) for b, side in zip(batches, sides, strict=True)
        )
        # A text that fills up takes a row: there are to be few of them.
        sequences = _coarse_texts(count) if of_texts else _power_of_two(count, _LEAST_SEQUENCES)
        tokens = [
            max(
                len(side[i][0]) + (sequences - len(side[i][1]) if of_texts else 0) for side in sides
            )
            for i in range(len(sides[0]))
        ]
        longest = [
            max(int(side[i][1].max(initial=1)) for side in sides) for i in range(len(tokens))
        ]
        # The last side is what fills the budget of a batch, so it has nearly the same number of
        # tokens each time; the others vary, and take coarser steps.
        rows = [*map(_coarse_rows, tokens[:-1]), recurring_rows(tokens[-1])]
        bounds = [_power_of_two(length, _LEAST_LENGTH) for length in longest]
        if most is not None:
            bounds = [
                max(length, min(bound, most)) for length, bound in zip(longest, bounds, strict=True)
            ]
        labels = sequences if of_texts else rows[-1]
        return Layout(tuple(rows), tuple(bounds), sequences, labels, of_texts)

    def block(self, device: torch.device | str, *, pinned: bool = False) -> Tensor:
        """Memory for a batch; pinned memory is used again when what was copied from it has gone."""
        return torch.empty(
            self._places()[-1][2], dtype=torch.uint8, device=device, pin_memory=pinned
        )

    def _places(self) -> list[tuple[int, int, int]]:
        """Of each tensor: its first byte, that behind its last, and the first of the next."""
        places, end = [], 0
        for rows in self.rows:
            for size in (8 * rows, 4 * rows, 4 * (self.sequences + 1)):
                places.append((end, end + size, _next(end + size)))
                end = places[-1][2]
        places.append((end, end + 8 * self.labels, _next(end + 8 * self.labels)))
        return places

    def _tensors(self, block: Tensor) -> list[Tensor]:
        """For each side ids, positions and cu_seqlens, then the labels."""
        kinds = [torch.int64, torch.int32, torch.int32] * len(self.rows) + [torch.int64]
        return [
            block[begin:end].view(kind)
            for (begin, end, _), kind in zip(self._places(), kinds, strict=True)
        ]

    def fill(self, batch: Any, block: Tensor) -> Tensor:
        """Writes a batch into a block on the host; returns it."""
        arrays = [tensor.numpy() for tensor in self._tensors(block)]
        for side, (ids, lengths) in enumerate(_sides(batch)):
            into, positions, cu_seqlens = arrays[3 * side : 3 * side + 3]
            tokens, count = len(ids), len(lengths)
            into[:tokens], into[tokens:] = ids, 0
            cu_seqlens[0] = 0
            np.cumsum(lengths, out=cu_seqlens[1 : count + 1])
            cu_seqlens[count + 1 :] = tokens
            if self.of_texts:
                cu_seqlens[count + 1 :] += np.arange(1, self.sequences - count + 1, dtype=np.int32)
            starts = np.repeat(cu_seqlens[:count], lengths)
            np.subtract(np.arange(tokens, dtype=np.int32), starts, out=positions[:tokens])
            positions[tokens:] = 0
        arrays[-1][: len(batch.labels)] = batch.labels
        arrays[-1][len(batch.labels) :] = _NO_LABEL
        return block

    def views(self, block: Tensor) -> DeviceBatch:
        """The batch that lies in a block; what is in it later is seen, too."""
        tensors = self._tensors(block)
        inputs: list[Tensor | Packed] = []
        for side, longest in enumerate(self.longest):
            ids, positions, cu_seqlens = tensors[3 * side : 3 * side + 3]
            inputs += [ids, Packed(cu_seqlens, longest, positions, None)]
        return DeviceBatch(tuple(inputs), tensors[-1], 0, 0)


def _next(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _coarse_rows(rows: int) -> int:
    """Rounded up to one of at most 16 numbers between a power of 2 and the next."""
    quantum = max(16, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // quantum) * quantum


def _coarse_texts(count: int) -> int:
    """Rounded up to one of at most 4 numbers between a power of 2 and the next."""
    quantum = max(_LEAST_SEQUENCES, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // quantum) * quantum


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << max(0, number - 1).bit_length())


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        batches: Micro-batches of this rank; fewer than ``accum_steps`` never.
        microsteps: Number of each in the step, over all ranks: the third word of the dropout rng.
        target_tokens: Labels in the step over all ranks: what the loss is divided by; of this rank
            alone where ``partial``.
        after: Position behind this step.
        partial: Only the other ranks know how many labels they have.
    """

    batches: list[Any]
    microsteps: list[int]
    target_tokens: int
    after: Position
    partial: bool = False


class BatchStream:
    """Endless optimizer steps from a position on.

    Args:
        collate: Makes a batch from example numbers; called by the workers.
        sampler: Gives the batches of an epoch; called by a thread of its own for the next epoch.
        label_counts: ``[examples]`` labels (target tokens + 1) of each example, so that each rank
            knows the size of the whole step without asking the others.
        accum_steps: Micro-batches of a rank in an optimizer step.
        rank: Number of this process.
        world_size: Number of processes.
        start: Where to begin.
        resample: Makes another batch of one, its examples and the epoch, with any number of labels;
            called by the workers.
        workers: Threads that read the next steps, two each, while this one is computed; 0: each
            step is read when it is asked for. The steps are the same for any number.
        content: A checksum of all that the examples say, for :attr:`fingerprint`.

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
        resample: Callable[[Any, np.ndarray, int], Any] | None = None,
        workers: int = 0,
        content: str = "",
    ) -> None:
        if accum_steps < 1:
            raise ValueError(f"accum_steps: got {accum_steps}, expected 1 or more")
        if workers < 0:
            raise ValueError(f"workers: got {workers}, expected 0 or more")
        self._reader = _StepReader(collate, label_counts, rank, world_size, resample)
        self._micros = accum_steps * world_size
        self._epochs = _Epochs(sampler)
        self._workers = workers
        self._content = content
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[Step]] = deque()
        self._position = self._planned = start or Position()
        batches = self._epochs[self.position.epoch]
        if self.position.batch > len(batches):
            raise ValueError(
                f"position: epoch {self.position.epoch} has {len(batches)} batches, got "
                f"batch {self.position.batch}; the training data or max_tokens changed"
            )

    @property
    def position(self) -> Position:
        """Behind the last step handed out, whatever the workers have read."""
        return self._position

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in the current epoch."""
        return len(self._epochs[self.position.epoch]) / self._micros

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: number of examples, checksums of lengths and content."""
        counts = np.ascontiguousarray(self._reader.label_counts)
        lengths = f"{zlib.crc32(counts.view(np.uint8).data):08x}"
        return f"{len(counts):,} examples {lengths} {self._content}".rstrip()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step.

        Raises:
            Exception: What ``collate`` or the sampler raised for this step; it is raised again when
                the step is asked for again.
        """
        if not self._workers:
            step = self._reader(*self._plan())
            self._planned = step.after
        else:
            self._read_ahead()
            step = self._waiting[0].result()
            self._waiting.popleft()
            # Here, not when the next step is asked for: a worker may begin at once.
            self._read_ahead()
        self._position = step.after
        self._epochs.forget_before(step.after.epoch)
        return step

    def seek(self, position: Position) -> None:
        """Lets the next step be the one at a position."""
        self.close()
        self._position = self._planned = position

    def close(self) -> None:
        """Ends the workers and forgets what they have read; a next step begins them anew."""
        self._waiting.clear()
        self._planned = self.position
        self._epochs.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _read_ahead(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, "transformer_ext data")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        while len(self._waiting) < 2 * self._workers:
            if self._waiting and self._waiting[-1].done() and self._waiting[-1].exception():
                return
            try:
                places, self._planned = self._plan()
            except Exception as error:
                # It may be a later step than the one that is asked for.
                failed: Future[Step] = Future()
                failed.set_exception(error)
                self._waiting.append(failed)
            else:
                self._waiting.append(self._pool.submit(self._reader, places, self._planned))

    def _plan(self) -> tuple[list[_Place], Position]:
        """The batches of the next step to be read; the position after it."""
        epoch, index = self._planned.epoch, self._planned.batch
        batches = self._epochs[epoch]
        places = []
        for _ in range(self._micros):
            if index >= len(batches):
                epoch, index = epoch + 1, 0
                batches = self._epochs[epoch]
            places.append((epoch, batches, index))
            index += 1
        if self._workers and 2 * index > len(batches):
            self._epochs.prepare(epoch + 1)
        return places, Position(epoch, index)


#: Epoch of a batch, the epoch's batches, its index there.
_Place = tuple[int, Sequence[np.ndarray], int]


@dataclass(frozen=True)
class _StepReader:
    """Reads the batches of one step: what the workers do."""

    collate: Callable[[np.ndarray], Any]
    label_counts: np.ndarray
    rank: int
    world_size: int
    resample: Callable[[Any, np.ndarray, int], Any] | None

    def __call__(self, places: Sequence[_Place], after: Position) -> Step:
        mine: list[Any] = []
        microsteps: list[int] = []
        target_tokens = 0
        for micro, (epoch, batches, index) in enumerate(places):
            examples = batches[index]
            if micro % self.world_size == self.rank:
                batch = self.collate(examples)
                if self.resample is not None:
                    batch = self.resample(batch, examples, epoch)
                    target_tokens += batch.target_tokens
                mine.append(batch)
                microsteps.append(micro)
            if self.resample is None:
                target_tokens += int(self.label_counts[examples].sum())
        partial = self.resample is not None and self.world_size > 1
        return Step(mine, microsteps, target_tokens, after, partial)


class _Epochs:
    """The batches of the epochs in use; the next one's are made before they are needed."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler
        self._made: dict[int, Sequence[np.ndarray]] = {}
        self._coming: dict[int, Future[Sequence[np.ndarray]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __getitem__(self, epoch: int) -> Sequence[np.ndarray]:
        if epoch not in self._made:
            coming = self._coming.pop(epoch, None)
            batches = self._sampler.epoch(epoch) if coming is None else coming.result()
            if not len(batches):
                raise ValueError(
                    "training data: no sentence pair is left to train on (all empty or too long)"
                )
            self._made[epoch] = batches
        return self._made[epoch]

    def prepare(self, epoch: int) -> None:
        """Begins to make an epoch's batches in the background."""
        if epoch in self._made or epoch in self._coming:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "transformer_ext order")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._coming[epoch] = self._pool.submit(self._sampler.epoch, epoch)

    def forget_before(self, epoch: int) -> None:
        """Drops the batches of the epochs before."""
        for old in [key for key in self._made if key < epoch]:
            del self._made[old]

    def close(self) -> None:
        """Ends the thread."""
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
