"""The plain Python beam search: against exhaustive search, and its rules one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from transformer_ext.config import ConfigError
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.search import (
    SentenceSearch,
    beam_search,
    never_proposed,
    search,
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


@pytest.mark.parametrize("seed", range(20))
def test_exact_stopping_returns_what_never_stopping_returns(seed):
    step = table_model(8, seed, sharpness=2.0)
    options = SearchOptions(num_hypotheses=3, length_penalty=1.0)
    stopped = one(step, 12, num_hypotheses=3, length_penalty=1.0)

    endless = SentenceSearch(12, EOS, options, {START})
    while endless.steps < 12 and endless.live:
        prefixes = np.array([[START, *live.tokens] for live in endless.live])
        endless.advance(step([0] * len(prefixes), prefixes))
    ended = [hypothesis for hypothesis in endless.result().hypotheses if hypothesis.ended]
    assert stopped.hypotheses[: len(ended)] == ended


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
        ({"beam_size": 0}, "beam_size: got 0, expected an integer of at least 1"),
        ({"beam_size": 2, "num_hypotheses": 3}, "num_hypotheses: got 3, expected at most beam"),
        ({"length_penalty": -1.0}, "length_penalty: got -1.0"),
        ({"length_penalty_kind": "gnm"}, "did you mean 'gnmt'"),
        ({"beam": 3}, "unknown search option 'beam'; did you mean"),
        ({"max_length": 0}, "max_length: got 0"),
        ({"early_stopping": True}, "early_stopping: got True, expected one of exact, first"),
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
