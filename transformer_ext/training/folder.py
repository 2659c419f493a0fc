"""The folder of a run: choosing it, keeping other trainings out of it, and going on in it.

A training holds a lock on the file ``lock`` in its folder as long as it lives. The system gives it
back when the process ends, however it ends, so a lock is never left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformer_ext.config import ConfigError, TrainConfig, options, to_dict
from transformer_ext.files import FileError, read_json, remove_abandoned, write_error

__all__ = [
    "RunFolder",
    "check_changes",
    "choose_folder",
    "newest_run",
    "refuse_held",
    "restarted_run",
]

_RUNS = Path("runs")
_LOCK = "lock"

#: What a resumed run may have differently, none of which changes the weights of a step.
_FREE = {
    *("training.max_steps", "training.max_epochs", "training.max_minutes"),
    *("training.validate_every", "training.early_stop_patience", "training.log_every"),
    *("training.max_skipped_steps", "training.data_workers", "data.cache", "data.prepare_workers"),
    "training.cuda_graphs",
}
_METRIC = "evaluation.validation_metric"
#: What it may have differently after a warning: the weights will be others, as is then wanted. Threads,
#: device and precision are warned of by what they turn out to be.
_FREE_IN_GROUPS = ("evaluation", "output")
_BY_FACTS = {"training.threads", "training.device", "training.precision"}
_WARNED = {"training.accum_steps", "training.ema_decay"}
_WARNED_GROUPS = ("optimizer",)
#: The text may have moved; whether it is the same is seen from its content.
_BY_CONTENT = {
    *(
        f"{name}_{part}"
        for name in (
            *("data.src", "data.tgt", "data.pairs"),
            *("language_model.text", "classification.labelled"),
        )
        for part in ("train", "dev", "test")
    ),
    *("data.tokenizer", "data.src_tokenizer", "data.tgt_tokenizer"),
}
_CORPORA = "data.corpora"


def _runs() -> list[Path]:
    """The numbered runs in the default folder, ascending."""
    if not _RUNS.is_dir():
        return []
    return sorted((p for p in _RUNS.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def newest_run() -> Path:
    """The numbered run with the highest number.

    Raises:
        ConfigError: There is none.
    """
    runs = _runs()
    if not runs:
        raise ConfigError(
            f"--resume: {_RUNS}/ holds no numbered run, as a training without --output makes; name the "
            "folder of the run with --output"
        )
    return runs[-1]


def restarted_run(output: str | None) -> Path | None:
    """The run that ``torchrun --max-restarts`` wants to go on with, all its processes being new.

    Args:
        output: The folder that the options name, if they do.

    Returns:
        None where this is the first start, or no process came as far as to begin a run.

    Raises:
        ConfigError: The job has no name to know its run by.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":
        raise ConfigError(
            "torchrun: restarts a job without a name, expected --rdzv-id NAME to know its run by; "
            "--output FOLDER --resume goes on with a run"
        )
    candidates = [Path(output)] if output else list(reversed(_runs()))
    for folder in candidates:
        if (folder / "config.yaml").is_file() and _holder(folder).get("job") == name:
            return folder
    return None


def _holder(folder: Path) -> dict[str, Any]:
    """What the lock file says of who holds or held it."""
    try:
        return read_json(folder / _LOCK)
    except FileError:
        return {}


def _in_use(folder: Path) -> bool:
    """Whether anything lies in the folder but what a training that died at once has left."""
    return folder.is_dir() and any(
        path.name != _LOCK and ".tmp-" not in path.name for path in folder.iterdir()
    )


def choose_folder(config: TrainConfig) -> Path:
    """The folder for this run; nothing is made or removed yet.

    Raises:
        ConfigError: It holds something, and neither --resume nor --overwrite is given.
    """
    if config.output.output is None:
        return _RUNS / f"{int(_runs()[-1].name) + 1 if _runs() else 1:03d}"
    folder = Path(config.output.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file, expected a folder")
    if not config.output.resume and _in_use(folder):
        if not config.output.overwrite:
            raise ConfigError(
                f"--output: {folder} is not empty; --overwrite replaces the run in it, --resume "
                "goes on with it"
            )
        # The lock alone is of a training that ended before it had noted its options.
        if not any((folder / name).is_file() for name in ("config.yaml", _LOCK)):
            raise ConfigError(f"--overwrite: {folder} holds no run; nothing was removed")
    return folder


def refuse_held(folder: Path) -> None:
    """Looks whether another training writes to a folder, before the text is read for this one.

    :meth:`RunFolder.claim` is what keeps others out.

    Raises:
        ConfigError: One does.
    """
    if (folder / _LOCK).is_file():
        with contextlib.suppress(OSError):
            held = _lock(folder)
            if held is not None:
                held.close()


@dataclass
class RunFolder:
    """A folder that no other training writes to as long as this object is not released.

    Attributes:
        path: The folder.
    """

    path: Path
    _lock: TextIO | None = None

    @staticmethod
    def claim(folder: Path, config: TrainConfig) -> RunFolder:
        """Makes the folder and locks it; empty, unless a run in it is to be resumed.

        Args:
            folder: As :func:`choose_folder` gave it; if that chose the number, and another training
                has taken it in the meantime, the next free number is taken.
            config: Says whether what is there is to be kept.

        Raises:
            ConfigError: Another training writes to it.
            WriteError: It cannot be written.
        """
        try:
            while True:
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    if config.output.output is not None:
                        break
                    folder = folder.with_name(f"{int(folder.name) + 1:03d}")
                else:
                    break
            claimed = RunFolder(folder, _lock(folder))
            if not config.output.resume:
                claimed._empty()
            remove_abandoned(folder)
            # Not before: a restarted job finds its run by this.
            claimed._sign()
        except OSError as error:
            raise write_error(folder, error) from error
        return claimed

    def _empty(self) -> None:
        # First what says that a run is here.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name != "config.yaml"):
            if path.name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _sign(self) -> None:
        """Says in the lock file whose it is."""
        if self._lock is not None:
            holder = {
                "process": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "job": os.environ.get("TORCHELASTIC_RUN_ID"),
            }
            self._lock.truncate(0)
            self._lock.write(json.dumps(holder) + "\n")
            self._lock.flush()

    def release(self) -> None:
        """Lets others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(folder: Path) -> TextIO | None:
    try:
        import fcntl
    except ImportError:
        return None
    file = open(folder / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as we live)
    try:
        # Not flock(): its locks would be held on by processes that this one has started.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = _describe(file.read())
        file.close()
        raise ConfigError(
            f"--output: another training{who} writes to {folder}; wait for its end, or name "
            "another folder"
        ) from None
    except OSError:
        # Some network file systems have none.
        return file
    return file


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f" (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return ""


def _without_files(corpora: Any) -> list[dict[str, Any]]:
    names = ("src", "tgt", "pairs")
    return [{k: v for k, v in corpus.items() if k not in names} for corpus in corpora or ()]


def check_changes(before: TrainConfig, after: TrainConfig, where: str) -> Iterable[str]:
    """Compares the options of a run with those it is to go on with.

    Args:
        before: Of the run.
        after: Now.
        where: Where they come from now, for the message.

    Returns:
        Warnings, a line each: options that change what is learned from here on.

    Raises:
        ConfigError: An option that a run has from its first step to its last differs.
    """
    old, new = to_dict(before), to_dict(after)
    warnings = []
    for entry in options(TrainConfig):
        was, now = (
            (values.get(entry.group, {}) if entry.group else values).get(entry.name)
            for values in (old, new)
        )
        if was == now or entry.key in _FREE | _BY_FACTS | _BY_CONTENT:
            continue
        change = f"{entry.key} was {was!r} and is {now!r} now"
        if entry.key == _METRIC:
            warnings.append(
                f"{change}: which checkpoint is the best, and how long validation got no better, is "
                "counted from here on"
            )
        if entry.group in _FREE_IN_GROUPS:
            continue
        if entry.key == _CORPORA and _without_files(was) == _without_files(now):
            continue
        if entry.key not in _WARNED and entry.group not in _WARNED_GROUPS:
            raise ConfigError(
                f"{where}: {change}; the run would be another one: leave it as it was, or begin a "
                "new run in another folder"
            )
        warnings.append(f"{change}: what is learned from here on changes with it")
    steps = before.training.max_steps, after.training.max_steps
    if steps[0] != steps[1] and after.optimizer.schedule in ("linear", "cosine"):
        warnings.append(
            f"training.max_steps was {steps[0]} and is {steps[1]} now: the learning rate falls to 0 "
            f"there (optimizer.schedule {after.optimizer.schedule}), so it is another from here on"
        )
    return warnings
