"""``python -m transformer_ext.train``: trains a model, from text to a model directory.

Without arguments it trains a translation model on the shipped English-German corpus. ``--src-train``
and ``--tgt-train`` name your own text, ``--resume`` goes on with an interrupted run, ``--task``
chooses another task. Under ``torchrun`` several processes train one model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformer_ext import __version__
from transformer_ext._command import command, import_ops, limit_openmp_spin

if __name__ == "__main__":
    limit_openmp_spin()  # What is imported below imports torch.
    import_ops()

from transformer_ext.config import (
    ArgumentParser,
    ConfigError,
    TrainConfig,
    add_arguments,
    from_yaml,
    given,
    parse_arguments,
    to_commented_yaml,
    to_dict,
)
from transformer_ext.files import FileError, atomic_write, read_json
from transformer_ext.training import distributed
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.folder import (
    RunFolder,
    check_changes,
    choose_folder,
    newest_run,
    refuse_held,
    restarted_run,
)
from transformer_ext.training.machine import Machine
from transformer_ext.training.report import Console, JsonLog, read_log, rewind_log
from transformer_ext.training.run import Run
from transformer_ext.training.tasks import task_of
from transformer_ext.training.tensorboard import Board

__all__ = ["main"]

#: The last line of a config.yaml: without it, the file was cut off.
_WHOLE = "# end\n"


class TrainingStopped(Exception):
    """The training cannot go on, for a reason outside of it that can be mended."""


def _parse(argv: Sequence[str] | None) -> TrainConfig:
    """The configuration; with ``--resume`` it begins from that of the run to go on with."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parse = functools.partial(
        parse_arguments,
        TrainConfig,
        prog=Run.command,
        description="Train a model; without options, a translation model on the shipped text.",
    )
    if "--resume" not in argv:
        return _restarted(parse(argv))
    if any(argument.split("=")[0] == "--config" for argument in argv):
        raise ConfigError(
            "--resume: goes on with the config.yaml of the run itself; leave --config out"
        )
    if any(argument.split("=")[0] == "--init-from" for argument in argv):
        raise ConfigError("--resume: goes on from the run's own checkpoint; leave --init-from out")
    parser = ArgumentParser(prog=Run.command, add_help=False)
    add_arguments(parser, TrainConfig)
    options = given(parser.parse_known_args(argv)[0], TrainConfig)
    output = options.get("output", {}).get("output")
    run = Path(output) if output else newest_run()
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--resume: {run} holds no run to go on with ({file} is missing)")
    before = _read_config(file)
    if options.get("training", {}).keys() & {"max_steps", "max_epochs"}:
        # One of them takes the place of both: a run that ends by the other would not become longer.
        argv = ["--max-steps", "auto", "--max-epochs", "auto", *argv]
    config = parse(["--config", str(file), *argv])
    # What it warns of is said when the checkpoint is compared.
    check_changes(before, config, "--resume")
    _check_steps(config, run)
    return _going_on(config, run)


def _check_steps(config: TrainConfig, run: Path) -> None:
    """Whether the run has steps left to do.

    Raises:
        ConfigError: It has done more than it is to do.
    """
    wanted, checkpoints = config.training.max_steps, Checkpoints(run / "checkpoints")
    # The newest may be damaged; to look at all of its bytes takes time, and is seldom needed.
    if wanted is not None and wanted < (checkpoints.last() or 0):
        done = checkpoints.last_good() or 0
        if wanted < done:
            raise ConfigError(
                f"--max-steps: got {wanted}, but the run has done {done} steps already"
            )


def _read_config(file: Path) -> TrainConfig:
    """The options that a run has noted.

    Raises:
        ConfigError: The file is damaged.
    """
    if not file.read_bytes().endswith(_WHOLE.encode()):
        raise ConfigError(
            f"{file}: its last line is missing, it was cut off or altered; the options of the run are also in "
            f"{file.parent / 'log.jsonl'} and in training.json of each checkpoint"
        )
    return from_yaml(TrainConfig, str(file))


def _going_on(config: TrainConfig, run: Path) -> TrainConfig:
    output = dataclasses.replace(config.output, output=str(run), resume=True, overwrite=False)
    return dataclasses.replace(config, output=output)


def _restarted(config: TrainConfig) -> TrainConfig:
    """The configuration, going on where ``torchrun --max-restarts`` has begun this run before."""
    run = None if config.output.dry_run else restarted_run(config.output.output)
    return config if run is None else _going_on(_read_config(run / "config.yaml"), run)


def _train(config: TrainConfig) -> int:
    if config.output.tensorboard:
        Board.require()
    task = task_of(config)
    config = task.preferences(config)
    task.check_metric(config)
    machine = Machine.join(config)
    world = machine.world
    console = Console(silent=not world.first)
    planned = None if config.output.dry_run else choose_folder(config)
    if planned is not None and world.first:
        refuse_held(planned)
    machine.print(console, "nothing (dry run)" if planned is None else f"{planned}/")
    machine.check_kernels(console)
    run = task.prepare(config, machine, console)
    run.print_plan()
    if planned is None:
        run.dry_run()
        return 0
    claimed = RunFolder.claim(planned, config) if world.first else None
    try:
        folder = Path(world.broadcast(str(claimed.path) if claimed else ""))
        if folder != planned:
            console.print(f"output     {folder}/ ({planned} was taken in the meantime)")
        run.use_folder(folder)
        return _train_in(folder, run)
    finally:
        if claimed is not None:
            claimed.release()


def _train_in(folder: Path, run: Run) -> int:
    """Trains in a folder that is this training's alone."""
    machine, console, world = run.machine, run.console, run.machine.world
    resume_from = _find_checkpoint(folder, run) if run.config.output.resume else None
    if world.first and not run.config.output.resume:
        _write_config(folder, run)
    board = None
    if run.config.output.tensorboard and world.first:
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
    if world.first and run.config.output.resume:
        # Not before: options that the checkpoint does not allow must not replace those that it has.
        _write_config(folder, run)
    if trainer.ended() and world.any(world.first and run.is_complete(trainer)):
        console.print(
            f"this run is finished: {trainer.progress.step:,} steps, results in "
            f"{folder / 'results.json'}. To train on: {run.go_on_command()} --max-steps N"
        )
        return 0
    try:
        with trainer.stop.installed():
            reason = trainer.fit()
        if world.first and reason != "interrupted":
            run.finish(trainer, reason, log)
    except OSError as error:
        raise TrainingStopped(
            f"{error}\nthe training stopped after step {trainer.progress.step}; "
            f"{_kept(run)}. When the cause is mended, to go on: {run.go_on_command()}"
        ) from error
    if reason == "interrupted":
        console.print(
            f"interrupted; step {trainer.progress.step} is saved. To go on: {run.go_on_command()}"
        )
        return 130
    log.close()
    world.barrier()
    return 0


def _write_config(folder: Path, run: Run) -> None:
    atomic_write(folder / "config.yaml", to_commented_yaml(run.settled_config()) + _WHOLE)


def _kept(run: Run) -> str:
    assert run.checkpoints is not None
    last = run.checkpoints.last()
    if last is None:
        return "there is no checkpoint yet"
    return f"the checkpoint of step {last} is whole ({run.checkpoints.path(last)})"


def _results_of(folder: Path) -> int | None:
    """The step whose results are in the folder."""
    try:
        return read_json(folder / "results.json").get("steps")
    except FileError:
        return None


def _find_checkpoint(folder: Path, run: Run) -> int | None:
    """Step to go on from, on every rank; the first one makes log and folder fit it.

    Raises:
        FileError: No checkpoint is good, though some were saved.
    """
    world, say = run.machine.world, run.console.print
    checkpoints = run.checkpoints
    assert checkpoints is not None
    found = ""
    if world.first:
        step = checkpoints.last_good(lambda problem: say(f"warning: {problem}"))
        log = folder / "log.jsonl"
        if step is None and log.is_file():
            saved = [e["step"] for e in read_log(log) if e["event"] == "checkpoint"]
            if saved:
                raise FileError(
                    f"{checkpoints.directory}: holds no checkpoint, though {log} tells of one at "
                    f"step {saved[-1]}"
                )
        for path in checkpoints.set_aside_after(step):
            say(f"warning: {path}: is what is left of a damaged checkpoint; not used")
        for problem in rewind_log(log, step or 0, ended=_results_of(folder) == step):
            say(f"warning: {problem}")
        found = "" if step is None else str(step)
    found = world.broadcast(found)
    if not found:
        say("the run has no checkpoint yet: it begins anew at step 0")
        return None
    say(f"going on from step {found}")
    return int(found)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # On the CPU torch has no class of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 (training failed), 2 (wrong input), 130 (stopped)."""
    try:
        config = _parse(argv)
        return _train(config)
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is as it was", file=sys.stderr)
        return 130
    except Exception as error:
        lost = distributed.describe_loss(error)
        if lost:
            print(
                f"error: {lost}. The training ends; --resume goes on from its last checkpoint, and "
                "torchrun --max-restarts N does so by itself",
                file=sys.stderr,
            )
        if lost is not None:
            return 1
        distributed.tell_others(error)
        known = isinstance(error, (FloatingPointError, TrainingStopped))
        if os.environ.get("TRANSFORMER_EXT_TRACEBACK") or not (known or _is_out_of_memory(error)):
            raise
        message = str(error)
        if not known:
            reason = message.splitlines()[0] if message else "no more can be had"
            message = (
                f"the memory does not suffice ({reason}); a smaller --max-tokens, --preset or "
                "--vocab-size needs less"
            )
        # What is wrong with the numbers is so on all ranks, and one says it.
        if not isinstance(error, FloatingPointError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr)
        return 1
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
