"""What a training tells people and programs: console lines, ``log.jsonl``.

On a terminal one line is rewritten in place; elsewhere (a file, a pipe, CI) a plain line is printed
every ``log_every`` steps. ``log.jsonl`` holds the same figures, one JSON object a line, each with
an ``event``: ``start``, ``train``, ``validation``, ``checkpoint``, ``resume``, ``end``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from transformer_ext._command import discard_output
from transformer_ext.files import atomic_write, write_error
from transformer_ext.training.tensorboard import Board

__all__ = ["Console", "JsonLog", "duration", "read_log", "rewind_log"]


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
        self._path = path
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                # Unbuffered: a line that the disk had no room for is not tried again at the end.
                self._file = cast(BinaryIO, open(path, "ab", buffering=0))
            except OSError as error:
                raise write_error(path, error) from error

    def write(self, event: str, /, **values: Any) -> None:
        """Writes one event; a number that JSON cannot hold (NaN, infinity) becomes null."""
        if self._file is None:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        assert self._path is not None
        line = (json.dumps({"event": event, **clean}, ensure_ascii=False) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise write_error(self._path, error, len(line)) from error
        if self._board is not None:
            self._board.write(event, values)

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


def rewind_log(path: str | os.PathLike[str], step: int, *, ended: bool = False) -> list[str]:
    """Removes from a ``log.jsonl`` what a run that goes on from ``step`` writes again.

    Those are the lines of later steps, and a last line cut short by a crash. A file that is not there
    stays so.

    Args:
        path: The file.
        step: Of the checkpoint that is gone on from.
        ended: Whether the run had come to its end there, and the line that says so stays.

    Returns:
        What else was wrong, a line each: broken lines, which are removed too.
    """
    path = Path(path)
    try:
        # Not splitlines(): JSON leaves U+2028 and its like as they are, and they end no line here.
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    kept, problems = [], []
    for number, line in enumerate(lines, 1):
        event = _parse_line(line)
        if event is None:
            if number < len(lines) and line.strip(b"\0 "):
                problems.append(f"{path}: line {number} is broken and was removed")
        elif event.get("step", 0) <= step and (ended or event["event"] != "end"):
            kept.append(line + b"\n")
    if kept != [line + b"\n" for line in lines[:-1]] or lines[-1]:
        atomic_write(path, b"".join(kept))
    return problems


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if whole and isinstance(event.get("step", 0), int) else None


def foreign_line(path: str | os.PathLike[str]) -> int | None:
    """Number, from 1, of the first line of a file that no training has written, or None.

    A line cut short by a crash is one of a training.
    """
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        begin = b'{"event": '
        cut = number == len(lines) and line[: len(begin)] == begin[: len(line)]
        if line.strip(b"\0 \r") and not cut and _parse_line(line) is None:
            return number
    return None


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Events of a ``log.jsonl`` in order of steps; what was trained again after a resume counts
    once, as trained last. A line cut short by a crash is left out."""
    events: list[dict[str, Any]] = []
    for line in Path(path).read_bytes().split(b"\n"):
        event = _parse_line(line)
        if event is None:
            continue
        if event["event"] == "resume":
            events = [e for e in events if e.get("step", 0) <= event["step"]]
        events.append(event)
    return events
