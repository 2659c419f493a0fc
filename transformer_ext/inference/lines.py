"""Lines of text in, for the commands: in blocks, as soon as they are there."""

from __future__ import annotations

import itertools
import os
import select
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence

from transformer_ext.inference.options import BATCH_SIZES

#: Lines of standard input that are looked through at once.
_BLOCK_LINES = 1000


class TextLines:
    """Decodes lines, and counts those that are not UTF-8.

    Only ``\\n`` ends a line; a ``\\r`` before it is dropped. Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        undecodable: lines in which bytes were replaced.
    """

    def __init__(self) -> None:
        self.undecodable = 0
        self._input_taken = False

    def take_input(self) -> int:
        """The descriptor of standard input, for whoever reads all of it.

        Raises:
            ValueError: it is closed, or has been taken before.
        """
        if sys.stdin is None:
            raise ValueError("standard input: is closed")
        if self._input_taken:
            raise ValueError("-: standard input is read already, by another option or argument")
        self._input_taken = True
        return sys.stdin.fileno()

    def decode(self, line: bytes) -> str:
        """One line, without its end."""
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.undecodable += 1
            return line.decode("utf-8", errors="replace")

    def warn(self) -> None:
        """Say on stderr how many lines were not UTF-8, if there were any."""
        if self.undecodable:
            print(
                "warning: lines with bytes that are not UTF-8, replaced by U+FFFD: "
                f"{self.undecodable}",
                file=sys.stderr,
            )

    def read(self, path: str) -> list[str]:
        """All lines of a file: plain, gzip or xz; ``-`` is standard input.

        Raises:
            CorpusError: it cannot be read.
            ValueError: see :meth:`take_input`.
        """
        from transformer_ext.data.corpus import read_lines

        if path == "-":
            blocks = self.stream_blocks(self.take_input(), _BLOCK_LINES)
            return [line for block in blocks for line in block]
        return [self.decode(line) for line in read_lines(path)]

    def file_blocks(self, paths: Iterable[str], limit: int) -> Iterator[list[str]]:
        """The lines of files, ``limit`` at a time."""
        from transformer_ext.data.corpus import read_lines

        lines = (self.decode(line) for path in paths for line in read_lines(path))
        while block := list(itertools.islice(lines, limit)):
            yield block

    def stream_blocks(self, descriptor: int, limit: int) -> Iterator[list[str]]:
        """The lines of a pipe or terminal, in blocks of at most ``limit``.

        A block is what has come by the time it is asked for, one line at least: whoever sends a
        line and waits for the answer gets it.

        Args:
            descriptor: of the open stream.
            limit: most lines held.

        Raises:
            CorpusError: the text is UTF-16 or UTF-32.
            OSError: it cannot be read.
        """
        rest = b""
        ended = False
        first = True
        while not ended or rest:
            while not ended and (
                b"\n" not in rest or (_ready(descriptor) and rest.count(b"\n") < limit)
            ):
                # Bounded, so that lines already read never exceed the limit by much.
                try:
                    chunk = os.read(descriptor, 1 << 16)
                except OSError as error:
                    raise OSError(f"standard input: cannot be read: {error.strerror}") from None
                ended = not chunk
                rest += chunk
            if first and rest.startswith(b"\xef\xbb\xbf"):
                rest = rest[3:]
            elif first and rest[:1] in (b"\xff", b"\xfe", b"\x00"):
                from transformer_ext.data.corpus import refuse_wide

                refuse_wide("standard input", rest[:4])
            first = False
            *lines, rest = rest.split(b"\n", limit)
            if ended and rest and len(lines) < limit:
                lines.append(rest)
                rest = b""
            if lines:
                yield [self.decode(line.removesuffix(b"\r")) for line in lines]


def _ready(descriptor: int) -> bool:
    """Whether a read would return at once."""
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    except (OSError, ValueError):
        # Where files cannot be asked (Windows), each line is taken by itself.
        return False


def check_as_many(path: str, lines: Sequence[str], other: str, others: Sequence[str]) -> None:
    """For two texts that belong together line by line.

    Raises:
        ValueError: one has more lines than the other.
    """
    if len(lines) != len(others):
        from transformer_ext.data.corpus import counted

        raise ValueError(
            f"{path} has {counted(len(lines), 'lines')}, {other} has {len(others):,}: "
            "expected as many"
        )


def count_lines(files: Sequence[str]) -> int | None:
    """How many lines there are, or None where they can be read only once.

    Raises:
        CorpusError: a file cannot be read.
    """
    from transformer_ext.data.corpus import read_lines

    if not files or not all(map(os.path.isfile, files)):
        return None
    return sum(1 for path in files for _ in read_lines(path))


def lines_ahead(arguments: Namespace) -> int:
    """Lines that a command reads ahead, to sort them by length (``add_batch_arguments``)."""
    return 4 * int(arguments.batch_size or BATCH_SIZES[arguments.device != "cpu"])


def input_blocks(text: TextLines, files: Sequence[str], limit: int) -> Iterator[list[str]]:
    """What a command reads: the lines of files, or of standard input, at most ``limit`` at a time.

    Args:
        text: decodes them.
        files: the files; none or ``-`` is standard input, which is invited to type on a terminal.
        limit: most lines held.

    Raises:
        ValueError: standard input among files, closed, or read by another option.
        CorpusError: a file cannot be read.
    """
    if files not in ([], ["-"]):
        if "-" in files:
            raise ValueError("-: standard input cannot be one of several files")
        yield from text.file_blocks(files, limit)
        return
    descriptor = text.take_input()
    terminal = sys.stdin.isatty()
    if terminal:
        print(
            "Type a sentence and press Enter (Ctrl-D ends):\n> ",
            file=sys.stderr,
            end="",
            flush=True,
        )
    for block in text.stream_blocks(descriptor, limit):
        yield block
        if terminal:
            print("> ", file=sys.stderr, end="", flush=True)
    if terminal:
        print(file=sys.stderr)
