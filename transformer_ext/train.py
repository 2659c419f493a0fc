"""``python -m transformer_ext.train``: trains a translation model, from text to a model directory.

Without arguments it trains on the shipped English-German corpus. ``--src-train`` and
``--tgt-train`` name your own text, ``--resume`` goes on with an interrupted run, ``--task copy``
is the first example of the Annotated Transformer. Under ``torchrun`` several processes train one
model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformer_ext import __version__, info
from transformer_ext.average import average_weights
from transformer_ext.config import (
    ArgumentParser,
    ConfigError,
    TrainConfig,
    add_arguments,
    given,
    parse_arguments,
    to_commented_yaml,
    to_dict,
)
from transformer_ext.data import BatchSampler, collate
from transformer_ext.data.preparation import PreparedData, prepare_data
from transformer_ext.files import (
    atomic_write,
    load_model_dir,
    save_model_dir,
    write_json,
    write_model_files,
)
from transformer_ext.model import Transformer, preset
from transformer_ext.ops import backend
from transformer_ext.training import copy_task, distributed
from transformer_ext.training.batches import BatchStream
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.distributed import World
from transformer_ext.training.environment import (
    choose_device,
    choose_precision,
    describe_device,
    keep_freed_memory,
    peak_memory_bytes,
)
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, JsonLog, duration, read_log, save_loss_curve
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.scoring import (
    Decoder,
    Scorer,
    pick_evenly,
    pick_samples,
    print_samples,
    score,
)
from transformer_ext.training.sizing import fill, recipe_for, shipped_recipe
from transformer_ext.training.trainer import Plan, Progress, Trainer, evaluate_loss

__all__ = ["main"]

_PROG = "python -m transformer_ext.train"
_DRY_STEPS = 20
#: Validation loss reads at most so many pairs, spread evenly over the held-out text.
_VALIDATION_PAIRS = 2000
_RUNS = Path("runs")


@dataclass(frozen=True)
class _Machine:
    """What this process trains on."""

    world: World
    precision: str
    threads: int
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.world.device


def _parse(argv: Sequence[str] | None) -> TrainConfig:
    """The configuration; with ``--resume`` it begins from that of the run to go on with."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parse = functools.partial(
        parse_arguments,
        TrainConfig,
        prog=_PROG,
        description="Train a translation model; without options, on the shipped text.",
    )
    if "--resume" not in argv:
        return parse(argv)
    if any(argument.split("=")[0] == "--config" for argument in argv):
        raise ConfigError(
            "--resume: goes on with the config.yaml of the run itself; leave --config out"
        )
    parser = ArgumentParser(prog=_PROG, add_help=False)
    add_arguments(parser, TrainConfig)
    output = given(parser.parse_known_args(argv)[0], TrainConfig).get("output", {}).get("output")
    run = Path(output) if output else _newest_run()
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--resume: {run} holds no run to go on with ({file} is missing)")
    return parse(["--config", str(file), *argv])


def _runs() -> list[Path]:
    """The numbered runs in the default folder, ascending."""
    if not _RUNS.is_dir():
        return []
    return sorted((p for p in _RUNS.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def _newest_run() -> Path:
    runs = _runs()
    if not runs:
        raise ConfigError(f"--resume: there is no run in {_RUNS}/; name its folder with --output")
    return runs[-1]


def _choose_folder(config: TrainConfig) -> Path:
    """The folder for this run; nothing is made or removed yet.

    Raises:
        ConfigError: It holds something, and neither --resume nor --overwrite is given.
    """
    if config.output.output is None:
        return _RUNS / f"{int(_runs()[-1].name) + 1 if _runs() else 1:03d}"
    folder = Path(config.output.output)
    if not config.output.resume and folder.is_dir() and any(folder.iterdir()):
        if not config.output.overwrite:
            raise ConfigError(
                f"--output: {folder} is not empty; --overwrite replaces the run in it, --resume "
                "goes on with it"
            )
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"--overwrite: {folder} holds no run; nothing was removed")
    return folder


def _claim(folder: Path, config: TrainConfig) -> Path:
    """Makes the folder, empty unless a run in it is to be resumed; returns the one made."""
    if config.output.output is None:
        while True:
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                # Another training has begun in the meantime.
                folder = folder.with_name(f"{int(folder.name) + 1:03d}")
            else:
                return folder
    if config.output.overwrite and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _machine(config: TrainConfig) -> _Machine:
    keep_freed_memory()
    facts = info.collect()
    threads = config.training.threads or facts["cpu"].get("default_threads")
    if threads:
        torch.set_num_threads(threads)
    device = choose_device(config.training.device, distributed.local_rank())
    precision = choose_precision(config.training.precision, device, facts["cpu"].get("features"))
    return _Machine(World.join(device), precision, torch.get_num_threads(), facts)


def _kernels(machine: _Machine) -> str:
    """Which implementation of the ops is in use, for people."""
    facts, device = machine.facts, machine.device.type
    if backend() == "reference":
        return "plain PyTorch, as asked for (TRANSFORMER_EXT_BACKEND)"
    if device not in ("cpu", "cuda") or not facts["torch"].get(f"{device}_ops"):
        return "plain PyTorch (python -m transformer_ext.info says why)"
    if device == "cuda":
        return "compiled"
    products = ", ".join(
        f"{entry['product']} {entry['library']}"
        for entry in facts["torch"].get("gemm") or []
        if entry["dtype"] == machine.precision
    )
    return f"compiled, {facts['cpu']['isa']}" + (
        f"; matrix products: {products}" if products else ""
    )


def _print_machine(console: Console, machine: _Machine, output: str) -> None:
    facts = machine.facts
    console.print(
        f"transformer_ext {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    name = describe_device(machine.device, facts["system"]["cpu"])
    processes = f"{machine.world.size} processes, " if machine.world.size > 1 else ""
    console.print(f"device     {processes}{name}, {machine.threads} threads, {machine.precision}")
    console.print(f"kernels    {_kernels(machine)}")
    console.print(f"output     {output}")


class _Run:
    """One training from prepared text to the final model."""

    def __init__(
        self,
        config: TrainConfig,
        machine: _Machine,
        prepared: PreparedData,
        console: Console,
    ) -> None:
        self.machine = machine
        self.prepared = prepared
        self.console = console
        self.folder: Path | None = None
        self.checkpoints: Checkpoints | None = None
        self.shipped = not config.data.src_train
        train = prepared.train
        self.pairs = len(train)
        self.epoch_tokens = int(train.target_lengths.sum())
        recipe = (
            shipped_recipe(machine.device.type, config.preset)
            if self.shipped
            else recipe_for(
                self.pairs,
                self.epoch_tokens / self.pairs,
                machine.device.type,
                config.preset,
            )
        )
        self.config = fill(config, recipe)
        self.max_steps = self._max_steps()
        self._shorten_warmup(config.optimizer.warmup_steps is not None)
        self.model = self._make_model()
        self.parameters = parameters_by_name(self.model)
        self.decoder = Decoder(
            self.model,
            prepared.source_tokenizer,
            prepared.target_tokenizer,
            console,
            length_penalty=config.evaluation.length_penalty,
            threads=machine.threads,
        )

    def use_folder(self, folder: Path) -> None:
        """Writes into this folder from now on."""
        self.folder = folder
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=self.config.output.keep_checkpoints
        )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one pass over the text, about."""
        training = self.config.training
        assert training.max_tokens is not None
        per_step = training.max_tokens * training.accum_steps * self.machine.world.size
        return max(1.0, self.epoch_tokens / per_step)

    def _max_steps(self) -> int:
        """Optimizer steps of the whole training; passes over the text count by their mean length."""
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

    def _make_model(self) -> Transformer:
        source, target = self.prepared.source_tokenizer, self.prepared.target_tokenizer
        changes = dict(self.config.model)
        if source is not target:
            changes.setdefault("tie", "target")
        for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
            changes[name] = getattr(target, name)
        assert self.config.preset is not None
        self.architecture = preset(
            self.config.preset, source.vocab_size, target.vocab_size, **changes
        )
        torch.manual_seed(self.config.training.seed)
        model = Transformer(self.architecture)
        return model.to(self.machine.device).set_precision(self.machine.precision)

    # What is said at once -------------------------------------------------------------------------

    def print_plan(self) -> None:
        """Data, model, schedule and an estimate of the time."""
        config, say = self.config, self.console.print
        training, optimizer, c = config.training, config.optimizer, self.architecture
        for message in self.prepared.messages:
            say(f"data       {message}")
        count = sum(p.numel() for p in self.parameters.values())
        say(
            f"model      {config.preset}: {c.num_encoder_layers}+{c.num_decoder_layers} layers, "
            f"width {c.d_model}, {c.nhead} heads, feed-forward {c.dim_feedforward}, "
            f"{'pre' if c.norm_first else 'post'}-norm, dropout {c.dropout}; "
            f"{count / 1e6:.1f} million parameters"
            + ("" if self.shipped or self.config.preset is None else self._why_this_size())
        )
        batch = f"{training.max_tokens:,} target tokens"
        ranks = self.machine.world.size
        if training.accum_steps * ranks > 1:
            assert training.max_tokens is not None
            total = training.max_tokens * training.accum_steps * ranks
            batch = f"{total:,} target tokens ({training.accum_steps} x {ranks} batches)"
        epochs = self.max_steps / self.steps_per_epoch
        at_most = "at most " if training.early_stop_patience else ""
        say(
            f"training   {at_most}{self.max_steps:,} steps of {batch} ({epochs:.1f} passes over "
            f"the text); {optimizer.schedule}, learning rate {optimizer.learning_rate:g}, warm-up "
            f"{optimizer.warmup_steps} steps"
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
        say()

    def _why_this_size(self) -> str:
        return f" (for {self.pairs:,} pairs; --preset chooses another size)"

    # Training -------------------------------------------------------------------------------------

    def write_model(self, folder: Path) -> None:
        """Writes the current weights as the files of a model directory."""
        write_model_files(
            folder,
            self.architecture,
            {name: parameter.detach() for name, parameter in self.parameters.items()},
            self.prepared.source_tokenizer,
            self.prepared.target_tokenizer,
            self.training_notes(),
        )

    def training_notes(self) -> dict[str, Any]:
        """The ``training`` part of the model's ``config.json``."""
        train = self.prepared.train
        longest = max(int(train.source_lengths.max()), int(train.target_lengths.max()))
        return {
            "max_train_length": longest,
            "corpus": self.prepared.name,
            "pairs": self.pairs,
            "precision": self.machine.precision,
        }

    def make_trainer(self, log: JsonLog, resume_from: int | None) -> Trainer:
        """Everything put together, at the beginning or at a checkpoint."""
        config, machine, prepared = self.config, self.machine, self.prepared
        training, world = config.training, machine.world
        assert training.max_tokens is not None
        assert training.validate_every is not None
        assert config.optimizer.schedule is not None
        assert config.optimizer.learning_rate is not None
        assert config.optimizer.warmup_steps is not None
        start = None
        if resume_from is not None:
            assert self.checkpoints is not None
            start = Progress.from_dict(self.checkpoints.load(resume_from)[1]["progress"]).position
            self._load_weights(self.checkpoints.path(resume_from))
        start_id = self.architecture.decoder_start_id
        train = prepared.train
        stream = BatchStream(
            functools.partial(collate, train, start_id=start_id),
            BatchSampler(
                train.source_lengths, train.target_lengths, training.max_tokens, training.seed
            ),
            train.target_lengths,
            accum_steps=training.accum_steps,
            rank=world.rank,
            world_size=world.size,
            start=start,
        )
        validation_batches = self._validation_batches(training.max_tokens, start_id)
        optimizer = Optimizer(
            self.parameters.items(),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
            loss_scale=2.0**16 if machine.precision == "float16" else None,
        )
        scorer = Scorer(
            prepared.dev,
            self.decoder,
            self.console,
            beam_size=config.evaluation.validation_beam_size,
            sentences=config.evaluation.validation_sentences,
        )
        trainer = Trainer(
            self.model,
            stream,
            optimizer,
            Schedule(
                config.optimizer.schedule,
                config.optimizer.learning_rate,
                config.optimizer.warmup_steps,
                self.max_steps,
                d_model=self.architecture.d_model,
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
            ),
            world=world,
            validation_batches=validation_batches,
            score=scorer,
            checkpoints=self.checkpoints,
            write_model=self.write_model,
            console=self.console,
            log=log,
            run_facts={
                "torch": torch.__version__,
                "threads": machine.threads,
                "processes": world.size,
                "device": describe_device(machine.device, machine.facts["system"]["cpu"]),
                "precision": machine.precision,
                "backend": backend(),
                "transformer_ext": __version__,
            },
        )
        if resume_from is not None:
            for warning in trainer.restore(resume_from):
                self.console.print(f"warning: {warning}")
        return trainer

    def _validation_batches(self, max_tokens: int, start_id: int | None) -> list[Callable[[], Any]]:
        dev = self.prepared.dev_set
        if dev is None:
            return []
        rows = pick_evenly(len(dev), _VALIDATION_PAIRS)
        source, target = dev.source_lengths[rows], dev.target_lengths[rows]
        sampler = BatchSampler(
            source,
            target,
            max(max_tokens, int(target.max())),
            max_source_tokens=max(2 * max_tokens, int(source.max())),
        )
        return [
            functools.partial(collate, dev, rows[indices], start_id) for indices in sampler.epoch(0)
        ]

    def _load_weights(self, folder: Path) -> None:
        saved = load_model_dir(folder)
        if saved.config != self.architecture:
            raise ConfigError(f"{folder}: its model differs from the one described by the options")
        tokenizers = (self.prepared.source_tokenizer, self.prepared.target_tokenizer)
        if [t.sha256 for t in tokenizers] != [
            saved.source_tokenizer.sha256,
            saved.target_tokenizer.sha256,
        ]:
            raise ConfigError(f"{folder}: its tokenizer differs: the training text has changed")
        self._set_weights(saved.weights)

    def _set_weights(self, weights: Any) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.asarray(weights[name])))

    def go_on_command(self) -> str:
        """The command that resumes this run."""
        return f"{_PROG} --output {shlex.quote(str(self.folder))} --resume"

    # The end --------------------------------------------------------------------------------------

    def final_model(self, trainer: Trainer) -> tuple[Path, str]:
        """Writes ``model/``: the average of the last checkpoints, or the best of them if better.

        Returns the folder and what was chosen.
        """
        assert self.folder is not None and self.checkpoints is not None
        progress = trainer.progress
        wanted = self.config.output.average_last
        newest = self.checkpoints.newest(wanted)
        best = self.checkpoints.pointed("best")
        weights = None
        if len(newest) > 1:
            weights = average_weights(newest)
            choice = f"average of the last {len(newest)} checkpoints"
            if trainer.validation_batches and best is not None:
                self._set_weights(weights)
                _, nll, _ = evaluate_loss(
                    trainer.losses, trainer.validation_batches, World(0, 1, self.machine.device)
                )
                if nll > progress.best_loss:
                    self.console.print(
                        f"the {choice} has validation perplexity {math.exp(nll):.3f}, the best "
                        f"checkpoint {math.exp(progress.best_loss):.3f}: the best one is kept"
                    )
                    weights = None
                else:
                    self.console.print(
                        f"{choice}: validation perplexity {math.exp(nll):.3f} "
                        f"(best single one {math.exp(progress.best_loss):.3f})"
                    )
        if weights is None:
            step = best if best is not None else progress.step
            choice = f"checkpoint of step {step}"
            weights = dict(load_model_dir(self.checkpoints.path(step)).weights)
        self._set_weights(weights)
        output = self.folder / "model"
        save_model_dir(
            output,
            self.architecture,
            weights,
            self.prepared.source_tokenizer,
            self.prepared.target_tokenizer,
            {**self.training_notes(), "steps": progress.step, "weights": choice},
            overwrite=True,
        )
        return output, choice

    def finish(self, trainer: Trainer, reason: str, log: JsonLog) -> None:
        """Averages, tests, draws, writes the results, and says how to go on from here."""
        assert self.folder is not None
        say, progress = self.console.print, trainer.progress
        say()
        why = {
            "finished": f"all {progress.step:,} steps are done",
            "early stop": "validation got no better",
            "time": "the time is up",
        }[reason]
        say(f"training ends after {duration(progress.seconds)}: {why}")
        model, choice = self.final_model(trainer)
        evaluation = self.config.evaluation
        pairs = self.prepared.test or self.prepared.dev
        part = "test" if self.prepared.test else "validation"
        results: dict[str, Any] = {
            "test_bleu": None,
            "ended": reason,
            "steps": progress.step,
            "target_tokens": progress.target_tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.target_tokens / max(1e-9, progress.seconds), 1),
            "best_step": progress.best_step,
            "validation_nll": progress.best_loss if progress.best_step else None,
            "weights": choice,
            "model": str(model),
            "corpus": self.prepared.name,
            "pairs": self.pairs,
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "peak_memory_bytes": peak_memory_bytes(self.machine.device),
            "seed": self.config.training.seed,
            "versions": {
                "transformer_ext": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **self.machine.facts["system"]["packages"],
            },
            "machine": {
                "device": describe_device(self.machine.device, self.machine.facts["system"]["cpu"]),
                "threads": self.machine.threads,
                "processes": self.machine.world.size,
                "precision": self.machine.precision,
                "backend": backend(),
            },
            "config": to_dict(self.config),
        }
        if pairs:
            say(
                f"translating the {part} text: {len(pairs):,} sentences, beam {evaluation.beam_size}"
            )
            began = time.monotonic()
            outputs = self.decoder(model, [src for src, _ in pairs], evaluation.beam_size)
            scores = score(outputs, [tgt for _, tgt in pairs])
            say(
                f"{part} BLEU {scores.bleu:.2f}  ({scores.bleu_signature}); "
                f"chrF {scores.chrf:.2f}  ({scores.chrf_signature}); "
                f"in {duration(time.monotonic() - began)}"
            )
            results |= {
                f"{part}_bleu": round(scores.bleu, 3),
                f"{part}_chrf": round(scores.chrf, 3),
                "bleu_signature": scores.bleu_signature,
                "chrf_signature": scores.chrf_signature,
                "decoding_seconds": round(time.monotonic() - began, 2),
            }
            say()
            samples = pick_samples(pairs, 5)
            print_samples(self.console, pairs, outputs, samples)
            results["samples"] = [
                {"source": pairs[i][0], "reference": pairs[i][1], "output": outputs[i]}
                for i in samples
            ]
            atomic_write(self.folder / f"{part}.output.txt", "".join(f"{o}\n" for o in outputs))
        log.write("end", **{k: v for k, v in results.items() if k not in ("config", "versions")})
        write_json(self.folder / "results.json", results)
        pictures = [self.folder / "loss.png"]
        save_loss_curve(read_log(self.folder / "log.jsonl"), pictures[0])
        if pairs:
            pictures.append(self.folder / "attention.png")
            self._draw_attention(pairs[samples[0]][0], outputs[samples[0]], pictures[1])
        example = pairs[pick_samples(pairs, 1)[0]][0] if pairs else "Click the button."
        say(f"model      {model}")
        say(f"results    {self.folder / 'results.json'}")
        say(f"pictures   {', '.join(map(str, pictures))}")
        say(
            f"translate  echo {shlex.quote(example)} | python -m transformer_ext.translate "
            f"{shlex.quote(str(model))}"
        )
        if self.shipped:
            say(
                f"this model has read {self.pairs:,} sentences of software help and nothing else; "
                f"for your own text: {_PROG} --src-train my.en --tgt-train my.de"
            )

    def _draw_attention(self, source: str, output: str, picture: Path) -> None:
        from transformer_ext.visualize import attention_picture

        source_tokenizer = self.prepared.source_tokenizer
        target_tokenizer = self.prepared.target_tokenizer
        source_ids = [*source_tokenizer.encode(source), source_tokenizer.eos_id]
        target_ids = target_tokenizer.encode(output)
        start = self.architecture.decoder_start_id
        assert start is not None
        attention_picture(
            self.model,
            source_ids,
            [start, *target_ids],
            source_tokenizer.pieces(source_ids),
            target_tokenizer.pieces([*target_ids, target_tokenizer.eos_id]),
            picture,
        )


def _dry_run(run: _Run, console: Console) -> None:
    """Trains some steps and says what the whole training would take."""
    trainer = run.make_trainer(JsonLog(None), None)
    times = []
    for _ in range(_DRY_STEPS):
        began = time.monotonic()
        trainer.train_step()
        if run.machine.device.type == "cuda":
            torch.cuda.synchronize(run.machine.device)
        times.append(time.monotonic() - began)
    trainer.progress.seconds = sum(times)
    trainer.report()
    step = sorted(times[_DRY_STEPS // 4 :])[len(times[_DRY_STEPS // 4 :]) // 2]
    training = run.config.training
    assert training.validate_every is not None
    began = time.monotonic()
    if trainer.validation_batches:
        evaluate_loss(trainer.losses, trainer.validation_batches, run.machine.world)
    validation = time.monotonic() - began
    total = run.max_steps * (step + validation / training.validate_every)
    console.print(
        f"dry run    {_DRY_STEPS} steps: {1000 * step:.0f} ms a step, validation loss "
        f"{validation:.1f} s; all {run.max_steps:,} steps: {duration(total)} and the "
        f"translations at each validation; most memory "
        f"{peak_memory_bytes(run.machine.device) / (1 << 30):.2f} GiB; nothing was written"
    )


def _train(config: TrainConfig) -> int:
    machine = _machine(config)
    world = machine.world
    console = Console(silent=not world.first)
    data = config.data
    if not data.src_train:
        data = fill(config, shipped_recipe(machine.device.type, config.preset)).data
    folder: Path | None = None
    if not config.output.dry_run:
        folder = _choose_folder(config)
    _print_machine(console, machine, "nothing (dry run)" if folder is None else f"{folder}/")
    # The first process builds the token ids, the others find them.
    if not world.first:
        world.barrier()
    prepared = prepare_data(data, lambda text: console.print(f"data       {text} ..."))
    if world.first:
        world.barrier()
    run = _Run(config, machine, prepared, console)
    run.print_plan()
    if folder is None:
        _dry_run(run, console)
        return 0
    planned = folder
    folder = Path(world.broadcast(str(_claim(folder, config)) if world.first else ""))
    if folder != planned:
        console.print(f"output     {folder}/ ({planned} was taken in the meantime)")
    run.use_folder(folder)
    assert run.checkpoints is not None
    resume_from = None
    if config.output.resume:
        resume_from = run.checkpoints.last()
        console.print(f"going on from step {resume_from or 0}")
    if world.first:
        kept = dataclasses.replace(
            run.config,
            output=dataclasses.replace(
                run.config.output, output=str(folder), resume=False, overwrite=False
            ),
        )
        atomic_write(folder / "config.yaml", to_commented_yaml(kept))
    log = JsonLog(folder / "log.jsonl" if world.first else None)
    log.write(
        "start",
        version=__version__,
        torch=torch.__version__,
        threads=machine.threads,
        precision=machine.precision,
        parameters=sum(p.numel() for p in run.parameters.values()),
        config=to_dict(run.config),
    )
    trainer = run.make_trainer(log, resume_from)
    with trainer.stop.installed():
        reason = trainer.fit()
        if reason == "interrupted":
            console.print(
                f"interrupted; step {trainer.progress.step} is saved. To go on: "
                f"{run.go_on_command()}"
            )
            return 130
    if world.first:
        run.finish(trainer, reason, log)
    log.close()
    world.barrier()
    return 0


def _copy(config: TrainConfig) -> int:
    files = config.output
    for name, wanted in (
        ("output", files.output is not None),
        ("resume", files.resume),
        ("overwrite", files.overwrite),
    ):
        if wanted:
            raise ConfigError(f"--{name}: --task copy writes no files; leave it out")
    # The model is so small that a second thread or another precision costs more than it brings.
    training = dataclasses.replace(
        config.training,
        threads=config.training.threads or 1,
        precision="float32" if config.training.precision == "auto" else config.training.precision,
    )
    machine = _machine(dataclasses.replace(config, training=training))
    console = Console(silent=not machine.world.first)
    _print_machine(console, machine, "none: nothing is written")
    console.print(
        "task       repeat 10 random symbols, as the Annotated Transformer's first example"
    )
    result = copy_task.run(
        machine.device, precision=machine.precision, seed=config.training.seed, console=console
    )
    source, output = (" ".join(map(str, side)) for side in result.example)
    console.print(f"  source     {source}\n  output     {output}")
    share = 100 * result.copied / result.sequences
    console.print(
        f"{share:.1f} % of {result.sequences} unseen sequences copied exactly after "
        f"{result.steps} steps, {duration(result.seconds)}"
    )
    return 0 if result.copied == result.sequences else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 (training failed), 2 (wrong input), 130 (stopped)."""
    try:
        config = _parse(argv)
        return _copy(config) if config.task == "copy" else _train(config)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRANSFORMER_EXT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is as it was", file=sys.stderr)
        return 130
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
