"""The plain Python beam search: against exhaustive search, and its rules one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from transformer_ext.config import ConfigError
from transformer_ext.inference.options import PRESETS, SearchOptions
from transformer_ext.inference.search import (
    SentenceSearch,
    beam_search,
    draw,
    never_proposed,
    repeating_tokens,
    search,
    uniform_number,
)

START, EOS = 0, 1


def table_model(vocabulary: int, seed: int, sharpness: float = 1.0):
    """A step function whose log-probabilities depend on the whole prefix, and on nothing else."""

    def log_probs(prefix: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([seed, *prefix])
        logits = generator.normal(size=vocabulary) * sharpness
        return logits - np.log(np.exp(logits).sum())

    def step(sentences, prefixes):
        return np.stack([log_probs(tuple(prefix)) for prefix in prefixes.tolist()])

    return step


def one(step, limit, **changes):
    options = SearchOptions().replace(**changes)
    return search(step, [limit], options, start_id=START, eos_id=EOS, suppressed={START})[0]


def exhaustive(step, vocabulary, limit, options):
    """(score, tokens) of every hypothesis that ends within the limit, best first."""
    found = []
    others = [token for token in range(vocabulary) if token not in (START, EOS)]
    for length in range(options.min_length, limit):
        for tokens in itertools.product(others, repeat=length):
            total, prefix = 0.0, [START]
            for token in (*tokens, EOS):
                total += float(step([0], np.array([prefix]))[0, token])
                prefix.append(token)
            found.append((total / options.penalty(length, ended=True), list(tokens)))
    return sorted(found, key=lambda item: -item[0])


@pytest.mark.parametrize("kind", ["gnmt", "divide", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_wide_beam_finds_what_exhaustive_search_finds(kind, alpha, seed):
    vocabulary, limit = 5, 5
    step = table_model(vocabulary, seed)
    changes = dict(
        beam_size=3**limit,
        num_hypotheses=7,
        length_penalty=alpha,
        length_penalty_kind=kind,
        min_length=seed - 1,
        length_counts_eos=seed == 1,
    )
    result = one(step, limit, **changes)
    expected = exhaustive(step, vocabulary, limit, SearchOptions().replace(**changes))[:7]
    assert [hypothesis.tokens for hypothesis in result.hypotheses] == [t for _, t in expected]
    np.testing.assert_allclose([h.score for h in result.hypotheses], [s for s, _ in expected])


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_exact_stopping_returns_what_never_stopping_returns(seed, ranked):
    step = table_model(5 if ranked else 8, seed, sharpness=2.0)
    changes = dict(num_hypotheses=3, length_penalty=1.5 if ranked else 1.0)
    changes.update(length_counts_eos=not ranked, rank_unfinished=ranked)
    limit = 4 if ranked else 12
    stopped = one(step, limit, **changes)

    endless = SentenceSearch(limit, EOS, SearchOptions(**changes), {START})
    while endless.steps < limit and endless.live:
        prefixes = np.array([[START, *live.tokens] for live in endless.live])
        endless.advance(step([0] * len(prefixes), prefixes))
    found = endless.result().hypotheses
    if not ranked:
        found = [hypothesis for hypothesis in found if hypothesis.ended]
    assert stopped.hypotheses[: len(found)] == found


@pytest.mark.parametrize("beam_size", [2, 5])
def test_first_stops_as_soon_as_beam_size_hypotheses_have_ended(beam_size):
    step = table_model(6, seed=3)
    first = one(step, 50, beam_size=beam_size, early_stopping="first", num_hypotheses=beam_size)
    exact = one(step, 50, beam_size=beam_size, num_hypotheses=1)
    assert first.stop == "first" and exact.stop == "exact"
    assert len(first.hypotheses) == beam_size and all(h.ended for h in first.hypotheses)
    assert exact.hypotheses[0].score >= first.hypotheses[0].score


def test_greedy_takes_the_best_token_and_ends_with_the_first_end():
    step = table_model(9, seed=5)
    tokens = []
    while True:
        row = step([0], np.array([[START, *tokens]]))[0]
        row[START] = -np.inf
        if row.argmax() == EOS:
            break
        tokens.append(int(row.argmax()))
    result = one(step, 100, beam_size=1)
    assert result.hypotheses[0].tokens == tokens
    assert result.stop == "first" and result.steps == len(tokens) + 1


def test_longest_output_gives_the_best_live_hypothesis_marked_so():
    def step(sentences, prefixes):
        probabilities = np.array([1e-30, 1e-30, 0.6, 0.4])
        return np.log(np.tile(probabilities, (len(prefixes), 1)))

    result = one(step, 2, beam_size=2, num_hypotheses=2)
    assert result.stop == "max_length" and result.steps == 2
    best, second = result.hypotheses
    assert best.tokens == [2, 2] and not best.ended and len(best.token_scores) == 2
    assert math.isclose(best.log_prob, 2 * math.log(0.6))
    assert math.isclose(best.score, best.log_prob / (7 / 6) ** 0.6)
    # As probable as [3, 2]: the lower hypothesis goes first.
    assert second.tokens == [2, 3]


def test_ties_go_to_the_lower_token():
    def step(sentences, prefixes):
        return np.full((len(prefixes), 6), -math.log(6))

    result = one(step, 2, beam_size=3, num_hypotheses=3, min_length=9)
    assert [h.tokens for h in result.hypotheses] == [[2, 2], [2, 3], [2, 4]]


def test_shortest_output():
    step = table_model(4, seed=9)
    for least in (0, 4, 7):
        result = one(step, 12, min_length=least)
        assert len(result.hypotheses[0].tokens) >= least


def test_scores_are_sums_of_token_scores():
    step = table_model(10, seed=11)
    for hypothesis in one(step, 20, num_hypotheses=4).hypotheses:
        assert math.isclose(sum(hypothesis.token_scores), hypothesis.log_prob)
        assert len(hypothesis.token_scores) == len(hypothesis.tokens) + hypothesis.ended
        prefix = [START]
        for token, score in zip(
            [*hypothesis.tokens, EOS], hypothesis.token_scores, strict=hypothesis.ended
        ):
            assert step([0], np.array([prefix]))[0, token] == score
            prefix.append(token)


def test_sentences_of_a_batch_do_not_see_each_other():
    tables = [table_model(7, seed) for seed in range(4)]

    def step(sentences, prefixes):
        rows = [tables[s]([s], prefixes[i : i + 1]) for i, s in enumerate(sentences)]
        return np.concatenate(rows)

    limits = [3, 9, 20, 6]
    options = SearchOptions(num_hypotheses=2)
    together = search(step, limits, options, start_id=START, eos_id=EOS, suppressed={START})
    alone = [one(table, n, num_hypotheses=2) for table, n in zip(tables, limits, strict=True)]
    assert together == alone


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="step 1: NaN"):
        one(lambda sentences, prefixes: np.full((1, 4), np.nan), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 0}, "beam_size: got 0, expected an integer from 1 to 1000"),
        ({"beam_size": 2, "num_hypotheses": 3}, "num_hypotheses: got 3, expected at most beam"),
        ({"length_penalty": -1.0}, "length_penalty: got -1.0"),
        ({"length_penalty_kind": "gnm"}, "did you mean 'gnmt'"),
        ({"beam": 3}, "unknown search option 'beam'; did you mean"),
        ({"max_length": 0}, "max_length: got 0"),
        ({"early_stopping": True}, "early_stopping: got True, expected one of exact, first"),
        (
            {"coverage_penalty": -0.1},
            "coverage_penalty: got -0.1, expected a number from 0.0 to 1000.0",
        ),
        ({"repetition_penalty": 0.9}, "repetition_penalty: got 0.9, expected a number from 1.0"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size: got 1.5, expected an integer"),
        ({"suppressed_tokens": [3, -1]}, r"suppressed_tokens: got \[3, -1\], expected a list"),
        ({"top_k": 5}, "top_k: got 5 without sampling"),
        ({"top_p": 0.5}, "top_p: got 0.5 without sampling"),
        ({"temperature": 0.5}, "temperature: got 0.5 without sampling"),
        (
            {"sampling": True, "temperature": 0.0},
            "temperature: got 0.0, expected a number from 0.001",
        ),
        ({"sampling": True, "top_p": 1.1}, "top_p: got 1.1, expected a number from 0.0 to 1.0"),
        ({"beam_patience": 2.0}, "beam_patience: got 2.0 with early_stopping 'exact'"),
        ({"seed": -1}, "seed: got -1"),
        ({"max_length": 5, "min_length": 6}, "min_length: got 6, expected at most max_length"),
        ({"beam_size": 1001}, "beam_size: got .*, expected an integer .*to 1000"),
        ({"beam_size": 10**400}, "beam_size: got .*, expected an integer .*to 1000"),
        ({"num_hypotheses": 1001}, "num_hypotheses: got .*, expected an integer .*to 1000"),
        ({"length_penalty": 1e300}, "length_penalty: got .*, expected a number .*to 50.0"),
        ({"length_penalty": 10**400}, "length_penalty: got .*, expected a number .*to 50.0"),
        ({"coverage_penalty": 1e300}, "coverage_penalty: got .*, expected a number .*to 1000.0"),
        ({"max_length": 1_000_001}, "max_length: got .*, expected an integer .*to 1000000"),
        ({"max_length_a": 1e300}, "max_length_a: got .*, expected a number .*to 1000.0"),
        ({"max_length_b": 1_000_001}, "max_length_b: got .*, expected an integer .*to 1000000"),
        (
            {"max_source_length": 10**10},
            "max_source_length: got .*, expected an integer .*to 1000000",
        ),
        ({"min_length": 10**20}, "min_length: got .*, expected an integer .*to 1000000"),
        ({"min_length_a": 1e300}, "min_length_a: got .*, expected a number .*to 1000.0"),
        ({"beam_patience": 1e300}, "beam_patience: got .*, expected a number .*to 1000.0"),
        (
            {"no_repeat_ngram_size": 10**20},
            "no_repeat_ngram_size: got .*, expected an integer .*to 1000000",
        ),
        (
            {"repetition_penalty": 1e300},
            "repetition_penalty: got .*, expected a number .*to 1000.0",
        ),
        ({"top_k": 2**31}, "top_k: got .*, expected an integer .*to 2147483647"),
        ({"temperature": 1e300}, "temperature: got .*, expected a number .*to 1000.0"),
        ({"seed": 2**63}, "seed: got .*, expected an integer .*to 9223372036854775807"),
        (
            {"attention_layer": 2**31},
            "attention_layer: got .*, expected an integer .*to 2147483647",
        ),
        ({"suppressed_tokens": [2**31]}, "suppressed_tokens: got .* from 0 to 2147483647"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        SearchOptions().replace(**changes)


def test_length_limit():
    assert SearchOptions().length_limit(7) == 57
    assert SearchOptions(max_length_a=1.5, max_length_b=0).length_limit(7) == 10
    assert SearchOptions(max_length_a=0.0, max_length_b=0).length_limit(7) == 1
    assert SearchOptions(max_length=5).length_limit(7) == 5
    assert SearchOptions().length_limit(7, positions=20) == 20
    largest = SearchOptions(max_length_a=1000, min_length_a=1000, length_penalty=50.0)
    assert largest.length_limit(10**7) == largest.length_minimum(10**7) == 1_000_000
    assert largest.replace(length_penalty_kind="divide").penalty(10**6, ended=True) > 1e300


def fixed_model(probabilities):
    """A step function that gives the same probabilities whatever came before."""

    def step(sentences, prefixes):
        with np.errstate(divide="ignore"):
            return np.log(np.tile(np.array(probabilities, dtype=float), (len(prefixes), 1)))

    return step


def test_length_minimum():
    assert SearchOptions(min_length=3).length_minimum(10) == 3
    assert SearchOptions(min_length=3, min_length_a=0.55).length_minimum(10) == 5
    step = table_model(5, seed=1)
    options = SearchOptions(min_length_a=0.5)
    result = search(
        step, [30], options, start_id=START, eos_id=EOS, suppressed={START}, source_lengths=[16]
    )[0]
    assert len(result.hypotheses[0].tokens) >= 8
    with pytest.raises(ValueError, match="source_lengths: got none"):
        search(step, [30], options, start_id=START, eos_id=EOS)


@pytest.mark.parametrize("patience", [0.5, 1.0, 2.0])
def test_patience_is_how_many_hypotheses_must_have_ended(patience):
    step = table_model(6, seed=3)
    options = dict(beam_size=4, early_stopping="first", num_hypotheses=2)
    result = one(step, 50, beam_patience=patience, **options)
    waiting = SentenceSearch(
        50, EOS, SearchOptions(beam_patience=patience, **options), suppressed={START}
    )
    while waiting.stop is None:
        assert len(waiting.finished) < max(2, 4 * patience)
        prefixes = np.array([[START, *live.tokens] for live in waiting.live])
        waiting.advance(step([0] * len(prefixes), prefixes))
    assert len(waiting.finished) >= max(2, 4 * patience)
    assert result.stop == "first" and result == waiting.result()


def test_heuristic_compares_with_the_worst_of_as_many_as_the_beam():
    # The end of sentence has half the probability at each step: with n^1, 0.5 scores log 0.5 for
    # any length, so nothing live is ever better and the search ends once two have ended.
    step = fixed_model([0.0, 0.5, 0.5])
    changes = dict(beam_size=2, length_penalty=1.0, length_penalty_kind="divide")
    result = one(step, 50, early_stopping="heuristic", **changes)
    assert result.stop == "heuristic" and result.steps == 2
    # The longest output could still reach the score of those that ended, not pass it.
    assert one(step, 50, early_stopping="exact", **changes).stop == "exact"


def test_exact_finds_what_the_heuristic_misses():
    unsure, sure = fixed_model([0.0, 0.4, 0.3, 0.3]), fixed_model([0.0, 0.0, 1.0, 0.0])
    ending = fixed_model([0.0, 1.0, 0.0, 0.0])

    def step(sentences, prefixes):
        length = prefixes.shape[1]
        return (unsure if length <= 2 else sure if length < 9 else ending)(sentences, prefixes)

    changes = dict(beam_size=2, length_penalty=1.0, length_penalty_kind="divide")
    early = one(step, 12, early_stopping="heuristic", **changes)
    assert early.stop == "heuristic" and early.steps == 2
    late = one(step, 12, early_stopping="exact", **changes)
    assert late.hypotheses[0].score > early.hypotheses[0].score


def test_unfinished_hypotheses_behind_or_among_the_others():
    step = fixed_model([0.0, 0.1, 0.9])
    changes = dict(beam_size=2, num_hypotheses=2, length_penalty=1.0, length_penalty_kind="divide")
    behind = one(step, 5, **changes).hypotheses
    among = one(step, 5, rank_unfinished=True, **changes).hypotheses
    assert [h.stop for h in among] == ["max_length", "eos"]
    assert all(h.ended for h in behind)
    assert among[0].score > among[1].score >= behind[-1].score


def test_no_token_may_follow():
    step = fixed_model([0.2, 0.2, 0.3, 0.3])
    result = one(step, 9, beam_size=2, num_hypotheses=2, min_length=99, no_repeat_ngram_size=1)
    assert result.stop == "no_token" and result.steps == 2
    assert [h.tokens for h in result.hypotheses] == [[2, 3], [3, 2]]
    assert all(h.stop == "no_token" and not h.ended for h in result.hypotheses)
    sampled = one(step, 9, sampling=True, min_length=99, no_repeat_ngram_size=1).hypotheses[0]
    assert sorted(sampled.tokens) == [2, 3] and sampled.stop == "no_token"


def test_repeating_tokens():
    assert repeating_tokens((4, 5, 4, 6, 4), 2) == {5, 6}
    assert repeating_tokens((4, 5, 4), 3) == set()
    assert repeating_tokens((4, 5, 6, 4, 5), 3) == {6}
    assert repeating_tokens((4, 5), 1) == {4, 5}
    assert repeating_tokens((), 1) == set() and repeating_tokens((4, 4, 4), 0) == set()
    assert repeating_tokens((4, 4), 2) == {4}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_sequence_of_tokens_comes_twice(size):
    # Left alone, the model says the same token for ever.
    step = fixed_model([0.0, 0.01, 0.5, 0.3, 0.19])
    for changes in ({"beam_size": 3, "num_hypotheses": 3}, {"sampling": True, "num_hypotheses": 9}):
        for hypothesis in one(step, 30, no_repeat_ngram_size=size, **changes).hypotheses:
            found = [tuple(hypothesis.tokens[i : i + size]) for i in range(len(hypothesis.tokens))]
            full = [ngram for ngram in found if len(ngram) == size]
            assert len(full) == len(set(full))


def test_repetition_penalty():
    step = fixed_model([0.0, 0.01, 0.6, 0.39])
    result = one(step, 3, beam_size=1, repetition_penalty=2.0, length_penalty=0.0)
    best = result.hypotheses[0]
    # log 0.6 * 2 < log 0.39: the second token is the other one, then both are repeated.
    assert best.tokens == [2, 3, 2]
    np.testing.assert_allclose(best.token_scores, np.log([0.6, 0.39, 0.6]))
    assert math.isclose(best.log_prob, sum(best.token_scores))
    assert math.isclose(best.score, best.log_prob + math.log(0.6))


def test_suppressed_tokens():
    step = fixed_model([0.0, 0.1, 0.6, 0.3])
    result = one(step, 3, beam_size=1, suppressed_tokens=[2])
    assert result.hypotheses[0].tokens == [3, 3, 3]
    ended = one(step, 4, beam_size=3, suppressed_tokens=[EOS])
    assert ended.stop == "max_length" and len(ended.hypotheses[0].tokens) == 4
    assert SearchOptions(suppressed_tokens=[2]) == SearchOptions(suppressed_tokens=(2,))


def test_target_prefix():
    step = table_model(8, seed=4)
    options = SearchOptions(num_hypotheses=3, min_length=1, no_repeat_ngram_size=1)
    # Taken as it is, whatever the options forbid.
    prefix = [5, 5, START]
    arguments = dict(start_id=START, eos_id=EOS, suppressed={START})
    result = search(step, [12], options, prefixes=[prefix], **arguments)[0]
    for hypothesis in result.hypotheses:
        assert hypothesis.tokens[:3] == prefix
        assert len(hypothesis.token_scores) == len(hypothesis.tokens) + hypothesis.ended
        assert math.isclose(hypothesis.log_prob, sum(hypothesis.token_scores))
        assert hypothesis.token_scores[1] == step([0], np.array([[START, 5]]))[0, 5]
    with pytest.raises(ValueError, match="prefix: got 3 tokens, expected fewer than the longest"):
        search(step, [3], options, prefixes=[prefix], **arguments)


def test_coverage_penalty():
    # Two tokens: one looks at the first word of the source, the other at the second.
    rows = {START: [0.6, 0.4], 2: [1.0, 0.0], 3: [0.0, 1.0]}

    def step(sentences, prefixes):
        log_probs = np.log(np.tile([1e-30, 0.3, 0.4, 0.3], (len(prefixes), 1)))
        return log_probs, np.array([rows[prefix[-1]] for prefix in prefixes.tolist()])

    changes = dict(beam_size=4, num_hypotheses=4, length_penalty=0.0, return_attention=True)
    plain = one(step, 4, **changes).hypotheses
    for beta in (0.1, 0.5):
        for hypothesis in one(step, 4, coverage_penalty=beta, **changes).hypotheses:
            read = [START, *hypothesis.tokens][: len(hypothesis.attention)]
            np.testing.assert_array_equal(
                hypothesis.attention,
                np.array([rows[t] for t in read], dtype=np.float32),
            )
            coverage = np.minimum(hypothesis.attention.sum(0), 1.0)
            expected = hypothesis.log_prob + beta * np.log(coverage).sum()
            assert math.isclose(hypothesis.score, expected, rel_tol=1e-6)
    assert plain[0].tokens == []
    # Nothing covers less than saying nothing: a large beta asks for words.
    assert one(step, 4, coverage_penalty=9.0, **changes).hypotheses[0].tokens != []
    with pytest.raises(ValueError, match="expected attention beside them"):
        one(table_model(5, seed=1), 4, coverage_penalty=0.1)


def test_attention_and_alignment():
    def step(sentences, prefixes):
        attention = np.tile([0.2, 0.4, 0.4], (len(prefixes), 1))
        return fixed_model([0.0, 0.2, 0.5, 0.3])(sentences, prefixes), attention

    result = one(step, 5, return_alignment=True)
    best = result.hypotheses[0]
    assert best.attention is None and best.alignment == [1] * len(best.token_scores)
    best = one(step, 5, return_attention=True).hypotheses[0]
    assert best.alignment is None and best.attention.shape == (len(best.token_scores), 3)
    assert best.attention.dtype == np.float32


def test_random_numbers_are_those_of_philox():
    torch = pytest.importorskip("torch")
    from transformer_ext.ops.dropout import philox4x32

    def word(value):
        return torch.tensor(value & 0xFFFFFFFF)

    for seed, sentence, sample, position in [(0, 0, 0, 0), (2**40 + 5, 2**33 + 7, 3, 11)]:
        words = philox4x32(
            (word(position), word(sample), word(sentence), word(sentence >> 32)),
            (word(seed), word(seed >> 32)),
        )
        expected = (int(words[0]) * 2**21 + int(words[1]) // 2**11) / 2**53
        assert uniform_number(seed, sentence, sample, position) == expected
    drawn = [uniform_number(1, sentence, 0, 0) for sentence in range(4000)]
    assert abs(np.mean(drawn) - 0.5) < 0.02 and 0 <= min(drawn) and max(drawn) < 1
    assert len(set(drawn)) == 4000


def test_draws_have_the_probabilities():
    probabilities = np.array([0.05, 0.4, 0.0, 0.25, 0.3])

    def frequencies(count=4000, **changes):
        options = SearchOptions(sampling=True, **changes)
        with np.errstate(divide="ignore"):
            rows = np.log(probabilities)
        drawn = [draw(rows, options, (i + 0.5) / count) for i in range(count)]
        return np.bincount(drawn, minlength=5) / count

    np.testing.assert_allclose(frequencies(), probabilities, atol=1e-3)
    np.testing.assert_allclose(frequencies(top_k=2), [0, 4 / 7, 0, 0, 3 / 7], atol=1e-3)
    # 0.4 alone has less.
    np.testing.assert_allclose(frequencies(top_p=0.699), [0, 4 / 7, 0, 0, 3 / 7], atol=1e-3)
    np.testing.assert_allclose(frequencies(top_p=0.0), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(top_k=3, top_p=0.5), [0, 4 / 7, 0, 0, 3 / 7], atol=1e-3)
    hot = probabilities**0.5 / (probabilities**0.5).sum()
    np.testing.assert_allclose(frequencies(temperature=2.0), hot, atol=1e-3)
    np.testing.assert_allclose(frequencies(temperature=0.001), [0, 1, 0, 0, 0])
    assert draw(np.full(3, -np.inf), SearchOptions(sampling=True), 0.5) is None


def test_samples_follow_the_model_and_their_number():
    step = table_model(9, seed=12)
    options = SearchOptions(sampling=True, num_hypotheses=300, length_penalty=0.0)
    arguments = dict(start_id=START, eos_id=EOS, suppressed={START})
    first, second = search(step, [6, 6], options, **arguments)
    assert first.hypotheses != second.hypotheses
    assert len(first.hypotheses) == 300
    again = search(step, [6], options, numbers=[1], **arguments)[0]
    assert again == second
    assert search(step, [6], options.replace(seed=1), **arguments)[0] != first
    # How often the first token comes, against its probability.
    row = np.exp(step([0], np.array([[START]]))[0])
    row[START] = 0.0
    row /= row.sum()
    starts = [h.tokens[0] if h.tokens else EOS for h in first.hypotheses + second.hypotheses]
    frequencies = np.bincount(starts, minlength=9) / 600
    assert np.abs(frequencies - row).max() < 4 * math.sqrt(0.25 / 600)
    ended = [h for h in first.hypotheses if h.ended]
    assert first.stop in ("sampled", "max_length") and ended
    assert [h.score for h in ended] == sorted((h.score for h in ended), reverse=True)


def test_presets():
    assert SearchOptions.preset("paper") == SearchOptions()
    for name in PRESETS:
        assert SearchOptions.preset(name, beam_size=7).beam_size == 7
    huggingface = SearchOptions.preset("huggingface")
    assert huggingface.penalty(4, ended=True) == 5.0 and huggingface.penalty(4, ended=False) == 4.0
    with pytest.raises(ConfigError, match="did you mean 'fairseq'"):
        SearchOptions.preset("fairsek")
    with pytest.raises(ConfigError, match="unknown search option 'beam'"):
        SearchOptions.preset("paper", beam=3)


def test_a_torch_model():
    torch = pytest.importorskip("torch")
    from transformer_ext.model.config import preset
    from transformer_ext.model.transformer import Transformer

    torch.manual_seed(1)
    config = preset("tiny", 13, 13, d_model=16, nhead=2, dim_feedforward=24)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.source_embedding.weight.mul_(3)
    sources = [[5, 6, 7, 3], [], [4, 3], [9, 8, 7, 6, 5, 4, 3]]
    results = beam_search(model, sources, SearchOptions(max_length=9))
    assert results[1].hypotheses[0].tokens == [] and results[1].steps == 0
    for source, result in zip(sources, results, strict=True):
        hypothesis = result.hypotheses[0]
        if not source:
            continue
        assert not set(hypothesis.tokens) & {*never_proposed(config), config.eos_id}
        target = [config.decoder_start_id, *hypothesis.tokens]
        with torch.no_grad():
            logits = model.logits(torch.tensor([source]), torch.tensor([target]))
        log_probs = torch.log_softmax(logits[0], -1)
        labels = [*hypothesis.tokens, config.eos_id][: len(hypothesis.token_scores)]
        expected = [float(log_probs[i, label]) for i, label in enumerate(labels)]
        np.testing.assert_allclose(hypothesis.token_scores, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_huggingface_preset_is_the_search_of_transformers(seed):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    vocabulary = 23
    config = transformers.MarianConfig(
        vocab_size=vocabulary,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=22,
        eos_token_id=0,
        decoder_start_token_id=22,
        forced_eos_token_id=None,
        init_std=1.0,
    )
    model = transformers.MarianMTModel(config).eval()
    sources = [[5, 6, 7, 0], [9, 0], [4, 8, 15, 16, 2, 3, 0]]
    longest = max(map(len, sources))
    padded = torch.tensor([source + [22] * (longest - len(source)) for source in sources])
    mask = (padded != 22).long()

    def step(rows, prefixes):
        chosen = torch.tensor(rows)
        with torch.no_grad():
            logits = model(
                input_ids=padded[chosen],
                attention_mask=mask[chosen],
                decoder_input_ids=torch.from_numpy(prefixes),
            ).logits[:, -1]
        return torch.log_softmax(logits.float(), -1).numpy()

    for alpha, beam_size, limit in ((1.0, 4, 20), (0.6, 3, 9), (2.0, 5, 4)):
        options = SearchOptions.preset(
            "huggingface", length_penalty=alpha, beam_size=beam_size, num_hypotheses=3
        )
        found = search(step, [limit] * 3, options, start_id=22, eos_id=0)
        expected = model.generate(
            input_ids=padded,
            attention_mask=mask,
            num_beams=beam_size,
            num_return_sequences=3,
            length_penalty=alpha,
            max_new_tokens=limit,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        sequences = expected.sequences.view(3, 3, -1)[:, :, 1:].tolist()
        scores = expected.sequences_scores.view(3, 3).tolist()
        for result, rows, values in zip(found, sequences, scores, strict=True):
            mine = [h.tokens + [0] * h.ended for h in result.hypotheses]
            assert mine == [row[: len(tokens)] for row, tokens in zip(rows, mine, strict=True)]
            np.testing.assert_allclose([h.score for h in result.hypotheses], values, rtol=1e-4)
