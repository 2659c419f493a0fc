"""Segmentations drawn anew in each epoch: their distribution, and what they depend on."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from transformer_ext.data import (
    ParallelDataset,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    build_dataset,
    collate,
    read_pairs,
    shipped_corpus,
)
from transformer_ext.data.subwords import SampledBatches, SubwordSampler, _words

_DRAWS = 4000

Make = Callable[..., Tokenizer]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return list(read_pairs(shipped_corpus().dev))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> Make:
    made: dict[str, Tokenizer] = {}

    def make(kind: str, **options: Any) -> Tokenizer:
        key = json.dumps([kind, options])
        if key not in made:
            path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([text for pair in pairs for text in pair]),
                model_writer=model,
                model_type=kind,
                normalization_rule_name="identity",
                minloglevel=2,
                **{"vocab_size": 1000, "byte_fallback": True, **options},
            )
            path.write_bytes(model.getvalue())
            made[key] = SentencePieceTokenizer(path)
        return made[key]

    return make


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all, each sentence with its end, and their lengths."""
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    return np.concatenate([np.array(row) for row in rows]), np.array([len(row) for row in rows])


def split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def drawn_pieces(tokenizer: Tokenizer, p: float, word: str, draws: int) -> Counter[str]:
    """How often each segmentation of a word comes."""
    ids, lengths = encode(tokenizer, [word])
    ids, lengths = SubwordSampler(tokenizer, p, 5)(
        np.tile(ids, draws), np.tile(lengths, draws), np.arange(draws), 0
    )
    return Counter(" ".join(tokenizer.pieces(row[:-1])) for row in split(ids, lengths))


def greatest_difference(found: Counter[str], expected: dict[str, float]) -> float:
    total = sum(found.values())
    return max(abs(found[key] / total - expected.get(key, 0.0)) for key in {*found, *expected})


# Distribution -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["LibreOffice", "<b>"], "split_digits": True},
        {"treat_whitespace_as_suffix": True},
        {"character_coverage": 0.98},
    ],
)
def test_all_merges_in_their_order_give_the_pieces_of_sentencepiece(
    make: Make, pairs: list[tuple[str, str]], options: dict[str, Any]
) -> None:
    tokenizer = make("bpe", **options)
    ids, lengths = encode(tokenizer, [text for pair in pairs[:40] for text in pair])
    model: Any = SubwordSampler(tokenizer, 0.1)._model
    words = _words(model, ids, lengths)
    cut = words.characters > 0
    assert words.tokens[cut].sum() > 0.8 * len(ids)
    assert (words.tokens[~cut] == 1).all()
    chosen = np.flatnonzero(cut)
    symbols = model.spell(ids, words, chosen).astype(np.int32)
    sizes = words.characters[chosen]
    starts = np.cumsum(sizes) - sizes
    never, states = np.full(len(sizes), -1), np.zeros(len(sizes), np.uint64)
    counts = model.merge(symbols, starts, sizes, never, states)
    assert len(symbols) > 2 * counts.sum() or "split_digits" in options
    found = [symbols[b : b + n].tolist() for b, n in zip(starts, counts, strict=True)]
    firsts, tokens = words.first[chosen], words.tokens[chosen]
    assert found == [ids[b : b + n].tolist() for b, n in zip(firsts, tokens, strict=True)]


def algorithm_1(tokenizer: Tokenizer, p: float, word: str, generator: random.Random) -> str:
    """BPE-dropout as the paper writes it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(len(processor))}
    symbols = list("\u2581" + word)
    while True:
        merges = [
            (-scores[a + b], at)
            for at, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in scores and generator.random() >= p
        ]
        if not merges:
            return " ".join(symbols)
        _, at = min(merges)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@pytest.mark.parametrize(("word", "p"), [("the", 0.3), ("document", 0.1), ("Tabelle", 0.5)])
def test_bpe_dropout_is_distributed_as_in_the_paper(make: Make, word: str, p: float) -> None:
    tokenizer, generator = make("bpe"), random.Random(7)
    found = drawn_pieces(tokenizer, p, word, _DRAWS)
    expected = Counter(algorithm_1(tokenizer, p, word, generator) for _ in range(800))
    # Three standard deviations of the difference of two frequencies of one half.
    bound = 3 * math.sqrt(0.25 / _DRAWS + 0.25 / 800)
    shares = {key: count / 800 for key, count in expected.items()}
    assert len(found) > 2
    assert greatest_difference(found, shares) < bound


def test_all_merges_left_out_gives_characters(make: Make) -> None:
    found = drawn_pieces(make("bpe"), 1.0, "documents", 10)
    assert found == {"\u2581 d o c u m e n t s": 10}


@pytest.mark.parametrize(("word", "alpha"), [("the", 0.1), ("document", 0.2), ("Zelle", 1.0)])
def test_unigram_segmentations_have_their_probability(make: Make, word: str, alpha: float) -> None:
    tokenizer = make("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(len(processor))}

    def segmentations(text: str) -> list[tuple[list[str], float]]:
        if not text:
            return [([], 0.0)]
        return [
            ([text[:at], *rest], alpha * scores[text[:at]] + score)
            for at in range(1, len(text) + 1)
            if text[:at] in scores
            for rest, score in segmentations(text[at:])
        ]

    weights = {" ".join(pieces): math.exp(s) for pieces, s in segmentations("\u2581" + word)}
    expected = {key: weight / sum(weights.values()) for key, weight in weights.items()}
    found = drawn_pieces(tokenizer, alpha, word, _DRAWS)
    assert len(expected) > 2 and found.keys() <= expected.keys()
    assert greatest_difference(found, expected) < 3 * math.sqrt(0.25 / _DRAWS)


# What they depend on ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_and_sentences_stay(make: Make, pairs: list[tuple[str, str]], kind: str) -> None:
    tokenizer = make(kind)
    # The last of them has characters that only bytes can spell; one is empty.
    texts = [*(src for src, _ in pairs[:100]), "", "\u4e16\u754c a\u754cb the end"]
    ids, lengths = encode(tokenizer, texts)
    new_ids, new_lengths = SubwordSampler(tokenizer, 0.1)(ids, lengths, np.arange(len(lengths)), 0)
    assert new_ids.dtype == ids.dtype
    rows = split(new_ids, new_lengths)
    assert len(rows) == len(texts)
    assert all(row[-1] == tokenizer.eos_id for row in rows)
    assert [tokenizer.decode(row) for row in rows] == [
        tokenizer.decode(row) for row in split(ids, lengths)
    ]
    assert sum(map(len, rows)) > 1.05 * len(ids)
    none = SubwordSampler(tokenizer, 0.1)(ids[:0], lengths[:0], np.arange(0), 0)
    assert len(none[0]) == len(none[1]) == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_depend_on_seed_epoch_side_and_example_alone(
    make: Make, pairs: list[tuple[str, str]], kind: str
) -> None:
    tokenizer = make(kind)
    texts = [src for src, _ in pairs[:50]]

    def sample(numbers: list[int], seed: int = 1, epoch: int = 0, side: int = 0) -> list[list[int]]:
        ids, lengths = encode(tokenizer, [texts[i] for i in numbers])
        sampler = SubwordSampler(tokenizer, 0.1, seed)
        return split(*sampler(ids, lengths, np.array(numbers), epoch, side))

    alone = [sample([i])[0] for i in range(50)]
    backwards = list(range(50))[::-1]
    assert sample(backwards)[::-1] == alone
    for other in ({"seed": 2}, {"epoch": 1}, {"side": 1}):
        assert sample(backwards, **other)[::-1] != alone
    # The same sentence as another example.
    ids, lengths = encode(tokenizer, [texts[0]] * 20)
    rows = split(*SubwordSampler(tokenizer, 0.1)(ids, lengths, np.arange(20), 0))
    assert len({tuple(row) for row in rows}) > 5


def test_a_batch_of_other_pieces(make: Make, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    tokenizer = make("bpe")
    build_dataset(tmp_path, pairs, tokenizer, tokenizer)
    examples = np.array([5, 900, 17])
    batch = collate(ParallelDataset(tmp_path), examples, start_id=0)

    def sampler() -> SubwordSampler:
        return SubwordSampler(tokenizer, 0.5)

    both = SampledBatches(sampler(), sampler())(batch, examples, 3)
    assert both.sentences == 3
    assert both.target_tokens == len(both.labels) == len(both.tgt_ids) > batch.target_tokens
    assert len(both.src_ids) == both.src_lengths.sum() > len(batch.src_ids)
    for new, labels in zip(
        split(both.tgt_ids, both.tgt_lengths), split(both.labels, both.tgt_lengths), strict=True
    ):
        assert new == [0, *labels[:-1]] and labels[-1] == tokenizer.eos_id
    for row, index in zip(split(both.labels, both.tgt_lengths), examples, strict=True):
        assert tokenizer.decode(row) == pairs[index][1]
    # One model for both sides: the same.
    one = sampler()
    joint = SampledBatches(one, one)(batch, examples, 3)
    for name, value in vars(both).items():
        assert np.array_equal(getattr(joint, name), value), name
    # One side alone: the other stays.
    source = SampledBatches(one, None)(batch, examples, 3)
    assert np.array_equal(source.src_ids, both.src_ids)
    assert source.labels is batch.labels and source.tgt_ids is batch.tgt_ids
    target = SampledBatches(None, one)(batch, examples, 3)
    assert np.array_equal(target.labels, both.labels) and target.src_ids is batch.src_ids
    empty = collate(ParallelDataset(tmp_path), examples[:0])
    assert SampledBatches(one, one)(empty, examples[:0], 0).target_tokens == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_a_vocabulary(make: Make, tmp_path: Path, kind: str) -> None:
    # As Marian's models have: other ids, pieces of another language, some pieces missing.
    plain = make(kind)
    pieces = [plain.piece(id) for id in range(plain.vocab_size)]
    kept = [p for i, p in enumerate(reversed(pieces)) if i % 50 and not p.startswith("<")]
    names = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>", "bos": "<pad>"}
    path = tmp_path / "vocab.json"
    vocabulary = [">>de<<", "</s>", *kept, "<unk>", "andere", "<pad>"]
    path.write_text(json.dumps({"pieces": vocabulary, **names}))
    tokenizer = SentencePieceTokenizer(plain.path, path)
    ids, lengths = encode(tokenizer, [">>de<< The document opens the table."] * 30)
    rows = split(*SubwordSampler(tokenizer, 0.3)(ids, lengths, np.arange(30), 0))
    assert len({tuple(row) for row in rows}) > 10
    assert all(tokenizer.piece(row[0]) == ">>de<<" for row in rows)
    assert {tokenizer.decode(row[1:]) for row in rows} == {tokenizer.decode(ids[1 : lengths[0]])}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentence_that_would_be_too_long_keeps_its_pieces(
    make: Make, pairs: list[tuple[str, str]], kind: str
) -> None:
    tokenizer = make(kind)
    ids, lengths = encode(tokenizer, [src for src, _ in pairs[:60]])
    examples = np.arange(60)
    free = split(*SubwordSampler(tokenizer, 0.2)(ids, lengths, examples, 0))
    limit = int(np.median([len(row) for row in free]))
    bounded = split(*SubwordSampler(tokenizer, 0.2, 1, limit)(ids, lengths, examples, 0))
    usual = split(ids, lengths)
    assert any(len(row) > limit for row in free)
    for number, row in enumerate(bounded):
        assert row == (free if len(free[number]) <= limit else usual)[number]


def test_a_tag_stays_whole(make: Make) -> None:
    plain = make("bpe")
    tag = max((plain.piece(id) for id in range(plain.vocab_size)), key=len)
    assert len(tag) > 8 and SubwordSampler(plain, 1.0)._model.characters.max() == len(tag)
    tokenizer = plain.with_tags([tag])
    ids, lengths = encode(tokenizer, [f"{tag} The document."])
    assert tokenizer.piece(int(ids[0])) == tag
    new_ids, new_lengths = SubwordSampler(tokenizer, 1.0)(ids, lengths, np.arange(1), 0)
    assert new_ids[0] == ids[0] and new_lengths[0] > 10


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_models_are_refused(make: Make, kind: str) -> None:
    tokenizer = make(kind, byte_fallback=False, vocab_size=200, hard_vocab_limit=False)
    with pytest.raises(TokenizerError, match=f"is a {kind} model, expected bpe or unigram"):
        SubwordSampler(tokenizer, 0.1)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_wrong_probabilities_are_refused(make: Make, p: float) -> None:
    with pytest.raises(ValueError, match="subword_dropout: got"):
        SubwordSampler(make("bpe"), p)
