"""Random options: the compiled engine against the plain Python search.

The search is given the engine's own log-probabilities and attention, which do not depend on the
batch: what is compared are the rules, equal to the last bit. That the engine's numbers are those of
the model is seen in test_engine.py, for which some options are repeated there.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from benchmark_files import benchmark
from decoding_helpers import random_engine

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from transformer_ext._native import native  # noqa: E402
from transformer_ext.config import ConfigError  # noqa: E402
from transformer_ext.files import parameter_shapes  # noqa: E402
from transformer_ext.inference.compiled import batches_by_length  # noqa: E402
from transformer_ext.inference.engine import Engine  # noqa: E402
from transformer_ext.inference.options import SearchOptions  # noqa: E402
from transformer_ext.inference.search import (  # noqa: E402
    attention_layer,
    draw,
    never_proposed,
    search,
    uniform_number,
)
from transformer_ext.model.config import classifier_preset, preset  # noqa: E402

# Five words, so that repetitions are the rule.
VOCABULARY = 9
SOURCES = [[5, 6, 7, 3], [8, 3], [4, 4, 8, 5, 6, 7, 7, 8, 3], [6, 5, 3]]

property_settings = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def make_engine(kind, threads=1):
    engine = random_engine(VOCABULARY, threads)
    if kind == "one model":
        return engine
    return Engine.ensemble([engine, random_engine(VOCABULARY, seed=8)])


@pytest.fixture(scope="module", params=["one model", "ensemble"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(kind):
    return make_engine(kind)


@pytest.fixture(scope="module")
def four_threads(kind):
    return make_engine(kind, threads=4)


@st.composite
def search_options(draw):
    sampling = draw(st.sampled_from([False, False, True]))
    beam_size = draw(st.integers(1, 5))
    early_stopping = draw(st.sampled_from(["exact", "first", "heuristic"]))
    fields = dict(
        beam_size=beam_size,
        num_hypotheses=draw(st.integers(1, 4 if sampling else beam_size)),
        length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 1.7])),
        length_penalty_kind=draw(st.sampled_from(["gnmt", "divide", "none"])),
        length_counts_eos=draw(st.booleans()),
        coverage_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, 2.0])),
        max_length=draw(st.sampled_from([None, 1, 4, 9, 16])),
        max_length_a=draw(st.sampled_from([0.0, 0.6, 1.5])),
        max_length_b=draw(st.integers(0, 9)),
        min_length=draw(st.sampled_from([0, 0, 1, 4, 20])),
        min_length_a=draw(st.sampled_from([0.0, 0.0, 0.7])),
        early_stopping=early_stopping,
        beam_patience=draw(st.sampled_from([0.3, 1.0, 2.0])) if early_stopping == "first" else 1.0,
        rank_unfinished=draw(st.booleans()),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 1, 2, 3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 4.0])),
        suppressed_tokens=draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=3)),
        sampling=sampling,
        return_attention=draw(st.booleans()),
        return_alignment=draw(st.booleans()),
    )
    if fields["max_length"] is not None:
        fields["min_length"] = min(fields["min_length"], fields["max_length"])
    if fields["return_attention"] or fields["return_alignment"] or fields["coverage_penalty"]:
        fields["attention_layer"] = draw(st.sampled_from([None, 0, 1]))
    if sampling:
        fields["seed"] = draw(st.integers(0, 2**63 - 1))
        fields["top_k"] = draw(st.sampled_from([None, 1, 3, 400]))
        fields["top_p"] = draw(st.sampled_from([1.0, 0.9, 0.5, 0.0]))
        fields["temperature"] = draw(st.sampled_from([1.0, 0.3, 3.0]))
    return SearchOptions(**fields)


@st.composite
def searches(draw):
    options = draw(search_options())
    prefixes = None
    if draw(st.booleans()):
        words = st.sampled_from([1, 4, 5, 6, 7, 8])
        prefixes = [
            draw(st.lists(words, max_size=min(3, options.length_limit(len(source)) - 1)))
            for source in SOURCES
        ]
    numbers = draw(st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
    return options, prefixes, numbers


def plain_search(engine, options, prefixes, numbers):
    """The Python search over the log-probabilities and the attention of the engine."""
    config = engine.config
    layer = attention_layer(options, config)
    longest = max(len(source) for source in SOURCES)

    def step(rows, prefix_rows):
        sources = [SOURCES[row] for row in rows for _ in range(VOCABULARY)]
        targets = [[*row[1:], token] for row in prefix_rows.tolist() for token in range(VOCABULARY)]
        if layer is None:
            scored = engine.score(sources, targets, batch_size=1000)
        else:
            aligned = engine.align(sources, targets, layer=layer, batch_size=1000)
            scored = [log_probs for log_probs, _ in aligned]
        log_probs = np.array([row[-1] for row in scored]).reshape(len(rows), VOCABULARY)
        if layer is None:
            return log_probs
        attention = np.zeros((len(rows), longest), np.float32)
        for i, (_, weights) in enumerate(aligned[::VOCABULARY]):
            attention[i, : weights.shape[1]] = weights[-1]
        return log_probs, attention

    lengths = [len(source) for source in SOURCES]
    return search(
        step,
        [options.length_limit(length) for length in lengths],
        options,
        start_id=config.decoder_start_id,
        eos_id=config.eos_id,
        suppressed=never_proposed(config),
        source_lengths=lengths,
        prefixes=prefixes,
        numbers=numbers,
    )


def assert_attention_equal(results, expected):
    for result, other in zip(results, expected, strict=True):
        for mine, theirs in zip(result.hypotheses, other.hypotheses, strict=True):
            if theirs.attention is None:
                assert mine.attention is None
            else:
                np.testing.assert_array_equal(mine.attention, theirs.attention)


@property_settings
@given(asked=searches())
def test_the_engine_finds_what_the_plain_search_finds(engine, asked):
    options, prefixes, numbers = asked
    found = engine.search(SOURCES, options, prefixes=prefixes, numbers=numbers)
    expected = plain_search(engine, options, prefixes, numbers)
    for result, other in zip(found, expected, strict=True):
        assert (result.stop, result.steps) == (other.stop, other.steps)
        assert len(result.hypotheses) == len(other.hypotheses)
        for mine, theirs in zip(result.hypotheses, other.hypotheses, strict=True):
            assert (mine.tokens, mine.stop) == (theirs.tokens, theirs.stop)
            assert mine.token_scores == theirs.token_scores
            assert mine.alignment == theirs.alignment
            # The logarithms of the coverage penalty are of two libraries.
            np.testing.assert_allclose(mine.score, theirs.score, rtol=1e-12)
            np.testing.assert_allclose(mine.log_prob, theirs.log_prob, rtol=1e-12)
    assert_attention_equal(found, expected)


@property_settings
@given(asked=searches())
def test_neither_batch_nor_threads_change_a_bit(engine, four_threads, asked):
    options, prefixes, numbers = asked
    expected = engine.search(SOURCES, options, prefixes=prefixes, numbers=numbers)
    arguments = dict(prefixes=prefixes, numbers=numbers)
    for batches in ({"batch_size": 1}, {"batch_tokens": 9}, {"batch_size": 3}):
        found = four_threads.search(SOURCES, options, **arguments, **batches)
        assert found == expected
        assert_attention_equal(found, expected)
    # Beside a long sentence, in another order.
    found = four_threads.search(
        [[7] * 20, *SOURCES[::-1]],
        options,
        prefixes=None if prefixes is None else [[], *prefixes[::-1]],
        numbers=[0, *numbers[::-1]],
    )
    assert found[:0:-1] == expected


@property_settings
@given(asked=searches(), data=st.data())
def test_what_the_documents_say_is_without_effect(engine, asked, data):
    options, prefixes, numbers = asked
    changes = {}
    if options.sampling or options.beam_size == 1:
        changes["early_stopping"] = data.draw(st.sampled_from(["exact", "first", "heuristic"]))
        first = changes["early_stopping"] == "first"
        changes["beam_patience"] = data.draw(st.sampled_from([0.3, 2.0])) if first else 1.0
    if options.sampling:
        changes["beam_size"] = data.draw(st.integers(1, 5))
    if options.length_penalty_kind == "none":
        changes["length_penalty"] = 0.7
        changes["length_counts_eos"] = not options.length_counts_eos
    elif options.length_penalty == 0.0:
        changes["length_penalty_kind"] = "none"
        changes["length_counts_eos"] = not options.length_counts_eos
    if options.max_length is not None:
        changes.update(max_length_a=0.1, max_length_b=3)
    arguments = dict(prefixes=prefixes, numbers=numbers)
    found = engine.search(SOURCES, options.replace(**changes), **arguments)
    expected = engine.search(SOURCES, options, **arguments)
    assert [r.hypotheses for r in found] == [r.hypotheses for r in expected]


def test_options_without_effect_are_refused():
    for changes, message in (
        (dict(top_k=3), "top_k: got 3 without sampling"),
        (dict(seed=3), "seed: got 3 without sampling"),
        (dict(beam_patience=2.0), "beam_patience: got 2.0 with early_stopping 'exact'"),
        (dict(attention_layer=0), "attention_layer: got 0 without return_attention, return_al"),
        (dict(beam_size=1, num_hypotheses=2), "num_hypotheses: got 2, expected at most beam_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            SearchOptions(**changes)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def wide_engines(request):
    """Of one model, with more rows, columns and inputs than any kernel takes at once."""
    if request.param == "bfloat16" and not native().has_bfloat16():
        pytest.skip("no AVX512_BF16")
    # 270 inner inputs are two slices of a product and a rest, 1100 tokens several panels.
    changes = dict(d_model=96, nhead=6, num_kv_heads=2, dim_feedforward=270, activation="gelu")
    return [
        random_engine(1100, threads, scale=0.6, compute_type=request.param, **changes)
        for threads in (1, 2, 3, 4)
    ]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_batches_and_threads_change_no_bit(wide_engines, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    count = data.draw(st.integers(1, 50))
    longest = data.draw(st.sampled_from([2, 12, 40]))
    sources, targets = (
        [
            [*generator.integers(4, 1100, size=length).tolist(), 3]
            for length in generator.integers(0, longest, size=count)
        ]
        for _ in range(2)
    )
    numbers = list(range(count))
    options = data.draw(search_options())
    longest_output = min(8, options.max_length or 8)
    options = options.replace(
        max_length=longest_output,
        min_length=min(longest_output, options.min_length),
        suppressed_tokens=(),
    )
    first = wide_engines[0]
    expected = first.search(sources, options, batch_size=1)
    scores = first.score(sources, targets, batch_size=1)
    aligned = first.align(sources, targets, batch_size=1)
    for engine in wide_engines:
        order = generator.permutation(count).tolist()
        batches = dict(
            batch_size=data.draw(st.integers(1, count)),
            batch_tokens=data.draw(st.sampled_from([1, 100, 10_000])),
        )
        some = [sources[i] for i in order]
        found = engine.search(some, options, numbers=[numbers[i] for i in order], **batches)
        assert found == [expected[i] for i in order]
        assert_attention_equal(found, [expected[i] for i in order])
        others = [targets[i] for i in order]
        assert engine.score(some, others, **batches) == [scores[i] for i in order]
        for (log_probs, attention), i in zip(
            engine.align(some, others, **batches), order, strict=True
        ):
            assert log_probs == aligned[i][0]
            np.testing.assert_array_equal(attention, aligned[i][1])


def test_whole_rows_and_lists_of_the_best_give_the_same():
    """More tokens than a list holds are suppressed: the engine then looks at whole rows."""
    vocabulary = 700
    engine = random_engine(vocabulary)
    sources = [[5, 6, 7, 3], [8, 9, 3]]
    options = SearchOptions(max_length=8, num_hypotheses=3)
    wide = SearchOptions(max_length=8, num_hypotheses=60, beam_size=60)
    # Tokens that not even a wide beam holds are suppressed without any effect.
    said = {
        t for result in engine.search(sources, wide) for h in result.hypotheses for t in h.tokens
    }
    unused = [token for token in range(4, vocabulary) if token not in said][:400]
    assert len(unused) == 400
    found = engine.search(sources, options)
    assert engine.search(sources, options.replace(suppressed_tokens=unused)) == found


def test_sampling_from_a_large_vocabulary():
    """Against the plain draw, where the engine sorts only as many tokens as it needs."""
    vocabulary = 700
    engine = random_engine(vocabulary, scale=0.5)
    source = [5, 6, 7, 3]
    every = [[token] for token in range(vocabulary)]
    log_probs = np.array([row[0] for row in engine.score([source] * vocabulary, every)])
    log_probs[sorted(never_proposed(engine.config))] = -np.inf
    for changes in ({}, {"top_k": 300}, {"top_p": 0.95}, {"top_k": 5}, {"temperature": 2.0}):
        options = SearchOptions(
            sampling=True, num_hypotheses=300, max_length=1, length_penalty=0.0, seed=3, **changes
        )
        found = engine.search([source], options, numbers=[8])[0]
        drawn = sorted(h.tokens[0] if h.tokens else 3 for h in found.hypotheses)
        expected = [draw(log_probs, options, uniform_number(3, 8, i, 0)) for i in range(300)]
        assert drawn == sorted(expected)
        assert len(set(drawn)) > 3


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_ctranslate2_preset_is_its_search(tmp_path, norm_first):
    ctranslate2 = pytest.importorskip("ctranslate2")
    models = benchmark("decoding_models")
    config = preset("tiny", 37, 37, d_model=32, nhead=4, dim_feedforward=48, norm_first=norm_first)
    weights = models.random_weights(config)
    # Sure enough of its tokens that sentences end.
    weights["source_embedding.weight"] *= 2
    tokens = [*models.SPECIAL, *(f"t{id}" for id in range(4, 37))]
    models.ctranslate2_model(config, weights, tokens, tmp_path)
    theirs = ctranslate2.Translator(str(tmp_path), compute_type="float32", intra_threads=1)
    engine = Engine(config, weights, threads=1)
    sources = [[9, 20, 3], [5, 30, 31, 32, 7, 8, 3], [12] * 9 + [3]]

    def step(rows, prefixes):
        found = engine.score(
            [sources[row] for row in rows for _ in range(37)],
            [[*prefix[1:], token] for prefix in prefixes.tolist() for token in range(37)],
            batch_tokens=10**6,
        )
        return np.array([row[-1] for row in found]).reshape(len(rows), 37)

    for beam_size, alpha, limit, patience in (
        (4, 1.0, 20, 1.0),
        (3, 0.6, 9, 2.0),
        (5, 2.0, 6, 1.0),
    ):
        options = SearchOptions.preset(
            "ctranslate2",
            beam_size=beam_size,
            num_hypotheses=beam_size,
            length_penalty=alpha,
            beam_patience=patience,
            max_length=limit,
            min_length=0,
        )
        # Nothing is suppressed, so that nothing has to be shared out.
        mine = search(step, [limit] * 3, options, start_id=2, eos_id=3)
        expected = theirs.translate_batch(
            [[tokens[i] for i in source] for source in sources],
            beam_size=beam_size,
            num_hypotheses=beam_size,
            length_penalty=alpha,
            patience=patience,
            max_decoding_length=limit,
            min_decoding_length=0,
            return_scores=True,
        )
        for result, other in zip(mine, expected, strict=True):
            said = [[tokens[i] for i in h.tokens] for h in result.hypotheses]
            assert said == other.hypotheses
            np.testing.assert_allclose(
                [h.score for h in result.hypotheses], other.scores, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "activation": "swiglu"}])
def test_the_bound_of_the_benchmark_counts_every_weight(changes):
    ceilings = benchmark("ceilings")
    config = preset("tiny", 41, 37, tie="target", **changes)
    sizes = {name: np.prod(s) for name, s in parameter_shapes(config).items() if len(s) == 2}
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    of_source = sum(size for name, size in sizes.items() if "key_value_projection" in name)
    decoder = sum(size for name, size in sizes.items() if name.startswith("decoder."))
    step = decoder - of_source + sizes["target_embedding.weight"]
    sources, steps, beam = [7, 3, 5], [4, 9, 2], 4
    found = ceilings.work(config, sources, steps, beam, batch=2)
    # The sentences of 9 and 4 steps are a batch, the one of 2 is another.
    assert found.weights == 2 * (encoder + of_source) + (9 + 2) * step
    rows = [1 + beam * (count - 1) for count in steps]
    products = 2 * (sum(sources) * (encoder + of_source) + sum(rows) * step)
    width = config.nhead * config.head_dim
    # Of the layers of the encoder, then of the decoder: queries with keys, probabilities with values.
    attention = 2 * sum(4 * width * length**2 for length in sources)
    for length, count, row in zip(sources, steps, rows, strict=True):
        attention += 2 * 4 * width * row * (length + (count + 1) / 2)
    assert found.operations == pytest.approx(products + attention, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "activation": "swiglu"}])
def test_the_bound_of_encoding_counts_every_weight(changes):
    ceilings = benchmark("ceilings")
    config = classifier_preset("tiny", 41, ["a"], **changes)
    layers = sum(
        np.prod(shape)
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and ".layers." in name
    )
    lengths = [7, 3, 5]
    found = ceilings.encoder_work(config, lengths)
    assert found.weights == layers
    attention = config.num_layers * 4 * config.d_model * sum(length**2 for length in lengths)
    assert found.operations == 2 * layers * sum(lengths) + attention


def test_eight_threads_on_one_engine():
    engine = random_engine(VOCABULARY, threads=2)
    options = [
        SearchOptions(max_length=12),
        SearchOptions(max_length=12, sampling=True, num_hypotheses=3, seed=5),
        SearchOptions(max_length=12, coverage_penalty=0.3, return_attention=True),
        SearchOptions(max_length=12, no_repeat_ngram_size=2, repetition_penalty=1.2),
    ]
    expected = [engine.search(SOURCES, each) for each in options]
    wrong = []

    def work(number):
        for _ in range(10):
            found = engine.search(SOURCES, options[number % 4])
            if found != expected[number % 4]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_leave_the_engine_as_it_was(engine):
    expected = engine.search(SOURCES)
    for arguments, message in (
        (dict(prefixes=[[4]]), "prefixes: got 1, expected one for each of the 4 sources"),
        (dict(prefixes=[[4], [5], [99], [5]]), "prefixes: got 99, expected integers from 0 to 8"),
        (dict(numbers=[1, 2]), "numbers: got 2, expected one for each of the 4 sources"),
        (
            dict(prefixes=[[4] * 3] * 4, options=SearchOptions(max_length=3)),
            r"prefix: got 3 tokens, expected fewer than the longest output of the sentence \(3,",
        ),
        (dict(options=SearchOptions(suppressed_tokens=[9])), "suppressed_tokens: got 9, expected"),
        (
            dict(options=SearchOptions(return_attention=True, attention_layer=2)),
            "attention_layer: got 2, but the decoder has 2 layers",
        ),
        (dict(batch_tokens=0), "batch_tokens: got 0, expected an integer from 1 to 1000000000"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.search(SOURCES, **arguments)
    assert engine.search(SOURCES) == expected


def test_long_sentences_make_batches_of_few(engine):
    sources = [[4] * n for n in (3, 100, 0, 40, 50, 3, 3, 3)]
    assert list(batches_by_length(sources, 64, 100)) == [[1], [4, 3], [0, 5, 6, 7]]
    assert list(batches_by_length(sources, 3, 100)) == [[1], [4, 3], [0, 5, 6], [7]]
    assert list(batches_by_length([], 64, 100)) == []
    options = SearchOptions(max_length=5)
    sources = [source for source in sources if source]
    assert engine.search(sources, options, batch_tokens=100) == engine.search(sources, options)
