"""What a training tells people and programs: console lines, ``log.jsonl``, the loss curve.

On a terminal one line is rewritten in place; elsewhere (a file, a pipe, CI) a plain line is printed
every ``log_every`` steps. ``log.jsonl`` holds the same figures, one JSON object a line, each with
an ``event``: ``start``, ``train``, ``validation``, ``checkpoint``, ``resume``, ``end``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from transformer_ext._command import discard_output
from transformer_ext.training.tensorboard import Board

__all__ = ["Console", "JsonLog", "duration", "read_log", "save_loss_curve"]


def duration(seconds: float) -> str:
    """Seconds for people: ``42s``, ``3m 20s``, ``2h 05m``, ``3d 04h``."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


class Console:
    """Lines on the console, and one live line where it is a terminal.

    Args:
        stream: Where to write; standard output by default.
        live: Rewrite one line in place; by default where the stream is a terminal.
        silent: Write nothing (ranks other than the first).
    """

    #: Seconds between two rewrites of the live line: often enough to look alive, and on a GPU the
    #: figures for it are read from the device no more often.
    interval = 1.0

    def __init__(
        self, stream: TextIO | None = None, *, live: bool | None = None, silent: bool = False
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.live = self._stream.isatty() if live is None else live
        self.silent = silent
        self._line_open = False
        self._shown_at = -math.inf

    def print(self, text: str = "") -> None:
        """Prints whole lines; a live line is cleared first."""
        if not self.silent:
            self._clear()
            self._write(text + "\n")

    def wants_update(self) -> bool:
        """Whether the live line is due."""
        now = time.monotonic()
        return self.live and not self.silent and now - self._shown_at >= self.interval

    def update(self, text: str) -> None:
        """Rewrites the live line, cut to the width of the terminal."""
        if self.silent or not self.live:
            return
        self._clear()
        self._write(text[: shutil.get_terminal_size().columns - 1])
        self._line_open = True
        self._shown_at = time.monotonic()

    def _clear(self) -> None:
        if self._line_open:
            self._write("\r\x1b[K")
            self._line_open = False

    def _write(self, text: str) -> None:
        """Writes text at once; whoever has gone, or a full disk, is no reason to end a training."""
        if self.silent:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except OSError as error:
            self.silent = True
            if self._stream is sys.stdout:
                discard_output()
            with contextlib.suppress(OSError):
                print(
                    f"warning: standard output: {error.strerror}; the training goes on without it",
                    file=sys.stderr,
                )


class JsonLog:
    """Appends one JSON object a line to a file; each line is flushed.

    Args:
        path: The file; None writes nowhere (ranks other than the first).
        board: Is given the same.
    """

    def __init__(self, path: str | os.PathLike[str] | None, board: Board | None = None) -> None:
        self._board = board
        self._file = None if path is None else open(path, "a", encoding="utf-8")

    def write(self, event: str, /, **values: Any) -> None:
        """Writes one event; a number that JSON cannot hold (NaN, infinity) becomes null."""
        if self._file is None:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"event": event, **clean}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.write(event, values)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Events of a ``log.jsonl`` in order of steps; what was trained again after a resume counts
    once, as trained last. A line cut short by a crash is left out."""
    events: list[dict[str, Any]] = []
    # Not splitlines(): JSON leaves U+2028 and its like as they are, and they end no line here.
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == "resume":
            events = [e for e in events if e.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def save_loss_curve(
    events: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "Training"
) -> None:
    """Draws training and validation loss per token, and BLEU where there is one, against the steps.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    from transformer_ext.visualize import new_figure

    events = list(events)
    train = [e for e in events if e["event"] == "train" and e.get("nll") is not None]
    valid = [e for e in events if e["event"] == "validation" and e.get("nll") is not None]
    scored = [e for e in valid if e.get("bleu") is not None]
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.plot([e["step"] for e in train], [e["nll"] for e in train], label="training", alpha=0.7)
    axes.plot([e["step"] for e in valid], [e["nll"] for e in valid], "o-", label="validation")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("negative log-likelihood per target token, nats")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if scored:
        right = axes.twinx()
        right.plot([e["step"] for e in scored], [e["bleu"] for e in scored], "s--", color="C2")
        right.set_ylabel("validation BLEU", color="C2")
    axes.legend(loc="upper center")
    figure.savefig(os.fspath(path))
