"""Checkpoints: directories ``step-N`` that are whole or absent, and pointers to the last and best.

A checkpoint holds a model directory (what translation reads) and the training state:
``training.safetensors`` (optimizer moments keyed by parameter name) and ``training.json`` (step,
epoch, batch, what the run was). It is written as ``step-N.tmp-...``, synced to the disk and renamed,
then the pointer ``last`` is replaced: a crash at any moment leaves the former checkpoint usable.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from transformer_ext.files import (
    FileError,
    Tensors,
    atomic_directory,
    atomic_write,
    read_json,
    save_tensors,
    write_json,
)

__all__ = ["Checkpoints", "TRAINING_FORMAT_VERSION"]

TRAINING_FORMAT_VERSION = 1
_STEP = re.compile(r"step-(\d+)")
_TENSORS = "training.safetensors"
_STATE = "training.json"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they lie; made when the first is saved.
        keep: How many of the newest to keep; what ``best`` and ``last`` point to is always kept.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 5) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints: got {keep}, expected 1 or more")
        self.directory = Path(directory)
        self.keep = keep

    def path(self, step: int) -> Path:
        """Directory of the checkpoint of ``step``, whether it exists or not."""
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(p.name) for p in self.directory.iterdir())
        return sorted(int(m[1]) for m in matches if m)

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: Sequence[int] = (),
    ) -> Path:
        """Writes the checkpoint of ``step`` and returns its directory.

        Args:
            step: Optimizer steps done.
            write_model: Writes the model directory into the (existing) directory it is given.
            tensors: Training state by name.
            state: What goes into ``training.json``; ``step`` and the format version are added.
            best: Steps of the best checkpoints, the best one first: ``best`` is to point to that,
                and all of them are kept.
        """
        for abandoned in self.directory.glob("step-*.tmp-*"):
            shutil.rmtree(abandoned)
        final = self.path(step)
        with atomic_directory(final, overwrite=True) as folder:
            write_model(folder)
            save_tensors(folder / _TENSORS, tensors)
            content = {"format_version": TRAINING_FORMAT_VERSION, "step": step, **state}
            write_json(folder / _STATE, content)
        self.point("last", step)
        if best:
            self.point("best", best[0])
        self._prune(best)
        return final

    def point(self, name: str, step: int) -> None:
        """Lets the pointer ``name`` (``last`` or ``best``) name the checkpoint of ``step``."""
        atomic_write(self.directory / name, f"{self.path(step).name}\n")

    def pointed(self, name: str) -> int | None:
        """Step that the pointer ``name`` names; None if there is none or it is gone."""
        try:
            content = (self.directory / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        match = _STEP.fullmatch(content)
        return int(match[1]) if match and self.path(int(match[1])).is_dir() else None

    def last(self) -> int | None:
        """Step of the newest checkpoint, also after a crash between rename and pointer."""
        steps = self.steps()
        return steps[-1] if steps else None

    def newest(self, count: int) -> list[Path]:
        """Directories of the newest ``count`` checkpoints, ascending by step."""
        return [self.path(step) for step in self.steps()[-count:]]

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Training state of ``step``: (tensors by name on the CPU, content of training.json).

        Raises:
            FileError: No such checkpoint, one without training state, or in an unknown format.
        """
        directory = self.path(step)
        state = read_json(directory / _STATE)
        if state.get("format_version") != TRAINING_FORMAT_VERSION:
            raise FileError(
                f"{directory / _STATE}: format_version is {state.get('format_version')!r}, expected "
                f"{TRAINING_FORMAT_VERSION}; another version of this package wrote it"
            )
        arrays = Tensors(directory / _TENSORS)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, state

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the checkpoints that is gone after the block."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # Named as what a killed process leaves, and like that removed by the next save.
        with TemporaryDirectory(prefix="step-0.tmp-", dir=self.directory) as folder:
            yield Path(folder)

    def _prune(self, best: Sequence[int]) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], *best, self.pointed("last"), self.pointed("best")}
        for step in steps:
            if step not in kept:
                # Renamed first: one that is half removed must not look like a checkpoint.
                path = self.path(step)
                removed = path.with_name(f"{path.name}.tmp-removed")
                os.replace(path, removed)
                shutil.rmtree(removed)
