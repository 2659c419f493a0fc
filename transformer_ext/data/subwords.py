"""Other segmentations of the training text in each epoch: BPE-dropout and subword regularization.

A word is cut into pieces anew each time it is read, so that a model sees rare pieces and misspelt
words in many forms: BPE-dropout (Provilkov et al., 2020, algorithm 1) leaves out each merge with a
probability; subword regularization (Kudo, 2018, sections 3.2 and 3.3) draws a segmentation from a
unigram language model.

SentencePiece has both, but draws from a generator that a thread seeds when it first needs it: what a
sentence gets would depend on what the thread read before. Here it is a function of (seed, epoch,
example) alone, so a resumed training reads the same pieces, with any number of workers. It begins
from the ids of the usual segmentation, so no text is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from transformer_ext.data.batches import GOLDEN, Batch, mix, random_state
from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError

_SPACE = "\u2581"
_NORMAL = 1
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
#: Of a pair that makes no piece.
_NO_RANK = np.iinfo(np.int32).max
#: Words at a time for a unigram model: its tables need some kilobytes a word.
_WORDS = 2048


class SubwordSampler:
    """Cuts words into other pieces.

    Args:
        tokenizer: whose pieces.
        p: for a BPE model the probability that a merge is left out, in steps of 1/65536; for a
            unigram model the exponent alpha of a segmentation's probability, so that a small one
            gives more variety. The papers take 0.1 for both.
        seed: of the draws.
        max_length: a sentence that would have more tokens keeps the usual pieces; None: no limit.

    Raises:
        TokenizerError: the tokenizer's model is neither BPE nor unigram.
        ValueError: ``p`` is not between 0 and 1.
    """

    def __init__(
        self, tokenizer: Tokenizer, p: float, seed: int = 1, max_length: int | None = None
    ) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"subword_dropout: got {p}, expected a number above 0, up to 1")
        if not isinstance(tokenizer, SentencePieceTokenizer):
            raise TokenizerError(
                f"subword_dropout: {tokenizer.path} is no SentencePiece model, expected one"
            )
        kind, pieces = _read_model(tokenizer)
        if kind == "bpe":
            self._model: _Merges | _Lattice = _Merges(pieces, p)
        elif kind == "unigram":
            self._model = _Lattice(pieces, p)
        else:
            raise TokenizerError(
                f"subword_dropout: {tokenizer.path} is a {kind} model, expected bpe or unigram"
            )
        self._seed = seed
        self._max_length = max_length

    def __call__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        examples: np.ndarray,
        epoch: int,
        side: int | np.ndarray = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Other ids for sentences that lie one behind the other.

        Args:
            ids: int64 [tokens]; special ids stay as they are.
            lengths: int64 [sentences].
            examples: [sentences], the number of each: what its draws depend on.
            epoch: the same.
            side: the same: 0 for the source, 1 for the target; one for all or of each sentence.

        Returns:
            ids and lengths.
        """
        if not len(ids):
            return ids, lengths
        words = _words(self._model, ids, lengths)
        bases = np.concatenate([random_state(self._seed, epoch, of, 3) for of in (0, 1)])
        sentences = mix(bases[side] + (examples.astype(np.uint64) + np.uint64(1)) * GOLDEN)
        states = mix(sentences[words.sentence] + (words.number + 1).astype(np.uint64) * GOLDEN)
        changed, new_ids, counts = self._model.sample(ids, words, states)
        if not len(changed):
            return ids, lengths
        sizes = words.tokens.copy()
        sizes[changed] = counts
        ends = np.cumsum(sizes)
        if self._max_length is not None:
            new_lengths = np.diff(np.append(0, ends)[words.sentence_bounds])
            over = (new_lengths > self._max_length)[words.sentence]
            new_ids = new_ids[~np.repeat(over[changed], counts)]
            changed = changed[~over[changed]]
            sizes[over] = words.tokens[over]
            ends = np.cumsum(sizes)
        result = np.empty(int(ends[-1]), np.int64)
        is_new = np.zeros(len(sizes), bool)
        is_new[changed] = True
        is_new_token = np.repeat(is_new, sizes)
        result[is_new_token] = new_ids
        result[~is_new_token] = ids[~np.repeat(is_new, words.tokens)]
        ends = np.append(0, ends)
        return result, np.diff(ends[words.sentence_bounds])


@dataclass(frozen=True)
class SampledBatches:
    """Makes batches of other segmentations; see :class:`SubwordSampler`.

    Attributes:
        source: of the source, or None to leave it.
        target: of the target, or None to leave it.
    """

    source: SubwordSampler | None
    target: SubwordSampler | None

    def __call__(self, batch: Batch, examples: np.ndarray, epoch: int) -> Batch:
        """The batch of these examples, cut anew; it is larger by some tokens."""
        if self.source is not None and self.source is self.target:
            # At once: half of the time of a small batch is a fixed cost.
            both = np.concatenate([batch.src_ids, batch.labels])
            lengths = np.concatenate([batch.src_lengths, batch.tgt_lengths])
            side = np.repeat([0, 1], len(examples))
            ids, lengths = self.source(both, lengths, np.tile(examples, 2), epoch, side)
            src_lengths, tgt_lengths = np.split(lengths, 2)
            src_ids, labels = np.split(ids, [src_lengths.sum()])
            return _with_target(
                replace(batch, src_ids=src_ids, src_lengths=src_lengths), labels, tgt_lengths
            )
        if self.source is not None:
            ids, lengths = self.source(batch.src_ids, batch.src_lengths, examples, epoch, 0)
            batch = replace(batch, src_ids=ids, src_lengths=lengths)
        if self.target is not None:
            labels, lengths = self.target(batch.labels, batch.tgt_lengths, examples, epoch, 1)
            batch = _with_target(batch, labels, lengths)
        return batch


def _with_target(batch: Batch, labels: np.ndarray, lengths: np.ndarray) -> Batch:
    tgt_ids = np.roll(labels, 1)
    tgt_ids[np.cumsum(lengths) - lengths] = batch.tgt_ids[:1]
    return replace(
        batch, tgt_ids=tgt_ids, labels=labels, tgt_lengths=lengths, target_tokens=len(labels)
    )


@dataclass(frozen=True)
class _Piece:
    """A piece of the vocabulary; its score is None where it cannot be cut."""

    text: str
    score: float | None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message of protocol buffers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        length = {1: 8, 2: -1, 5: 4}[wire]
        length = varint() if length < 0 else length
        yield number, data[at : at + length]
        at += length


def _read_model(tokenizer: SentencePieceTokenizer) -> tuple[str, list[_Piece]]:
    """Kind of the SentencePiece model, and the pieces by the ids of the tokenizer.

    The file is read here because SentencePiece itself does not tell the types of pieces.
    """
    kind = 1
    scores: dict[str, float] = {}
    for number, content in _fields(tokenizer.path.read_bytes()):
        if number == 1 and isinstance(content, bytes):
            fields = dict(_fields(content))
            text, score, type_ = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, _NORMAL)
            assert isinstance(text, bytes) and isinstance(score, bytes)
            if type_ == _NORMAL:
                scores[text.decode()] = struct.unpack("<f", score)[0]
        elif number == 2 and isinstance(content, bytes):
            value = dict(_fields(content)).get(3, 1)
            assert isinstance(value, int)
            kind = value
    pieces = []
    for id in range(tokenizer.vocab_size):
        name = tokenizer.piece(id)
        # A tag stays whole, even where it is a piece like others.
        pieces.append(_Piece(name, None if id in tokenizer.tag_ids else scores.get(name)))
    return _MODEL_TYPES[kind], pieces


@dataclass(frozen=True)
class _Words:
    """Where the words of a batch lie. A piece that is not made of others is a word of its own.

    Attributes:
        first: int64 [words], its first token.
        tokens: int64 [words], number of tokens.
        characters: int64 [words], number of characters; 0 of a word that cannot be cut.
        sentence: int64 [words], place of its sentence in the batch.
        number: int64 [words], place in the sentence.
        sentence_bounds: int64 [sentences + 1], first word of each sentence.
    """

    first: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    sentence: np.ndarray
    number: np.ndarray
    sentence_bounds: np.ndarray


def _words(model: _Merges | _Lattice, ids: np.ndarray, lengths: np.ndarray) -> _Words:
    characters = model.characters[ids]
    whole = characters == 0
    begins = whole | model.begins_word[ids]
    begins[1:] |= whole[:-1]
    starts = np.cumsum(lengths) - lengths
    begins[starts[lengths > 0]] = True
    first = np.flatnonzero(begins)
    before = np.append(0, np.cumsum(begins))
    bounds = before[np.append(starts, len(ids))]
    per_sentence = np.diff(bounds)
    sentence = np.repeat(np.arange(len(lengths)), per_sentence)
    number = np.arange(len(first)) - np.repeat(bounds[:-1], per_sentence)
    tokens = np.diff(np.append(first, len(ids)))
    return _Words(first, tokens, np.add.reduceat(characters, first), sentence, number, bounds)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``starts[i], starts[i] + 1, ...``, ``lengths[i]`` numbers for each i."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
        starts - (ends - lengths), lengths
    )


class _Table:
    """From 64-bit keys to int32 values, for whole arrays; ``missing`` for a key that is not there."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, missing: int) -> None:
        bits = max(4, (4 * len(keys)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self._keys = np.zeros(1 << bits, np.uint64)
        self._values = np.full(1 << bits, missing, np.int32)
        self._missing = missing
        waiting = np.arange(len(keys))
        places = self._places(keys)
        while len(waiting):
            free = self._values[places] == missing
            _, chosen = np.unique(places[free], return_index=True)
            chosen = np.flatnonzero(free)[chosen]
            self._keys[places[chosen]] = keys[waiting[chosen]]
            self._values[places[chosen]] = values[waiting[chosen]]
            left = np.ones(len(waiting), bool)
            left[chosen] = False
            waiting = waiting[left]
            places = places[left] + np.uint64(1) & self._mask

    def _places(self, keys: np.ndarray) -> np.ndarray:
        places: np.ndarray = keys * GOLDEN >> self._shift
        return places

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        places = self._places(keys)
        values = self._values[places]
        other = self._keys[places] != keys
        if not other.any():
            return values
        # Nearly all that are elsewhere are nowhere.
        values[other] = self._missing
        at = np.flatnonzero(other & (self._values[places] != self._missing))
        places = places[at]
        while len(at):
            places = places + np.uint64(1) & self._mask
            here = self._keys[places] == keys[at]
            found = self._values[places]
            values[at[here]] = found[here]
            on = ~here & (found != self._missing)
            at, places = at[on], places[on]
        return values


class _Pieces:
    """What both kinds of model need to know of each id.

    Attributes:
        characters: int64 [ids], number of characters; 0 for what cannot be cut: special, byte and
            user-defined pieces, and those with a character that is no piece.
        begins_word: bool [ids], whether a word begins here.
    """

    def __init__(self, pieces: list[_Piece]) -> None:
        self.ids = {p.text: id for id, p in enumerate(pieces) if p.score is not None and p.text}
        cut = {text: id for text, id in self.ids.items() if all(char in self.ids for char in text)}
        self.characters = np.zeros(len(pieces), np.int64)
        for text, id in cut.items():
            self.characters[id] = len(text)
        # Where pieces go over spaces, what lies between special pieces is one word.
        by_space = not any(_SPACE in text[1:] for text in cut)
        self.begins_word = np.array([by_space and p.text.startswith(_SPACE) for p in pieces])
        # The pieces of the characters of each piece.
        self.spelling = np.zeros(int(self.characters.sum()), np.int64)
        self.spelled_from = np.cumsum(self.characters) - self.characters
        for text, id in cut.items():
            begin = self.spelled_from[id]
            self.spelling[begin : begin + len(text)] = [self.ids[char] for char in text]
        self.cut = cut

    def spell(self, ids: np.ndarray, words: _Words, chosen: np.ndarray) -> np.ndarray:
        """The pieces of the characters of some words, one behind the other."""
        tokens = ids[_spans(words.first[chosen], words.tokens[chosen])]
        spelled = self.spelling[_spans(self.spelled_from[tokens], self.characters[tokens])]
        return spelled


class _Merges(_Pieces):
    """BPE: the two neighbours whose piece has the highest score are merged, again and again."""

    def __init__(self, pieces: list[_Piece], p: float) -> None:
        super().__init__(pieces)
        ranked = sorted(self.cut.items(), key=lambda item: -(pieces[item[1]].score or 0.0))
        self._merged = np.array([id for _, id in ranked], np.int32)
        pairs = [
            (self.ids[text[:at]], self.ids[text[at:]], rank)
            for rank, (text, _) in enumerate(ranked)
            for at in range(1, len(text))
            if text[:at] in self.ids and text[at:] in self.ids
        ]
        left, right, ranks = np.array(pairs, np.int64).reshape(-1, 3).T
        self._ranks = _Table(self._keys(left, right), ranks, _NO_RANK)
        self._threshold = round(p * 65536)
        # The probabilities, times 2^32, that none of the first 1, 2, ... merges is left out.
        kept = 1.0
        thresholds: list[int] = []
        while kept >= 2.0**-32 and len(thresholds) < 4096:
            kept *= 1 - self._threshold / 65536
            thresholds.append(round(kept * 2.0**32))
        self._kept = np.array(thresholds[::-1], np.uint64)

    @staticmethod
    def _keys(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left.astype(np.uint64) << np.uint64(32)) | right.astype(np.uint64)

    def sample(
        self, ids: np.ndarray, words: _Words, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which words are cut anew, their ids one behind the other, and how many each has.

        The best merge is left out at each step with probability p, so a number drawn at once says at
        which step it is first: most words (two thirds in English at p = 0.1) have fewer merges, and
        keep the pieces that they have.
        """
        before_first = len(self._kept) - np.searchsorted(
            self._kept, states >> np.uint64(32), "right"
        )
        changed = np.flatnonzero(before_first < words.characters - words.tokens)
        lengths = words.characters[changed]
        spelled = self.spell(ids, words, changed).astype(np.int32)
        starts = np.cumsum(lengths) - lengths
        counts = self.merge(
            spelled, starts, lengths, lengths - before_first[changed], states[changed]
        )
        return changed, spelled[_spans(starts, counts)].astype(np.int64), counts

    def merge(
        self,
        symbols: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        first_at: np.ndarray,
        states: np.ndarray,
    ) -> np.ndarray:
        """Merges the symbols of each word in their place; returns how many are left.

        Words of as many symbols are done together: each step makes words of one symbol fewer.
        ``first_at`` is the number of symbols at which the best merge is left out for the first time.
        """
        counts = lengths.copy()
        by_length = np.argsort(-lengths, kind="stable")
        longest = int(lengths.max(initial=0))
        bounds = np.searchsorted(-lengths[by_length], -np.arange(longest + 2), "right")
        rows = np.empty(0, np.int64)
        table = np.empty((0, longest), np.int32)
        ranks = np.empty((0, max(longest - 1, 0)), np.int32)
        for size in range(longest, 1, -1):
            new = by_length[bounds[size + 1] : bounds[size]]
            if len(new):
                new_table = symbols[starts[new][:, None] + np.arange(size)]
                rows = np.concatenate([rows, new])
                table = np.concatenate([table, new_table])
                new_ranks = self._rank(new_table[:, :-1], new_table[:, 1:])
                ranks = np.concatenate([ranks, new_ranks])
            if not len(rows):
                table, ranks = table[:, : size - 1], ranks[:, : size - 2]
                continue
            number = np.arange(len(rows))
            left_out = ranks.copy()
            first = first_at[rows]
            draws = self._draws(states[rows], size)
            left_out[(draws < self._threshold) & (size <= first)[:, None]] = _NO_RANK
            now = np.equal(size, first).nonzero()[0]
            left_out[now, ranks[now].argmin(1)] = _NO_RANK
            at = left_out.argmin(1)
            done = left_out[number, at] == _NO_RANK
            if done.any():
                ended = rows[done]
                symbols[starts[ended][:, None] + np.arange(size)] = table[done]
                counts[ended] = size
                on = ~done
                rows, table, ranks, at = rows[on], table[on], ranks[on], at[on]
                number = np.arange(len(rows))
            merged = self._merged[ranks[number, at]]
            # What is behind the merged pair moves by one.
            column = np.arange(size - 1)
            column = column + (column > at[:, None])
            rows_of = number[:, None]
            table = table[rows_of, column]
            table[number, at] = merged
            ranks = ranks[rows_of, np.minimum(column[:, :-1], size - 2)]
            has_left, has_right = (at > 0).nonzero()[0], (at < size - 2).nonzero()[0]
            pair_rows = np.concatenate([has_left, has_right])
            pair_at = np.concatenate([at[has_left] - 1, at[has_right]])
            ranks[pair_rows, pair_at] = self._rank(
                table[pair_rows, pair_at], table[pair_rows, pair_at + 1]
            )
        if longest > 0:
            symbols[starts[rows]] = table[:, 0]
            counts[rows] = 1
        return counts

    def _rank(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        keys = self._keys(left, right)
        return self._ranks(keys.ravel()).reshape(keys.shape)

    @staticmethod
    def _draws(states: np.ndarray, size: int) -> np.ndarray:
        """A 16-bit number for each pair of neighbours of words of so many symbols."""
        counters = np.arange((size + 2) // 4, dtype=np.uint64) + np.uint64(size << 20)
        draws = mix(states[:, None] + counters * GOLDEN).astype("<u8", copy=False)
        return draws.view("<u2")[:, : size - 1].astype(np.int32)


class _Lattice(_Pieces):
    """Unigram: a segmentation's probability is the product of those of its pieces."""

    def __init__(self, pieces: list[_Piece], alpha: float) -> None:
        super().__init__(pieces)
        texts = list(self.cut)
        self._longest = max((len(text) for text in texts), default=1)
        keys = np.zeros(len(texts), np.uint64)
        for number, text in enumerate(texts):
            key = 0
            for char in text:
                key = (key * int(GOLDEN) + self.ids[char] + 1) % 2**64
            keys[number] = key
        self._table = _Table(keys, np.arange(len(keys)), -1)
        # The last entry is for texts that are no piece.
        self._ids = np.array([*(self.cut[text] for text in texts), -1])
        scores = [alpha * (pieces[self.cut[text]].score or 0.0) for text in texts]
        self._scores = np.array([*scores, -np.inf])

    def sample(
        self, ids: np.ndarray, words: _Words, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which words are cut anew, their ids one behind the other, and how many each has."""
        changed = np.flatnonzero(words.characters > 1)
        new_ids, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        # Words of like length together, so that tables have little padding.
        order = np.argsort(words.characters[changed], kind="stable")
        for begin in range(0, len(order), _WORDS):
            part = changed[order[begin : begin + _WORDS]]
            drawn, sizes = self._draw(
                self.spell(ids, words, part), words.characters[part], states[part]
            )
            new_ids.append(drawn)
            counts.append(sizes)
        sizes = np.concatenate(counts)
        starts = np.cumsum(sizes) - sizes
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return changed, np.concatenate(new_ids)[_spans(starts[back], sizes[back])], sizes[back]

    def _draw(
        self, spelled: np.ndarray, lengths: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Forward filtering, backward sampling (Scott, 2002)."""
        words, longest = len(lengths), int(lengths.max())
        symbols = np.full((words, longest), -1)
        symbols[np.arange(longest) < lengths[:, None]] = spelled
        width = min(self._longest, longest)
        # found[:, end, size - 1]: the piece of the size characters before the end.
        found = np.full((words, longest + 1, width), -1, np.int32)
        keys = np.zeros((words, longest), np.uint64)
        for size in range(1, width + 1):
            last = symbols[:, size - 1 :]
            keys = keys[:, : longest - size + 1] * GOLDEN + (last + 1).astype(np.uint64)
            pieces = self._table(keys.ravel()).reshape(keys.shape)
            pieces[last < 0] = -1
            found[:, size:, size - 1] = pieces
        scores = self._scores[found]
        logs = np.full((words, longest + 1), -np.inf)
        logs[:, 0] = 0.0
        for end in range(1, longest + 1):
            most = min(width, end)
            ways = logs[:, end - most : end][:, ::-1] + scores[:, end, :most]
            best = ways.max(1)
            best[best == -np.inf] = 0.0
            with np.errstate(divide="ignore"):
                logs[:, end] = best + np.log(np.exp(ways - best[:, None]).sum(1))
        drawn = np.empty((words, longest), np.int64)
        counts = np.zeros(words, np.int64)
        ends = lengths.copy()
        rows = np.arange(words)
        sizes = np.arange(1, width + 1)
        while len(rows):
            end = ends[rows]
            befores = end[:, None] - sizes
            ways = logs[rows[:, None], np.maximum(befores, 0)] + scores[rows, end]
            ways[befores < 0] = -np.inf
            shares = np.cumsum(np.exp(ways - logs[rows, end][:, None]), 1)
            draws = mix(states[rows] + end.astype(np.uint64) * GOLDEN) >> np.uint64(11)
            wanted = draws.astype(np.float64) * 2.0**-53 * shares[:, -1]
            taken = (shares <= wanted[:, None]).sum(1)
            drawn[rows, counts[rows]] = self._ids[found[rows, end, taken]]
            counts[rows] += 1
            ends[rows] = end - (taken + 1)
            rows = rows[ends[rows] > 0]
        # They were drawn from the last to the first.
        place = np.arange(longest)
        reverse = np.take_along_axis(drawn, np.maximum(counts[:, None] - 1 - place, 0), 1)
        return reverse[place < counts[:, None]], counts
