"""Texts of one side: the lines that a language model reads, the labelled texts of a classifier.

They are stored as pairs are (:mod:`transformer_ext.data.dataset`): the text is the source, which
ends with the end id, so that the stored source of all lines is one stream of text; the label, if
there is one, is a target of one id, its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from transformer_ext.data.corpus import (
    BadLine,
    BadLines,
    describe_counts,
    json_texts,
    one_line,
    read_lines,
    refused_line,
    text_format,
    undecodable,
)
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.tokenizer import Tokenizer


@dataclass
class TextCounts:
    """How many texts were read and used, and why others were not."""

    read: int = 0
    empty: int = 0
    undecodable: int = 0
    malformed: int = 0
    held_out: int = 0
    too_long: int = 0

    @property
    def used(self) -> int:
        """Texts that are left."""
        unusable = self.empty + self.undecodable + self.malformed
        return self.read - unusable - self.held_out - self.too_long

    def describe(self, what: str) -> str:
        """One line for people; ``what`` is the plural of what was counted."""
        reasons = {
            "empty": self.empty,
            "not UTF-8": self.undecodable,
            "malformed": self.malformed,
            "too long": self.too_long,
            "held out for validation": self.held_out,
        }
        return describe_counts(what, self.used, self.read, reasons)


class _Reader:
    """Reads files of text, and refuses or counts the lines that cannot be used."""

    def __init__(self, bad_lines: BadLines, counts: TextCounts | None) -> None:
        self._bad_lines = bad_lines
        self.counts = TextCounts() if counts is None else counts

    def lines(self, path: str) -> Iterator[tuple[int, str]]:
        """The lines of a file with their numbers."""
        for number, line in enumerate(read_lines(path), start=1):
            self.counts.read += 1
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                if self._bad_lines == "error":
                    raise undecodable(path, number, error, "lines") from None
                self.counts.undecodable += 1

    def malformed(self, path: str, number: int, error: BadLine) -> None:
        """A line that is not what it should be."""
        self._refuse(path, number, str(error))
        self.counts.malformed += 1

    def empty(self, path: str, number: int, part: str) -> None:
        """A line without one of its parts."""
        self._refuse(path, number, f"empty {part}")
        self.counts.empty += 1

    def _refuse(self, path: str, number: int, why: str) -> None:
        if self._bad_lines == "error":
            raise refused_line(path, number, why) from None


def read_texts(
    paths: Sequence[str], bad_lines: BadLines = "error", counts: TextCounts | None = None
) -> Iterator[tuple[str, str]]:
    """The lines of files as (text, ""), or of JSON files what stands under ``text``.

    Empty lines, which divide paragraphs in many corpora, are left out and counted.

    Raises:
        CorpusError: a file cannot be read or is broken, or (under ``error``) a line is not UTF-8, or
            not such an object.
    """
    reader = _Reader(bad_lines, counts)
    for path in paths:
        as_json = text_format(path) == "jsonl"
        for number, line in reader.lines(path):
            text = line
            if as_json and line.strip():
                try:
                    text = one_line(*json_texts(line, ["text"]))
                except BadLine as error:
                    reader.malformed(path, number, error)
                    continue
            if text.strip():
                yield text, ""
            else:
                reader.counts.empty += 1


def read_labelled(
    paths: Sequence[str], bad_lines: BadLines = "error", counts: TextCounts | None = None
) -> Iterator[tuple[str, str]]:
    """The lines ``label<TAB>text`` of files as (text, label); of JSON files objects with both.

    Raises:
        CorpusError: a file cannot be read or is broken, or (under ``error``) a line has no label or
            no text, or is not UTF-8.
    """
    reader = _Reader(bad_lines, counts)
    for path in paths:
        split = _json_label if text_format(path) == "jsonl" else _tabbed_label
        for number, line in reader.lines(path):
            try:
                label, text = split(line) if line.strip() else ("", "")
            except BadLine as error:
                reader.malformed(path, number, error)
                continue
            if label and text.strip():
                yield text, label
            else:
                reader.empty(path, number, "text" if label else "label")


def _tabbed_label(line: str) -> tuple[str, str]:
    label, tab, text = line.partition("\t")
    if not tab:
        raise BadLine(f"got {line!r:.40}, expected a label, a tab and a text")
    return label.strip(), text


def _json_label(line: str) -> tuple[str, str]:
    label, text = json_texts(line, ["label", "text"])
    label = label.strip()
    # Labels are written one a line, before a tab.
    if any(character in label for character in "\n\r\t"):
        raise BadLine(f"label: got {label!r:.40}, expected one without line ends and tabs")
    return label, one_line(text)


class Labels:
    """The names of classes as an encoder of a data set: a label is a text of one id, its number.

    Args:
        names: the labels, in the order of their numbers; none for texts without labels, whose ids
            are then none, too.
        tokenizer: of the texts; a data set keeps its special ids.
    """

    vocabulary = None
    tag_ids: frozenset[int] = frozenset()

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer) -> None:
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.vocab_size = max(1, len(self.names))
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id

    def split_tag(self, text: str) -> tuple[list[int], str]:
        """No label has a tag."""
        return [], text

    def encode_untagged(self, texts: Sequence[str]) -> list[list[int]]:
        """The number of each label."""
        return [[self._numbers[text]] if self.names else [] for text in texts]


@dataclass
class TextBatch:
    """Texts one after the other, without padding.

    Attributes:
        ids: int64 [tokens], what the model reads: each text after the start id.
        lengths: int64 [texts].
        labels: int64, what it has to predict: for each id the next one, or for each text its label.
        target_tokens: number of labels.
        sentences: number of texts.
    """

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    target_tokens: int
    sentences: int


class Lines:
    """The lines of a data set as examples of a language model: each is a sequence of its own.

    Attributes:
        lengths: int32 [examples], labels of each: its tokens and the end id.
    """

    def __init__(self, dataset: ParallelDataset) -> None:
        self._dataset = dataset
        self.lengths = dataset.source_lengths

    def __call__(self, indices: np.ndarray) -> TextBatch:
        """A batch of these examples."""
        labels, lengths = self._dataset.gather_source(indices)
        ids = np.roll(labels, 1)
        ids[np.cumsum(lengths) - lengths] = self._dataset.bos_id
        return TextBatch(ids, lengths, labels, len(labels), len(indices))


class Blocks:
    """A data set as one stream of text, cut into blocks of as many tokens each.

    A line ends with the end id as label; what follows it is read after the start id, as the
    beginning of a text is everywhere else. The model reads across the ends of lines.

    Args:
        dataset: the lines.
        size: tokens of a block; the last may have fewer.

    Attributes:
        lengths: int32 [examples], labels of each.
    """

    def __init__(self, dataset: ParallelDataset, size: int) -> None:
        self._dataset = dataset
        self._size = size
        self._ends = np.cumsum(dataset.source_lengths, dtype=np.int64)
        total = int(self._ends[-1])
        self.lengths = np.full(-(-total // size), size, np.int32)
        self.lengths[-1] = total - size * (len(self.lengths) - 1)

    def __call__(self, indices: np.ndarray) -> TextBatch:
        """A batch of these examples."""
        found = [self._block(int(index)) for index in indices]
        labels = np.concatenate([labels for _, labels in found])
        ids = np.concatenate([ids for ids, _ in found])
        return TextBatch(
            ids, self.lengths[indices].astype(np.int64), labels, len(labels), len(indices)
        )

    def _block(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        begin = index * self._size
        end = begin + int(self.lengths[index])
        # From the token before the block, which is read first.
        first = int(np.searchsorted(self._ends, max(0, begin - 1), "right"))
        last = int(np.searchsorted(self._ends, end, "left"))
        stream, _ = self._dataset.gather_source(np.arange(first, last + 1))
        before = int(self._ends[first - 1]) if first else 0
        labels = stream[begin - before : end - before]
        previous = stream[begin - before - 1] if begin else self._dataset.eos_id
        ids = np.concatenate([[previous], labels[:-1]])
        ids[ids == self._dataset.eos_id] = self._dataset.bos_id
        return ids, labels


class Labelled:
    """The labelled texts of a data set as examples of a classifier: start id, text, end id.

    Args:
        dataset: made with :class:`Labels` for the target.
        longest: tokens of a text that are read, start and end included; None: all.

    Attributes:
        lengths: int32 [examples], tokens of each.
    """

    def __init__(self, dataset: ParallelDataset, longest: int | None = None) -> None:
        self._dataset = dataset
        whole = dataset.source_lengths + np.int32(1)
        self.lengths = whole if longest is None else np.minimum(whole, np.int32(longest))

    def __call__(self, indices: np.ndarray) -> TextBatch:
        """A batch of these examples."""
        tokens, token_lengths = self._dataset.gather_source(indices)
        labels, _ = self._dataset.gather_target(indices)
        starts = np.cumsum(token_lengths) - token_lengths
        kept = self.lengths[indices].astype(np.int64) - 1
        cut = token_lengths - kept
        if cut.any():
            # The end id stays.
            place = np.arange(len(tokens)) - np.repeat(starts, token_lengths)
            limit = np.repeat(kept - 1, token_lengths)
            tokens = tokens[
                (place < limit) | (place == np.repeat(token_lengths - 1, token_lengths))
            ]
            starts = np.cumsum(kept) - kept
        ids = np.insert(tokens, starts, self._dataset.bos_id)
        return TextBatch(ids, kept + 1, labels, len(indices), len(indices))
