"""Sentence pairs as token ids in memory-mapped files, whatever their number.

A data set is a folder: ``source.ids`` and ``target.ids`` hold the ids of all sentences one after
the other (uint16 where the vocabulary allows, else int32), ``source.offsets`` and
``target.offsets`` (int64) where each begins, ``dataset.json`` the rest. Source sentences end with
the end id; target sentences have neither start nor end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from transformer_ext.data.corpus import CorpusError, SkippedPairs
from transformer_ext.data.tokenizer import Tokenizer

DATASET_VERSION = 1
_CHUNK = 4096


class _Side:
    """Writes one language as a stream."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self._ids: BinaryIO = open(folder / f"{name}.ids", "wb")
        self._offsets: BinaryIO = open(folder / f"{name}.offsets", "wb")
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
        self._end = 0
        self._offsets.write(np.zeros(1, "<i8").tobytes())

    def add(self, texts: Sequence[str], with_eos: bool) -> None:
        sentences = self._tokenizer.encode_batch(texts)
        if with_eos:
            for ids in sentences:
                ids.append(self._tokenizer.eos_id)
        lengths = np.fromiter(map(len, sentences), "<i8", len(sentences))
        total = int(lengths.sum())
        flat = itertools.chain.from_iterable(sentences)
        self._ids.write(np.fromiter(flat, self._dtype, total).tobytes())
        self._offsets.write((self._end + np.cumsum(lengths)).astype("<i8").tobytes())
        self._end += total

    def close(self) -> dict[str, Any]:
        self._ids.close()
        self._offsets.close()
        return {"tokens": self._end, "dtype": self._dtype.str}


def build_dataset(
    folder: str | Path,
    pairs: Iterable[tuple[str, str]],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    skipped: SkippedPairs | None = None,
) -> None:
    """Write a data set into a folder that is there, a few thousand pairs in memory at a time.

    Args:
        folder: where to.
        pairs: source and target sentences.
        source_tokenizer: of the source.
        target_tokenizer: of the target, possibly the same.
        skipped: what the reader of ``pairs`` counts; stored with the data set.

    Raises:
        CorpusError: there is no pair at all.
    """
    folder = Path(folder)
    sides = (
        _Side(folder, "source", source_tokenizer),
        _Side(folder, "target", target_tokenizer),
    )
    count = 0
    iterator = iter(pairs)
    try:
        while chunk := list(itertools.islice(iterator, _CHUNK)):
            sides[0].add([src for src, _ in chunk], with_eos=True)
            sides[1].add([tgt for _, tgt in chunk], with_eos=False)
            count += len(chunk)
    finally:
        source, target = sides[0].close(), sides[1].close()
    if count == 0:
        raise CorpusError("the text has no usable sentence pair")
    meta = {
        "version": DATASET_VERSION,
        "pairs": count,
        "source": source,
        "target": target,
        "bos_id": target_tokenizer.bos_id,
        "eos_id": target_tokenizer.eos_id,
        "skipped": (skipped or SkippedPairs(read=count, used=count)).to_dict(),
    }
    (folder / "dataset.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


class ParallelDataset:
    """A data set on disk; only the offsets of its sentences are held in memory.

    Args:
        folder: made by :func:`build_dataset`.

    Attributes:
        skipped: how many pairs were read, used, and left out.
        bos_id: start id of the target.
        eos_id: end id of the target.

    Raises:
        CorpusError: a file is missing or has not the size it should have.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "dataset.json").read_text(encoding="utf-8"))
            version = meta["version"]
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(f"{folder}: not a data set: {error}") from None
        if version != DATASET_VERSION:
            raise CorpusError(
                f"{folder}: data set of version {version!r}, expected {DATASET_VERSION}"
            )
        self.bos_id: int = meta["bos_id"]
        self.eos_id: int = meta["eos_id"]
        self.skipped = SkippedPairs(**meta["skipped"])
        self._pairs: int = meta["pairs"]
        self._source_ids = self._map(
            "source.ids", meta["source"]["dtype"], meta["source"]["tokens"]
        )
        self._target_ids = self._map(
            "target.ids", meta["target"]["dtype"], meta["target"]["tokens"]
        )
        self._source_offsets = self._map("source.offsets", "<i8", self._pairs + 1)
        self._target_offsets = self._map("target.offsets", "<i8", self._pairs + 1)
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

    def filtered(self, max_length: int, max_length_ratio: float | None = None) -> ParallelDataset:
        """The pairs that are not too long, as a data set on the same files.

        Args:
            max_length: most tokens a side, the end included.
            max_length_ratio: most tokens of the longer side for each of the shorter one.

        Raises:
            CorpusError: no pair is left.
        """
        source, target = self.source_lengths, self.target_lengths
        too_long = (source > max_length) | (target > max_length)
        keep = ~too_long
        if max_length_ratio is not None:
            longer, shorter = np.maximum(source, target), np.minimum(source, target)
            keep &= longer <= max_length_ratio * shorter
        result = ParallelDataset(self.folder)
        rows = np.flatnonzero(keep)
        result._rows = rows if self._rows is None else self._rows[rows]
        long = int(too_long.sum())
        result.skipped = dataclasses.replace(
            self.skipped,
            used=len(rows),
            too_long=self.skipped.too_long + long,
            ratio=self.skipped.ratio + len(self) - len(rows) - long,
        )
        if len(rows) == 0:
            raise CorpusError(
                f"max_length: with {max_length} tokens none of {len(self):,} pairs is left"
            )
        return result


def _gather(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return ids[positions].astype(np.int64), lengths
