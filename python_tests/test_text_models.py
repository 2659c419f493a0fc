"""Encoder-only models on text: classifier, sentence encoder; texts to ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import FileError, save_model_dir
from transformer_ext.inference.classifier import TextClassifier
from transformer_ext.inference.sentence_encoder import SentenceEncoder
from transformer_ext.model import TextEncoder

BERT = {
    "d_model": 24,
    "nhead": 3,
    "num_layers": 2,
    "dim_feedforward": 40,
    "positions": "learned",
    "max_positions": 12,
    "activation": "gelu",
    "embedding_norm": True,
    "scale_embedding": False,
    "pooler": True,
    "num_token_types": 2,
    "output_bias": True,
}
TEXTS = ["to be or not to be", "be", "", "or not", "to", "not to be"]
PAIRS = ["be", None, "to be", "", None, "or"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["to be or not to be"] * 9, vocab_size=280)[0])
    return SentencePieceTokenizer(path)


def save(folder, tokenizer, **changes) -> TextEncoder:
    torch.manual_seed(0)
    model = TextEncoder(vocab_size=tokenizer.vocab_size, **{**BERT, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    save_model_dir(folder, model.config, model.state_dict(), tokenizer, tokenizer, {})
    return model


def ids_of(tokenizer, text, pair=None):
    """Ids and token types of a text as in Devlin et al. 2019, figure 2."""
    first = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    second = [] if pair is None else [*tokenizer.encode(pair), tokenizer.eos_id]
    return first + second, [0] * len(first) + [1] * len(second)


def test_classifier_gives_what_the_model_gives_one_text_at_a_time(tmp_path, tokenizer) -> None:
    model = save(tmp_path / "m", tokenizer, labels=["a", "b", "c"])
    classifier = TextClassifier(tmp_path / "m")
    found = classifier.scores(TEXTS, PAIRS)
    for text, pair, row in zip(TEXTS, PAIRS, found, strict=True):
        ids, types = ids_of(tokenizer, text, pair)
        with torch.no_grad():
            expected = model.logits(torch.tensor([ids]), None, torch.tensor([types]))[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert not np.allclose(found, classifier.scores(TEXTS), atol=1e-2)

    for prediction, row in zip(classifier(TEXTS, PAIRS), found, strict=True):
        assert prediction.label == "abc"[row.argmax()]
        assert prediction.probability == max(prediction.probabilities)
        expected = np.exp(row) / np.exp(row).sum()
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-6)
    assert classifier([]) == []


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean", "normalize": True}])
def test_sentence_encoder_pools_the_states(changes, tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer, pooler=False, **changes)
    encoder = SentenceEncoder(tmp_path / "m")
    vectors = encoder.encode(TEXTS)
    states = encoder.states(TEXTS)
    assert [len(state) for state in states] == [len(ids_of(tokenizer, t)[0]) for t in TEXTS]
    for vector, state in zip(vectors, states, strict=True):
        expected = state.mean(0) if changes else state[0]
        expected = expected / np.linalg.norm(expected) if changes else expected
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[1]), vectors[1], atol=1e-6)
    assert encoder.encode([]).shape == (0, 24) and encoder.states([]) == []


def test_sentence_encoder_may_pool_otherwise_than_the_model_says(tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer)
    means = SentenceEncoder(tmp_path / "m", pooling="mean", normalize=True).encode(TEXTS)
    states = SentenceEncoder(tmp_path / "m").states(TEXTS)
    expected = np.stack([state.mean(0) / np.linalg.norm(state.mean(0)) for state in states])
    np.testing.assert_allclose(means, expected, atol=1e-5)
    with pytest.raises(ValueError, match="pooling: expected one of first, mean, got 'max'"):
        SentenceEncoder(tmp_path / "m", pooling="max")


def test_a_text_longer_than_the_positions_is_an_error_or_cut(tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer, labels=["a", "b"])
    classifier = TextClassifier(tmp_path / "m")
    long = "to be or not to be or not to be or not"
    ids = tokenizer.encode(long)
    assert len(ids) > 10
    count = len(ids) + 2
    with pytest.raises(ValueError) as caught:
        classifier(["be", long])
    assert str(caught.value) == (
        f"texts: number 1 (from 0) has {count} tokens, start and end included, but the model "
        "reads at most 12; truncation cuts it"
    )
    (cut,), _ = classifier.sequences([long], truncation=True)
    assert cut == [tokenizer.bos_id, *ids[:10], tokenizer.eos_id]
    # Of a pair the longer text is cut, and both where each has more than its half.
    for first, second, kept in ((long, "be", 8), ("be", long, 1), (long, long, 4)):
        (cut,), types = classifier.sequences([first], [second], truncation=True)
        end = tokenizer.eos_id
        expected = [
            *(tokenizer.bos_id, *tokenizer.encode(first)[:kept], end),
            *(*tokenizer.encode(second)[: 9 - kept], end),
        ]
        assert cut == expected
        assert types == [[0] * (kept + 2) + [1] * (12 - kept - 2)]


def test_a_model_too_short_for_the_special_tokens_is_named(tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer, labels=["a", "b"], max_positions=2)
    classifier = TextClassifier(tmp_path / "m")
    (alone,), _ = classifier.sequences(["to be"], truncation=True)
    assert alone == [tokenizer.bos_id, tokenizer.eos_id]
    with pytest.raises(ValueError) as caught:
        classifier(["", "to be"], [None, "be"], truncation=True)
    assert str(caught.value) == (
        "texts: number 1 (from 0) cannot be cut to the 2 tokens that the model reads at most: its "
        "start and end tokens alone are 3"
    )


def test_an_iterator_is_as_good_as_a_list(tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer, labels=["a", "b"])
    texts, pairs = ["to be", "or not", "be"], ["not", None, "to"]
    classifier = TextClassifier(tmp_path / "m")
    assert classifier(iter(texts), iter(pairs)) == classifier(texts, pairs)
    encoder = SentenceEncoder(tmp_path / "m")
    np.testing.assert_array_equal(encoder.encode(iter(texts)), encoder.encode(texts))
    assert len(encoder.encode(text for text in texts)) == 3


def test_wrong_input_is_one_clear_error(tmp_path, tokenizer) -> None:
    save(tmp_path / "m", tokenizer, labels=["a", "b"], num_token_types=0)
    classifier = TextClassifier(tmp_path / "m")
    with pytest.raises(TypeError, match="texts: got a text, expected a sequence of texts"):
        classifier("be")
    with pytest.raises(TypeError, match="texts: got NoneType, expected a sequence of texts"):
        classifier(None)
    with pytest.raises(TypeError, match="texts: got int at position 1, expected a text"):
        classifier(["be", 3])
    with pytest.raises(ValueError, match=r"texts: number 1 \(from 0\) has half a character"):
        classifier(["be", "a \udc00"])
    with pytest.raises(ValueError, match="pairs: this model has no token types"):
        classifier(["be"], ["to"])
    save(tmp_path / "plain", tokenizer)
    with pytest.raises(FileError, match="the model has no labels, it is no classifier"):
        TextClassifier(tmp_path / "plain")
    with pytest.raises(ValueError, match="compute_type: got 'float8'"):
        TextClassifier(tmp_path / "m", compute_type="float8")


def test_vectors_and_scores_of_a_damaged_model_are_an_error(tmp_path, tokenizer) -> None:
    model = save(tmp_path / "m", tokenizer, labels=["a", "b"])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights["encoder.layers.1.feed_forward_norm.weight"][5] = torch.nan
    save_model_dir(tmp_path / "nan", model.config, weights, tokenizer, tokenizer, {})
    vectors = SentenceEncoder(tmp_path / "nan")
    calls = (TextClassifier(tmp_path / "nan"), vectors.encode, vectors.states)
    for call in calls:
        with pytest.raises(
            FileError,
            match=r"nan/model.safetensors: encoder.layers.1.feed_forward_norm.weight: 1 of its 24 n",
        ):
            call(["be"])
