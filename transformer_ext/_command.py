"""What the commands have in common: how they begin and end."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from transformer_ext._native import why_no_torch

#: Why a write can fail: no room, a limit, or a broken or read-only descriptor.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF)

#: What GNU's OpenMP reads of how its threads wait for each other.
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
#: Pauses of the processor. A wait of the default, 300,000 (30 ms), takes the core from the thread that
#: is waited for if others want it. These cost no time on a quiet machine; 1,000 do: docs/training.md,
#: "Beside other work".
SPIN_COUNT = "2000"

Main = Callable[[Sequence[str] | None], int]


def command(main: Main) -> Callable[..., int]:
    """``main`` of a command, with one line on stderr and a status for what a user can run into.

    The status is 2 for an error, 130 for Ctrl-C, and 141, without a word, where the reader of the
    output has gone. An output that cannot be written is an error. With TRANSFORMER_EXT_TRACEBACK in
    the environment an error is raised instead, to see where it comes from.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        # Python has None for a stream that is closed, and print() takes None for stdout.
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")
        if sys.stdout is None:
            print("error: standard output: is closed", file=sys.stderr)
            return 2
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
            return 141
        except KeyboardInterrupt:
            return 130
        except (ImportError, OSError, ValueError) as error:
            if os.environ.get("TRANSFORMER_EXT_TRACEBACK"):
                raise
            message = str(error)
            if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "torch":
                message = why_no_torch(error)
            # Other files that cannot be written are in the error by name.
            if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
                discard_output()
                message = f"standard output: {error.strerror}"
            print(f"error: {message}", file=sys.stderr)
            return 2

    return run


def limit_openmp_spin() -> None:
    """Lets the threads of torch go to sleep soon when they wait for each other, unless it is set.

    For a command that computes with torch, in a process of its own: the OpenMP that torch brings
    reads it once, when torch is imported, and after that nothing is changed. It is in the
    environment, so processes that this one starts have it too: workers that read data, for which it
    changes nothing.
    """
    if "torch" not in sys.modules and not any(map(os.environ.get, _WAITING)):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def import_ops() -> None:
    """For a command whose own imports import torch: where that fails, it ends as by :func:`command`.

    So it does where a variable of the environment that is read at import is wrong.
    """

    @command
    def run(_: Sequence[str] | None) -> int:
        importlib.import_module("transformer_ext.ops")
        return 0

    if status := run():
        sys.exit(status)


def discard_output() -> None:
    """Nothing goes to standard output any more, so that Python's own flush at exit does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
