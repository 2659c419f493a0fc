"""The compiled text encoder: against the torch model, and against transformers' BERT."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from decoding_helpers import ctrl_c  # noqa: E402
from huggingface_helpers import write_bert_dir  # noqa: E402

from transformer_ext import ops  # noqa: E402
from transformer_ext._native import native  # noqa: E402
from transformer_ext.files import load_model_dir, parameter_shapes  # noqa: E402
from transformer_ext.inference.compiled import UnsupportedModelError  # noqa: E402
from transformer_ext.inference.encoder_engine import EncoderEngine  # noqa: E402
from transformer_ext.inference.quantization import linear_int8, quantize_rows  # noqa: E402
from transformer_ext.inference.torch_encoder import TorchEncoder  # noqa: E402
from transformer_ext.model.config import TextEncoderConfig, TransformerConfig  # noqa: E402
from transformer_ext.model.text_encoder import TextEncoder  # noqa: E402
from transformer_ext.ops import set_backend  # noqa: E402
from transformer_ext.packed import Packed  # noqa: E402

BERT = {
    "positions": "learned",
    "max_positions": 40,
    "activation": "gelu",
    "embedding_norm": True,
    "scale_embedding": False,
    "pooler": True,
    "num_token_types": 2,
    "layer_norm_eps": 1e-12,
    "output_bias": True,
    "labels": ["no", "yes", "perhaps"],
    "masked_lm_head": True,
}
VARIANTS = {
    "BERT": BERT,
    "a sentence encoder": {**BERT, "pooling": "mean", "pooler": False, "normalize": True},
    "mean through the pooler": {**BERT, "pooling": "mean", "normalize": True},
    "without a pooler": {**BERT, "pooler": False},
    "no token types, no embedding norm": {**BERT, "num_token_types": 0, "embedding_norm": False},
    "the paper's": {"labels": ["a", "b"]},
    "gelu_tanh": {**BERT, "activation": "gelu_tanh"},
    "modern": {
        "norm": "rms",
        "norm_first": True,
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
        "num_kv_heads": 2,
        "pooling": "mean",
        "labels": ["only"],
    },
    "pre-norm": {**BERT, "norm_first": True, "pooler": False},
    "odd sizes": {**BERT, "d_model": 36, "nhead": 3, "dim_feedforward": 51, "vocab_size": 67},
    "no layers": {**BERT, "num_layers": 0, "norm_first": True},
    "wide": {**BERT, "d_model": 320, "nhead": 5, "dim_feedforward": 700, "vocab_size": 1031},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that a second thread of torch costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(seed=0, **changes):
    """A model of random weights, norms and biases included."""
    torch.manual_seed(seed)
    fields = dict(vocab_size=50, d_model=32, nhead=4, num_layers=2, dim_feedforward=48)
    model = TextEncoder(TextEncoderConfig(**{**fields, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.3)
    return model


def weights_of(model):
    state = model.state_dict()
    return {name: state[name].float().numpy() for name in parameter_shapes(model.config)}


def make_engine(model, **options):
    return EncoderEngine(model.config, weights_of(model), **{"threads": 1, **options})


def random_texts(config, lengths=(7, 1, 33, 12, 12, 2), seed=0):
    """Ids, token types (None where the model has none), and some positions of each text."""
    generator = np.random.default_rng(seed)
    texts = [generator.integers(0, config.vocab_size, size=n).tolist() for n in lengths]
    types = None
    if config.num_token_types:
        types = [generator.integers(0, config.num_token_types, size=n).tolist() for n in lengths]
    positions = [generator.integers(0, n, size=min(3, n)).tolist() for n in lengths]
    positions[3] = []
    return texts, types, positions


def all_results(engine, texts, types, positions, **batches):
    """Of all methods that the model has weights for."""
    found = {
        "states": engine.states(texts, types, **batches),
        "pooled": list(engine.pooled(texts, types, **batches)),
        "label_scores": [],
        "token_scores": [],
    }
    if engine.config.labels:
        found["label_scores"] = list(engine.label_scores(texts, types, **batches))
    if engine.config.masked_lm_head:
        found["token_scores"] = engine.token_scores(texts, positions, types, **batches)
    return found


@torch.no_grad()
def expected_results(model, texts, types, positions):
    """The same by the torch model, each text by itself, in its type."""
    found = {"states": [], "pooled": [], "label_scores": [], "token_scores": []}
    for i, text in enumerate(texts):
        packed = Packed.from_lengths([len(text)])
        ids = torch.tensor(text)
        kinds = None if types is None else torch.tensor(types[i])
        states = model.encode_packed(ids, packed, kinds)
        pooled = model.forward_packed(ids, packed, kinds)
        found["states"].append(states.numpy())
        found["pooled"].append(pooled[0].numpy())
        if model.config.labels:
            found["label_scores"].append(model.generator.logits(pooled)[0].numpy())
        if model.config.masked_lm_head:
            found["token_scores"].append(model.masked_logits(states[positions[i]]).numpy())
    return found


def largest_error(got, exact):
    assert [a.shape for a in got] == [e.shape for e in exact]
    return max((float(np.abs(a - e).max(initial=0.0)) for a, e in zip(got, exact, strict=True)))


def assert_equal(found, others):
    for name, arrays in found.items():
        for a, b in zip(arrays, others[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_is_the_torch_model(variant):
    model = make_model(**VARIANTS[variant])
    asked = random_texts(model.config)
    found = all_results(make_engine(model, threads=2), *asked)
    with set_backend("reference"):
        single = expected_results(model, *asked)
        exact = expected_results(model.double(), *asked)
    for name, arrays in found.items():
        for array in arrays:
            assert array.dtype == np.float32
        if arrays:
            # Of the model's own error in float32, with its last place for those that have next to
            # none.
            scale = max(float(np.abs(e).max(initial=0.0)) for e in exact[name])
            bound = 2 * largest_error(single[name], exact[name]) + 2**-23 * scale
            assert largest_error(arrays, exact[name]) <= bound, name


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", ["BERT", "a sentence encoder", "modern", "odd sizes", "wide"])
def test_batches_and_threads_change_no_bit(variant, compute_type):
    if compute_type == "bfloat16" and not native().has_bfloat16():
        pytest.skip("this machine cannot multiply bfloat16")
    model = make_model(**VARIANTS[variant])
    asked = random_texts(model.config)
    one = make_engine(model, compute_type=compute_type)
    together = all_results(one, *asked)
    for threads in (2, 4):
        engine = make_engine(model, threads=threads, compute_type=compute_type)
        assert_equal(together, all_results(engine, *asked))
    assert_equal(together, all_results(one, *asked, batch_size=1))
    assert_equal(together, all_results(one, *asked, batch_tokens=24))


@pytest.mark.parametrize("variant", ["BERT", "a sentence encoder"])
def test_int8_is_the_model_on_integers(monkeypatch, variant):
    model = make_model(**{**VARIANTS[variant], "d_model": 64, "dim_feedforward": 96})
    asked = random_texts(model.config)
    found = all_results(make_engine(model, compute_type="int8"), *asked)
    model = model.double()
    with set_backend("reference"):
        exact = expected_results(model, *asked)
        monkeypatch.setattr(ops, "linear", linear_int8)
        with torch.no_grad():  # the engine keeps a tied embedding as the products have it
            integers, scales = quantize_rows(model.embedding.weight)
            model.embedding.weight.copy_(integers * scales)
        expected = expected_results(model, *asked)
    for name in found:
        got, mine, theirs = (
            np.concatenate([a.ravel() for a in r[name]]) for r in (found, expected, exact)
        )
        # What is left is float32 instead of float64, and here and there an integer that is rounded
        # to its neighbour for that.
        assert np.abs(got - mine).mean() < 0.2 * np.abs(theirs - mine).mean(), name


def test_bfloat16_is_close():
    if not native().has_bfloat16():
        pytest.skip("this machine cannot multiply bfloat16")
    model = make_model(**VARIANTS["wide"])
    asked = random_texts(model.config)
    found = all_results(make_engine(model, compute_type="bfloat16"), *asked)
    with set_backend("reference"):
        exact = expected_results(model.double(), *asked)
    for name, arrays in found.items():
        got, expected = (np.concatenate([a.ravel() for a in r]) for r in (arrays, exact[name]))
        error = np.abs(got - expected).mean() / np.abs(expected).mean()
        # Factors have 8 bits: some of them, after two layers, and not none.
        assert 1e-5 < error < 0.02, name


def test_token_types_of_0_are_no_token_types():
    model = make_model(**BERT)
    texts, _, positions = random_texts(model.config)
    engine = make_engine(model)
    zeros = [[0] * len(text) for text in texts]
    ones = [[1] * len(text) for text in texts]
    found = all_results(engine, texts, None, positions)
    assert_equal(found, all_results(engine, texts, zeros, positions))
    assert np.abs(found["pooled"][0] - engine.pooled(texts, ones)[0]).max() > 0.01


def test_arrays_of_numpy_and_many_positions():
    model = make_model(**BERT)
    texts, types, _ = random_texts(model.config, lengths=(30, 40, 5, 20))
    engine = make_engine(model, threads=2)
    # More than are computed at once, in any order, and one of them twice.
    positions = [[*range(29, -1, -1), 4], [*range(40)], [], [19, 0]]
    found = engine.token_scores(
        [np.array(text) for text in texts],
        [np.array(rows, np.int64) for rows in positions],
        [np.array(row, np.int32) for row in types],
    )
    for text, rows, kinds, scores in zip(texts, positions, types, found, strict=True):
        assert scores.shape == (len(rows), 50)
        for row, score in zip(rows, scores, strict=True):
            alone = engine.token_scores([text], [[row]], [kinds])[0]
            np.testing.assert_array_equal(score, alone[0])


def test_no_texts():
    model = make_model(**BERT)
    engine = make_engine(model)
    assert engine.states([]) == [] and engine.token_scores([], []) == []
    assert engine.pooled([]).shape == (0, 32) and engine.label_scores([]).shape == (0, 3)
    assert engine.token_scores([[5, 6]], [[]])[0].shape == (0, 50)


@pytest.mark.parametrize("kind", ["compiled", "torch"])
def test_wrong_texts_are_named(kind):
    def make(**fields):
        model = make_model(**fields)
        return make_engine(model) if kind == "compiled" else TorchEncoder(model)

    rows = "expected a sequence of integers for each text"
    encoder = make(**BERT)
    for call, message in [
        (lambda: encoder.states([[5], []]), r"texts: number 1 \(from 0\) has no token"),
        (lambda: encoder.pooled([[5], [], [6]]), r"texts: number 1 \(from 0\) has no token"),
        (lambda: encoder.states([[5, 50]]), "texts: got 50, expected integers from 0 to 49"),
        (lambda: encoder.pooled([[-1]]), "texts: got -1, expected integers from 0 to 49"),
        (lambda: encoder.pooled([[2**40]]), "texts: got 1099511627776, expected integers"),
        (lambda: encoder.pooled([["a"]]), "texts: got 'a', expected integers from 0 to 49"),
        (lambda: encoder.pooled([[1.5]]), "texts: got 1.5, expected integers from 0 to 49"),
        (lambda: encoder.pooled([[True]]), "texts: got True, expected integers from 0 to 49"),
        (
            lambda: encoder.pooled([[5], [5] * 41]),
            r"texts: number 1 \(from 0\) has 41 tokens.* positions for 40 \(max_positions\)",
        ),
        (lambda: encoder.pooled([[5]], [[2]]), "token_types: got 2, expected integers from 0 to 1"),
        (
            lambda: encoder.states([[5, 6], [5]], [[0], [0, 1]]),
            "token_types: got 1, expected one for each of the 2 tokens of a text",
        ),
        (lambda: encoder.pooled([[5]], []), "token_types: got 0, expected one for each of the 1"),
        (
            lambda: encoder.states([[5], [6]], [[0]]),
            "token_types: got 1, expected one for each of the 2 texts",
        ),
        (
            lambda: encoder.token_scores([[5, 6], [7]], [[2], [0]]),
            "positions: got 2, expected 0 to 1 in a text of 2 tokens",
        ),
        (lambda: encoder.token_scores([[5]], [[-1]]), "positions: got -1, expected integers from"),
        (lambda: encoder.token_scores([[5]], []), "positions: got 0, expected one for each of the"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in [
        (lambda: encoder.states([1, 2]), "texts: got 1, "),
        (lambda: encoder.states(np.array([1, 2])), "texts: got .*1.*, "),
        (lambda: encoder.pooled(1), "texts: got 1, "),
        (lambda: encoder.pooled([{5, 6}]), r"texts: got \{5, 6\}, "),
        (lambda: encoder.pooled([b"ab"]), "texts: got b'ab', "),
        (lambda: encoder.pooled([[5]], [0]), "token_types: got 0, "),
        (lambda: encoder.token_scores([[5]], [0]), "positions: got 0, "),
    ]:
        with pytest.raises(TypeError, match=message + rows):
            call()
    assert encoder.states([]) == [] and encoder.pooled([]).shape == (0, 32)
    assert encoder.states([[np.int64(5), np.int32(6)]])[0].shape == (2, 32)
    bare = make(vocab_size=50)
    for call, message in [
        (lambda: bare.label_scores([[5]]), "label_scores: the model has no labels"),
        (lambda: bare.token_scores([[5]], [[0]]), "the model has no masked_lm_head"),
        (lambda: bare.pooled([[5]], [[0]]), "token_types: expected none, the model has no"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_what_does_not_fit_is_named():
    model = make_model(**BERT)
    engine = make_engine(model)
    assert engine.positions == 40 and engine.threads == 1
    for call, message in [
        (lambda: engine.states([[5]], batch_size=0), "batch_size: got 0"),
        (lambda: engine.states([[5]], batch_tokens=0), "batch_tokens: got 0"),
        (lambda: make_engine(model, threads=0), "threads: got 0"),
        (lambda: make_engine(model, compute_type="int3"), "compute_type: got 'int3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    bare = make_engine(make_model(vocab_size=50))
    for call, message in [
        (lambda: bare._open().label_scores(ids=[[5]], token_types=[]), "the model has no labels"),
        (
            lambda: bare._open().score(
                sources=[[3]], targets=[[3]], start_id=2, others=[], attention_layers=[]
            ),
            "score: the model is encoder-only, expected encoder-decoder",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    weights = weights_of(model)
    other = TransformerConfig(src_vocab_size=9, tgt_vocab_size=9)
    with pytest.raises(
        ValueError, match="expected a model of the kind encoder-only, got encoder-d"
    ):
        EncoderEngine(other, weights)
    with pytest.raises(UnsupportedModelError, match="does not know: 'adapter.weight'"):
        EncoderEngine(model.config, {**weights, "adapter.weight": weights["pooler.weight"]})
    for name in ("pooler.bias", "encoder.token_types.weight", "masked_lm_head.norm.weight"):
        with pytest.raises(ValueError, match=f"weight {name} is missing"):
            EncoderEngine(model.config, {n: a for n, a in weights.items() if n != name})
    # Heads need not be used.
    config = dataclasses.replace(model.config, pooler=False, labels=[], masked_lm_head=False)
    trunk = EncoderEngine(config, weights)
    np.testing.assert_array_equal(trunk.pooled([[5, 6]])[0], engine.states([[5, 6]])[0][0])
    engine.close()
    for call in (lambda: engine.states([]), lambda: engine.pooled([[5]])):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_ctrl_c_ends_a_long_text():
    # It would take half a minute; a layer, after which signals are looked at, a fraction of a second.
    engine = make_engine(make_model(vocab_size=50, num_layers=64))
    before = engine.states([[5, 6]])[0]
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        engine.states([[5] * 16_384])
    np.testing.assert_array_equal(engine.states([[5, 6]])[0], before)


def test_several_threads_share_an_engine():
    model = make_model(**BERT)
    engine = make_engine(model, threads=2)
    asked = [random_texts(model.config, seed=seed) for seed in range(4)]
    expected = [all_results(engine, *each) for each in asked]
    failures = []

    def work(first):
        try:
            for round in range(first, first + 6):
                assert_equal(expected[round % 4], all_results(engine, *asked[round % 4]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Against transformers' BERT.


@torch.no_grad()
def results_of_bert(model, texts, types):
    """What transformers says of a batch padded on the right, by the names of its outputs."""
    length = max(map(len, texts))
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (text, row) in enumerate(zip(texts, types, strict=True)):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
        kinds[i, : len(text)] = torch.tensor(row)
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
    return {name: value.numpy() for name, value in output.items()}


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 45, "num_attention_heads": 3}])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_as_exact_as_transformers(kind, changes, tmp_path):
    fields = dict(
        vocab_size=211,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=210,
        max_position_embeddings=64,
        num_labels=3,
    )
    model = write_bert_dir(tmp_path / "bert", kind, **{**fields, **changes})
    saved = load_model_dir(tmp_path / "bert", TextEncoderConfig)
    engine = EncoderEngine(saved.config, saved.weights, threads=2)
    texts, types, _ = random_texts(saved.config, lengths=(64, 1, 17, 30, 30, 2, 41))
    single = results_of_bert(model, texts, types)
    exact = results_of_bert(model.double(), texts, types)
    if kind == "BertModel":
        pairs = [("pooler_output", list(engine.pooled(texts, types)))]
        pairs.append(("last_hidden_state", engine.states(texts, types)))
    elif kind == "BertForMaskedLM":
        everywhere = [range(len(text)) for text in texts]
        pairs = [("logits", engine.token_scores(texts, everywhere, types))]
    else:
        pairs = [("logits", list(engine.label_scores(texts, types)))]
    for name, ours in pairs:
        # Without their padding.
        theirs, true = (
            [row[: len(mine)] for row, mine in zip(values[name], ours, strict=True)]
            for values in (single, exact)
        )
        assert largest_error(ours, true) <= 2 * largest_error(theirs, true), name
        assert np.abs(true[0]).max() > 0.1
