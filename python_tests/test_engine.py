"""The compiled engine on token ids: against the plain Python search on the torch model."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformer_ext import ops  # noqa: E402
from transformer_ext._native import native  # noqa: E402
from transformer_ext.files import parameter_shapes  # noqa: E402
from transformer_ext.inference import torch_search  # noqa: E402
from transformer_ext.inference.engine import (  # noqa: E402
    Engine,
    UnsupportedModelError,
    resolve_compute_type,
)
from transformer_ext.inference.options import SearchOptions  # noqa: E402
from transformer_ext.inference.quantization import linear_int8, quantize_rows  # noqa: E402
from transformer_ext.inference.search import beam_search  # noqa: E402
from transformer_ext.inference.torch_engine import TorchEngine  # noqa: E402
from transformer_ext.model.config import KINDS, TransformerConfig  # noqa: E402
from transformer_ext.model.transformer import Transformer  # noqa: E402
from transformer_ext.ops import set_backend  # noqa: E402

VARIANTS = {
    "the paper's": {},
    "pre-norm": {"norm_first": True},
    "pre-norm without final norm": {"norm_first": True, "final_norm": False},
    "post-norm with final norm": {"final_norm": True},
    "rms": {"norm": "rms", "norm_first": True, "layer_norm_eps": 1e-6},
    "rms, post-norm": {"norm": "rms"},
    "sinusoidal_halves": {"positions": "sinusoidal_halves"},
    "learned": {"positions": "learned", "max_positions": 30},
    "rope": {"positions": "rope"},
    "no positions": {"positions": "none"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu"},
    "reglu": {"activation": "reglu"},
    "no bias": {"bias": False},
    "output bias": {"output_bias": True},
    "tie target": {"tie": "target", "src_vocab_size": 31},
    "tie none": {"tie": "none", "src_vocab_size": 31, "output_bias": True},
    "no scale": {"scale_embedding": False},
    "embedding norm": {"embedding_norm": True},
    "grouped heads": {"num_kv_heads": 2},
    "one key head, rope": {"num_kv_heads": 1, "positions": "rope"},
    "head_dim of its own": {"head_dim": 24},
    "odd sizes": {"d_model": 36, "nhead": 3, "dim_feedforward": 51},
    "unequal depth": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "no layers": {"num_encoder_layers": 0, "num_decoder_layers": 0},
    "special ids": {"pad_id": 36, "eos_id": 0, "bos_id": 1, "unk_id": 2, "decoder_start_id": 36},
    "modern": {
        "norm": "rms",
        "norm_first": True,
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
        "num_kv_heads": 2,
        "tie": "target",
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that a second thread of torch costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(seed=0, **changes):
    """A model of random weights, norms and biases included, that is sure enough of its tokens."""
    torch.manual_seed(seed)
    fields = dict(
        src_vocab_size=37,
        tgt_vocab_size=37,
        d_model=32,
        nhead=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dim_feedforward=48,
    )
    config = TransformerConfig(**{**fields, **changes})
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.3)
            elif "embedding" in name or "generator" in name:
                parameter.mul_(2.0)
    return model


def weights_of(model):
    state = model.state_dict()
    return {name: state[name].numpy() for name in parameter_shapes(model.config)}


def make_engine(model, threads=1):
    return Engine(model.config, weights_of(model), threads=threads)


def random_sources(model, count=6, longest=17, seed=0):
    config = model.config
    generator = np.random.default_rng(seed)
    special = {config.pad_id, config.bos_id, config.eos_id, config.decoder_start_id}
    words = [i for i in range(config.src_vocab_size) if i not in special]
    lengths = generator.integers(1, longest, size=count)
    return [[*generator.choice(words, size=n).tolist(), config.eos_id] for n in lengths]


def assert_same(results, expected, tolerance=2e-5):
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.stop == other.stop and result.steps == other.steps
        assert len(result.hypotheses) == len(other.hypotheses)
        for mine, reference in zip(result.hypotheses, other.hypotheses, strict=True):
            assert mine.tokens == reference.tokens
            assert mine.stop == reference.stop
            assert mine.alignment == reference.alignment
            if reference.attention is None:
                assert mine.attention is None
            else:
                assert mine.attention.dtype == np.float32
                np.testing.assert_allclose(mine.attention, reference.attention, atol=tolerance)
                np.testing.assert_allclose(mine.attention.sum(1), 1.0, atol=tolerance)
            np.testing.assert_allclose(mine.score, reference.score, rtol=tolerance)
            np.testing.assert_allclose(mine.log_prob, reference.log_prob, rtol=tolerance)
            np.testing.assert_allclose(
                mine.token_scores, reference.token_scores, rtol=10 * tolerance, atol=1e-5
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_finds_what_the_python_search_finds(variant):
    model = make_model(**VARIANTS[variant])
    engine = make_engine(model)
    sources = random_sources(model)
    for options in (
        SearchOptions(num_hypotheses=3, max_length=14),
        SearchOptions(beam_size=1, max_length=14),
    ):
        expected = beam_search(model, sources, options)
        assert_same(engine.search(sources, options), expected)
        assert_same(TorchEngine(model).search(sources, options), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_size": 7, "num_hypotheses": 7},
        {"length_penalty": 0.0},
        {"length_penalty": 1.4, "length_penalty_kind": "divide"},
        {"length_penalty_kind": "none", "length_counts_eos": False},
        {"early_stopping": "first", "num_hypotheses": 4},
        {"min_length": 6, "num_hypotheses": 2},
        {"max_length": 15, "min_length": 15, "num_hypotheses": 2},
        {"max_length": 1, "num_hypotheses": 4},
        {"max_length": None, "max_length_a": 0.5, "max_length_b": 2},
        {"beam_size": 60, "num_hypotheses": 60, "max_length": 3},
        {"coverage_penalty": 0.4, "num_hypotheses": 3, "return_attention": True},
        {"return_attention": True, "return_alignment": True, "attention_layer": 0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5, "repetition_penalty_on": "logits", "beam_size": 1},
        {"sampling": True, "num_hypotheses": 3, "seed": 4},
        {"sampling": True, "top_k": 5, "top_p": 0.8, "temperature": 1.3},
    ],
)
def test_options(changes, monkeypatch):
    model = make_model(seed=3)
    sources = random_sources(model)
    options = SearchOptions(**{"max_length": 15, **changes})
    expected = beam_search(model, sources, options)
    assert_same(make_engine(model).search(sources, options), expected)
    assert_same(TorchEngine(model).search(sources, options), expected)
    # Caches that grow, sentences that leave, batches of a few.
    monkeypatch.setattr(torch_search, "_ROOM", 4)
    monkeypatch.setattr(torch_search, "CHECK_EVERY", 3)
    assert_same(TorchEngine(model).search(sources, options, batch_size=4), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hypotheses": 3},
        {"coverage_penalty": 0.3, "return_attention": True},
        {"sampling": True, "num_hypotheses": 3},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ],
)
def test_ensembles(changes):
    models = [make_model(seed=3), make_model(seed=4, positions="rope", num_decoder_layers=1)]
    sources = random_sources(models[0])
    options = SearchOptions(max_length=15, **changes)
    engine = Engine.ensemble([make_engine(model) for model in models])
    expected = beam_search(models, sources, options)
    assert_same(engine.search(sources, options), expected)
    assert_same(TorchEngine(models).search(sources, options), expected)


def test_an_ensemble_has_the_mean_of_the_probabilities():
    engines = [make_engine(make_model(seed=seed)) for seed in (3, 4, 5)]
    sources, targets = [[5, 6, 3], [7, 3]], [[8, 9, 3], [3]]
    together = Engine.ensemble(engines)
    each = [engine.score(sources, targets) for engine in engines]
    for i, row in enumerate(together.score(sources, targets)):
        mean = np.mean([np.exp(scores[i]) for scores in each], axis=0)
        np.testing.assert_allclose(np.exp(row), mean, rtol=1e-5)
    for (_, attention), *others in zip(
        together.align(sources, targets), *(e.align(sources, targets) for e in engines), strict=True
    ):
        np.testing.assert_allclose(attention, np.mean([a for _, a in others], axis=0), atol=1e-6)
    learned = make_engine(make_model(positions="learned", max_positions=9))
    assert Engine.ensemble([engines[0], learned]).positions == 9
    with pytest.raises(ValueError, match="a sequence of 12 tokens is longer than the 9 learned"):
        Engine.ensemble([engines[0], learned]).search([[5] * 12])
    other = make_engine(make_model(src_vocab_size=40, tgt_vocab_size=40))
    with pytest.raises(
        ValueError, match="number 1 .from 0. has src_vocab_size 40, expected the 37"
    ):
        Engine.ensemble([engines[0], other])
    with pytest.raises(ValueError, match="engines: got none"):
        Engine.ensemble([])
    options = SearchOptions(return_attention=True, attention_layer=1)
    shallow = make_engine(make_model(num_decoder_layers=1))
    with pytest.raises(ValueError, match="attention_layer: got 1, but the decoder has 1 layers"):
        Engine.ensemble([engines[0], shallow]).search(sources, options)
    expected = together.score(sources, targets)

    def closing():
        yield from sources
        together.close()

    # A call that has begun goes on, with all members.
    assert together.score(closing(), targets, batch_size=1) == expected
    with pytest.raises(ValueError, match="^this Engine is closed$"):
        together.score(sources, targets)


def test_a_long_sentence():
    model = make_model(seed=4, positions="rope")
    sources = random_sources(model, count=1, longest=2) + [[5, 6] * 80 + [3]]
    options = SearchOptions(beam_size=2, max_length=90, min_length=80)
    expected = beam_search(model, sources, options)
    for engine in (make_engine(model), TorchEngine(model)):
        assert_same(engine.search(sources, options), expected, tolerance=1e-4)


def test_a_vocabulary_of_several_chunks():
    model = make_model(seed=5, src_vocab_size=11000, tgt_vocab_size=11000)
    sources = random_sources(model, count=3)
    options = SearchOptions(beam_size=3, num_hypotheses=3, max_length=8)
    expected = beam_search(model, sources, options)
    for engine in (make_engine(model), TorchEngine(model)):
        assert_same(engine.search(sources, options), expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_what_exhaustive_search_finds(seed):
    # Vocabulary: pad, unk, bos, eos and two words; unk can be said too.
    model = make_model(seed, src_vocab_size=6, tgt_vocab_size=6)
    engine = make_engine(model)
    source, limit = [4, 5, 5, 3], 5
    options = SearchOptions(
        beam_size=3**limit, num_hypotheses=5, length_penalty=1.0, max_length=limit
    )
    found = []
    for length in range(limit):
        for tokens in itertools.product((1, 4, 5), repeat=length):
            log_probs = engine.score([source], [[*tokens, 3]])[0]
            found.append((sum(log_probs) / options.penalty(length, True), list(tokens)))
    found.sort(key=lambda item: -item[0])
    hypotheses = engine.search([source], options)[0].hypotheses
    assert [h.tokens for h in hypotheses] == [tokens for _, tokens in found[:5]]
    np.testing.assert_allclose([h.score for h in hypotheses], [score for score, _ in found[:5]])


def test_scores_are_teacher_forced_scores():
    model = make_model(seed=6)
    engine = make_engine(model)
    sources = random_sources(model)
    for source, result in zip(
        sources, engine.search(sources, num_options := SearchOptions(num_hypotheses=4)), strict=True
    ):
        assert len(result.hypotheses) == num_options.num_hypotheses
        for hypothesis in result.hypotheses:
            labels = hypothesis.tokens + [model.config.eos_id] * hypothesis.ended
            # The same arithmetic on the same rows: equal to the last bit.
            assert engine.score([source], [labels])[0] == hypothesis.token_scores
            fed = [model.config.decoder_start_id, *labels[:-1]]
            with torch.no_grad():
                logits = model.logits(torch.tensor([source]), torch.tensor([fed]))[0]
            expected = torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels]
            np.testing.assert_allclose(hypothesis.token_scores, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["the paper's", "modern", "geglu", "learned"])
def test_bitwise_the_same_in_any_batch_and_for_any_number_of_threads(variant):
    model = make_model(seed=7, **VARIANTS[variant])
    sources = random_sources(model, count=40, longest=25, seed=1)
    options = SearchOptions(num_hypotheses=4, max_length=25)
    expected = make_engine(model).search(sources, options, batch_size=1)
    for threads in (1, 2, 4):
        engine = make_engine(model, threads)
        for batch_size in (3, 40):
            assert engine.search(sources, options, batch_size=batch_size) == expected
        assert engine.search(sources[::-1], options) == expected[::-1]


def test_several_threads_on_one_engine():
    model = make_model(seed=8)
    engine = make_engine(model, threads=2)
    options = SearchOptions(max_length=20)
    batches = [random_sources(model, count=5, seed=seed) for seed in range(4)]
    expected = [engine.search(batch, options) for batch in batches]
    failures = []

    def work(number):
        for _ in range(5):
            if engine.search(batches[number], options) != expected[number]:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("layer", [None, 0])
def test_attention_of_given_targets(layer):
    model = make_model(seed=6, num_kv_heads=2)
    engine = make_engine(model)
    sources = random_sources(model)
    targets = [[7, 9, 11, 3], [3], [5] * 7, [6, 3], [], [8, 8, 3]]
    found = engine.align(sources, targets, layer=layer)
    for source, target, (log_probs, attention) in zip(sources, targets, found, strict=True):
        assert log_probs == engine.score([source], [target])[0]
        assert attention.shape == (len(target), len(source))
        if not target:
            continue
        fed = torch.tensor([[model.config.decoder_start_id, *target[:-1]]])
        trace = model.trace(torch.tensor([source]), fed)
        name = f"decoder.layers.{1 if layer is None else layer}.cross_attention"
        expected = trace.attentions[name].weights[0].mean(0)
        np.testing.assert_allclose(attention, expected, atol=1e-5)


def test_attention_of_a_search_is_that_of_its_tokens():
    model = make_model(seed=6)
    engine = make_engine(model)
    sources = random_sources(model)
    options = SearchOptions(num_hypotheses=3, return_attention=True, max_length=12)
    for source, result in zip(sources, engine.search(sources, options), strict=True):
        for hypothesis in result.hypotheses:
            labels = hypothesis.tokens + [model.config.eos_id] * hypothesis.ended
            assert (hypothesis.attention == engine.align([source], [labels])[0][1]).all()


def test_empty_sources():
    model = make_model()
    engine = make_engine(model)
    assert engine.search([]) == []
    results = engine.search([[], [5, 3], []])
    assert [result.steps == 0 for result in results] == [True, False, True]
    assert results[0].hypotheses[0].tokens == [] and results[0].hypotheses[0].ended
    assert engine.score([[], [5, 3]], [[4, 3], []]) == [[], []]


def test_weights_are_copied():
    model = make_model()
    weights = {name: array.copy() for name, array in weights_of(model).items()}
    engine = Engine(model.config, weights, threads=1)
    before = engine.search([[5, 6, 3]])
    for array in weights.values():
        array[:] = 0
    assert engine.search([[5, 6, 3]]) == before


def test_errors():
    model = make_model(positions="learned", max_positions=12)
    weights = weights_of(model)
    engine = make_engine(model)
    for sources, message in (
        ([[5, 37, 3]], "got 37, expected integers from 0 to 36"),
        ([[5] * 1000 + [2**40]], "got 1099511627776, expected integers from 0 to 36"),
        ([[5.5, 3]], "got 5.5, expected integers from 0 to 36"),
        ([["a"]], "got 'a', expected integers from 0 to 36"),
        ([[True]], "got True, expected integers from 0 to 36"),
        (np.array([[5.0, 3.0]]), "got 5.0, expected integers from 0 to 36"),
        *(
            (given, f"got {shown}, expected a sequence of integers for each text")
            for given, shown in (
                (None, "None"),
                (["abc"], "'abc'"),
                ([b"abc"], "b'abc'"),
                ([5, 6, 3], "5"),
                ([{7, 5}], r"\{5, 7\}"),
                ([{5: 6}], r"\{5: 6\}"),
                ({5: [6]}, r"\{5: \[6\]\}"),
                (np.array(5), r"array\(5\)"),
            )
        ),
    ):
        for call in (
            engine.search,
            lambda ids: engine.score(ids, [[3]]),
            lambda ids: engine.align(ids, [[3]]),
        ):
            kind = TypeError if message.endswith("text") else ValueError
            with pytest.raises(kind, match=f"^sources: {message}$"):
                call(sources)
    with pytest.raises(ValueError, match="^prefixes: got 'a', expected integers from 0 to"):
        engine.search([[5, 3]], prefixes=[["a"]])
    with pytest.raises(ValueError, match="^numbers: got -1, expected integers from 0 to"):
        engine.search([[5, 3]], numbers=[-1])
    with pytest.raises(TypeError, match=r"^options: got dict, expected SearchOptions \(single"):
        engine.search([[5, 3]], {"beam_size": 2})
    with pytest.raises(TypeError, match="^Engine: a model cannot be pickled or copied"):
        copy.deepcopy(engine)
    with pytest.raises(ValueError, match="13 tokens is longer than the 12 learned positions"):
        engine.search([[5] * 13])
    with pytest.raises(ValueError, match="targets: got -1, expected integers from 0 to"):
        engine.score([[5, 3]], [[-1]])
    with pytest.raises(ValueError, match="targets: got 2, expected one for each of the 1"):
        engine.score([[5, 3]], [[3], [3]])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        engine.search([[5, 3]], batch_size=0)
    with pytest.raises(
        ValueError, match=r"number 1 \(from 0\) has 4 tokens, expected at most max_"
    ):
        engine.search([[5, 3], [5, 6, 7, 3]], SearchOptions(max_source_length=3))
    with pytest.raises(ValueError, match="number 0 .* has 2 tokens, expected at most max_source"):
        beam_search(model, [[5, 3]], SearchOptions(max_source_length=1))
    with pytest.raises(ValueError, match="attention_layer: got 2, but the decoder has 2 layers"):
        engine.align([[5, 3]], [[3]], layer=2)
    assert len(engine.search([[5] * 12])[0].hypotheses) == 1
    with pytest.raises(ValueError, match="threads: got 0"):
        Engine(model.config, weights, threads=0)
    name = "decoder.layers.1.self_attention.in_projection.weight"
    with pytest.raises(ValueError, match=f"weight {name} is missing"):
        Engine(model.config, {n: a for n, a in weights.items() if n != name}, threads=1)
    with pytest.raises(ValueError, match=rf"weight {name}: got shape \[5, 2\]"):
        Engine(model.config, {**weights, name: np.zeros((5, 2), np.float32)}, threads=1)
    with pytest.raises(ValueError, match=f"weight {name}: got float64"):
        Engine(model.config, {**weights, name: weights[name].astype(np.float64)}, threads=1)
    with pytest.raises(UnsupportedModelError, match="does not know: 'encoder.adapter.weight'"):
        Engine(model.config, {**weights, "encoder.adapter.weight": weights[name]}, threads=1)
    config = TransformerConfig(**model.config.to_dict())
    config.activation = "mish"
    with pytest.raises(UnsupportedModelError, match="activation mish is not known to the engine"):
        Engine(config, weights, threads=1)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.search([[5, 3]])


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 6, "num_hypotheses": 2, "return_attention": True},
        {"sampling": True, "num_hypotheses": 8, "top_k": 9},
    ],
)
def test_teams_of_threads_find_the_same(options):
    # So many hypotheses that the threads form teams, of one thread, of two, and of unequal size.
    model = make_model()
    options = SearchOptions(max_length_b=5, **options)
    sources = random_sources(model, count=70)
    prefixes = [source[:1] if i % 3 == 0 else [] for i, source in enumerate(sources)]
    found = [
        Engine(model.config, weights_of(model), threads=threads).search(
            sources, options, prefixes=prefixes, batch_size=70
        )
        for threads in (1, 2, 3, 8)
    ]
    for other in found[1:]:
        assert other == found[0]
        for ours, theirs in zip(other, found[0], strict=True):
            for a, b in zip(ours.hypotheses, theirs.hypotheses, strict=True):
                if a.attention is not None:
                    np.testing.assert_array_equal(a.attention, b.attention)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-17, 1.0])
def test_parts_of_the_vocabulary_agree_about_ties(scale, flush):
    # Scores that differ by less than log-probabilities can, or not at all. Which part of the
    # vocabulary is searched first is a matter of chance, and must not decide.
    model = make_model(tie="none", tgt_vocab_size=8192)
    with torch.no_grad():
        model.generator.weight.mul_(scale)
    sources = random_sources(model, count=5)
    options = SearchOptions(beam_size=3, max_length=4)
    weights = weights_of(model)
    expected = Engine(model.config, weights, threads=1).search(sources, options)
    if scale == 0.0:  # all equal: the lowest ids that may be said
        assert expected[0].hypotheses[0].stop == "eos" or expected[0].steps == 4
    engine = Engine(model.config, weights, threads=4)
    try:
        torch.set_flush_denormal(flush)  # of this thread, which works too
        for _ in range(10):
            assert engine.search(sources, options) == expected
    finally:
        torch.set_flush_denormal(False)


def test_an_error_in_a_team_is_raised_and_the_engine_goes_on():
    model = make_model(positions="learned", max_positions=20)
    engine = Engine(model.config, weights_of(model), threads=2)
    sources = random_sources(model, count=64)
    broken = [*sources[:-1], [5] * 21]
    with pytest.raises(ValueError, match="21 tokens is longer than the 20 learned positions"):
        engine.search(broken, SearchOptions(beam_size=6, max_length=8))
    assert len(engine.search(sources, SearchOptions(beam_size=6, max_length=8))) == 64


def test_nan_weights_are_an_error():
    model = make_model()
    weights = weights_of(model)
    name = "decoder.layers.1.feed_forward_norm.weight"
    engine = Engine(model.config, {**weights, name: np.full_like(weights[name], np.nan)}, threads=2)
    with pytest.raises(ValueError, match="not finite numbers"):
        engine.search([[5, 3]])


@pytest.mark.parametrize("variant", ["the paper's", "modern", "head_dim of its own", "odd sizes"])
@pytest.mark.parametrize("compute_type", ["bfloat16", "int8"])
def test_lower_precision_is_close_and_the_same_in_any_batch(compute_type, variant):
    model = make_model(**{"d_model": 64, "dim_feedforward": 96, **VARIANTS[variant]})
    weights = weights_of(model)
    if compute_type == "bfloat16" and not native().has_bfloat16():
        with pytest.raises(ValueError, match="compute_type: got 'bfloat16', which needs"):
            Engine(model.config, weights, compute_type=compute_type)
        return
    exact = Engine(model.config, weights, threads=1)
    low = Engine(model.config, weights, threads=1, compute_type=compute_type)
    sources = random_sources(model, count=12)
    targets = random_sources(model, count=12, seed=1)
    expected = exact.score(sources, targets)
    got = low.score(sources, targets)
    differences = np.concatenate([np.subtract(a, b) for a, b in zip(got, expected, strict=True)])
    # Both have about 8 bits: what two layers make of them, and not nothing.
    assert 0 < np.abs(differences).max() < 0.5
    assert np.abs(differences).mean() < 0.05
    options = SearchOptions(beam_size=3)
    together = low.search(sources, options)
    for source, result in zip(sources, together, strict=True):
        assert low.search([source], options)[0].hypotheses == result.hypotheses
    two = Engine(model.config, weights, threads=2, compute_type=compute_type)
    assert two.search(sources, options) == together


def round_keys_and_values(model):
    """From here on the decoder's are those of the engine's cache of bfloat16."""

    def rounding(begin):
        def hook(module, arguments, output):
            kept = output[..., begin:].bfloat16().to(output.dtype)
            return torch.cat([output[..., :begin], kept], dim=-1)

        return hook

    for name, module in model.named_modules():
        if name.startswith("decoder.") and name.endswith("self_attention.in_projection"):
            module.register_forward_hook(rounding(model.config.d_model))
        elif name.endswith("key_value_projection"):
            module.register_forward_hook(rounding(0))


@pytest.mark.parametrize("tie", ["all", "target", "none"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_int8_is_the_model_on_integers(monkeypatch, tie, norm_first):
    model = make_model(d_model=64, dim_feedforward=96, tie=tie, norm_first=norm_first)
    weights = weights_of(model)
    engine = Engine(model.config, weights, threads=2, compute_type="int8")
    sources = random_sources(model, count=8)
    targets = random_sources(model, count=8, seed=1)
    got = np.concatenate(engine.score(sources, targets))

    def scores():
        found = []
        for source, target in zip(sources, targets, strict=True):
            fed = torch.tensor([[model.config.decoder_start_id, *target[:-1]]])
            states = model(torch.tensor([source]), fed)
            log_probs = model.generator(states)[0]
            found.append(log_probs[torch.arange(len(target)), torch.tensor(target)])
        return torch.cat(found).numpy()

    model = model.double()
    with set_backend("reference"), torch.no_grad():
        exact = scores()
        monkeypatch.setattr(ops, "linear", linear_int8)
        if tie != "none":  # the engine keeps a tied embedding as the products have it
            table = model.target_embedding.weight
            integers, scales = quantize_rows(table)
            table.copy_(integers * scales)
        round_keys_and_values(model)
        expected = scores()
    # What is left is float32 instead of float64, and here and there a key, a value or an integer
    # that is rounded to its neighbour for that.
    assert np.abs(got - expected).mean() < 0.2 * np.abs(exact - expected).mean()


@pytest.mark.parametrize(("isa", "expected"), [("baseline", "float32"), ("avx2", "int8")])
def test_auto_takes_what_the_machine_has(isa, expected):
    if isa == "avx2" and not native().cpu_features()["avx2"]:
        pytest.skip("this machine does not have avx2")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from transformer_ext.inference.engine import resolve_compute_type\n"
            "print(resolve_compute_type('auto'))",
        ],
        env={**os.environ, "TRANSFORMER_EXT_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == f"{expected}\n", result.stderr
    model = make_model()
    resolved = resolve_compute_type("auto")
    assert Engine(model.config, weights_of(model), compute_type="auto").compute_type == resolved


def test_an_unknown_compute_type_is_named():
    model = make_model()
    with pytest.raises(ValueError, match="compute_type: got 'int3', expected one of auto, float32"):
        Engine(model.config, weights_of(model), compute_type="int3")


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-only"])
def test_a_model_of_another_kind_is_refused(kind):
    fields = dict(vocab_size=20, d_model=16, nhead=2, dim_feedforward=24, num_layers=1)
    config = KINDS[kind].from_dict(fields)
    weights = {
        name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()
    }
    with pytest.raises(
        ValueError, match=f"expected a model of the kind encoder-decoder, got {kind}"
    ):
        Engine(config, weights)
    # What lies under it knows the kind, and that it does not search like this.
    compiled = native().Engine({"kind": kind, **config.to_dict()}, weights.get, 1, "float32")
    message = {
        "decoder-only": "sources: got 1, but the model has no encoder",
        "encoder-only": "score: the model is encoder-only, expected encoder-decoder",
    }
    with pytest.raises(ValueError, match=message[kind]):
        compiled.score(sources=[[3]], targets=[[3]], start_id=2, others=[], attention_layers=[])
    del weights["embedding.weight"]
    with pytest.raises(ValueError, match="weight embedding.weight is missing"):
        native().Engine({"kind": kind, **config.to_dict()}, weights.get, 1, "float32")
