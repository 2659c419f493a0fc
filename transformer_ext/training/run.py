"""One training from its data to the final model: what is the same for every task.

A task derives from :class:`Run` and says what it learns from, which model learns it, and how that is
judged; steps, checkpoints, resuming, averaging and the results are here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from transformer_ext.average import average_weights
from transformer_ext.config import ConfigError, TrainConfig, from_dict, to_dict
from transformer_ext.data.corpus import counted
from transformer_ext.files import FileError, atomic_directory, free_bytes, read_json, write_json
from transformer_ext.ops import backend
from transformer_ext.training.batches import BatchStream, Position
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.distributed import World
from transformer_ext.training.environment import peak_memory_bytes
from transformer_ext.training.folder import check_changes
from transformer_ext.training.machine import Machine
from transformer_ext.training.moving_average import MovingAverage
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, JsonLog, duration, read_log
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.sizing import Recipe, fill
from transformer_ext.training.trainer import Plan, Progress, Trainer, evaluate_loss, is_better
from transformer_ext.visualization.figure import save_figure
from transformer_ext.visualization.training import draw_training

__all__ = ["Run"]


class Run(ABC):
    """One training, to be derived from for each task.

    Args:
        config: What the user asked for.
        machine: What to train on.
        console: Where people read.
        recipe: Fills in what the configuration leaves open.
        epoch_tokens: What ``max_tokens`` counts, in one pass over the training data.

    Attributes:
        config: With the recipe's values filled in.
        max_steps: Optimizer steps of the whole training.
        model: The model, on the device.
        parameters: Its parameters by name.
        folder: Where results go; None before :meth:`use_folder`.
        checkpoints: The checkpoints there.
    """

    #: The command that trains.
    command: ClassVar[str] = "python -m transformer_ext.train"
    #: What ``max_tokens`` counts, and what one label is.
    batch_unit: ClassVar[str] = "target tokens"
    counted: ClassVar[str] = "tok"

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        console: Console,
        recipe: Recipe,
        epoch_tokens: int,
    ) -> None:
        self.machine = machine
        self.console = console
        self.epoch_tokens = epoch_tokens
        self.folder: Path | None = None
        self.checkpoints: Checkpoints | None = None
        self.config = fill(config, recipe)
        self._metric()  # An unknown one is to be found before anything is written.
        self.max_steps = self._max_steps()
        self._shorten_warmup(config.optimizer.warmup_steps is not None)
        torch.manual_seed(self.config.training.seed)
        # As LossModule wants it, and with its configuration.
        self.model: Any = self.make_model()
        self.parameters = parameters_by_name(self.model)

    # What a task defines --------------------------------------------------------------------------

    @staticmethod
    def preferences(config: TrainConfig) -> TrainConfig:
        """The configuration with what suits the task in place of what the machine would choose."""
        return config

    #: Names of the scores that the task's judge can give.
    all_scores: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check_metric(cls, config: TrainConfig) -> None:
        """Whether the task can have the metric that the configuration asks for.

        Raises:
            ConfigError: It cannot, whatever the data are.
        """
        _require_metric(config, cls.all_scores)

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The model with its first weights, on the device; the generator is seeded before."""

    @abstractmethod
    def describe(self) -> Sequence[str]:
        """Lines on the data, then on the model, for people."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What ``results.json`` says of the data, the name of the corpus among it."""

    @abstractmethod
    def make_stream(self, start: Position | None) -> BatchStream:
        """The batches, from a position on."""

    @abstractmethod
    def validation_batches(self) -> list[Callable[[], Any]]:
        """Each gives one batch of held-out data; empty if there are none."""

    def make_scorer(self) -> Callable[[Path | None], dict[str, float]] | None:
        """Judges the model directory it is given; see :class:`Trainer`."""
        return None

    def score_in_memory(self) -> bool:
        """Whether that judges the model in memory, and is given no directory."""
        return False

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that :meth:`make_scorer`'s judge gives."""
        return ()

    @abstractmethod
    def write_model(self, folder: Path, weights: Mapping[str, Any], notes: dict[str, Any]) -> None:
        """Writes weights as the files of a model directory; ``notes`` go into its config.json."""

    @abstractmethod
    def read_model(self, folder: Path) -> Mapping[str, Any]:
        """Weights of a model directory of this run.

        Raises:
            ValueError: It is one of another model or other data.
        """

    @abstractmethod
    def test(self, model: Path) -> dict[str, Any]:
        """Judges the final model, says so, and returns what belongs into ``results.json``."""

    def farewell(self, model: Path) -> Sequence[str]:
        """Last lines, for people: what can be done with the model now."""
        return ()

    # ----------------------------------------------------------------------------------------------

    def use_folder(self, folder: Path) -> None:
        """Writes into this folder from now on."""
        self.folder = folder
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=self.config.output.keep_checkpoints
        )

    @property
    def data_workers(self) -> int:
        """Threads that read ahead.

        On two cores of a CPU that compute the step, one cost it 2 to 3 %, and reading without it
        0.7 to 0.9 % (``benchmarks/loop.py``).
        """
        chosen = self.config.training.data_workers
        if chosen is not None:
            return chosen
        return 0 if self.machine.device.type == "cpu" else 1

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one pass over the data, about."""
        training = self.config.training
        assert training.max_tokens is not None
        per_step = training.max_tokens * training.accum_steps * self.machine.world.size
        return max(1.0, self.epoch_tokens / per_step)

    def _max_steps(self) -> int:
        """Optimizer steps of the whole training; passes over the data count by their mean length."""
        training = self.config.training
        limits = [] if training.max_steps is None else [training.max_steps]
        if training.max_epochs is not None:
            limits.append(math.ceil(training.max_epochs * self.steps_per_epoch))
        return min(limits)

    def _shorten_warmup(self, chosen: bool) -> None:
        """Keeps the recipe's warm-up to a tenth of a training that the user made shorter."""
        optimizer, most = self.config.optimizer, max(1, self.max_steps // 10)
        self.shortened_from: int | None = None
        if chosen or optimizer.warmup_steps is None or optimizer.warmup_steps <= most:
            return
        self.shortened_from = optimizer.warmup_steps
        self.config = dataclasses.replace(
            self.config, optimizer=dataclasses.replace(optimizer, warmup_steps=most)
        )

    def _print_disk(self) -> None:
        """What the checkpoints will take: weights, two moments, and with an average the weights."""
        output = self.config.output
        values = 4 if self.config.training.ema_decay else 3
        each = 4 * values * sum(p.numel() for p in self.parameters.values())
        # One more while the next is written.
        most = output.keep_checkpoints + output.keep_best + 1
        free = free_bytes(output.output or ".")
        self.console.print(
            f"disk       {each / 1e6:,.0f} MB a checkpoint, at most {most} of them at once: "
            f"{most * each / 1e9:,.2f} GB"
            + ("" if free is None else f"; {free / 1e9:,.2f} GB are free")
        )
        if free is not None and free < most * each:
            self.console.print(
                "warning: the disk will not hold them; --keep-checkpoints and --keep-best say how "
                "many are kept"
            )

    def print_plan(self) -> None:
        """Data, model and schedule, for people."""
        config, say = self.config, self.console.print
        training, optimizer = config.training, config.optimizer
        for line in self.describe():
            say(line)
        if self.machine.device.type == "cuda":
            reason = self._why_no_graphs()
            graphs = "CUDA graphs, one for each shape of the batches, recorded at its second step"
            say(f"step       {graphs if reason is None else f'op by op: {reason}'}")
        say(f"seed       {training.seed}: of weights, order of batches and dropout")
        self._print_disk()
        batch = f"{training.max_tokens:,} {self.batch_unit}"
        ranks = self.machine.world.size
        if training.accum_steps * ranks > 1:
            assert training.max_tokens is not None
            total = training.max_tokens * training.accum_steps * ranks
            batch = f"{total:,} {self.batch_unit} ({training.accum_steps} x {ranks} batches)"
        epochs = self.max_steps / self.steps_per_epoch
        at_most = "at most " if training.early_stop_patience else ""
        say(
            f"training   {at_most}{counted(self.max_steps, 'steps')} of {batch} ({epochs:.1f} passes over "
            f"the data); {optimizer.schedule}, learning rate {optimizer.learning_rate:g}, warm-up "
            f"{counted(optimizer.warmup_steps or 0, 'steps')}"
            + (
                ""
                if self.shortened_from is None
                else f" (a tenth of the training, for the {self.shortened_from} of the recipe)"
            )
            + f"; validation every {training.validate_every} steps"
            + (
                f", ends after {training.early_stop_patience} without a better one"
                if training.early_stop_patience
                else ""
            )
        )
        warmup = optimizer.warmup_steps
        if warmup is not None and warmup > self.max_steps:
            # A recipe may be tried for a few steps.
            say(
                f"warning: --warmup-steps: {warmup:,} is more than the {self.max_steps:,} steps of "
                "the whole training (--max-steps): the learning rate does not reach its peak"
            )
        say()

    def _why_no_graphs(self) -> str | None:
        """Why steps on a GPU are not recorded and replayed; None: they are."""
        if not self.config.training.cuda_graphs:
            return "as asked for (--no-cuda-graphs)"
        if backend() == "reference":
            return "plain PyTorch, as asked for (TRANSFORMER_EXT_BACKEND)"
        return None

    # Training -------------------------------------------------------------------------------------

    def make_trainer(self, log: JsonLog, resume_from: int | None) -> Trainer:
        """Everything put together, at the beginning or at a checkpoint."""
        config, machine = self.config, self.machine
        training = config.training
        assert training.validate_every is not None
        assert config.optimizer.schedule is not None
        assert config.optimizer.learning_rate is not None
        assert config.optimizer.warmup_steps is not None
        assert config.optimizer.label_smoothing is not None
        start = None
        if resume_from is not None:
            assert self.checkpoints is not None
            state = self.checkpoints.state(resume_from)
            start = Progress.from_dict(state["progress"]).position
            trained = from_dict(TrainConfig, state["config"], f"checkpoint of step {resume_from}")
            for warning in check_changes(trained, config, f"{self.folder}/config.yaml"):
                self.console.print(f"warning: {warning}")
            self.model.load_weights(self.read_model(self.checkpoints.path(resume_from)))
        optimizer = Optimizer(
            self.parameters.items(),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
            loss_scale=2.0**16 if machine.precision == "float16" else None,
        )
        decay = config.training.ema_decay
        trainer = Trainer(
            self.model,
            self.make_stream(start),
            optimizer,
            Schedule(
                config.optimizer.schedule,
                config.optimizer.learning_rate,
                config.optimizer.warmup_steps,
                self.max_steps,
                d_model=self.model.config.d_model,
            ),
            Plan(
                max_steps=self.max_steps,
                log_every=training.log_every,
                validate_every=training.validate_every,
                checkpoint_every=config.output.checkpoint_every or 0,
                early_stop_patience=training.early_stop_patience or 0,
                max_seconds=None if training.max_minutes is None else 60 * training.max_minutes,
                label_smoothing=config.optimizer.label_smoothing,
                seed=training.seed,
                metric=self._metric(),
                keep_best=config.output.keep_best,
                max_skipped=training.max_skipped_steps,
                counted=self.counted,
                cuda_graphs=self._why_no_graphs() is None,
            ),
            world=machine.world,
            validation_batches=self.validation_batches(),
            score=self.make_scorer(),
            score_in_memory=self.score_in_memory,
            checkpoints=self.checkpoints,
            write_model=self._write_current_model,
            moving_average=MovingAverage(self.parameters, decay) if decay else None,
            skipped_folder=None if self.folder is None else self.folder / "skipped",
            console=self.console,
            log=log,
            run_facts=machine.facts(),
            config=to_dict(self.settled_config()),
        )
        if resume_from is not None:
            for warning in trainer.restore(resume_from):
                self.console.print(f"warning: {warning}")
        return trainer

    def judge_parent(self, trainer: Trainer, log: JsonLog, resume_from: int | None) -> None:
        """Says how the model that a fine-tuning begins with does on the new text."""
        if resume_from is not None or not trainer.validation_batches:
            return
        before = trainer.validate()
        self.console.print(f"before fine-tuning: {before.describe()}")
        self.console.print()
        scores = dataclasses.asdict(before)
        log.write("before", **scores.pop("scores"), **scores)

    def _metric(self) -> str:
        return _require_metric(self.config, self.scores)

    def notes(self) -> dict[str, Any]:
        """What is stored with every model: enough to train it again."""
        return {
            "seed": self.config.training.seed,
            "versions": self.machine.versions(),
            "config": to_dict(self.settled_config()),
        }

    def settled_config(self) -> TrainConfig:
        """The configuration of the run, without what only says how to begin."""
        output = self.config.output
        folder = output.output if self.folder is None else str(self.folder)
        output = dataclasses.replace(output, output=folder, resume=False, overwrite=False)
        return dataclasses.replace(self.config, output=output)

    def _write_current_model(self, folder: Path) -> None:
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self.write_model(folder, weights, self.notes())

    def go_on_command(self) -> str:
        """The command that resumes this run."""
        command, ranks = self.command, self.machine.world.size
        if ranks > 1:
            here = os.environ.get("LOCAL_WORLD_SIZE", ranks)
            command = command.replace("python", f"torchrun --nproc-per-node {here}", 1)
        return f"{command} --output {shlex.quote(str(self.folder))} --resume"

    # The end --------------------------------------------------------------------------------------

    def final_model(self, trainer: Trainer) -> tuple[Path, str]:
        """Writes ``model/``: the average of the last checkpoints, or the best of them if better.

        Returns the folder and what was chosen.
        """
        assert self.folder is not None and self.checkpoints is not None
        progress, output = trainer.progress, self.config.output
        best = progress.best_step
        if best and not self._good([best]):
            best = 0
        if output.average_best > 1:
            steps, which = [step for _, step in progress.best[: output.average_best]], "best"
        else:
            steps, which = self.checkpoints.steps()[-output.averaged_last :], "last"
        good = self._good(steps)
        averaged = [self.checkpoints.path(step) for step in good]
        weights = None
        if len(averaged) > 1:
            weights = average_weights(averaged)
            choice = f"average of the {which} {len(averaged)} checkpoints"
            if best:
                self.model.load_weights(weights)
                metric = trainer.plan.metric
                single_process = World(0, 1, self.machine.device)
                scored = metric not in ("nll", "accuracy")
                found = trainer.validate(single_process, scored=scored)
                value, single = found.value(metric), progress.best[0][0]
                better = value == single or is_better(metric, value, single)
                self.console.print(
                    f"{choice}: {found.describe()}; {metric} {value:.4f}, "
                    f"{single:.4f} of the best checkpoint, step {best}: "
                    + ("the average is kept" if better else "that one is kept")
                )
                if not better:
                    weights = None
        if weights is None:
            if best or good:
                step = best or max(good)
                choice = f"checkpoint of step {step}"
                weights = dict(self.read_model(self.checkpoints.path(step)))
            else:
                choice = f"weights after step {progress.step}"
                with trainer.averaged():
                    weights = {
                        n: p.detach().cpu().numpy().copy() for n, p in self.parameters.items()
                    }
        self.model.load_weights(weights)
        model = self.folder / "model"
        with atomic_directory(model, overwrite=True) as folder:
            self.write_model(
                folder, weights, {"steps": progress.step, "weights": choice, **self.notes()}
            )
        return model, choice

    def _good(self, steps: Sequence[int]) -> list[int]:
        """Those of the checkpoints whose models are as they were written; the others are named."""
        assert self.checkpoints is not None
        good = []
        for step in steps:
            try:
                self.checkpoints.verify(step, model_only=True)
            except FileError as error:
                self.console.print(f"warning: {error}; not used")
            else:
                good.append(step)
        return good

    def is_complete(self, trainer: Trainer) -> bool:
        """Whether :meth:`finish` has come to its end, and what it wrote is there."""
        assert self.folder is not None
        try:
            self.read_model(self.folder / "model")
            return read_json(self.folder / "results.json").get("steps") == trainer.progress.step
        except ValueError:
            return False

    def finish(self, trainer: Trainer, reason: str, log: JsonLog) -> None:
        """Averages, tests, draws, writes the results, and says how to go on from here."""
        assert self.folder is not None
        say, progress = self.console.print, trainer.progress
        say()
        why = {
            "finished": "the one step is done"
            if progress.step == 1
            else f"all {progress.step:,} steps are done",
            "early stop": "validation got no better",
            "time": "the time is up",
        }[reason]
        say(f"training ends after {duration(progress.seconds)}: {why}")
        model, choice = self.final_model(trainer)
        results: dict[str, Any] = {
            "ended": reason,
            "steps": progress.step,
            "target_tokens": progress.target_tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.target_tokens / max(1e-9, progress.seconds), 1),
            "best_step": progress.best_step,
            f"best_{trainer.plan.metric}": progress.best[0][0] if progress.best else None,
            "weights": choice,
            "model": str(model),
            **self.facts(),
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "peak_memory_bytes": peak_memory_bytes(self.machine.device),
            "seed": self.config.training.seed,
            "versions": self.machine.versions(),
            "machine": {
                "device": self.machine.device_name,
                "threads": self.machine.threads,
                "processes": self.machine.world.size,
                "precision": self.machine.precision,
                "backend": backend(),
            },
            "config": to_dict(self.settled_config()),
        }
        results |= self.test(model)
        log.write("end", **{k: v for k, v in results.items() if k not in ("config", "versions")})
        curves = draw_training(read_log(self.folder / "log.jsonl"), self.folder.name)
        save_figure(curves, self.folder / "loss.png")
        # The last of all: where it is, a run that is to go on has nothing left to do.
        write_json(self.folder / "results.json", results)
        say(f"model      {model}")
        say(f"results    {self.folder / 'results.json'}")
        say(f"pictures   {', '.join(map(str, sorted(self.folder.glob('*.png'), reverse=True)))}")
        for line in self.farewell(model):
            say(line)

    def dry_run(self) -> None:
        """Trains some steps and says what the whole training would take."""
        trainer = self.make_trainer(JsonLog(None), None)
        # The first steps on a GPU record graphs.
        steps, first = (120, 60) if self.machine.device.type == "cuda" else (20, 5)
        times = []
        for _ in range(steps):
            began = time.monotonic()
            trainer.train_step()
            if self.machine.device.type == "cuda":
                torch.cuda.synchronize(self.machine.device)
            times.append(time.monotonic() - began)
        trainer.stream.close()
        trainer.progress.seconds = sum(times)
        trainer.report()
        step = sorted(times[first:])[(steps - first) // 2]
        training = self.config.training
        assert training.validate_every is not None
        began = time.monotonic()
        if trainer.validation_batches:
            evaluate_loss(trainer.losses, trainer.validation_batches, self.machine.world)
        validation = time.monotonic() - began
        total = self.max_steps * (step + validation / training.validate_every)
        self.console.print(
            f"dry run    {steps} steps: {1000 * step:.1f} ms a step, validation loss "
            f"{validation:.1f} s; all {self.max_steps:,} steps: {duration(total)} and what each "
            "validation decodes; most memory "
            f"{peak_memory_bytes(self.machine.device) / (1 << 30):.2f} GiB; no run was written"
        )


def _require_metric(config: TrainConfig, scores: Sequence[str]) -> str:
    metric, known = config.evaluation.validation_metric, ("nll", "accuracy", *scores)
    if metric not in known:
        raise ConfigError(
            f"evaluation.validation_metric: got {metric!r}, expected one of {', '.join(known)} for "
            "this task"
        )
    return metric
