"""What the device does in one optimizer step, and how it is queued: op by op, or as a CUDA graph.

A step of a model of the usual sizes is one to two thousand small kernels. Queued from Python they
take longer than they run on a large GPU; a CUDA graph queues them as one. It holds addresses and
shapes, so batches are filled into memory that stays (:class:`~.batches.Layout`), and every number
that changes from step to step lies on the device: the learning rate, what the loss is divided by,
the state of dropout, the scale of the loss.

There is a graph for each layout. All of them have one pool of memory, since nothing in it outlives a
step. A layout's first step runs op by op and sets up what must not be set up while a graph is
recorded (cuBLAS, tables of positions, moments of the optimizer); its second step records.

With several GPUs the graph of a layout ends with the gradients of this rank. Their exchange is queued
behind it, and behind that one graph for all layouts, which clips and updates
(:class:`~.distributed.GradientSum` says why).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformer_ext.ops.linear import convert_weights, converted_weights, forget_copies
from transformer_ext.training.batches import DeviceBatch, Layout
from transformer_ext.training.distributed import GradientSum
from transformer_ext.training.optimizer import Optimizer

__all__ = ["CudaGraphs", "DeviceStep", "Numbers"]

#: Graphs kept, with the layouts that came once; one after these, then a rare one, runs op by op.
_MOST_GRAPHS = 64


@dataclass(frozen=True)
class Numbers:
    """The numbers of one step.

    Attributes:
        real: float32 ``[2 + micro-batches]``: the learning rate, what the loss is divided by, and
            the number of labels of each micro-batch.
        rng: int64 ``[micro-batches, 3]``: seed, step and microstep, the state of dropout.
    """

    real: Tensor
    rng: Tensor

    @staticmethod
    def zeros(count: int, device: torch.device | str, *, pinned: bool = False) -> Numbers:
        """For so many micro-batches."""
        return Numbers(
            torch.zeros(2 + count, device=device, pin_memory=pinned),
            torch.zeros(count, 3, dtype=torch.int64, device=device, pin_memory=pinned),
        )

    @staticmethod
    def of(
        learning_rate: float,
        normalizer: float,
        tokens: Sequence[int],
        rng: Sequence[tuple[int, int, int]],
        *,
        pinned: bool = False,
    ) -> Numbers:
        """These numbers, on the host."""
        numbers = Numbers.zeros(len(tokens), "cpu", pinned=pinned)
        numbers.real.copy_(torch.tensor([learning_rate, normalizer, *tokens]))
        numbers.rng.copy_(torch.tensor(rng))
        return numbers

    def copied_to(self, other: Numbers) -> Numbers:
        """Writes them there, without waiting; returns the other."""
        other.real.copy_(self.real, non_blocking=True)
        other.rng.copy_(self.rng, non_blocking=True)
        return other

    @property
    def learning_rate(self) -> Tensor:
        """Without dimensions."""
        return self.real[0]

    @property
    def normalizer(self) -> Tensor:
        """What the loss is divided by, without dimensions."""
        return self.real[1]

    @property
    def tokens(self) -> Tensor:
        """Labels of each micro-batch."""
        return self.real[2:]


@dataclass
class _Part:
    """A part of a step that is queued again and again, on the same memory.

    Attributes:
        seen: Whether it has run, op by op.
        graph: None before it runs for the second time.
        kept: What the graph reads and the model may replace: tables that grow.
    """

    seen: bool = False
    graph: Any = None
    kept: tuple[Tensor, ...] = ()


@dataclass
class _LayoutEntry:
    """The memory that the batches of a layout are filled into, and what is done there.

    Attributes:
        layout: Of each micro-batch.
        blocks: One for each micro-batch.
        batches: What lies in the blocks.
        numbers: Of the step.
        part: The work on them.
    """

    layout: Layout
    blocks: list[Tensor]
    batches: list[DeviceBatch]
    numbers: Numbers
    part: _Part = field(default_factory=_Part)

    @staticmethod
    def make(layout: Layout, count: int, device: torch.device) -> _LayoutEntry:
        blocks = [layout.block(device) for _ in range(count)]
        views = [layout.views(block) for block in blocks]
        return _LayoutEntry(layout, blocks, views, Numbers.zeros(count, device))


class CudaGraphs:
    """Records work on a GPU; all its graphs share one pool of memory.

    Args:
        device: The GPU.
        stream: On which it is recorded, not the default one; None: one of its own.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        # Recording needs a stream of its own, and what is set up for a stream must be before.
        self._stream = stream or torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: Any = None

    def run(self, work: Callable[[], None]) -> None:
        """Queues work op by op, on the stream on which it will be recorded."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Any:
        """A graph of the work, which is not done; ``replay()`` queues it.

        Raises:
            RuntimeError: It cannot be recorded.
        """
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError:
            # torch leaves its own stream as the current one.
            torch.cuda.set_stream(current)
            self._clean_up(graph, current.device_index)
            raise
        return graph

    def _clean_up(self, graph: Any, index: int) -> None:
        """Ends for torch a recording that CUDA has broken off.

        torch checks the end of the recording for errors before it does what belongs to the end: its
        allocator would record on, and give no memory back for as long as the process lives, and its
        generator would refuse every random op outside of a graph.
        """
        with suppress(RuntimeError):
            graph.reset()
        # The allocator of pinned memory goes on asking it which streams are its own.
        self._failed = graph
        # RuntimeError: the recording has ended after all, and the pool is the graph's to release.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        with suppress(RuntimeError, AttributeError):
            generator = torch.cuda.default_generators[index]
            # The same numbers, in a state that is not recorded.
            generator.graphsafe_set_state(generator.clone_state())

    def release(self, forget: Callable[[], None]) -> None:
        """Gives back the memory of the graphs, which ``forget()`` drops when none of them runs."""
        torch.cuda.synchronize(self._device)
        forget()
        torch.cuda.empty_cache()


class DeviceStep:
    """Forward, backward and update of each optimizer step, queued without waiting for the device.

    Args:
        losses: The model with its loss: :class:`~.trainer.LossModule`.
        parallel: What is called in its place: itself, or DDP around it.
        optimizer: Over the model's parameters.
        device: Where they are.
        graphs: Records the steps; None: each runs op by op.
        gradients: Adds up the gradients of several processes; None: there is one, or DDP does it.
        tell: Is told why, if a step cannot be recorded; all further ones run op by op.

    Attributes:
        sums: float32 ``[3]``: of the loss, of the negative log-likelihoods and of the labels of the
            steps since it was last set to 0, without those that were skipped.
    """

    def __init__(
        self,
        losses: Any,
        parallel: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        *,
        graphs: CudaGraphs | None = None,
        gradients: GradientSum | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.losses = losses
        self.parallel = parallel
        self.optimizer = optimizer
        self.device = device
        self.sums = torch.zeros(3, device=device)
        self._graphs = graphs
        self._gradients = gradients
        self._tell = tell
        #: What goes from the first part of a step to the second, the same for all layouts.
        self._rate = torch.zeros((), device=device)
        self._step_sums = torch.zeros_like(self.sums)
        self._update_part = _Part()
        self._rng: Tensor | None = getattr(losses.model, "rng", None)
        self._entries: dict[tuple[Layout, int], _LayoutEntry] = {}
        #: Weights that the model reads in another type, and that type.
        self._converted: list[tuple[Tensor, torch.dtype]] = []

    @property
    def graphs(self) -> int:
        """Number of graphs recorded."""
        return sum(entry.part.graph is not None for entry in self._entries.values())

    def __call__(
        self,
        batches: Sequence[Any],
        learning_rate: float,
        normalizer: float,
        rng: Sequence[tuple[int, int, int]],
    ) -> None:
        """Queues a step.

        Args:
            batches: Its micro-batches, of ``transformer_ext.data``.
            learning_rate: Of the step.
            normalizer: What the sum of the losses is divided by.
            rng: The state of dropout for each micro-batch: seed, step, microstep.
        """
        # Nothing between the two parts holds a graph that must be given up.
        self._queue_batches(batches, learning_rate, normalizer, rng)
        if self._gradients is not None:
            # Not within what falls back to op by op: an exchange that fails is another rank's end.
            self._gradients.exchange()
            self._queue(self._update_part, self._apply)

    def _queue_batches(
        self,
        batches: Sequence[Any],
        learning_rate: float,
        normalizer: float,
        rng: Sequence[tuple[int, int, int]],
    ) -> None:
        """Queues a step, or with several GPUs the part of it before the exchange."""
        work = self._compute if self._gradients is None else self._contribute
        pinned = self.device.type == "cuda"
        tokens = [int(batch.target_tokens) for batch in batches]
        numbers = Numbers.of(learning_rate, normalizer, tokens, rng, pinned=pinned)
        entry = self._entry(batches)
        if entry is None:
            loaded = [self.losses.load(batch, self.device) for batch in batches]
            if self.device.type != "cpu":
                numbers = numbers.copied_to(Numbers.zeros(len(loaded), self.device))
            work(loaded, numbers)
            return
        for batch, block in zip(batches, entry.blocks, strict=True):
            host = entry.layout.block("cpu", pinned=pinned)
            block.copy_(entry.layout.fill(batch, host), non_blocking=True)
        numbers.copied_to(entry.numbers)
        self._queue(entry.part, lambda: work(entry.batches, entry.numbers))

    def _entry(self, batches: Sequence[Any]) -> _LayoutEntry | None:
        """Where the batches are filled in; None for those that get no graph."""
        if self._graphs is None:
            return None
        layout = Layout.of(batches, self.losses.longest)
        key = (layout, len(batches))
        if key not in self._entries:
            if len(self._entries) >= _MOST_GRAPHS:
                # One that has come once may never come again.
                entries = self._entries.items()
                once = next((k for k, entry in entries if entry.part.graph is None), None)
                if once is None:
                    return None
                del self._entries[once]
            self._entries[key] = _LayoutEntry.make(layout, len(batches), self.device)
        return self._entries[key]

    def _queue(self, part: _Part, work: Callable[[], None]) -> None:
        """Queues work op by op, or as its graph."""
        if self._graphs is None:
            work()
        elif part.graph is not None or self._prepare(part, work):
            part.graph.replay()
            # The weights have changed, and their versions have not.
            forget_copies()

    def _prepare(self, part: _Part, work: Callable[[], None]) -> bool:
        """Queues work for the first time, or records it, returning True: to be replayed."""
        assert self._graphs is not None
        first, part.seen = not part.seen, True
        try:
            if first:
                self._graphs.run(work)
                own = {id(parameter) for parameter in self.optimizer.parameters.values()}
                converted = [pair for pair in converted_weights() if id(pair[0]) in own]
                if converted:
                    self._converted = converted
                    # Nothing runs for the first time while it is recorded.
                    self._graphs.run(lambda: convert_weights(converted))
                return False
            # A copy of a weight must be made by the graph that reads it.
            forget_copies()
            part.graph = self._graphs.record(work)
            part.kept = tuple(self.losses.buffers())
            return True
        except torch.OutOfMemoryError as error:
            # What the graphs hold is not to be had for anything else.
            if first and not self.graphs:
                raise
            self._give_up(error)
        except RuntimeError as error:
            if first:
                raise
            self._give_up(error)
        finally:
            forget_copies()
        work()
        return False

    def _give_up(self, error: RuntimeError) -> None:
        """Lets all further steps run op by op."""
        self.optimizer.clear_gradients()
        assert self._graphs is not None
        self._graphs.release(self._forget)
        self._graphs = None
        # The end of a recording that has failed fails, too.
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        reason = str(first).strip().partition("\n")[0] or repr(first)
        self._tell(f"the step cannot be a CUDA graph ({reason})")

    def _forget(self) -> None:
        self._entries.clear()
        self._update_part = _Part()

    def _compute(self, batches: Sequence[DeviceBatch], numbers: Numbers) -> None:
        """The step itself: only work for the device."""
        self._update(numbers.learning_rate, self._backward(batches, numbers))

    def _contribute(self, batches: Sequence[DeviceBatch], numbers: Numbers) -> None:
        """The part of a step before the gradients of all ranks are added up."""
        assert self._gradients is not None
        self._step_sums.copy_(self._backward(batches, numbers))
        self._rate.copy_(numbers.learning_rate)
        self._gradients.collect()

    def _apply(self) -> None:
        """The part after it, which depends on no batch."""
        assert self._gradients is not None
        self._gradients.hand_out()
        self._update(self._rate, self._step_sums)

    def _backward(self, batches: Sequence[DeviceBatch], numbers: Numbers) -> Tensor:
        """Makes the gradients; returns what is to be added to :attr:`sums`."""
        # In float16 the scale belongs inside the loss: its gradients are made there.
        scale = self.optimizer.scale
        divisor = numbers.normalizer if scale is None else numbers.normalizer / scale
        convert_weights(self._converted)
        sums = torch.zeros_like(self.sums)
        for index, batch in enumerate(batches):
            if self._rng is not None:
                self._rng.copy_(numbers.rng[index])
            with self._without_exchange() if index < len(batches) - 1 else nullcontext():
                loss, nll, _ = self.parallel(batch, divisor)
                loss = loss.float()
                # An infinite loss can have finite gradients; made NaN, they tell all ranks of it.
                finite = loss.detach().isfinite()
                loss.backward(torch.where(finite, 1.0, math.nan))
            parts = [loss.detach() * divisor, nll.float(), numbers.tokens[index]]
            sums += torch.stack(parts)
        return sums

    def _update(self, learning_rate: Tensor, sums: Tensor) -> None:
        """Applies the gradients."""
        self.optimizer.step(learning_rate)
        # A step that the optimizer skipped has no loss to average.
        self.sums += torch.where(self.optimizer.broken > 0, 0.0, sums)

    def _without_exchange(self) -> AbstractContextManager[None]:
        if isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()
