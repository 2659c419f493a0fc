"""Parallel text in files: what is shipped, how it is read, what is wrong with it.

A file is plain, gzip or xz, told apart by its first bytes. It is UTF-8, one sentence a line, or,
where its name ends in ``.tsv``, ``.jsonl`` or ``.json`` (before ``.gz`` or ``.xz``), one pair a
line. Only ``\\n`` ends a line (a ``\\r`` before it is dropped): the other characters that Unicode
or Python count as line ends, such as U+2028, U+0085 or a form feed, occur inside sentences, and
splitting there would shift every later pair.

Text is read as :class:`Chunk`, a few thousand lines that are still bytes, and each chunk is parsed by
itself, here or in another process.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, cast

BadLines = Literal["error", "skip"]
Format = Literal["lines", "tsv", "jsonl"]

_FORMATS: dict[str, Format] = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}
# Lines in a chunk, and bytes that are read at once of each file.
_CHUNK_LINES = 4096
_BLOCK_BYTES = 1 << 19

HELD_OUT_LIMIT = 2000


class CorpusError(ValueError):
    """Text that cannot be used; the message names file, line, and what is wrong."""


@dataclass(frozen=True)
class ParallelText:
    """Pairs of files, aligned line by line, and files that hold both sides.

    Attributes:
        src: paths of the source side.
        tgt: paths of the target side, as many.
        pairs: paths of files with both sides, read after the others.
        keys: where source and target stand in the objects of JSON files, see :func:`parse`.
    """

    src: tuple[str, ...] = ()
    tgt: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    keys: tuple[str, str] = ("src", "tgt")

    def __bool__(self) -> bool:
        return bool(self.src or self.pairs)

    @property
    def paths(self) -> tuple[str, ...]:
        """All files."""
        return (*self.src, *self.tgt, *self.pairs)

    def check_files(self) -> None:
        """Look at the files without reading their text.

        Raises:
            CorpusError: unequal numbers of files, a missing or unreadable one, the same file on
                both sides, or a file of pairs whose name does not tell its format.
        """
        if len(self.src) != len(self.tgt):
            raise CorpusError(
                f"{len(self.src)} source files and {len(self.tgt)} target files, expected as many "
                "of each"
            )
        for path in self.paths:
            if not os.path.exists(path):
                raise CorpusError(f"{path}: no such file")
            if os.path.isdir(path):
                raise CorpusError(f"{path}: is a folder, expected a text file")
            if not os.path.isfile(path):
                # Text is read more than once.
                raise CorpusError(f"{path}: is a pipe or a device, expected a text file")
            if not os.access(path, os.R_OK):
                raise CorpusError(f"{path}: may not be read")
        for src, tgt in zip(self.src, self.tgt, strict=True):
            if os.path.samefile(src, tgt):
                raise CorpusError(f"{src} is given as source and as target")
        for path in self.pairs:
            pairs_format(path)


def text_format(path: str) -> Format:
    """The format of a file, by its name: lines, where that tells no other."""
    name = os.path.basename(path).lower()
    ending = os.path.splitext(name.removesuffix(".gz").removesuffix(".xz"))[1]
    return _FORMATS.get(ending, "lines")


def pairs_format(path: str) -> Format:
    """The format of a file with both sides, by its name.

    Raises:
        CorpusError: the name tells none.
    """
    found = text_format(path)
    if found == "lines":
        raise CorpusError(
            f"{path}: expected a name that ends in {', '.join(_FORMATS)} (or these and .gz or .xz), "
            "which tells how the pairs stand in the file"
        )
    return found


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


@dataclass(frozen=True)
class CorpusPart:
    """One of the corpora that together are the text to train on.

    Attributes:
        name: for people.
        text: its files.
        weight: how many times an epoch has each of its pairs; None: once.
        source_tag: a token before each source sentence; empty: none.
        target_prefix: a token before each target sentence; empty: none.
    """

    name: str
    text: ParallelText
    weight: float | None = None
    source_tag: str = ""
    target_prefix: str = ""


@dataclass
class SkippedPairs:
    """How many pairs were read and used, and why others were not.

    Attributes:
        read: pairs in the files.
        used: pairs handed on.
        empty: pairs with an empty line on a side.
        undecodable: pairs with a line that is not UTF-8.
        malformed: lines of TSV or JSON files that are not a pair.
        too_long: pairs with more tokens than allowed on a side.
        ratio: pairs whose sides differ too much in length.
        held_out: pairs put aside for validation, or equal to one of those.
        duplicates: pairs that were there before and were left out.
        same_text: pairs with the same text on both sides that were left out.
        repeated: used pairs that were there before.
        identical: used pairs with the same text on both sides.
    """

    read: int = 0
    used: int = 0
    empty: int = 0
    undecodable: int = 0
    malformed: int = 0
    too_long: int = 0
    ratio: int = 0
    held_out: int = 0
    duplicates: int = 0
    same_text: int = 0
    repeated: int = 0
    identical: int = 0

    def add(self, other: SkippedPairs) -> None:
        """Add the counts of other pairs."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))

    def describe(self) -> str:
        """One line for people, for example ``36,673 pairs, 12 skipped (10 empty, 2 too long)``."""
        reasons = {
            "empty": self.empty,
            "not UTF-8": self.undecodable,
            "not a pair": self.malformed,
            "too long": self.too_long,
            "too unequal in length": self.ratio,
            "duplicates": self.duplicates,
            "the same on both sides": self.same_text,
            "held out for validation": self.held_out,
        }
        text = describe_counts("pairs", self.used, self.read, reasons)
        if self.repeated:
            text += f"; {self.repeated:,} of them are duplicates"
        if self.identical:
            text += f"; {self.identical:,} of them are the same on both sides"
        return text

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


def counted(count: int, what: str) -> str:
    """``36,673 pairs``, or ``1 pair``; ``what`` is the plural, which ends with an s."""
    return f"{count:,} {what if count != 1 else what.removesuffix('s')}"


def describe_counts(what: str, used: int, read: int, reasons: dict[str, int]) -> str:
    """How much was used of what was read, and why not the rest, for people."""
    text = counted(used, what)
    if read != used:
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        text += f" of {read:,} ({found})"
    return text


def describe_held_out(what: str, held_out: int, left_out: int) -> str:
    """How much is held out for validation, and what else is not trained on for that, for people."""
    text = (
        f"validation text: {counted(held_out, what)} held out of the training text, the same ones for "
        "every run on it"
    )
    if left_out > held_out:
        same = "source" if what == "pairs" else "text"
        text += f"; {counted(left_out - held_out, what)} more with the same {same} left out"
    return text


def open_text(path: str) -> BinaryIO:
    """Open a plain, gzip or xz file for reading its bytes.

    Raises:
        CorpusError: it cannot be opened.
    """
    return _open(path)[0]


def _open(path: str) -> tuple[BinaryIO, BinaryIO]:
    """The text, and the file it comes from."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    start = file.peek(6)[:6]
    # Line by line, BufferedReader is several times as fast as the compressed files themselves.
    if start.startswith(b"\x1f\x8b"):
        unpacked: Any = gzip.GzipFile(fileobj=file)
    elif start == b"\xfd7zXZ\x00":
        unpacked = lzma.LZMAFile(file)
    else:
        refuse_wide(path, start)
        return file, file
    return io.BufferedReader(unpacked, 1 << 18), file


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
    for block in _read_blocks(path):
        for line in block:
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def _read_blocks(
    path: str, advance: Callable[[int], None] = lambda count: None
) -> Iterator[list[bytes]]:
    """The lines of a file with their ends, some at a time.

    Args:
        path: the file.
        advance: is told how many more bytes of the file, as it lies on disk, were read.

    Raises:
        CorpusError: see :func:`read_lines`.
    """
    text, file = _open(path)
    try:
        with file, text:
            first = True
            position = 0
            while block := text.readlines(_BLOCK_BYTES):
                if first:
                    block[0] = block[0].removeprefix(b"\xef\xbb\xbf")
                    first = False
                before, position = position, file.tell()
                advance(position - before)
                yield block
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path}: its compressed data are broken: {error}") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from None


class Chunk(NamedTuple):
    """Some lines of a text, not yet looked at.

    Attributes:
        paths: the file, or source and target file.
        format: what the lines are.
        keys: see :class:`ParallelText`.
        first: number of the first line in the file, from 1.
        size: number of lines, of each side.
        src: the lines, of the source where there are two files.
        tgt: the lines of the target; empty where one file holds both.
    """

    paths: tuple[str, ...]
    format: Format
    keys: tuple[str, str]
    first: int
    size: int
    src: bytes
    tgt: bytes


class _Lines:
    """A file from which lines are taken in numbers of one's own."""

    def __init__(self, path: str, advance: Callable[[int], None]) -> None:
        self._blocks = _read_blocks(path, advance)
        self._held: list[bytes] = []

    def held(self) -> int:
        """Lines that can be taken now; 0 is the end of the file."""
        if not self._held:
            self._held = next(self._blocks, [])
        return len(self._held)

    def take(self, count: int) -> bytes:
        taken = b"".join(self._held[:count])
        del self._held[:count]
        return taken

    def rest(self) -> int:
        """Reads to the end and counts the lines."""
        return len(self._held) + sum(map(len, self._blocks))


def read_chunks(
    text: ParallelText, advance: Callable[[int], None] = lambda count: None
) -> Iterator[Chunk]:
    """The lines of all files in order, cut in the same places each time.

    Args:
        text: the files.
        advance: is told how many more bytes of the files were read.

    Raises:
        CorpusError: unequal numbers of lines, or a missing or broken file.
    """
    text.check_files()
    for src_path, tgt_path in zip(text.src, text.tgt, strict=True):
        src, tgt = _Lines(src_path, advance), _Lines(tgt_path, advance)
        number = 0
        while count := min(src.held(), tgt.held(), _CHUNK_LINES):
            chunk = (src.take(count), tgt.take(count))
            yield Chunk((src_path, tgt_path), "lines", text.keys, number + 1, count, *chunk)
            number += count
        if src.held() or tgt.held():
            more, fewer = (src_path, tgt_path) if src.held() else (tgt_path, src_path)
            rest = src.rest() + tgt.rest()
            raise CorpusError(
                f"{more} has {counted(number + rest, 'lines')} and {fewer} has {number:,}; expected "
                "as many in both, each pair of lines a sentence and its translation"
            )
    for path in text.pairs:
        lines, form = _Lines(path, advance), pairs_format(path)
        number = 0
        while count := min(lines.held(), _CHUNK_LINES):
            yield Chunk((path,), form, text.keys, number + 1, count, lines.take(count), b"")
            number += count


class Parsed(NamedTuple):
    """The usable pairs of a chunk, and the places of their lines in it, from 0."""

    src: Sequence[str]
    tgt: Sequence[str]
    places: Sequence[int]


def parse(chunk: Chunk, bad_lines: BadLines, counts: SkippedPairs) -> Parsed:
    """The sentence pairs in a chunk.

    The lines of a TSV file are two columns, source and target. Those of a JSON file are objects;
    the chunk's ``keys`` name their entries for source and target, and ``translation.en`` is the
    entry ``en`` of the object under ``translation``. Line ends in these become spaces.

    Args:
        chunk: the lines.
        bad_lines: what to do with a pair that has an empty side (or one of white space alone) or
            bytes that are not UTF-8, and with a line that is not a pair: ``error`` or ``skip``.
        counts: what was read, left out and used is added here.

    Raises:
        CorpusError: under ``error`` a bad line, with its file and number.
    """
    counts.read += chunk.size
    try:
        columns: list[Sequence[str | None]] = [
            _split(data.decode("utf-8")) for data in (chunk.src, chunk.tgt)[: len(chunk.paths)]
        ]
    except UnicodeDecodeError:
        columns = [
            [_decode(line) for line in data.removesuffix(b"\n").split(b"\n")]
            for data in (chunk.src, chunk.tgt)[: len(chunk.paths)]
        ]
    if chunk.format != "lines":
        columns = _columns(chunk, columns[0], bad_lines, counts)
    src, tgt = columns
    bad = [
        place
        for place, (s, t) in enumerate(zip(src, tgt, strict=True))
        if not s or not t or s.isspace() or t.isspace()
    ]
    places: Sequence[int] = range(chunk.size)
    if bad:
        for place in bad:
            if src[place] is None or tgt[place] is None:
                if chunk.format == "lines":
                    if bad_lines == "error":
                        _refuse_undecodable(chunk, place)
                    counts.undecodable += 1
                continue
            if bad_lines == "error":
                _refuse_empty(chunk, place, src[place])
            counts.empty += 1
        left_out = frozenset(bad)
        places = [place for place in places if place not in left_out]
        src, tgt = [src[place] for place in places], [tgt[place] for place in places]
    counts.used += len(places)
    counts.identical += sum(map(str.__eq__, cast("list[str]", src), cast("list[str]", tgt)))
    return Parsed(cast("list[str]", src), cast("list[str]", tgt), places)


def _split(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def _decode(line: bytes) -> str | None:
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        return None


def undecodable(path: str, number: int, error: UnicodeDecodeError, what: str) -> CorpusError:
    """The error for a line that is not UTF-8; ``what`` is what is left out instead."""
    return CorpusError(
        f"{path}:{number}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte "
        f"{error.start + 1} of the line; --bad-lines skip leaves such {what} out"
    )


def _refuse_undecodable(chunk: Chunk, place: int) -> NoReturn:
    for path, data in zip(chunk.paths, (chunk.src, chunk.tgt), strict=False):
        line = data.split(b"\n")[place]
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise undecodable(path, chunk.first + place, error, "pairs") from None
    raise AssertionError("every line is UTF-8")


def _refuse_empty(chunk: Chunk, place: int, src: str | None) -> NoReturn:
    in_source = not src or src.isspace()
    path = chunk.paths[0 if in_source else -1]
    side = "line" if len(chunk.paths) == 2 else "source" if in_source else "target"
    raise CorpusError(
        f"{path}:{chunk.first + place}: empty {side}; --bad-lines skip leaves such pairs out"
    )


def _columns(
    chunk: Chunk, lines: Sequence[str | None], bad_lines: BadLines, counts: SkippedPairs
) -> list[Sequence[str | None]]:
    """Source and target of each line of a file of pairs, None where there is none."""
    pairs: list[tuple[str | None, str | None]] = []
    for place, line in enumerate(lines):
        if line is None:
            if bad_lines == "error":
                _refuse_undecodable(chunk, place)
            counts.undecodable += 1
            pairs.append((None, None))
            continue
        try:
            if chunk.format == "tsv":
                pairs.append(_tsv_pair(line))
            else:
                src, tgt = json_texts(line, chunk.keys, "; --pair-keys names the two keys")
                pairs.append((one_line(src), one_line(tgt)))
            # Not left to the caller: a line further on may be worse, but the first is to be named.
            if bad_lines == "error" and not all(text and text.strip() for text in pairs[-1]):
                _refuse_empty(chunk, place, pairs[-1][0])
        except BadLine as error:
            if bad_lines == "error":
                number = chunk.first + place
                raise refused_line(chunk.paths[0], number, str(error)) from None
            counts.malformed += 1
            pairs.append((None, None))
    return [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]


class BadLine(ValueError):
    """A line that is not what it should be; the message does not say where."""


def refused_line(path: str, number: int, why: str) -> CorpusError:
    """The error for a line that is not what it should be, for who wants no bad lines."""
    if layout := wrong_layout([path]):
        return CorpusError(layout)
    return CorpusError(f"{path}:{number}: {why}; --bad-lines skip leaves such lines out")


def wrong_layout(paths: Iterable[str]) -> str:
    """What is to be said of the first JSON file that has not one object a line, by its beginning.

    Args:
        paths: files of any format, of which no line, or not each, could be used.
    """
    for path in paths:
        if text_format(path) != "jsonl":
            continue
        lines = list(itertools.islice((line for line in read_lines(path) if line.strip()), 3))
        begin = b"".join(b"".join(lines)[:1000].split())[:2]
        first = lines[0].strip() if lines else b""
        if first == b"{":
            looks, tool = "objects over several lines", "jq -c ."
        elif len(lines) > 1 and first.endswith(b"]"):
            continue  # An array a line.
        elif begin in (b"[", b"[{", b"[]"):
            looks, tool = "one array of all", "jq -c '.[]'"
        elif begin == b'["':
            looks, tool = "one array of texts", "jq -c '.[] | {text: .}'"
        else:
            continue
        return (
            f"{path}: expected one JSON object a line; this looks like {looks} ({tool} writes one "
            "a line)"
        )
    return ""


def _tsv_pair(line: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2:
        got = f"{len(columns)} columns" if line else "an empty line"
        raise BadLine(f"got {got}, expected two, source and target, with a tab between them")
    return columns[0], columns[1]


def json_texts(line: str, keys: Sequence[str], hint: str = "") -> list[str]:
    """The texts under some keys of a JSON object.

    Args:
        line: the object.
        keys: where the texts stand, see :func:`parse`.
        hint: what to do about a missing key, for the message.

    Raises:
        BadLine: it is no such object.
    """
    if not line.strip():
        raise BadLine("got an empty line, expected a JSON object")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not a JSON object: {error}") from None
    texts = []
    for key in keys:
        value = values
        for name in [key] if isinstance(values, dict) and key in values else key.split("."):
            if not isinstance(value, dict):
                raise BadLine(
                    f"got {type(value).__name__}, expected an object with the key {name!r}"
                )
            if name not in value:
                found = ", ".join(map(repr, list(value)[:5])) or "none"
                raise BadLine(f"the key {key!r} is not there, only {found}{hint}")
            value = value[name]
        if not isinstance(value, str):
            raise BadLine(f"{key}: got {type(value).__name__}, expected a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadLine(f"{key}: has half a character (a lone surrogate)") from None
        texts.append(value)
    return texts


def one_line(text: str) -> str:
    """A text with spaces for its line ends."""
    return re.sub("[\r\n]+", " ", text)


class SameTextCheck:
    """Finds files whose two sides are one text, from the counts of their chunks in order."""

    def __init__(self) -> None:
        self._paths: tuple[str, ...] = ()
        self._used = self._identical = 0

    def add(self, paths: tuple[str, ...], counts: SkippedPairs) -> None:
        """Take the counts of one chunk.

        Raises:
            CorpusError: the file before it had the same text on both sides throughout.
        """
        if paths != self._paths:
            self.finish()
            self._paths = paths
        self._used += counts.used
        self._identical += counts.identical

    def finish(self) -> None:
        """The last file has ended; raises as :meth:`add`."""
        if self._used > 1 and self._identical == self._used:
            if len(self._paths) == 1:
                raise CorpusError(
                    f"{self._paths[0]}: source and target are the same text, expected a text and "
                    "its translation"
                )
            raise CorpusError(
                f"{self._paths[0]} and {self._paths[1]} hold the same text, expected a text and "
                "its translation"
            )
        self._used = self._identical = 0


def read_pairs(
    text: ParallelText, bad_lines: BadLines = "error", skipped: SkippedPairs | None = None
) -> Iterator[tuple[str, str]]:
    """The sentence pairs of files, in order, read as a stream.

    Args:
        text: the files.
        bad_lines: see :func:`parse`.
        skipped: counts what was read and left out, complete when the iterator is exhausted.

    Raises:
        CorpusError: unequal numbers of lines, the same text in both files, a missing or broken
            file; under ``error`` a bad line, with its file and number.
    """
    skipped = SkippedPairs() if skipped is None else skipped
    check = SameTextCheck()
    for chunk in read_chunks(text):
        counts = SkippedPairs()
        parsed = parse(chunk, bad_lines, counts)
        skipped.add(counts)
        yield from zip(parsed.src, parsed.tgt, strict=True)
        check.add(chunk.paths, counts)
    check.finish()


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
        parts: for each pair, the number that it was added with.
    """

    seed: int = 0
    threshold: int = -1
    pairs: list[tuple[str, str]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def __contains__(self, src: str) -> bool:
        return self.threshold >= 0 and text_hash(src, self.seed) <= self.threshold

    @classmethod
    def choose(
        cls,
        pairs: Iterable[tuple[str, str]],
        part: float,
        seed: int = 0,
        limit: int = HELD_OUT_LIMIT,
    ) -> HeldOut:
        """Choose from a stream of pairs; see :class:`HeldOutChoice`."""
        choice = HeldOutChoice(seed, limit)
        count = 0
        for src, tgt in pairs:
            count += 1
            choice.add(text_hash(src, seed), src, tgt)
        return choice.result(part, count)


class HeldOutChoice:
    """Chooses from a stream of pairs, in memory for ``limit`` pairs only.

    Args:
        seed: another seed chooses other pairs.
        limit: at most so many pairs.
    """

    def __init__(self, seed: int = 0, limit: int = HELD_OUT_LIMIT) -> None:
        self._seed = seed
        self._limit = limit
        self._kept: list[tuple[int, str, str, int]] = []
        self._hashes: set[int] = set()

    @property
    def highest(self) -> int:
        """Pairs whose hash is above this need not be added."""
        full = len(self._kept) == self._limit + 1
        return -self._kept[0][0] if full else (1 << 64) - 1

    def add(self, key: int, src: str, tgt: str, part: int = 0) -> None:
        """Take a pair into account; ``key`` is the hash of its source."""
        if key in self._hashes or key > self.highest:
            return
        self._hashes.add(key)
        heapq.heappush(self._kept, (-key, src, tgt, part))
        if len(self._kept) > self._limit + 1:
            self._hashes.remove(-heapq.heappop(self._kept)[0])

    def result(self, part: float, count: int) -> HeldOut:
        """The choice.

        Args:
            part: part of the pairs to hold out, at least one pair if above 0.
            count: number of all pairs.

        Raises:
            CorpusError: fewer than two different source texts.
        """
        kept = self._kept
        if part <= 0:
            return HeldOut(self._seed)
        if count == 0:
            raise CorpusError("the training text has no usable sentence pair")
        if len(kept) < 2:
            raise CorpusError(
                f"{counted(count, 'pairs')} with {counted(len(kept), 'different source sentences')}: "
                "too few to hold some out for validation; give --src-dev and --tgt-dev"
            )
        wanted = min(self._limit, max(1, round(part * count)), len(kept) - 1)
        chosen = sorted(kept, reverse=True)[:wanted]
        return HeldOut(
            self._seed,
            -chosen[-1][0],
            [(src, tgt) for _, src, tgt, _ in chosen],
            [number for _, _, _, number in chosen],
        )


def text_hash(text: str, seed: int = 0) -> int:
    """64 bits of a text."""
    key = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(key.digest(), "little")
