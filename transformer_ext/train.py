"""``python -m transformer_ext.train``: trains a translation model, from text to a model directory.

Without arguments it trains on the shipped English-German corpus. ``--src-train`` and
``--tgt-train`` name your own text, ``--resume`` goes on with an interrupted run, ``--task copy``
is the first example of the Annotated Transformer. Under ``torchrun`` several processes train one
model.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from transformer_ext import __version__
from transformer_ext._command import command
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
from transformer_ext.files import atomic_write
from transformer_ext.training import copy_task, distributed
from transformer_ext.training.machine import Machine
from transformer_ext.training.report import Console, JsonLog, duration
from transformer_ext.training.run import Run
from transformer_ext.training.tensorboard import Board
from transformer_ext.training.translation import TranslationRun

__all__ = ["main"]

_RUNS = Path("runs")


def _parse(argv: Sequence[str] | None) -> TrainConfig:
    """The configuration; with ``--resume`` it begins from that of the run to go on with."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parse = functools.partial(
        parse_arguments,
        TrainConfig,
        prog=Run.command,
        description="Train a translation model; without options, on the shipped text.",
    )
    if "--resume" not in argv:
        return parse(argv)
    if any(argument.split("=")[0] == "--config" for argument in argv):
        raise ConfigError(
            "--resume: goes on with the config.yaml of the run itself; leave --config out"
        )
    if any(argument.split("=")[0] == "--init-from" for argument in argv):
        raise ConfigError("--resume: goes on from the run's own checkpoint; leave --init-from out")
    parser = ArgumentParser(prog=Run.command, add_help=False)
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


def _train(config: TrainConfig) -> int:
    if config.output.tensorboard:
        Board.require()
    machine = Machine.join(config)
    world = machine.world
    console = Console(silent=not world.first)
    folder = None if config.output.dry_run else _choose_folder(config)
    machine.print(console, "nothing (dry run)" if folder is None else f"{folder}/")
    run = TranslationRun.prepare(config, machine, console)
    run.print_plan()
    if folder is None:
        run.dry_run()
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
        atomic_write(folder / "config.yaml", to_commented_yaml(run.settled_config()))
    board = None
    if config.output.tensorboard and world.first:
        board = Board(folder / "tensorboard", resume_from or 0)
    log = JsonLog(folder / "log.jsonl" if world.first else None, board)
    log.write(
        "start",
        version=__version__,
        torch=machine.versions()["torch"],
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
    if config.init_from is not None:
        raise ConfigError("--init-from: --task copy begins with random weights; leave it out")
    # The model is so small that a second thread or another precision costs more than it brings.
    training = dataclasses.replace(
        config.training,
        threads=config.training.threads or 1,
        precision="float32" if config.training.precision == "auto" else config.training.precision,
    )
    machine = Machine.join(dataclasses.replace(config, training=training))
    console = Console(silent=not machine.world.first)
    machine.print(console, "none: nothing is written")
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


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 (training failed), 2 (wrong input), 130 (stopped)."""
    try:
        config = _parse(argv)
        return _copy(config) if config.task == "copy" else _train(config)
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
