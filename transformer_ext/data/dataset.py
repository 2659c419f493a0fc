"""Sentence pairs as token ids in memory-mapped files, whatever their number.

A data set is a folder: ``source.ids`` and ``target.ids`` hold the ids of all sentences one after
the other (uint16 where the vocabulary allows, else int32), ``source.offsets`` and
``target.offsets`` (int64) where each begins, ``flags`` (uint8) what is known of each pair,
``dataset.json`` the rest, with the SHA-256 of the others and of itself. Source sentences end with
the end id; target sentences have neither start nor end. Pairs of one corpus are rows one after the
other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np

from transformer_ext.data.corpus import CorpusError, SkippedPairs

DATASET_VERSION = 3
_CHUNK = 4096
_SIDES = ("source", "target")
_FILES = ("source.ids", "source.offsets", "target.ids", "target.offsets", "flags")
# Bits of the flags.
_REPEATED = 1
_IDENTICAL = 2
# Pairs that are sorted at once when duplicates are looked for, 24 bytes each.
_SORTED_PAIRS = 1 << 22


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write JSON with a checksum of itself."""
    sealed = {**values, "checksum": _checksum(values)}
    path.write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote.

    Raises:
        CorpusError: it is not there, or not as it was written.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.pop("checksum", None) != _checksum(values):
        raise CorpusError(
            f"{path}: was altered after it was written; remove the folder {path.parent}, it is then "
            "built anew"
        )
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Encoder(Protocol):
    """What a side of a data set is encoded with: a tokenizer, or what gives each text a label."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def vocabulary(self) -> Path | None: ...
    @property
    def tag_ids(self) -> frozenset[int]: ...

    def split_tag(self, text: str) -> tuple[list[int], str]: ...
    def encode_untagged(self, texts: Sequence[str]) -> list[list[int]]: ...


def _id_type(tokenizer: Encoder) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")


class IdEncoder:
    """Turns texts into ids as a data set stores them.

    Args:
        tokenizer: gives the ids.
        with_eos: whether the end id is appended.
        by_words: whether the tokenizer's pieces never cross a space and the choice of pieces within
            a word does not depend on the others, as in the BPE models that are trained here: the
            ids of a word are then remembered, with the same result several times as fast.
    """

    # Words remembered: 50 MB for each language and process.
    _MOST_WORDS = 1 << 18
    _LONGEST_WORD = 48

    def __init__(self, tokenizer: Encoder, with_eos: bool = False, by_words: bool = False) -> None:
        self._tokenizer = tokenizer
        self._dtype = _id_type(tokenizer)
        size = self._dtype.itemsize
        self._id_bytes = [id.to_bytes(size, "little") for id in range(tokenizer.vocab_size)]
        self._after = self._bytes([tokenizer.eos_id]) if with_eos else b""
        self._by_words = by_words and tokenizer.vocabulary is None
        self._words: dict[str, bytes] = {"": b""}

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._id_bytes[id] for id in ids])

    def encode(self, texts: Sequence[str], tag: str = "") -> tuple[bytes, np.ndarray]:
        """The ids of all texts one after the other, and the number of each (int32).

        Args:
            texts: what to encode.
            tag: comes before each of them; a tag that a text begins with is then text like any
                other.
        """
        if not texts:
            return b"", np.zeros(0, np.int32)
        before = b""
        firsts: list[bytes] | None = None
        if tag:
            before = self._bytes(self._tokenizer.split_tag(tag)[0])
        elif self._tokenizer.tag_ids:
            split = [self._tokenizer.split_tag(text) for text in texts]
            firsts = [self._bytes(first) if first else b"" for first, _ in split]
            texts = [rest for _, rest in split]
        rows = self._rows_by_words(texts) if self._by_words else self._rows(texts)
        if firsts is not None:
            rows = [first + row for first, row in zip(firsts, rows, strict=True)]
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        lengths += len(before) + len(self._after)
        lengths //= self._dtype.itemsize
        return b"".join((before, (self._after + before).join(rows), self._after)), lengths

    def _rows(self, texts: Sequence[str]) -> list[bytes]:
        sentences = self._tokenizer.encode_untagged(texts)
        ids = np.fromiter(itertools.chain.from_iterable(sentences), self._dtype).tobytes()
        ends = list(itertools.accumulate(len(row) * self._dtype.itemsize for row in sentences))
        return [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def _rows_by_words(self, texts: Sequence[str]) -> list[bytes]:
        ids_of, join = self._words.__getitem__, b"".join
        rows, unknown = [], []
        for text in texts:
            try:
                rows.append(join(map(ids_of, text.split(" "))))
            except KeyError:
                unknown.append(len(rows))
                rows.append(b"")
        if unknown:
            learnt = self._learn([texts[number].split(" ") for number in unknown])
            for number, row in zip(unknown, learnt, strict=True):
                rows[number] = row
        return rows

    def _learn(self, texts: Sequence[list[str]]) -> list[bytes]:
        """Ids of texts of which some words are not known yet."""
        known = self._words
        words = set(itertools.chain.from_iterable(texts))
        new = words.difference(known)
        if len(known) + len(new) > self._MOST_WORDS:
            known.clear()
            known[""] = b""
            new = words - {""}
        # SentencePiece takes U+2581 for a space.
        odd = {word for word in new if len(word) > self._LONGEST_WORD or "\u2581" in word}
        # All at once: for each call SentencePiece starts a thread, as long as 15 words take.
        order = list(new - odd)
        for word, ids in zip(order, self._tokenizer.encode_untagged(order), strict=True):
            known[word] = self._bytes(ids)
        ids_of, join = known.__getitem__, b"".join
        return [
            join(map(ids_of, words))
            if odd.isdisjoint(words)
            else self._bytes(self._tokenizer.encode_untagged([" ".join(words)])[0])
            for words in texts
        ]


class Block(NamedTuple):
    """Some pairs as they go into a data set.

    Attributes:
        ids: of the source and of the target, as bytes.
        lengths: int32 [pairs], of the source and of the target.
        hashes: uint64 [pairs], equal for equal pairs.
        identical: bool [pairs], whether both sides are the same text.
    """

    ids: tuple[bytes, bytes]
    lengths: tuple[np.ndarray, np.ndarray]
    hashes: np.ndarray
    identical: np.ndarray


def encode_pairs(
    src: Sequence[str],
    tgt: Sequence[str],
    source: IdEncoder,
    target: IdEncoder,
    source_tag: str = "",
    target_prefix: str = "",
) -> Block:
    """Pairs as a block; the tags, if any, come before each sentence of their side."""
    source_ids, source_lengths = source.encode(src, source_tag)
    target_ids, target_lengths = target.encode(tgt, target_prefix)
    # The same text under other tags is no duplicate.
    tags = f"{source_tag}\n{target_prefix}" if source_tag or target_prefix else ""
    salt = hashlib.blake2b(tags.encode(), digest_size=16).digest() if tags else b""
    blake2b = hashlib.blake2b
    digests = b"".join(
        [
            # No text has a line end in it.
            blake2b(f"{s}\n{t}".encode(), digest_size=8, key=salt).digest()
            for s, t in zip(src, tgt, strict=True)
        ]
    )
    return Block(
        (source_ids, target_ids),
        (source_lengths, target_lengths),
        np.frombuffer(digests, "<u8"),
        np.fromiter(map(str.__eq__, src, tgt), bool, len(src)),
    )


class _File:
    """A file that is written from begin to end, with its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        self._file.close()
        return self._digest.hexdigest()


class DatasetWriter:
    """Writes a data set as a stream of blocks.

    Args:
        folder: where to; it is there.
        source_tokenizer: of the source.
        target_tokenizer: of the target, possibly the same.
    """

    def __init__(
        self, folder: str | Path, source_tokenizer: Encoder, target_tokenizer: Encoder
    ) -> None:
        self._folder = Path(folder)
        self._tokenizers = (source_tokenizer, target_tokenizer)
        self._files = {name: _File(self._folder / name) for name in _FILES if name != "flags"}
        self._hashes = _File(self._folder / "hashes")
        self._tokens = [0, 0]
        self._pairs = 0
        self._identical: list[np.ndarray] = []
        self._corpora: list[tuple[str, int, SkippedPairs]] = []
        for side in _SIDES:
            self._files[f"{side}.offsets"].write(np.zeros(1, "<i8").tobytes())

    def begin(self, name: str) -> SkippedPairs:
        """The next blocks are of this corpus; returns its counts, to be completed until the end."""
        skipped = SkippedPairs()
        self._corpora.append((name, self._pairs, skipped))
        return skipped

    def add(self, block: Block) -> None:
        """Append the pairs of a block."""
        for side, name in enumerate(_SIDES):
            self._files[f"{name}.ids"].write(block.ids[side])
            ends = self._tokens[side] + np.cumsum(block.lengths[side], dtype=np.int64)
            self._files[f"{name}.offsets"].write(ends.astype("<i8").tobytes())
            self._tokens[side] = int(ends[-1]) if len(ends) else self._tokens[side]
        self._hashes.write(block.hashes.astype("<u8").tobytes())
        self._identical.append(block.identical)
        self._pairs += len(block.hashes)

    def abort(self) -> None:
        """Close the files, whatever is in them."""
        for file in (*self._files.values(), self._hashes):
            try:
                file.close()
            except OSError:
                # The error that led here is the one to show.
                pass

    def finish(self) -> None:
        """Write the rest.

        Raises:
            CorpusError: there is no pair at all, or none of a corpus.
        """
        digests = {name: file.close() for name, file in self._files.items()}
        self._hashes.close()
        for number, (name, begin, _) in enumerate(self._corpora):
            if self._end(number) == begin:
                which = f"corpus {name!r}" if len(self._corpora) > 1 else "the text"
                raise CorpusError(f"{which} has no usable sentence pair")
        flags = _repeated(self._folder / "hashes", self._pairs).astype(np.uint8) * _REPEATED
        (self._folder / "hashes").unlink()
        flags += np.concatenate(self._identical).astype(np.uint8) * np.uint8(_IDENTICAL)
        file = _File(self._folder / "flags")
        file.write(flags.tobytes())
        digests["flags"] = file.close()
        total = SkippedPairs()
        corpora = []
        for number, (name, begin, skipped) in enumerate(self._corpora):
            end = self._end(number)
            skipped.used = end - begin
            skipped.repeated = int(np.count_nonzero(flags[begin:end] & _REPEATED))
            skipped.identical = int(np.count_nonzero(flags[begin:end] & _IDENTICAL))
            total.add(skipped)
            corpora.append({"name": name, "begin": begin, "end": end, "skipped": skipped.to_dict()})
        source, target = self._tokenizers
        meta = {
            "version": DATASET_VERSION,
            "pairs": self._pairs,
            "source": {"tokens": self._tokens[0], "dtype": _id_type(source).str},
            "target": {"tokens": self._tokens[1], "dtype": _id_type(target).str},
            "bos_id": target.bos_id,
            "eos_id": target.eos_id,
            "skipped": total.to_dict(),
            "corpora": corpora,
            "sha256": digests,
        }
        write_sealed(self._folder / "dataset.json", meta)

    def _end(self, number: int) -> int:
        last = number + 1 == len(self._corpora)
        return self._pairs if last else self._corpora[number + 1][1]


def _repeated(path: Path, count: int) -> np.ndarray:
    """Which of the hashes in a file were there before, in memory for a part of them at a time."""
    result = np.zeros(count, bool)
    if count == 0:
        return result
    hashes = np.memmap(path, "<u8", mode="r")
    bits = max(0, (-(-count // _SORTED_PAIRS) - 1).bit_length())
    for part in range(1 << bits):
        found = []
        for begin in range(0, count, _SORTED_PAIRS):
            some = hashes[begin : begin + _SORTED_PAIRS]
            if bits:
                found.append(begin + np.flatnonzero(some >> np.uint64(64 - bits) == part))
            else:
                found.append(np.arange(begin, begin + len(some)))
        rows = np.concatenate(found)
        keys = hashes[rows]
        # Stable: of equal ones, the first is not marked.
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        result[rows[order[1:][keys[1:] == keys[:-1]]]] = True
    return result


def build_dataset(
    folder: str | Path,
    pairs: Iterable[tuple[str, str]],
    source_tokenizer: Encoder,
    target_tokenizer: Encoder,
    name: str = "text",
) -> None:
    """Write a data set into a folder that is there, a few thousand pairs in memory at a time.

    Args:
        folder: where to.
        pairs: source and target sentences.
        source_tokenizer: of the source.
        target_tokenizer: of the target, possibly the same; or what gives the labels.
        name: of the corpus.

    Raises:
        CorpusError: there is no pair at all.
    """
    source = IdEncoder(source_tokenizer, with_eos=True)
    target = IdEncoder(target_tokenizer)
    writer = DatasetWriter(folder, source_tokenizer, target_tokenizer)
    try:
        skipped = writer.begin(name)
        iterator = iter(pairs)
        while chunk := list(itertools.islice(iterator, _CHUNK)):
            src, tgt = zip(*chunk, strict=True)
            writer.add(encode_pairs(src, tgt, source, target))
            skipped.read += len(chunk)
        writer.finish()
    except BaseException:
        writer.abort()
        raise


@dataclasses.dataclass(frozen=True)
class CorpusRows:
    """Where one of the corpora of a data set lies.

    Attributes:
        name: of the corpus.
        begin: its first pair.
        end: the first pair after it.
        skipped: how many pairs were read, used, and left out.
    """

    name: str
    begin: int
    end: int
    skipped: SkippedPairs = dataclasses.field(default_factory=SkippedPairs)

    def __len__(self) -> int:
        return self.end - self.begin


class ParallelDataset:
    """A data set on disk; only the offsets of its sentences are held in memory.

    Args:
        folder: made by :class:`DatasetWriter`.

    Attributes:
        skipped: how many pairs were read, used, and left out.
        corpora: where each corpus begins and ends, in order.
        bos_id: start id of the target.
        eos_id: end id of the target.

    Raises:
        CorpusError: a file is missing or has not the size it should have, or ``dataset.json`` is not
            as it was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = read_sealed(self.folder / "dataset.json")
        if meta["version"] != DATASET_VERSION:
            raise CorpusError(
                f"{folder}: data set of version {meta['version']!r}, expected {DATASET_VERSION}"
            )
        self.bos_id: int = meta["bos_id"]
        self.eos_id: int = meta["eos_id"]
        self.skipped = SkippedPairs(**meta["skipped"])
        self.corpora = [
            CorpusRows(
                entry["name"], entry["begin"], entry["end"], SkippedPairs(**entry["skipped"])
            )
            for entry in meta["corpora"]
        ]
        self._sha256: dict[str, str] = meta["sha256"]
        self._pairs: int = meta["pairs"]
        self._source_ids = self._map(
            "source.ids", meta["source"]["dtype"], meta["source"]["tokens"]
        )
        self._target_ids = self._map(
            "target.ids", meta["target"]["dtype"], meta["target"]["tokens"]
        )
        self._source_offsets = self._map("source.offsets", "<i8", self._pairs + 1)
        self._target_offsets = self._map("target.offsets", "<i8", self._pairs + 1)
        self._flags = self._map("flags", "u1", self._pairs)
        self._rows: np.ndarray | None = None

    def _map(self, name: str, dtype: str, size: int) -> np.ndarray:
        path = self.folder / name
        expected = size * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CorpusError(
                f"{path}: {state}, expected {expected:,} bytes; remove the folder {self.folder}, "
                "it is then built anew"
            )
        if size == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    @property
    def bytes_on_disk(self) -> int:
        """Size of all its files."""
        return sum((self.folder / name).stat().st_size for name in _FILES)

    def digest(self, weights: Sequence[float] = ()) -> str:
        """What tells these pairs from others, in hexadecimal; the files are not read.

        Args:
            weights: of the corpora, where they differ.
        """
        # Not the names of the corpora: those are names of files, which may be moved.
        rows = [[corpus.begin, corpus.end] for corpus in self.corpora]
        # Rounded: a weight that comes of a temperature may have other last bits elsewhere.
        rounded = [f"{weight:.6g}" for weight in weights]
        result = hashlib.sha256(json.dumps([self._sha256, rows, rounded]).encode())
        if self._rows is not None:
            result.update(np.ascontiguousarray(self._rows, "<i8").data)
        return result.hexdigest()[:32]

    def verify(self) -> None:
        """Read all files and compare them with their checksums.

        Raises:
            CorpusError: one is not as it was written.
        """
        for name in _FILES:
            digest = hashlib.sha256()
            with open(self.folder / name, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != self._sha256.get(name):
                raise CorpusError(
                    f"{self.folder / name}: was altered after it was written (its SHA-256 is not "
                    f"the one in dataset.json); remove the folder {self.folder}, it is then built "
                    "anew"
                )

    def __len__(self) -> int:
        return self._pairs if self._rows is None else len(self._rows)

    def _spans(self, offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = indices if self._rows is None else self._rows[indices]
        starts = offsets[rows]
        return starts, offsets[rows + 1] - starts

    def _lengths(self, offsets: np.ndarray) -> np.ndarray:
        lengths = np.subtract(offsets[1:], offsets[:-1], dtype=np.int32, casting="unsafe")
        return lengths if self._rows is None else lengths[self._rows]

    @cached_property
    def source_lengths(self) -> np.ndarray:
        """int32 [pairs]: tokens of each source sentence, its end included."""
        return self._lengths(self._source_offsets)

    @cached_property
    def target_lengths(self) -> np.ndarray:
        """int32 [pairs]: tokens of each target sentence, its end included."""
        return self._lengths(self._target_offsets) + np.int32(1)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One pair as int32 ids: the source with its end, the target without start and end."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        source, _ = self.gather_source(np.array([index]))
        target, _ = self.gather_target(np.array([index]))
        return source.astype(np.int32), target.astype(np.int32)

    def gather_source(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of several source sentences, one after the other, and their lengths (int64)."""
        return _gather(self._source_ids, *self._spans(self._source_offsets, indices))

    def gather_target(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of several target sentences, one after the other, and their lengths (int64)."""
        return _gather(self._target_ids, *self._spans(self._target_offsets, indices))

    def filtered(
        self,
        max_length: int,
        max_length_ratio: float | None = None,
        *,
        duplicates: Literal["keep", "drop"] = "keep",
        identical: Literal["keep", "drop"] = "keep",
    ) -> ParallelDataset:
        """The pairs that pass some filters, as a data set on the same files.

        A pair is counted for the first filter that it does not pass, in this order: identical,
        duplicates, length, ratio.

        Args:
            max_length: most tokens a side, the end included.
            max_length_ratio: most tokens of the longer side for each of the shorter one.
            duplicates: whether pairs stay that were there before, as the same text (found by hashes
                of 64 bits).
            identical: whether pairs stay that have the same text on both sides.

        Raises:
            CorpusError: no pair is left, or none of a corpus.
        """
        source, target = self.source_lengths, self.target_lengths
        flags = np.asarray(self._flags) if self._rows is None else self._flags[self._rows]
        repeated, same = (flags & _REPEATED) != 0, (flags & _IDENTICAL) != 0
        keep = np.ones(len(self), bool)
        dropped: dict[str, np.ndarray] = {}

        def drop(reason: str, which: np.ndarray) -> None:
            dropped[reason] = keep & which
            np.logical_and(keep, ~which, out=keep)

        if identical == "drop":
            drop("same_text", same)
        if duplicates == "drop":
            drop("duplicates", repeated)
        drop("too_long", np.maximum(source, target) > max_length)
        if max_length_ratio is not None:
            longer, shorter = np.maximum(source, target), np.minimum(source, target)
            drop("ratio", longer > max_length_ratio * shorter)

        result = ParallelDataset(self.folder)
        result.skipped = SkippedPairs()
        result.corpora = []
        begin = 0
        for rows in self.corpora:
            span = slice(rows.begin, rows.end)
            kept = keep[span]
            changes = {reason: int(which[span].sum()) for reason, which in dropped.items()}
            skipped = dataclasses.replace(
                rows.skipped,
                used=int(kept.sum()),
                repeated=int((repeated[span] & kept).sum()),
                identical=int((same[span] & kept).sum()),
                **{reason: getattr(rows.skipped, reason) + n for reason, n in changes.items()},
            )
            if skipped.used == 0:
                which = f" of corpus {rows.name!r}" if len(self.corpora) > 1 else ""
                why = ", ".join(
                    f"{n:,} {reason.replace('_', ' ')}" for reason, n in changes.items() if n
                )
                raise CorpusError(
                    f"max_length: with {max_length} tokens none of {len(rows):,} pairs{which} is "
                    f"left ({why})"
                )
            result.corpora.append(CorpusRows(rows.name, begin, begin + skipped.used, skipped))
            result.skipped.add(skipped)
            begin += skipped.used
        if begin == len(self):
            result._rows = self._rows
        else:
            found = np.flatnonzero(keep)
            result._rows = found if self._rows is None else self._rows[found]
            if self._pairs < 1 << 31:
                result._rows = result._rows.astype(np.int32)
        return result


def _gather(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return ids[positions].astype(np.int64), lengths
