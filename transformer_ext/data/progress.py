"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Lines that nobody watches are for a log.
_FIRST_LINE_SECONDS = 10.0
_LINE_SECONDS = 30.0


class Progress:
    """Tells of work on a text of known size.

    Args:
        what: the work, for people.
        total: bytes that will be read.
        say: takes a line, where the standard error is not a terminal; None: nothing is told.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None] | None) -> None:
        self._what = what
        self._total = total
        self._say = say
        self._read = 0
        self._pairs = 0
        self._begin = time.monotonic()
        self._next = self._begin + _FIRST_LINE_SECONDS
        self._bar: Any = None
        if say is not None and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()
            self._bar = tqdm(
                total=total,
                desc=what,
                unit="B",
                unit_scale=True,
                leave=False,
                mininterval=0.2,
                # A terminal without a size would show nothing.
                ncols=min(100, size.columns - 1),
                nrows=size.lines,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def read(self, count: int) -> None:
        """So many more bytes were read."""
        self._read += count
        if self._bar is not None:
            self._bar.update(count)

    def done(self, pairs: int) -> None:
        """So many more pairs are done."""
        self._pairs += pairs
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._pairs:,} pairs", refresh=False)
            return
        now = time.monotonic()
        if self._say is None or now < self._next:
            return
        self._next = now + _LINE_SECONDS
        share = self._read / self._total if self._total else 1.0
        rate = self._pairs / (now - self._begin)
        self._say(f"{self._what}: {100 * share:.0f} %, {self._pairs:,} pairs, {rate:,.0f} a second")
