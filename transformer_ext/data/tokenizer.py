"""Text to token ids and back, by SentencePiece (Kudo and Richardson, 2018)."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import sentencepiece

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or trained."""


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Tokenizer:
    """A SentencePiece model.

    Where a model brought along has no padding, start or end piece, ids after its last piece stand
    for them, and ``vocab_size`` counts these too.

    Attributes:
        path: the file.
        sha256: of the file's bytes, in hexadecimal.
        vocab_size: number of ids; rows of an embedding for it.
        pad_id, unk_id, bos_id, eos_id: special ids.

    Raises:
        TokenizerError: no such file, or not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise TokenizerError(f"{path}: not a SentencePiece model") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        size = self._processor.get_piece_size()
        self._pieces = size
        special = []
        for id in (self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id()):
            if id < 0:
                id = size
                size += 1
            special.append(id)
        self.pad_id, self.bos_id, self.eos_id = special
        self.unk_id: int = self._processor.unk_id()
        self.vocab_size: int = size

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset((self.pad_id, self.bos_id, self.eos_id))

    def encode(self, text: str) -> list[int]:
        """Ids of a sentence, without start and end."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each, faster."""
        # The threads are started anew in each call: for a few sentences they cost more than they
        # save.
        threads = min(8, _usable_cpus()) if len(texts) >= 256 else 1
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids are left out, and the text is always one line.

        Byte pieces can spell a line end or broken UTF-8: the former becomes a space, the latter
        U+FFFD.
        """
        text: str = self._processor.decode(
            [int(id) for id in ids if id not in self._special and id < self._pieces]
        )
        return re.sub("[\r\n]+", " ", text)

    def piece(self, id: int) -> str:
        """The piece of an id, as in the SentencePiece model.

        Raises:
            IndexError: no such id.
        """
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"id: expected 0 to {self.vocab_size - 1}, got {id}")
        if id < self._pieces:
            text: str = self._processor.id_to_piece(int(id))
            return text
        names = {self.pad_id: "<pad>", self.bos_id: "<s>", self.eos_id: "</s>"}
        return names[id]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """:meth:`piece` of each id, for pictures of attention."""
        return [self.piece(id) for id in ids]


def train_tokenizer(
    sentences: Iterable[str],
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 1.0,
) -> tuple[bytes, int]:
    """Train a SentencePiece model: the same sentences give the same model.

    Characters without a piece of their own fall back to bytes, so nothing is ever unknown. Text is
    not normalised (other than white space): a target language has to come out as it went in.

    Args:
        sentences: training text.
        vocab_size: number of pieces wanted, special and byte pieces included.
        kind: ``bpe`` or ``unigram``.
        character_coverage: part of the characters that get a piece of their own.

    Returns:
        The model file's bytes, and its number of pieces: smaller than ``vocab_size`` where the text
        has not so many different pieces.

    Raises:
        TokenizerError: ``vocab_size`` is too small for the characters of the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            # A constant: unigram training sums floating-point counts by thread.
            num_threads=4,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise TokenizerError(
                f"vocab_size: got {vocab_size}, expected at least {needed[1]}: so many are the "
                "characters of the text, the 256 bytes and the 4 special pieces; a lower "
                "character_coverage needs fewer"
            ) from None
        raise TokenizerError(f"the tokenizer could not be trained: {error}") from None
    data = model.getvalue()
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return data, processor.get_piece_size()
