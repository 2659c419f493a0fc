"""Processes that die as by ``kill -9``: between any two operations on files, or at any time."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformer_ext import files

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


class Operations:
    """Counts what this process does to files; never undone, so only for a forked process.

    Args:
        before: Is called before each operation with its number, from 0.
        folder: Where to count; what goes on elsewhere, in caches, is left out.
    """

    def __init__(self, before: Callable[[int], None], folder: Path) -> None:
        self.count = 0
        self._folder = str(folder)
        self._before = before
        write, fsync = files._write, os.fsync

        def write_in_two(file: Any, data: Any) -> None:
            view = memoryview(data)
            middle = len(view) // 2
            for part in (view[:middle], view[middle:]):
                self._tick()
                write(file, part)

        def counted_fsync(descriptor: int) -> None:
            self._tick()
            fsync(descriptor)

        files._write = write_in_two  # type: ignore[assignment]
        os.fsync = counted_fsync
        sys.addaudithook(self._hear)

    def _tick(self) -> None:
        number, self.count = self.count, self.count + 1
        self._before(number)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        if writes or event in _CHANGES:
            path = os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else ""
            # shutil.rmtree() names what it removes relative to the folder that it is in.
            if path.startswith(self._folder) or not os.path.isabs(path):
                self._tick()


def forked(body: Callable[[], int | None]) -> int:
    """Runs the body in a forked process; returns its process id.

    The process must not have used a second thread yet: a fork has none.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = body() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_of(pid: int) -> int:
    """Waits; returns the exit status, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(operation: int, folder: Path, body: Callable[[], int | None]) -> int:
    """Runs the body in a process that is killed before its ``operation``-th operation in a folder.

    Returns:
        As :func:`end_of`: ``-signal.SIGKILL``, or 0 if the body had fewer operations.
    """

    def die(number: int) -> None:
        if number == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted() -> int | None:
        Operations(die, folder)
        return body()

    return end_of(forked(counted))
