"""The training loop: steps, reports, validations, checkpoints, and going on where it stopped."""

from __future__ import annotations

import functools
import inspect
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from transformer_ext import ops
from transformer_ext.files import write_json
from transformer_ext.ops.linear import gemm_choices
from transformer_ext.training.batches import BatchStream, DeviceBatch, Position, Step, to_device
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.device_step import CudaGraphs, DeviceStep
from transformer_ext.training.distributed import GradientSum, World
from transformer_ext.training.moving_average import MovingAverage
from transformer_ext.training.optimizer import Optimizer
from transformer_ext.training.report import Console, JsonLog, duration
from transformer_ext.training.schedules import Schedule

__all__ = [
    "LossModule",
    "Plan",
    "StopRequest",
    "Trainer",
    "Validation",
    "evaluate_loss",
    "is_better",
]

#: The first estimate of the time is made from the steps between these two; before, libraries and
#: memory are being set up, and on a GPU CUDA graphs recorded.
_ESTIMATE = {"cpu": (5, 15), "cuda": (60, 110)}
#: With several ranks, steps between two agreements on whether to stop.
_STEPS_BETWEEN_AGREEMENTS = 10
#: Before the names of a checkpoint's weights, where its model directory holds their moving average.
_WEIGHTS = "weights."


class LossModule(nn.Module):
    """A model with its loss, so that a wrapper of modules (DDP) sees one forward pass.

    Args:
        model: Has ``forward_packed``, which takes the ids of each side of a batch and where its
            sentences lie, and returns a state for each label, ``[labels, d_model]``; and
            ``generator`` with ``weight`` and ``bias``.
        label_smoothing: As in :func:`transformer_ext.ops.linear_cross_entropy`.
    """

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def load(self, batch: Any, device: torch.device) -> DeviceBatch:
        """The batch on the device, with numbers of rows that recur where that pays."""
        dtype = getattr(self.model, "activation_dtype", torch.float32)
        recurring = _compiles_shapes(device.type, dtype)
        return to_device(batch, device, recurring=recurring, longest=self.longest)

    @property
    def longest(self) -> int | None:
        """Length of the longest sentence that the model takes; None: there is none."""
        most: int | None = getattr(getattr(self.model, "config", None), "longest", None)
        return most

    def forward(
        self, batch: DeviceBatch, normalizer: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss divided by the normalizer, sum of the negative log-likelihoods, count correct)."""
        model: Any = self.model
        hidden = model.forward_packed(*batch.inputs)
        output = ops.linear_cross_entropy(
            hidden,
            model.generator.weight,
            batch.labels,
            bias=model.generator.bias,
            label_smoothing=self.label_smoothing,
            normalizer=normalizer,
        )
        return output.loss, output.nll_sum, output.correct


def _compiles_shapes(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies, which makes a program for each shape: torch's bfloat16."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return False
    return ops.backend() == "reference" or _torch_multiplies_bfloat16()


def _records_steps(plan: Plan, device: torch.device) -> bool:
    """Whether steps are recorded and replayed."""
    return plan.cuda_graphs and device.type == "cuda"


def _without_buffers() -> dict[str, Any]:
    """The option by which DDP leaves buffers alone; torch 2.13 has another name for it."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


@functools.cache
def _torch_multiplies_bfloat16() -> bool:
    return any(
        choice["dtype"] == "bfloat16" and choice["library"] == "torch" for choice in gemm_choices()
    )


@dataclass(frozen=True)
class Validation:
    """Figures of one validation.

    Attributes:
        step: Optimizer steps done.
        loss: Smoothed loss per target token, nats.
        nll: Negative log-likelihood per target token, nats.
        accuracy: Share of the target tokens predicted, given the ones before, in [0, 1].
        scores: What the task's own judge found, for example BLEU and chrF, 0 to 100.
        seconds: How long it took.
    """

    step: int
    loss: float
    nll: float
    accuracy: float
    scores: dict[str, float]
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(min(self.nll, 700.0))

    def value(self, metric: str) -> float:
        """The figure of this name, ``nll``, ``accuracy``, or one of the scores."""
        figures = {"nll": self.nll, "accuracy": self.accuracy, **self.scores}
        return figures[metric]

    def describe(self) -> str:
        """For people, on one line."""
        scores = "".join(f"  {_NAMES.get(k, k)} {v:.2f}" for k, v in self.scores.items())
        return (
            f"loss {self.loss:.3f}  ppl {self.perplexity:.2f}  "
            f"accuracy {100 * self.accuracy:.1f} %{scores}"
        )


#: Scores whose names are not written as the log writes them.
_NAMES = {"bleu": "BLEU", "chrf": "chrF", "macro_f1": "macro-F1"}


def is_better(metric: str, value: float, other: float) -> bool:
    """Whether the first value of a metric is the better one; NaN never is."""
    return value < other if metric == "nll" else value > other


@dataclass(frozen=True)
class Plan:
    """What the loop does and when; the numbers of a training that have no place in the model.

    Attributes:
        max_steps: Optimizer steps of the whole training.
        log_every: Steps between two lines of the log.
        validate_every: Steps between two validations, each with a checkpoint.
        checkpoint_every: Steps between two checkpoints beside these; 0: none.
        early_stop_patience: Validations without a better loss before the training ends; 0: never.
        max_seconds: Time after which the training ends, counted over resumes; None: no limit.
        label_smoothing: Share of the target distribution spread over the vocabulary.
        seed: Seed of dropout.
        metric: What says which validation is the best: ``nll``, ``accuracy`` or a score's name.
        keep_best: How many of the best checkpoints are kept.
        max_skipped: Skipped steps (loss or gradients not finite) since the last validation after
            which the training ends with an error.
        counted: What a label is, for the speed in the log: "tok", or "texts" where there is one
            label for each.
        cuda_graphs: Whether steps on GPUs are recorded and replayed (:class:`DeviceStep`).
    """

    max_steps: int
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 0
    early_stop_patience: int = 0
    max_seconds: float | None = None
    label_smoothing: float = 0.1
    seed: int = 1
    metric: str = "nll"
    keep_best: int = 1
    max_skipped: int = 20
    counted: str = "tok"
    cuda_graphs: bool = True


@dataclass
class Progress:
    """How far a training is; all of it is in the checkpoint.

    Attributes:
        step: Optimizer steps done.
        position: The next batch.
        target_tokens: Labels read over all ranks.
        sentences: Sentence pairs read by the first rank.
        seconds: Time spent in training and validating.
        validation_seconds: Of it, in validating.
        best: Value of the metric and step of the best validations, the best one first.
        worse: Validations since the best one.
        skipped: Steps skipped since the last validation, their gradients not being finite.
        unplanned: Steps at which a signal, not the plan, had a checkpoint saved.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    target_tokens: int = 0
    sentences: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    best: list[tuple[float, int]] = field(default_factory=list)
    worse: int = 0
    skipped: int = 0
    unplanned: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON holds."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Progress:
        """Inverse of :meth:`to_dict`."""
        values = dict(values)
        values["position"] = Position(**values["position"])
        values["best"] = [(value, step) for value, step in values["best"]]
        return Progress(**values)

    @property
    def best_step(self) -> int:
        """Step of the best validation; 0 before the first."""
        return self.best[0][1] if self.best else 0

    def rank(self, value: float, metric: str, keep: int) -> bool:
        """Takes in a validation of the present step; returns whether it is the best so far."""
        if math.isnan(value):
            self.worse += 1
            return False
        # Of equal ones the first stays the best.
        place = len(self.best)
        while place and is_better(metric, value, self.best[place - 1][0]):
            place -= 1
        self.best = [*self.best[:place], (value, self.step), *self.best[place:]][:keep]
        self.worse = 0 if place == 0 else self.worse + 1
        return place == 0


class StopRequest:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a flag; the second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handles the signals within the block (only possible in the main thread)."""
        former = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def evaluate_loss(
    losses: LossModule, batches: Sequence[Callable[[], Any]], world: World
) -> tuple[float, float, float]:
    """Loss, negative log-likelihood and accuracy per target token over batches shared by the ranks.

    Args:
        losses: The model with its loss; put into evaluation mode for the time of the call.
        batches: Each gives a batch of ``transformer_ext.data``; rank r takes every W-th from r.
        world: The processes.
    """
    training = losses.training
    losses.eval()
    sums: Tensor | None = None
    tokens = 0
    with torch.no_grad():
        for make in batches[world.rank :: world.size]:
            batch = losses.load(make(), world.device)
            loss, nll, correct = losses(batch, 1.0)
            part = torch.stack([loss.float(), nll.float(), correct.float()])
            sums = part if sums is None else sums + part
            tokens += batch.target_tokens
    losses.train(training)
    mine = [0.0, 0.0, 0.0] if sums is None else sums.tolist()
    loss_sum, nll_sum, correct_sum, all_tokens = world.sum(*mine, tokens)
    return loss_sum / all_tokens, nll_sum / all_tokens, correct_sum / all_tokens


class Trainer:
    """Trains a model.

    Args:
        model: As :class:`LossModule` wants it, with ``rng`` as in
            :class:`transformer_ext.model.Transformer` where it has dropout; on ``world.device``.
        stream: The batches.
        optimizer: Over the model's parameters.
        schedule: Learning rate of each step.
        plan: What to do when.
        world: The processes; one by default.
        validation_batches: Each gives one batch of the held-out text.
        score: Judges the model directory that it is given, for example by translating held-out
            sentences, may print samples, and returns scores by name; called by the first rank only.
        score_in_memory: Whether it judges the model itself, and is given no directory.
        checkpoints: Where to save; None saves nothing.
        write_model: Writes the model directory of the current weights.
        moving_average: Of the weights, to be validated and saved in their place.
        skipped_folder: Where the batches of skipped steps are written; None writes none.
        console: Where people read.
        log: Where programs read.
        run_facts: Added to ``training.json``, and compared on resuming: a difference is warned of.
        config: Added to ``training.json``.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: BatchStream,
        optimizer: Optimizer,
        schedule: Schedule,
        plan: Plan,
        *,
        world: World | None = None,
        validation_batches: Sequence[Callable[[], Any]] | None = None,
        score: Callable[[Path | None], dict[str, float]] | None = None,
        score_in_memory: Callable[[], bool] = lambda: False,
        checkpoints: Checkpoints | None = None,
        write_model: Callable[[Path], None] | None = None,
        moving_average: MovingAverage | None = None,
        skipped_folder: Path | None = None,
        console: Console | None = None,
        log: JsonLog | None = None,
        run_facts: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.optimizer = optimizer
        self.schedule = schedule
        self.plan = plan
        self.world = world or World(0, 1, optimizer.device)
        self.validation_batches = validation_batches or []
        self.score = score
        self.score_in_memory = score_in_memory
        self.checkpoints = checkpoints
        self.write_model = write_model
        self.moving_average = moving_average
        self.skipped_folder = skipped_folder
        self.console = console or Console(silent=True)
        self.log = log or JsonLog(None)
        self.run_facts = run_facts or {}
        self.config = config or {}
        self.progress = Progress(position=stream.position)
        self.stop = StopRequest()
        self.losses = LossModule(model, plan.label_smoothing)
        self._parallel: nn.Module = self.losses
        recorded = _records_steps(plan, self.world.device)
        self._gradients: GradientSum | None = None
        if self.world.size > 1 and recorded:
            self._gradients = GradientSum(self.losses, optimizer.parameters, self.world)
        elif self.world.size > 1:
            self._parallel = nn.parallel.DistributedDataParallel(
                self.losses, gradient_as_bucket_view=True, **_without_buffers()
            )
        self._device_step = DeviceStep(
            self.losses,
            self._parallel,
            optimizer,
            self.world.device,
            graphs=CudaGraphs(self.world.device) if recorded else None,
            gradients=self._gradients,
            tell=self._say_no_graphs,
        )
        self._sums = self._device_step.sums
        self._unchecked: list[tuple[int, Step, Tensor]] = []
        self._interval_all_tokens = 0
        self._interval_started = time.monotonic()
        self._began: float | None = None
        self._exchanged = False
        self._data_seconds = 0.0

    @property
    def graphs(self) -> int:
        """Number of CUDA graphs that steps are replayed from."""
        return self._device_step.graphs

    # One optimizer step ---------------------------------------------------------------------------

    def train_step(self) -> None:
        """Reads the next batches and updates the parameters once; does not wait for the device."""
        began = time.monotonic()
        step = next(self.stream)
        self._data_seconds += time.monotonic() - began
        number = self.progress.step + 1
        world = self.world
        target_tokens = step.target_tokens
        if step.partial:
            target_tokens = int(world.sum(target_tokens)[0])
        # The loss of the whole step is a sum, and DDP averages the gradients of the ranks.
        normalizer = target_tokens / (world.size if self._gradients is None else 1)
        if not self.losses.training:
            self.losses.train()
        if self._gradients is None and not self._exchanged:
            self._exchange_once(step.batches[0], normalizer)
        self._device_step(
            step.batches,
            self.schedule(number),
            normalizer,
            [(self.plan.seed, number, microstep) for microstep in step.microsteps],
        )
        self.progress.sentences += sum(int(batch.sentences) for batch in step.batches)
        self._unchecked.append((number, step, self.optimizer.broken.clone()))
        if self.moving_average is not None:
            self.moving_average.update(number)
        self.progress.step = number
        self.progress.position = step.after
        self.progress.target_tokens += target_tokens
        self._interval_all_tokens += target_tokens
        if self.world.device.type == "cpu" or len(self._unchecked) >= self.plan.log_every:
            self._check_skipped()

    def _say_no_graphs(self, reason: str) -> None:
        warning = f"warning: {reason}; it runs op by op"
        if self.world.first:
            self.console.print(warning)
        else:
            # Of this rank alone, for which all others will wait in each step.
            print(f"rank {self.world.rank}: {warning}", file=sys.stderr, flush=True)
        self.log.write("no_cuda_graphs", step=self.progress.step, reason=reason)

    def _check_skipped(self) -> None:
        """Counts the steps that the optimizer skipped, saves their batches, and gives up if many.

        Raises:
            FloatingPointError: More than ``plan.max_skipped`` since the last validation.
        """
        if not self._unchecked:
            return
        broken = torch.stack([flag for _, _, flag in self._unchecked]).tolist()
        steps = [entry[:2] for entry, flag in zip(self._unchecked, broken, strict=True) if flag]
        self._unchecked.clear()
        # In float16 it is how the scale of the loss is found; the batch is not to blame.
        scaled = self.optimizer.scale is not None
        for number, step in steps:
            self.progress.skipped += 1
            path = None if scaled else self._save_skipped(number, step)
            self.log.write(
                "skipped",
                step=number,
                epoch=step.after.epoch,
                batches=None if path is None else str(path),
            )
            if not scaled:
                self.console.print(
                    f"warning: step {number} skipped: its loss or gradients are NaN or infinite"
                    + ("" if path is None else f"; its batches are in {path}")
                )
        if steps and self.progress.skipped > self.plan.max_skipped:
            raise FloatingPointError(
                f"max_skipped_steps: {self.progress.skipped} steps since the last validation, "
                f"{steps[-1][0]} the last one, were skipped because their loss or gradients are "
                f"NaN or infinite, expected at most {self.plan.max_skipped}: lower learning_rate, "
                "lengthen warmup_steps or set clip_norm; to see whether a compiled kernel is the "
                "cause, train with TRANSFORMER_EXT_BACKEND=reference"
            )

    def _save_skipped(self, number: int, step: Step) -> Path | None:
        if self.skipped_folder is None:
            return None
        self.skipped_folder.mkdir(parents=True, exist_ok=True)
        path = self.skipped_folder / f"step-{number}.rank-{self.world.rank}.json"
        batches = [
            {
                name: value.tolist() if hasattr(value, "tolist") else value
                for name, value in vars(batch).items()
            }
            for batch in step.batches
        ]
        values = {"step": number, "epoch": step.after.epoch, "rank": self.world.rank}
        write_json(path, {**values, "batches": batches})
        return path

    def _exchange_once(self, data: Any, normalizer: float) -> None:
        """Exchanges gradients that are not used, where there are more than two ranks.

        DDP lays gradients out anew after its first exchange, and in which order the ranks' numbers
        are added up depends on where they lie. Without this the first step of a resumed training
        would round otherwise than the same step of one that never stopped.
        """
        self._exchanged = True
        if self.world.size > 2:
            loss, _, _ = self._parallel(self.losses.load(data, self.world.device), normalizer)
            loss.backward()
            for parameter in self.optimizer.parameters.values():
                parameter.grad = None

    # The loop -------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Trains until the plan ends.

        Returns:
            Why it ended: "finished", "early stop", "time", or "interrupted" (by a signal; a
            checkpoint of this moment is saved).

        Raises:
            FloatingPointError: Too many steps were skipped.
        """
        try:
            return self._loop()
        finally:
            self.stream.close()

    def _loop(self) -> str:
        plan, progress = self.plan, self.progress
        self._began = time.monotonic() - progress.seconds
        first, warm = progress.step, self._began
        estimate_from, estimate_at = _ESTIMATE.get(self.world.device.type, _ESTIMATE["cpu"])
        reason = self.ended()
        while not reason:
            self.train_step()
            self._count_seconds()
            if progress.step - first == estimate_from:
                warm = time.monotonic()
            elif progress.step - first == estimate_at:
                self._say_how_long((time.monotonic() - warm) / (estimate_at - estimate_from))
            if progress.step % plan.log_every == 0 or progress.step == plan.max_steps:
                self.report()
            elif self.console.wants_update():
                self.console.update(self._line(*self._averages(self._sums.tolist())))
            stopped = self._agreed_stop()
            due = progress.step % plan.validate_every == 0 or progress.step == plan.max_steps
            if due or stopped == "time":
                self.validate_and_save()
                self._interval_started = time.monotonic()
            elif plan.checkpoint_every and progress.step % plan.checkpoint_every == 0:
                self.save()
            elif stopped:
                progress.unplanned.append(progress.step)
                self.save()
            reason = stopped or self._finished()
        return reason

    def _count_seconds(self) -> None:
        if self._began is not None:
            self.progress.seconds = time.monotonic() - self._began

    def ended(self) -> str:
        """Why there is nothing to train at this beginning, as :meth:`fit` says it; "" if there is."""
        limit = self.plan.max_seconds
        over_time = limit is not None and self.progress.seconds >= limit
        return self._finished() or ("time" if over_time else "")

    def _finished(self) -> str:
        plan, progress = self.plan, self.progress
        if progress.step >= plan.max_steps:
            return "finished"
        if plan.early_stop_patience and progress.worse >= plan.early_stop_patience:
            return "early stop"
        return ""

    def _agreed_stop(self) -> str:
        progress, limit = self.progress, self.plan.max_seconds
        over_time = limit is not None and progress.seconds >= limit
        if self.world.size > 1:
            if progress.step % _STEPS_BETWEEN_AGREEMENTS:
                return ""
            interrupted, over_time = self.world.any(bool(self.stop)), self.world.any(over_time)
        else:
            interrupted = bool(self.stop)
        return "interrupted" if interrupted else "time" if over_time else ""

    # Reports --------------------------------------------------------------------------------------

    def _start_interval(self) -> None:
        self._sums.zero_()
        self._interval_all_tokens = 0
        self._interval_started = time.monotonic()
        self._data_seconds = 0.0

    def _interval(self) -> dict[str, Any]:
        """What the next report depends on, so that it says the same after a resume."""
        return {
            "sums": self.world.gather(self._sums.tolist()),
            "tokens": self._interval_all_tokens,
            "seconds": time.monotonic() - self._interval_started,
            "data_seconds": self._data_seconds,
        }

    def _restore_interval(self, values: dict[str, Any]) -> None:
        sums = values["sums"]
        if len(sums) != self.world.size:
            # There are not as many processes as then, to go on with their own each.
            total = [sum(column) for column in zip(*sums, strict=True)]
            sums = [total] + [[0.0] * len(total)] * (self.world.size - 1)
        self._sums.copy_(torch.tensor(sums[self.world.rank]))
        self._interval_all_tokens = values["tokens"]
        self._interval_started = time.monotonic() - values["seconds"]
        self._data_seconds = values["data_seconds"]

    def _averages(self, sums: list[float]) -> tuple[float, float, float]:
        """(loss, nll) per token, from their sums, and target tokens/s, since the last report."""
        loss, nll, tokens = sums
        tokens = tokens or math.nan
        elapsed = max(1e-9, time.monotonic() - self._interval_started)
        return loss / tokens, nll / tokens, self._interval_all_tokens / elapsed

    def _line(self, loss: float, nll: float, speed: float) -> str:
        progress, plan = self.progress, self.plan
        left = self._seconds_left()
        return (
            f"step {progress.step}/{plan.max_steps}  loss {loss:.3f}  "
            f"ppl {math.exp(min(nll, 20.0)):.2f}  {speed:,.0f} {plan.counted}/s  "
            f"lr {self.schedule(max(1, progress.step)):.2e}  {duration(left)} left"
        )

    def _say_how_long(self, seconds: float) -> None:
        """The first estimate of the time, from the seconds of a step."""
        left = self.plan.max_steps - self.progress.step
        total = left * seconds
        if self.plan.max_seconds is not None:
            total = min(total, self.plan.max_seconds - self.progress.seconds)
        at_most = "at most " if self.plan.early_stop_patience else "about "
        self.console.print(
            f"time       {at_most}{duration(total)} for the next {left:,} steps at the speed of the "
            "first ones; validations come on top"
        )

    def _seconds_left(self) -> float:
        progress, plan = self.progress, self.plan
        left = (plan.max_steps - progress.step) * progress.seconds / max(1, progress.step)
        if plan.max_seconds is not None:
            left = min(left, plan.max_seconds - progress.seconds)
        return left

    def report(self) -> None:
        """Prints and logs the averages since the last report, and begins to average anew.

        Raises:
            FloatingPointError: Too many steps were skipped.
        """
        self._check_skipped()
        loss, nll, speed = self._averages(self.world.sum(*self._sums.tolist()))
        line = self._line(loss, nll, speed)
        if self.console.live:
            self.console.update(line)
        else:
            self.console.print(line)
        self.log.write(
            "train",
            step=self.progress.step,
            epoch=self.progress.position.epoch,
            loss=loss,
            nll=nll,
            target_tokens=self.progress.target_tokens,
            seconds=round(self.progress.seconds, 3),
            tokens_per_second=round(speed, 1),
            data_seconds=round(self._data_seconds, 6),
            learning_rate=self.schedule(self.progress.step),
            gradient_norm=float(self.optimizer.gradient_norm),
            skipped_steps=int(self.optimizer.skipped),
            **({"cuda_graphs": self.graphs} if self.graphs else {}),
        )
        self._start_interval()

    # Validation and checkpoints -------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[dict[str, Tensor]]:
        """A block in which the model has the weights that are judged and saved."""
        return nullcontext({}) if self.moving_average is None else self.moving_average.applied()

    def validate(self, world: World | None = None, *, scored: bool = True) -> Validation:
        """Judges the present weights by the held-out data; changes nothing.

        Args:
            world: The processes that take part; all of them by default.
            scored: Whether the task's own judge is asked, too.
        """
        started = time.monotonic()
        world = world or self.world
        loss, nll, accuracy = evaluate_loss(self.losses, self.validation_batches, world)
        scores: dict[str, float] = {}
        judged = scored and world.first and self.score is not None
        if judged and self.score_in_memory():
            assert self.score is not None
            scores = self.score(None)
        elif judged and None not in (self.write_model, self.checkpoints):
            assert self.score and self.write_model and self.checkpoints
            # Not yet a checkpoint: that is to hold what this finds.
            with self.checkpoints.scratch() as folder:
                self.write_model(folder)
                scores = self.score(folder)
        if scored and self.plan.metric not in ("nll", "accuracy"):
            (value,) = world.sum(scores[self.plan.metric] if world.first else 0.0)
            scores[self.plan.metric] = value
        seconds = round(time.monotonic() - started, 3)
        return Validation(self.progress.step, loss, nll, accuracy, scores, seconds)

    def validate_and_save(self) -> Validation | None:
        """Validates, and saves a checkpoint; ``best`` then names the best one so far."""
        self._check_skipped()
        progress = self.progress
        progress.skipped = 0
        self._start_interval()
        if not self.validation_batches:
            self.save()
            return None
        with self.averaged():
            result = self.validate()
            best = progress.rank(
                result.value(self.plan.metric), self.plan.metric, self.plan.keep_best
            )
        self._count_seconds()
        progress.validation_seconds += result.seconds
        share = progress.validation_seconds / max(
            progress.seconds, progress.validation_seconds, 1e-9
        )
        self.console.print(
            f"validation at step {result.step}: {result.describe()}"
            + ("  (best so far)" if best else f"  (best: step {progress.best_step})")
            + f"  [{duration(progress.seconds)}; validation {result.seconds:.1f} s, "
            f"{100 * share:.1f} % of the time so far]"
        )
        values = asdict(result)
        self.log.write(
            "validation",
            **(values | values.pop("scores")),
            best=best,
            training_seconds=round(progress.seconds, 3),
            validation_share=round(share, 5),
            target_tokens=progress.target_tokens,
        )
        # After the line: a run killed between the two says it again when it is back here, not never.
        self.save()
        self.world.barrier()
        return result

    def save(self) -> Path | None:
        """Writes the checkpoint of this moment; returns its directory (None on other ranks)."""
        if self.checkpoints is None or self.write_model is None:
            return None
        self._check_skipped()
        interval = self._interval()
        if not self.world.first:
            return None
        state = {
            "progress": self.progress.to_dict(),
            "interval": interval,
            "metric": self.plan.metric,
            "data": self.stream.fingerprint,
            "facts": self.run_facts,
            "config": self.config,
        }
        # Whoever finds the checkpoint finds the lines before it.
        self.log.sync()
        with self.averaged() as weights:
            tensors = {f"{_WEIGHTS}{name}": weight for name, weight in weights.items()}
            directory = self.checkpoints.save(
                self.progress.step,
                self.write_model,
                self.optimizer.state_dict() | tensors,
                state,
                best=[step for _, step in self.progress.best],
                unplanned=self.progress.unplanned,
                model_bytes=sum(p.nbytes for p in self.optimizer.parameters.values()),
            )
        self.log.write("checkpoint", step=self.progress.step, path=str(directory))
        return directory

    def restore(self, step: int) -> list[str]:
        """Takes over progress and optimizer state of a checkpoint (weights are the caller's).

        The stream must have been made with the position that :class:`Progress` of the checkpoint
        names. Returns warnings: facts of the run that differ now, so that bits may differ.
        """
        assert self.checkpoints is not None
        tensors, state = self.checkpoints.load(step)
        if state["data"] != self.stream.fingerprint:
            raise ValueError(
                f"training data: got {self.stream.fingerprint}, but the checkpoint of step {step} was "
                f"trained with {state['data']}; its text or what cuts it into tokens has changed"
            )
        weights = {
            name.removeprefix(_WEIGHTS): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_WEIGHTS)
        }
        if weights:
            # The model directory held the averages.
            average = self.moving_average or MovingAverage(self.optimizer.parameters, 0.5)
            average.restore(weights)
        elif self.moving_average is not None:
            self.moving_average.restore(dict(self.optimizer.parameters))
        self.optimizer.load_state_dict(tensors)
        self.progress = Progress.from_dict(state["progress"])
        if state["metric"] != self.plan.metric:
            # Values of another metric say nothing of which is the best now.
            self.progress.best, self.progress.worse = [], 0
        if self.stream.position != self.progress.position:
            raise ValueError(
                f"stream: begins at {self.stream.position}, expected {self.progress.position}"
            )
        self._restore_interval(state["interval"])
        if self.world.first:
            best = [step for _, step in self.progress.best]
            self.checkpoints.settle(step, best, self.progress.unplanned)
        self.log.write("resume", step=step)
        return [
            f"{name} was {value!r} and is {self.run_facts.get(name)!r} now: the training goes on, "
            "but not bit for bit as it would have"
            for name, value in state["facts"].items()
            if self.run_facts.get(name) != value
        ]
