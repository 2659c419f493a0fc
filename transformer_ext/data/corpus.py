"""Parallel text in files: what is shipped, how it is read, what is wrong with it.

A file is plain, gzip or xz, told apart by its first bytes. It is UTF-8, one sentence a line. Only
``\\n`` ends a line (a ``\\r`` before it is dropped): the other characters that Unicode or Python
count as line ends, such as U+2028, U+0085 or a form feed, occur inside sentences, and splitting
there would shift every later pair.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

BadLines = Literal["error", "skip"]

HELD_OUT_LIMIT = 2000


class CorpusError(ValueError):
    """Text that cannot be used; the message names file, line, and what is wrong."""


@dataclass(frozen=True)
class ParallelText:
    """Pairs of files, aligned line by line.

    Attributes:
        src: paths of the source side.
        tgt: paths of the target side, as many.
    """

    src: tuple[str, ...] = ()
    tgt: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.src)

    def check_files(self) -> None:
        """Look at the files without reading their text.

        Raises:
            CorpusError: unequal numbers of files, a missing or unreadable one, or the same file on
                both sides.
        """
        if len(self.src) != len(self.tgt):
            raise CorpusError(
                f"{len(self.src)} source files and {len(self.tgt)} target files, expected as many "
                "of each"
            )
        for path in (*self.src, *self.tgt):
            if not os.path.exists(path):
                raise CorpusError(f"{path}: no such file")
            if os.path.isdir(path):
                raise CorpusError(f"{path}: is a folder, expected a text file")
            if not os.access(path, os.R_OK):
                raise CorpusError(f"{path}: may not be read")
        for src, tgt in zip(self.src, self.tgt, strict=True):
            if os.path.samefile(src, tgt):
                raise CorpusError(f"{src} is given as source and as target")


@dataclass(frozen=True)
class Corpus:
    """A named set of parallel text for training, validation and the final test."""

    name: str
    train: ParallelText
    dev: ParallelText
    test: ParallelText


def shipped_corpus() -> Corpus:
    """The English-German text in the package: software help, 36,673 pairs to train on."""
    folder = Path(__file__).parent / "libreoffice_help.en-de"

    def part(name: str) -> ParallelText:
        return ParallelText((str(folder / f"{name}.en.xz"),), (str(folder / f"{name}.de.xz"),))

    return Corpus("libreoffice_help.en-de", part("train"), part("dev"), part("test"))


@dataclass
class SkippedPairs:
    """How many pairs were read and used, and why others were not.

    Attributes:
        read: pairs in the files.
        used: pairs handed on.
        empty: pairs with an empty line on a side.
        undecodable: pairs with a line that is not UTF-8.
        too_long: pairs with more tokens than allowed on a side.
        ratio: pairs whose sides differ too much in length.
        held_out: pairs put aside for validation, or equal to one of those.
        identical: used pairs with the same text on both sides.
    """

    read: int = 0
    used: int = 0
    empty: int = 0
    undecodable: int = 0
    too_long: int = 0
    ratio: int = 0
    held_out: int = 0
    identical: int = 0

    def describe(self) -> str:
        """One line for people, for example ``36,673 pairs, 12 skipped (10 empty, 2 too long)``."""
        reasons = {
            "empty": self.empty,
            "not UTF-8": self.undecodable,
            "too long": self.too_long,
            "too unequal in length": self.ratio,
            "held out for validation": self.held_out,
        }
        text = f"{self.used:,} pairs"
        if self.read != self.used:
            found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            text += f" of {self.read:,} ({found})"
        if self.identical:
            text += f"; {self.identical:,} of them are the same on both sides"
        return text

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


def open_text(path: str) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    """Open a plain, gzip or xz file for reading its bytes.

    Raises:
        CorpusError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if start == b"\xfd7zXZ\x00":
        return lzma.open(path, "rb")
    refuse_wide(path, start)
    return open(path, "rb")


def refuse_wide(name: str, start: bytes) -> None:
    """Refuse a text whose first bytes are the byte order mark of UTF-16 or UTF-32.

    Raises:
        CorpusError: they are.
    """
    for code, marks in (
        # That of UTF-32 begins with that of UTF-16.
        ("UTF-32", (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")),
        ("UTF-16", (b"\xff\xfe", b"\xfe\xff")),
    ):
        if start.startswith(marks):
            raise CorpusError(
                f"{name}: is {code}, expected UTF-8 (iconv -f {code} -t UTF-8 converts)"
            )


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, without their ends and without a byte order mark.

    Raises:
        CorpusError: the file cannot be read, or its compressed data are broken.
    """
    try:
        with open_text(path) as file:
            for number, line in enumerate(file):
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield line.removesuffix(b"\n").removesuffix(b"\r")
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path}: its compressed data are broken: {error}") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from None


_END = object()


def read_pairs(
    text: ParallelText, bad_lines: BadLines = "error", skipped: SkippedPairs | None = None
) -> Iterator[tuple[str, str]]:
    """The sentence pairs of aligned files, in order, read as a stream.

    Args:
        text: the files.
        bad_lines: what to do with a pair that has an empty line (or one of white space alone) or
            bytes that are not UTF-8: ``error`` or ``skip``.
        skipped: counts what was read and left out, complete when the iterator is exhausted.

    Raises:
        CorpusError: unequal numbers of lines, the same text in both files, a missing or broken
            file; under ``error`` a bad line, with its file and number.
    """
    text.check_files()
    skipped = SkippedPairs() if skipped is None else skipped
    for src_path, tgt_path in zip(text.src, text.tgt, strict=True):
        src_lines, tgt_lines = read_lines(src_path), read_lines(tgt_path)
        number = used = identical = 0
        while True:
            raw_src, raw_tgt = next(src_lines, _END), next(tgt_lines, _END)
            if raw_src is _END or raw_tgt is _END:
                break
            number += 1
            skipped.read += 1
            src = _decode(raw_src, src_path, number, bad_lines)
            tgt = _decode(raw_tgt, tgt_path, number, bad_lines)
            if src is None or tgt is None:
                skipped.undecodable += 1
                continue
            if not src or not tgt or src.isspace() or tgt.isspace():
                if bad_lines == "error":
                    path = src_path if not src or src.isspace() else tgt_path
                    raise CorpusError(
                        f"{path}:{number}: empty line; --bad-lines skip leaves such pairs out"
                    )
                skipped.empty += 1
                continue
            used += 1
            identical += src == tgt
            yield src, tgt
        if raw_src is not raw_tgt:
            more = src_path if raw_tgt is _END else tgt_path
            rest = 1 + sum(1 for _ in (src_lines if raw_tgt is _END else tgt_lines))
            fewer = tgt_path if raw_tgt is _END else src_path
            raise CorpusError(
                f"{more} has {number + rest:,} lines and {fewer} has {number:,}; expected as many "
                "in both, each pair of lines a sentence and its translation"
            )
        if used > 1 and identical == used:
            raise CorpusError(
                f"{src_path} and {tgt_path} hold the same text, expected a text and its translation"
            )
        skipped.used += used
        skipped.identical += identical


def _decode(line: object, path: str, number: int, bad_lines: BadLines) -> str | None:
    assert isinstance(line, bytes)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if bad_lines == "skip":
            return None
        raise CorpusError(
            f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} "
            "of the line; --bad-lines skip leaves such pairs out"
        ) from None


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        CorpusError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


@dataclass
class HeldOut:
    """Which pairs are put aside for validation: those whose source text has a small hash.

    The choice depends on the text alone, not on its order, so a pair that occurs again never has
    one copy to train on and one to validate on.

    Attributes:
        seed: another seed chooses other pairs.
        threshold: source texts with a hash up to this are held out; -1 is none.
        pairs: the pairs for validation, each source text once.
    """

    seed: int = 0
    threshold: int = -1
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def __contains__(self, src: str) -> bool:
        return self.threshold >= 0 and _text_hash(src, self.seed) <= self.threshold

    @classmethod
    def choose(
        cls,
        pairs: Iterable[tuple[str, str]],
        part: float,
        seed: int = 0,
        limit: int = HELD_OUT_LIMIT,
    ) -> HeldOut:
        """Choose from a stream of pairs, in memory for ``limit`` pairs only.

        Args:
            pairs: all pairs.
            part: part of the pairs to hold out, at least one pair if above 0.
            seed: another seed chooses other pairs.
            limit: at most so many pairs.

        Raises:
            CorpusError: fewer than two different source texts.
        """
        kept: list[tuple[int, str, str]] = []
        hashes: set[int] = set()
        count = 0
        for src, tgt in pairs:
            count += 1
            key = _text_hash(src, seed)
            if key in hashes or (len(kept) == limit + 1 and key > -kept[0][0]):
                continue
            hashes.add(key)
            heapq.heappush(kept, (-key, src, tgt))
            if len(kept) > limit + 1:
                hashes.remove(-heapq.heappop(kept)[0])
        if part <= 0:
            return cls(seed)
        if len(kept) < 2:
            raise CorpusError(
                f"{count} pairs with {len(kept)} different source sentences: too few to hold some "
                "out for validation; give --src-dev and --tgt-dev"
            )
        wanted = min(limit, max(1, round(part * count)), len(kept) - 1)
        chosen = sorted(kept, reverse=True)[:wanted]
        return cls(seed, -chosen[-1][0], [(src, tgt) for _, src, tgt in chosen])


def _text_hash(text: str, seed: int) -> int:
    key = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(key.digest(), "little")
