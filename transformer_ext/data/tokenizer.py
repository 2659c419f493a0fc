"""Text to token ids and back: what every tokenizer has, and SentencePiece (Kudo and Richardson, 2018).

The tokenizers of BERT and GPT-2 are in :mod:`transformer_ext.data.json_tokenizer`.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import sentencepiece

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or trained."""


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_characters(texts: str | Sequence[str]) -> None:
    """Raise a TokenizerError for a text with half a character, which the libraries have no words for."""
    alone = isinstance(texts, str) or not isinstance(texts, Iterable)
    for number, text in enumerate([texts] if alone else texts):
        if not isinstance(text, str):
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            place = "text:" if alone else f"texts: number {number} (from 0)"
            raise TokenizerError(f"{place} has half a character (a lone surrogate)") from None


TokenizerT = TypeVar("TokenizerT", bound="Tokenizer")


class Tokenizer(ABC):
    """What the rest of the package asks of a tokenizer.

    A text that begins with a tag has the tag's piece as its first token, whatever the model would
    make of it; elsewhere in a text a tag is text like any other.

    Attributes:
        path: the file of the model.
        vocabulary: a second file that gives the pieces other ids, or None.
        source_tags: tags of source texts, in order; those that follow from a vocabulary are among
            them.
        target_prefixes: tags of target texts, in order.
        sha256: of all that ids depend on, in hexadecimal.
        vocab_size: number of ids; rows of an embedding for it.
        pad_id, unk_id, bos_id, eos_id: special ids; they may be the same.
        mask_id: id of the token that stands for one to be guessed, or None.
    """

    #: How a model directory names the file: ``tokenizer.model``.
    suffix: ClassVar[str]

    path: Path
    vocabulary: Path | None
    source_tags: tuple[str, ...]
    target_prefixes: tuple[str, ...]
    sha256: str
    vocab_size: int
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None = None

    #: Tags that follow from the vocabulary.
    _known_tags: tuple[str, ...] = ()

    @abstractmethod
    def content(self) -> bytes:
        """What a model directory holds as the file of this tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, str] | None:
        """Which tokens are special, by role, where the file does not tell; else None."""
        return None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a sentence, without start and end.

        Raises:
            TokenizerError: the text has half a character (a lone surrogate).
        """

    @abstractmethod
    def encode_untagged(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """:meth:`encode_batch` of texts in which a tag at the beginning is text like any other."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids, and a tag at the beginning, are left out."""

    @abstractmethod
    def piece(self, id: int) -> str:
        """The piece of an id.

        Raises:
            IndexError: no such id.
        """

    @abstractmethod
    def find(self, piece: str) -> int | None:
        """The id of a piece, or None."""

    @abstractmethod
    def _with(
        self: TokenizerT, source_tags: Sequence[str], target_prefixes: Sequence[str]
    ) -> TokenizerT:
        """The same tokenizer with these tags."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each, faster."""
        # The threads are started anew in each call: for a few sentences they cost more than they
        # save.
        threads = min(8, usable_cpus()) if len(texts) >= 256 else 1
        if not self._tags:
            return self.encode_untagged(texts, threads)
        split = [self.split_tag(text) for text in texts]
        rows = self.encode_untagged([rest for _, rest in split], threads)
        return [first + row if first else row for (first, _), row in zip(split, rows, strict=True)]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """:meth:`piece` of each id, for pictures of attention."""
        return [self.piece(id) for id in ids]

    def _set_tags(self, source_tags: Sequence[str], target_prefixes: Sequence[str]) -> None:
        known = self._known_tags
        self.source_tags = tuple(dict.fromkeys((*known, *source_tags)))
        self.target_prefixes = tuple(dict.fromkeys(target_prefixes))
        # The longest first: one may be the beginning of another.
        tags = sorted({*self.source_tags, *self.target_prefixes}, key=lambda tag: (-len(tag), tag))
        self._tags: dict[str, int] = {tag: self._tag_id(tag) for tag in tags}
        self._tag_texts = tuple(tags)
        self._tag_ids = frozenset(self._tags.values())
        shown = set(known) - {*source_tags, *target_prefixes}
        self._hidden = frozenset(id for tag, id in self._tags.items() if tag not in shown)

    def _tag_id(self, tag: str) -> int:
        found = self.find(tag)
        if found is None or found in (self.pad_id, self.bos_id, self.eos_id, self.unk_id):
            raise TokenizerError(
                f"{self.vocabulary or self.path}: the tag {tag!r} is not a piece of this tokenizer "
                "(a tokenizer of your own must have been trained with it as a symbol)"
            )
        return found

    @property
    def given_source_tags(self) -> tuple[str, ...]:
        """``source_tags`` without those that follow from the vocabulary."""
        return tuple(tag for tag in self.source_tags if tag not in self._known_tags)

    @property
    def tag_ids(self) -> frozenset[int]:
        """Ids of all tags."""
        return self._tag_ids

    def split_tag(self, text: str) -> tuple[list[int], str]:
        """The id of the tag that a text begins with, or none, and the text after it."""
        if self._tag_texts and text.startswith(self._tag_texts):
            tag = next(tag for tag in self._tag_texts if text.startswith(tag))
            return [self._tags[tag]], text[len(tag) :].removeprefix(" ")
        return [], text

    def with_tags(
        self: TokenizerT, source_tags: Sequence[str] = (), target_prefixes: Sequence[str] = ()
    ) -> TokenizerT:
        """This tokenizer, or one that knows these tags too.

        Raises:
            TokenizerError: a tag is not a piece.
        """
        sources = tuple(dict.fromkeys((*self.source_tags, *source_tags)))
        targets = tuple(dict.fromkeys((*self.target_prefixes, *target_prefixes)))
        if (sources, targets) == (self.source_tags, self.target_prefixes):
            return self
        given = tuple(tag for tag in sources if tag in (*self.given_source_tags, *source_tags))
        return self._with(given, targets)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset((self.pad_id, self.bos_id, self.eos_id))


class _Processor:
    """A SentencePiece processor whose calls may be under way in other threads when Python ends.

    They let the interpreter's lock go, and where one asks for it again when the interpreter has begun
    to end, SentencePiece aborts the process (before Python 3.14). So the end waits for those that
    are under way, and those that come later wait for the end.
    """

    _under_way: ClassVar[set[int]] = set()  # in which threads
    _ending: ClassVar[int | None] = None  # the thread that ends the interpreter

    def __init__(self) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._processor, name)

        def call(*arguments: Any, **options: Any) -> Any:
            thread = threading.get_ident()
            self._under_way.add(thread)
            try:
                if self._ending is not None and self._ending != thread:
                    self._under_way.discard(thread)
                    # Not for ever: what runs at exit may wait for this thread.
                    time.sleep(_LONGEST_WAIT)
                return function(*arguments, **options)
            finally:
                self._under_way.discard(thread)

        setattr(self, name, call)
        return call

    @classmethod
    def end(cls) -> None:
        """No other thread is in SentencePiece any more."""
        cls._ending = threading.get_ident()
        latest = time.monotonic() + _LONGEST_WAIT
        while cls._under_way - {cls._ending} and time.monotonic() < latest:
            time.sleep(0.001)


#: Seconds.
_LONGEST_WAIT = 5.0

atexit.register(_Processor.end)
if hasattr(os, "register_at_fork"):
    # The child has none of the other threads.
    os.register_at_fork(after_in_child=_Processor._under_way.clear)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, alone or with a vocabulary that gives its pieces other ids.

    Where a model brought along has no padding, start or end piece, ids after its last piece stand
    for them, and ``vocab_size`` counts these too.

    A vocabulary, as models of Marian have one for the SentencePiece models of both languages, is a
    JSON file::

        {"pieces": ["</s>", "<unk>", ",", ...],          the position of a piece is its id
         "eos": "</s>", "unk": "<unk>", "pad": "<pad>",  which of them are special
         "bos": "<pad>"}

    A piece of the SentencePiece model that is not among them is unknown.

    Tags are those given, and the pieces ``>>...<<`` (target languages) of a vocabulary.

    Args:
        path: the SentencePiece model.
        vocabulary: the JSON file; None: ids are those of the SentencePiece model.
        source_tags: tags of source texts; each is a piece.
        target_prefixes: tags of target texts; each is a piece.

    Raises:
        TokenizerError: no such file, not a SentencePiece model, not a vocabulary, the vocabulary
            of another SentencePiece model, or a tag that is not a piece.
    """

    suffix = ".model"

    def __init__(
        self,
        path: str | Path,
        vocabulary: str | Path | None = None,
        source_tags: Sequence[str] = (),
        target_prefixes: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.vocabulary = None if vocabulary is None else Path(vocabulary)
        model = _read(self.path)
        self._processor = _Processor()
        try:
            if not model:
                raise RuntimeError
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError):  # ValueError: its message is not UTF-8
            raise TokenizerError(f"{path}: not a SentencePiece model") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        size = self._processor.get_piece_size()
        self._pieces = size
        self._vocabulary: _Vocabulary | None = None
        if self.vocabulary is not None:
            content = _read(self.vocabulary)
            try:
                pieces = [self._processor.id_to_piece(id) for id in range(size)]
            except UnicodeDecodeError:
                raise TokenizerError(
                    f"{path}: not a SentencePiece model: a piece is not UTF-8"
                ) from None
            self._vocabulary = _Vocabulary(self.vocabulary, content, self._processor, pieces)
            digest = hashlib.sha256(content).hexdigest()
            self.sha256 = hashlib.sha256(f"{self.sha256} {digest}".encode()).hexdigest()
            size = self._pieces = len(self._vocabulary.pieces)
            special = [self._vocabulary.special[name] for name in ("pad", "bos", "eos", "unk")]
            self.pad_id, self.bos_id, self.eos_id, self.unk_id = special
        else:
            processor = self._processor
            special = []
            for id in (processor.pad_id(), processor.bos_id(), processor.eos_id()):
                if id < 0:
                    id = size
                    size += 1
                special.append(id)
            self.pad_id, self.bos_id, self.eos_id = special
            self.unk_id = processor.unk_id()
        self.vocab_size: int = size
        if self._vocabulary is not None:
            self._known_tags = self._vocabulary.languages
        self._set_tags(source_tags, target_prefixes)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "vocabulary": self.vocabulary,
            "source_tags": self.source_tags,
            "target_prefixes": self.target_prefixes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def content(self) -> bytes:
        """The bytes of the SentencePiece model."""
        return self.path.read_bytes()

    def find(self, piece: str) -> int | None:
        if self._vocabulary is not None:
            return self._vocabulary.find(piece)
        # What is no piece has the id of the unknown one.
        id: int = self._processor.piece_to_id(piece)
        return id if self._processor.id_to_piece(id) == piece else None

    def _with(
        self, source_tags: Sequence[str], target_prefixes: Sequence[str]
    ) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(self.path, self.vocabulary, source_tags, target_prefixes)

    def encode(self, text: str) -> list[int]:
        """Ids of a sentence, without start and end."""
        first, rest = self.split_tag(text)
        if self._vocabulary is not None:
            try:
                return first + self._vocabulary.encode([rest], 1)[0]
            except (RuntimeError, TypeError):
                check_characters(text)
                raise
        # Not as a list of one: for a list SentencePiece starts a thread, ten times as long as this.
        try:
            ids: list[int] = self._processor.encode(rest)
        except RuntimeError:
            check_characters(text)
            raise
        return first + ids

    def encode_untagged(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """:meth:`encode_batch` of texts in which a tag at the beginning is text like any other."""
        try:
            if self._vocabulary is not None:
                return self._vocabulary.encode(texts, threads)
            ids: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        except (RuntimeError, TypeError):
            check_characters(texts)
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids are left out, and the text is always one line.

        A tag at the beginning is left out too, unless it is of the vocabulary.

        Byte pieces can spell a line end or broken UTF-8: the former becomes a space, the latter
        U+FFFD.
        """
        known = [int(id) for id in ids if id not in self._special and id < self._pieces]
        if known and known[0] in self._hidden:
            del known[0]
        if self._vocabulary is not None:
            # A piece of the other language comes out as it is, its word boundary included.
            pieces = [self._vocabulary.pieces[id] for id in known]
            text: str = self._processor.decode(pieces).replace("\u2581", " ").strip()
        else:
            text = self._processor.decode(known)
        return re.sub("[\r\n]+", " ", text)

    def piece(self, id: int) -> str:
        """The piece of an id, as in the SentencePiece model or the vocabulary.

        Raises:
            IndexError: no such id.
        """
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"id: expected 0 to {self.vocab_size - 1}, got {id}")
        if self._vocabulary is not None:
            return self._vocabulary.pieces[id]
        if id < self._pieces:
            text: str = self._processor.id_to_piece(int(id))
            return text
        names = {self.pad_id: "<pad>", self.bos_id: "<s>", self.eos_id: "</s>"}
        return names[id]


class _Vocabulary:
    """Other ids for the pieces of a SentencePiece model; see :class:`SentencePieceTokenizer`."""

    def __init__(self, path: Path, content: bytes, processor: Any, pieces: list[str]) -> None:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: broken, not JSON: {error}") from None
        names = ("pieces", "eos", "unk", "pad", "bos")
        if not isinstance(values, dict) or set(values) != set(names):
            got = (
                ", ".join(map(reprlib.repr, itertools.islice(values, 9)))
                if isinstance(values, dict)
                else type(values).__name__
            )
            raise TokenizerError(f"{path}: got {got}, expected the keys {', '.join(names)}")
        self.pieces: list[str] = values["pieces"]
        if not isinstance(self.pieces, list) or not all(isinstance(p, str) for p in self.pieces):
            raise TokenizerError(f"{path}: pieces: expected a list of texts")
        self._ids = {piece: id for id, piece in enumerate(self.pieces)}
        if len(self._ids) != len(self.pieces):
            twice = next(piece for id, piece in enumerate(self.pieces) if self._ids[piece] != id)
            raise TokenizerError(f"{path}: pieces: {reprlib.repr(twice)} is there twice")
        self.special: dict[str, int] = {}
        for name in names[1:]:
            if not isinstance(values[name], str) or values[name] not in self._ids:
                raise TokenizerError(
                    f"{path}: {name}: got {reprlib.repr(values[name])}, expected one of the pieces"
                )
            self.special[name] = self._ids[values[name]]
        self._processor = processor
        self._unknown: int = processor.unk_id()
        unknown = self.special["unk"]
        size = len(pieces)
        self._table = [self._ids.get(piece, unknown) for piece in pieces]
        # The two of one model share almost all: a piece can be missing that no training text had.
        found = size - self._table.count(unknown)
        if 2 * found < size:
            raise TokenizerError(
                f"{path}: has {found} of the {size} pieces of the SentencePiece model: it is the "
                "vocabulary of another"
            )
        #: Pieces that name a target language.
        self.languages = tuple(p for p in self.pieces if re.fullmatch(">>.+<<", p))

    def find(self, piece: str) -> int | None:
        """The id of a piece, or None."""
        return self._ids.get(piece)

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        table, unknown = self._table, self.special["unk"]
        rows: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        for number, row in enumerate(rows):
            if self._unknown in row:
                # What the SentencePiece model does not know may be a piece of the other language.
                pieces = self._processor.encode(texts[number], out_type=str)
                rows[number] = [self._ids.get(piece, unknown) for piece in pieces]
            else:
                rows[number] = [table[id] for id in row]
        return rows


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None


def open_tokenizer(
    path: str | Path, source_tags: Sequence[str] = (), target_prefixes: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer that a person names.

    Args:
        path: a SentencePiece model, or a folder of Hugging Face with a tokenizer of BERT or GPT-2,
            or the ``tokenizer.json`` in it.
        source_tags: tags of source texts; each is a piece.
        target_prefixes: tags of target texts; each is a piece.

    Raises:
        TokenizerError: there is no such tokenizer, or a tag is not a piece of it.
    """
    path = Path(path)
    if not path.is_dir() and (path.name != "tokenizer.json" or not path.is_file()):
        return SentencePieceTokenizer(path, None, source_tags, target_prefixes)
    from transformer_ext.data.json_tokenizer import JsonTokenizer

    found = JsonTokenizer.from_huggingface(path if path.is_dir() else path.parent)
    return found.with_tags(source_tags, target_prefixes)


def train_tokenizer(
    sentences: Iterable[str],
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 1.0,
    tags: Sequence[str] = (),
) -> tuple[bytes, int]:
    """Train a SentencePiece model: the same sentences give the same model.

    Characters without a piece of their own fall back to bytes, so nothing is ever unknown. Text is
    not normalised (other than white space): a target language has to come out as it went in.

    Args:
        sentences: training text.
        vocab_size: number of pieces wanted, special and byte pieces included.
        kind: ``bpe`` or ``unigram``.
        character_coverage: part of the characters that get a piece of their own.
        tags: pieces that no text is cut into, see :class:`Tokenizer`.

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
            control_symbols=list(tags),
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
