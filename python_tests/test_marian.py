"""Models from and to transformers' MarianMT directories."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import benchmark
from decoding_helpers import SENTENCES, save_random_model
from marian_helpers import (
    ENGLISH,
    GERMAN,
    pieces_of,
    sentencepiece_model,
    write_marian_dir,
    write_tokenizers,
)

from transformer_ext import Translator, convert, translate
from transformer_ext.config import given
from transformer_ext.data.tokenizer import SentencePieceTokenizer, TokenizerError, train_tokenizer
from transformer_ext.files import FileError, Tensors, load_model_dir, save_model_dir, save_tensors
from transformer_ext.huggingface import HuggingFaceError, from_huggingface, to_huggingface
from transformer_ext.inference.engine import Engine
from transformer_ext.inference.options import SearchOptions
from transformer_ext.model.transformer import Transformer

rescoring = benchmark("rescoring")

SOURCES = [[5, 6, 7, 8, 9, 10, 0], [11, 0], [4, 8, 15, 3, 0]]
TARGETS = [[12, 5, 5, 7], [9], [3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def torch_model(path):
    model = load_model_dir(path)
    made = Transformer(model.config).eval()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in model.weights.items()}
    made.load_state_dict(weights, strict=False)
    return made


def padded(rows, pad):
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def their_logits(model, sources, targets):
    """Of each token of each target, as ``[tokens, vocabulary]``."""
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    ids = padded(sources, pad)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            decoder_input_ids=padded([[start, *target] for target in targets], pad),
        ).logits
    return [row[: len(target) + 1] for row, target in zip(logits, targets, strict=True)]


def our_logits(model, sources, targets):
    start = model.config.decoder_start_id
    with torch.no_grad():
        return [
            model.logits(torch.tensor([source]), torch.tensor([[start, *target]]))[0]
            for source, target in zip(sources, targets, strict=True)
        ]


def assert_equal_logits(path, theirs, sources=SOURCES, targets=TARGETS, ids=None):
    """In float32: as near to their model in float64 as it is itself, within a factor.

    ``ids`` are our ids by theirs, of the target; sources and targets are in our ids.
    """
    mine = our_logits(torch_model(path), sources, targets)
    order = list(range(mine[0].shape[1])) if ids is None else ids["target"]
    new = [np.argsort(ids[side]) if ids else range(10**6) for side in ("source", "target")]
    their_sources = [[int(new[0][id]) for id in row] for row in sources]
    their_targets = [[int(new[1][id]) for id in row] for row in targets]
    single = their_logits(theirs, their_sources, their_targets)
    exact = their_logits(theirs.double(), their_sources, their_targets)
    theirs.float()
    for a, b, c in zip(mine, single, exact, strict=True):
        a = a[:, order]
        assert a.dtype == b.dtype == torch.float32 and c.dtype == torch.float64
        size = float(c.abs().max())
        error, allowed = (float((x - c).abs().max()) / size for x in (a, b))
        assert error <= 2 * allowed + 1e-6, (error, allowed)
    # The engine's log-probabilities are those of these logits.
    model = load_model_dir(path)
    found = Engine(model.config, model.weights, threads=1).score(sources, targets)
    for row, logits, target in zip(found, exact, their_targets, strict=True):
        expected = torch.log_softmax(logits, -1)[torch.arange(len(target)), torch.tensor(target)]
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-5, atol=1e-4)


# --- import: logits -----------------------------------------------------------------------------

ARCHITECTURES = {
    "plain": {},
    "relu": {"activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3},
    "gelu": {"activation_function": "gelu", "scale_embedding": False},
    "gelu_new": {"activation_function": "gelu_new"},
    "separate": {"separate": True},
    "separate, untied": {"separate": True, "tie_word_embeddings": False},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_an_imported_model_are_those_of_transformers(transformers, name, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian", **ARCHITECTURES[name])
    done = from_huggingface(tmp_path / "marian", tmp_path / "model")
    assert done.path == tmp_path / "model"
    config = load_model_dir(tmp_path / "model").config
    assert config == done.config
    assert config.positions == "sinusoidal_halves" and config.output_bias
    tie = "none" if "untied" in name else "target" if name == "separate" else "all"
    assert config.tie == tie
    assert (config.eos_id, config.unk_id) == (0, 1)
    assert config.pad_id == config.decoder_start_id == theirs.config.pad_token_id
    assert_equal_logits(tmp_path / "model", theirs)


def test_a_checkpoint_whose_tied_weights_differ_is_read_as_transformers_does(
    transformers, tmp_path
):
    theirs = write_marian_dir(tmp_path / "marian")
    file = tmp_path / "marian" / "model.safetensors"
    weights = {name: np.array(value) for name, value in Tensors(file).items()}
    weights["lm_head.weight"] = weights["model.shared.weight"] * 0.5
    save_tensors(file, weights, {"format": "pt"})
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "marian").eval()
    assert from_huggingface(tmp_path / "marian", tmp_path / "model").config.tie == "none"
    assert_equal_logits(tmp_path / "model", theirs)


def test_positions_that_are_no_sinusoids_are_kept(transformers, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian", max_position_embeddings=16)
    file = tmp_path / "marian" / "model.safetensors"
    weights = {name: np.array(value) for name, value in Tensors(file).items()}
    table = theirs.model.decoder.embed_positions.weight.detach().numpy().copy()
    table[0] += 0.7
    weights["model.decoder.embed_positions.weight"] = table
    save_tensors(file, weights, {"format": "pt"})
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "marian").eval()
    done = from_huggingface(tmp_path / "marian", tmp_path / "model")
    assert (done.config.positions, done.config.max_positions) == ("learned", 16)
    assert any("16 rows" in message for message in done.messages)
    assert_equal_logits(tmp_path / "model", theirs)


def test_normalised_embeddings(transformers, tmp_path):
    """MarianMTModel has lost this part of early checkpoints: it is put in by hand."""
    theirs = write_marian_dir(tmp_path / "marian")
    file = tmp_path / "marian" / "model.safetensors"
    weights = {name: np.array(value) for name, value in Tensors(file).items()}
    for number, stack in enumerate(("encoder", "decoder")):
        norm = torch.nn.LayerNorm(16)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        for kind in ("weight", "bias"):
            weights[f"model.{stack}.layernorm_embedding.{kind}"] = getattr(norm, kind).detach()
        layer = getattr(theirs.model, stack).layers[0]
        layer.add_module(f"norm{number}", norm)
        layer.register_forward_pre_hook(
            lambda _, arguments, norm=norm: (norm(arguments[0]), *arguments[1:])
        )
    save_tensors(file, weights, {"format": "pt"})
    with pytest.raises(HuggingFaceError, match=r"layernorm_embedding.*\(and 3 more\)"):
        from_huggingface(tmp_path / "marian", tmp_path / "model")
    change_json(tmp_path / "marian" / "config.json", normalize_embedding=True)
    assert from_huggingface(tmp_path / "marian", tmp_path / "model").config.embedding_norm
    assert_equal_logits(tmp_path / "model", theirs)


def change_json(file, **changes):
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def test_pytorch_model_bin_is_read_without_running_it(transformers, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian")
    from_huggingface(tmp_path / "marian", tmp_path / "expected")
    (tmp_path / "marian" / "model.safetensors").unlink()
    file = tmp_path / "marian" / "pytorch_model.bin"
    torch.save(theirs.state_dict(), file)
    done = from_huggingface(tmp_path / "marian", tmp_path / "model")
    assert "pytorch_model.bin" in done.messages[0]
    expected, found = (load_model_dir(tmp_path / name).weights for name in ("expected", "model"))
    assert set(expected) == set(found)
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name])

    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"model.shared.weight": Evil()}, file)
    with pytest.raises(FileError, match="pytorch_model.bin: broken, or holds more than tensors"):
        from_huggingface(tmp_path / "marian", tmp_path / "again")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "again").exists()
    torch.save({"model": theirs.state_dict()}, file)
    with pytest.raises(FileError, match="expected tensors by name"):
        from_huggingface(tmp_path / "marian", tmp_path / "again")


def test_half_precision_becomes_float32(transformers, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian").half()
    (tmp_path / "marian" / "model.safetensors").unlink()
    # Its state has the positions too, rounded.
    torch.save(theirs.state_dict(), tmp_path / "marian" / "pytorch_model.bin")
    done = from_huggingface(tmp_path / "marian", tmp_path / "model")
    assert "float16, converted to float32" in done.messages[0]
    assert any("rounded" in message for message in done.messages)
    assert done.config.positions == "sinusoidal_halves"
    model = load_model_dir(tmp_path / "model")
    np.testing.assert_array_equal(
        model.weights["source_embedding.weight"], theirs.model.shared.weight.detach().float()
    )


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_safetensors_of_other_types_become_float32(transformers, tmp_path, name):
    theirs = write_marian_dir(tmp_path / "marian").to(getattr(torch, name))
    theirs.save_pretrained(tmp_path / "marian")
    # Nor is torch needed to read them.
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from transformer_ext.huggingface import from_huggingface\n"
            "print(from_huggingface(sys.argv[1], sys.argv[2]).messages[0])\n"
            "print('torch' in sys.modules, 'safetensors' in sys.modules)\n",
            str(tmp_path / "marian"),
            str(tmp_path / "model"),
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"in {name}, converted to float32\nFalse False\n" in result.stdout, result.stderr
    weights = load_model_dir(tmp_path / "model").weights
    state = theirs.state_dict()
    for ours, whose in (
        ("source_embedding.weight", "model.shared.weight"),
        ("encoder.layers.1.feed_forward.in_projection.weight", "model.encoder.layers.1.fc1.weight"),
        ("decoder.layers.0.feed_forward_norm.bias", "model.decoder.layers.0.final_layer_norm.bias"),
        ("generator.bias", "final_logits_bias"),
    ):
        np.testing.assert_array_equal(
            weights[ours], state[whose].float().reshape(weights[ours].shape)
        )


# --- import: tokenizers and search --------------------------------------------------------------

TEXTS = [
    *ENGLISH,
    *GERMAN,
    "",
    "  Two   spaces and a tab\there. ",
    "Unknown: ☃ 漢字 — ß Schaltfläche",
    ">>de<< Click the button.",
    ">>fr<<Open the file.",
    "a >>de<< in the middle",
]


@pytest.mark.parametrize("separate", (False, True))
def test_token_ids_and_texts_are_those_of_marians_tokenizer(transformers, separate, tmp_path):
    write_marian_dir(tmp_path / "marian", separate=separate)
    theirs = transformers.MarianTokenizer.from_pretrained(tmp_path / "marian")
    from_huggingface(tmp_path / "marian", tmp_path / "model")
    with Translator(tmp_path / "model", threads=1) as translator:
        source, target = translator.source_tokenizer, translator.target_tokenizer
        texts = [text for text in TEXTS if not (separate and text.startswith(">>"))]
        expected = [theirs(text).input_ids[:-1] for text in texts]
        assert source.encode_batch(texts) == expected == [source.encode(t) for t in texts]
        assert max(map(len, expected)) > 5 and 1 in sum(expected, [])
        assert (">>de<<" in source.pieces(expected[-3])) == (not separate)
        expected = [theirs(text_target=text).input_ids[:-1] for text in texts]
        assert target.encode_batch(texts) == expected
        # Of ids that a model could say.
        for ids in expected:
            ids = [id for id in ids if id != target.unk_id]
            text = theirs.decode([*ids, 0], skip_special_tokens=True)
            assert target.decode([*ids, 0]) == text
        assert translator.encode(["Open"])[0][-1] == 0
        assert translator.max_train_length == 64


def test_many_texts_are_cut_in_threads(transformers, tmp_path):
    write_marian_dir(tmp_path / "marian")
    from_huggingface(tmp_path / "marian", tmp_path / "model")
    tokenizer = load_model_dir(tmp_path / "model").source_tokenizer
    texts = TEXTS * 30
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_settings_of_generate_become_search_options(transformers, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian")
    pad = theirs.config.pad_token_id
    change_json(
        tmp_path / "marian" / "generation_config.json",
        num_beams=6,
        max_length=512,
        length_penalty=0.8,
        early_stopping=True,
        no_repeat_ngram_size=3,
        bad_words_ids=[[pad], [7], [8, 9]],
        repetition_penalty=1.2,
        min_length=4,
    )
    done = from_huggingface(tmp_path / "marian", tmp_path / "model")
    assert done.search == SearchOptions.preset(
        "huggingface",
        beam_size=6,
        max_length=511,
        length_penalty=0.8,
        early_stopping="first",
        no_repeat_ngram_size=3,
        suppressed_tokens=(7,),
        min_length=3,
    )
    messages = "\n".join(done.messages)
    assert "--search-preset huggingface --beam-size 6" in messages
    flags = next(line for line in done.messages if "--search-preset" in line).split(": ")[1]
    arguments = translate._parser().parse_args(["MODEL", *flags.split()])
    values = given(arguments, SearchOptions)
    assert SearchOptions.preset(arguments.search_preset, **values) == done.search
    assert "not taken over: bad_words_ids of more than one token" in messages
    assert "not taken over: repetition_penalty 1.2" in messages
    for setting in ({"num_beams": "six"}, {"bad_words_ids": [7]}, {"early_stopping": "soon"}):
        change_json(tmp_path / "marian" / "generation_config.json", **setting)
        with pytest.raises(HuggingFaceError, match="generation_config.json: a setting that cannot"):
            from_huggingface(tmp_path / "marian", tmp_path / "other")
        values = {"num_beams": 6, "bad_words_ids": [[7]], "early_stopping": True}
        change_json(tmp_path / "marian" / "generation_config.json", **values)


# --- import: what cannot be ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_marian(tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("plain") / "marian"
    write_marian_dir(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"model_type": "bart"}, "model_type: got 'bart', expected one of bert, gpt2, marian"),
        ({"normalize_before": True}, "normalize_before: got True"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm: got True"),
        ({"decoder_attention_heads": 2}, "attention_heads: got 4 and 2"),
        ({"decoder_ffn_dim": 48}, "ffn_dim: got 24 and 48"),
        ({"activation_function": "mish"}, "activation_function: got 'mish'"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "nhead: 3 does not divide"),
        ({"d_model": "16"}, "d_model: got '16', expected an integer"),
        ({"d_model": "absent"}, "d_model is missing, expected an integer"),
        ({"eos_token_id": [0, 1]}, r"eos_token_id: got \[0, 1\], expected an integer"),
        ({"eos_token_id": 2}, "'</s>' has the id 0, but eos_token_id in config.json is 2"),
        ({"pad_token_id": 5}, "'<pad>' has the id .* but pad_token_id in config.json is 5"),
        ({"pad_token_id": 500}, "pad_token_id: got 500, expected an integer from 0 to"),
        ({"decoder_layers": 2}, r"model.decoder.layers.1.self_attn.q_proj.weight is missing"),
        ({"encoder_layers": 1}, r"model.encoder.layers.1.\S*: is no part of a model"),
        ({"vocab_size": 500}, r"source_embedding.weight: made of tensors of the shape"),
        ({"normalize_embedding": True}, "layernorm_embedding.weight is missing"),
    ),
)
def test_what_cannot_be_imported_is_named(plain_marian, changes, message, tmp_path):
    marian = shutil.copytree(plain_marian, tmp_path / "marian")
    change_json(marian / "config.json", **changes)
    if "eos_token_id" in changes:
        change_json(marian / "generation_config.json", forced_eos_token_id="absent")
    with pytest.raises((HuggingFaceError, FileError), match=message):
        from_huggingface(marian, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marian"]


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("config.json", "config.json: no such file"),
        ("model.safetensors", "has neither model.safetensors nor pytorch_model.bin"),
        ("source.spm", "source.spm: cannot be read"),
        ("target.spm", "target.spm: cannot be read"),
        ("vocab.json", "vocab.json: no such file"),
    ),
)
def test_a_missing_file_is_named(plain_marian, name, message, tmp_path):
    marian = shutil.copytree(plain_marian, tmp_path / "marian")
    (marian / name).unlink()
    with pytest.raises(FileError, match=message):
        from_huggingface(marian, tmp_path / "model")
    if name == "model.safetensors":
        (marian / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(FileError, match="weight_map: got None"):
            from_huggingface(marian, tmp_path / "model")


def test_broken_files_are_named(plain_marian, tmp_path):
    marian = shutil.copytree(plain_marian, tmp_path / "marian")
    whole = (marian / "model.safetensors").read_bytes()
    (marian / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="model.safetensors: broken or cut off"):
        from_huggingface(marian, tmp_path / "model")
    (marian / "model.safetensors").write_bytes(whole)
    vocabulary = json.loads((marian / "vocab.json").read_text())
    pieces = sorted(vocabulary, key=vocabulary.get)
    for change, message in (
        ({pieces[9]: 8}, "but not exactly one is 9"),
        ({pieces[9]: "9"}, "expected an id for each piece"),
        ({pieces[9]: "absent"}, "but not exactly one is 9"),
        ({"<unk>": "absent", "<other>": 1}, "has no unk token '<unk>'"),
        ({"one more": len(pieces)}, "src_vocab_size is .* pieces"),
    ):
        (marian / "vocab.json").write_text(json.dumps(vocabulary))
        change_json(marian / "vocab.json", **change)
        with pytest.raises(FileError, match=message):
            from_huggingface(marian, tmp_path / "model")
    others = {
        piece if id < 2 or piece == "<pad>" else f"x{id}": id for piece, id in vocabulary.items()
    }
    (marian / "vocab.json").write_text(json.dumps(others))
    with pytest.raises(FileError, match=r"marian/vocab.json: .* vocabulary of another"):
        from_huggingface(marian, tmp_path / "model")


# --- the vocabulary beside a SentencePiece model ------------------------------------------------


@pytest.fixture
def vocabulary_model(tmp_path):
    """A SentencePiece model, and a vocabulary with its pieces in reverse."""
    model = sentencepiece_model(ENGLISH)
    (tmp_path / "a.model").write_bytes(model)
    pieces = [*reversed(pieces_of(model)), "<pad>"]
    values = {"pieces": pieces, "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "bos": "<s>"}
    (tmp_path / "a.json").write_text(json.dumps(values))
    return tmp_path / "a.model", tmp_path / "a.json"


def test_a_vocabulary_gives_pieces_other_ids(vocabulary_model):
    plain, other = (
        SentencePieceTokenizer(vocabulary_model[0]),
        SentencePieceTokenizer(*vocabulary_model),
    )
    assert other.vocab_size == plain._processor.get_piece_size() + 1
    last = other.vocab_size - 2
    for text in ENGLISH:
        assert other.encode(text) == [last - id for id in plain.encode(text)]
        assert other.decode(other.encode(text)) == plain.decode(plain.encode(text)) == text
        assert other.pieces(other.encode(text)) == plain.pieces(plain.encode(text))
    assert (other.pad_id, other.unk_id, other.bos_id, other.eos_id) == (
        last + 1,
        last,
        last - 1,
        last - 2,
    )
    assert other.sha256 != plain.sha256
    again = pickle.loads(pickle.dumps(other))
    assert again.encode(ENGLISH[0]) == other.encode(ENGLISH[0]) and again.sha256 == other.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"pieces": "absent"}, "expected the keys"),
        ({"more": 1}, "expected the keys"),
        ({"pieces": [1, 2]}, "pieces: expected a list of texts"),
        ({"pieces": ["</s>", "<unk>", "</s>"]}, "'</s>' is there twice"),
        ({"eos": "nowhere"}, "eos: got 'nowhere', expected one of the pieces"),
        ({"eos": 3}, "eos: got 3, expected one of the pieces"),
        ({"pieces": ["</s>", "<unk>", "<pad>", "<s>", "a"]}, "vocabulary of another"),
    ),
)
def test_a_broken_vocabulary_is_one_error(vocabulary_model, changes, message):
    change_json(vocabulary_model[1], **changes)
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(*vocabulary_model)
    vocabulary_model[1].write_text("{")
    with pytest.raises(TokenizerError, match="not JSON"):
        SentencePieceTokenizer(*vocabulary_model)


def test_a_piece_that_is_no_utf8_is_one_error(vocabulary_model):
    model, vocabulary = vocabulary_model
    piece = "\u2581".encode()
    model.write_bytes(model.read_bytes().replace(piece, b"\x99" + piece[1:]))
    with pytest.raises(TokenizerError, match="not a SentencePiece model: a piece is not UTF-8"):
        SentencePieceTokenizer(model, vocabulary)


def test_a_model_directory_is_bound_to_its_vocabulary(plain_marian, tmp_path):
    folder = from_huggingface(plain_marian, tmp_path / "model").path
    names = {path.name for path in folder.iterdir()}
    assert {"source.model", "target.model", "vocabulary.json"} < names
    model = load_model_dir(folder)
    save_model_dir(
        tmp_path / "copy",
        model.config,
        model.weights,
        model.source_tokenizer,
        model.target_tokenizer,
    )
    copy = load_model_dir(tmp_path / "copy")
    assert copy.source_tokenizer.sha256 == model.source_tokenizer.sha256
    assert copy.target_tokenizer.encode(GERMAN[0]) == model.target_tokenizer.encode(GERMAN[0])

    values = json.loads((folder / "vocabulary.json").read_text())
    pieces = values["pieces"]
    pieces[5], pieces[6] = pieces[6], pieces[5]
    (folder / "vocabulary.json").write_text(json.dumps(values))
    with pytest.raises(FileError, match="not the tokenizer that this model was trained with"):
        load_model_dir(folder)
    (folder / "vocabulary.json").write_text("{}")
    with pytest.raises(FileError, match="vocabulary.json: got , expected the keys"):
        load_model_dir(folder)
    (folder / "vocabulary.json").unlink()
    with pytest.raises(FileError, match="vocabulary.json: no such file"):
        load_model_dir(folder)
    tokenizer = json.loads((folder / "config.json").read_text())["tokenizer"]
    change_json(folder / "config.json", tokenizer={**tokenizer, "source_vocabulary": "../x"})
    with pytest.raises(FileError, match="tokenizer.source_vocabulary: got '../x'"):
        load_model_dir(folder)


# --- export -------------------------------------------------------------------------------------

EXPORTS = {
    "interleaved sinusoids": {"tie": "all"},
    "sinusoids in halves": {"tie": "all", "positions": "sinusoidal_halves"},
    "learned positions": {"tie": "all", "positions": "learned", "max_positions": 30},
    "target tied": {"tie": "target", "activation": "silu", "num_decoder_layers": 2},
    "nothing tied": {"tie": "none", "activation": "gelu", "scale_embedding": False},
    "grouped heads": {"num_kv_heads": 2, "activation": "gelu_tanh"},
    "no bias": {"tie": "all", "bias": False},
    "output bias": {"tie": "all", "output_bias": True},
    "spare rows": {"src_vocab_size": 336, "tgt_vocab_size": 336, "tie": "all"},
}


def order_of(file, tokenizer, pad=2):
    """Our ids by theirs, read off the pieces; ``pad`` is our id of what they call padding."""
    vocabulary = json.loads(file.read_text())
    ours = {tokenizer.piece(id): id for id in range(4, tokenizer.vocab_size)}
    ours |= {"</s>": 3, "<unk>": 1, "<pad>": pad}
    order = [ours.get(piece) for piece in sorted(vocabulary, key=vocabulary.get)]
    missing = [id for id in range(len(order)) if id not in set(order)]
    return [missing.pop(0) if id is None else id for id in order]


@pytest.mark.parametrize("zero_start", (False, True))
@pytest.mark.parametrize("name", EXPORTS)
def test_logits_of_an_exported_model_are_ours(transformers, name, zero_start, tmp_path):
    folder = save_random_model(tmp_path / "model", **EXPORTS[name])
    done = to_huggingface(folder, tmp_path / "marian", zero_start=zero_start)
    model, info = transformers.MarianMTModel.from_pretrained(
        tmp_path / "marian", output_loading_info=True
    )
    assert not any(info[key] for key in ("unexpected_keys", "mismatched_keys", "error_msgs"))
    assert all("positions" in key for key in info["missing_keys"])
    rows = model.config.vocab_size
    assert model.config.pad_token_id == model.config.decoder_start_token_id == rows - 1
    ids = order_of(tmp_path / "marian" / "vocab.json", load_model_dir(folder).target_tokenizer)
    assert sorted(ids) == list(range(rows)) and ids[0] == 3 and ids[1] == 1 and ids[-1] == 2
    start = model.model.decoder.embed_tokens.weight[rows - 1]
    assert bool((start == 0).all()) == zero_start
    assert any("--zero-start" in message for message in done.messages) != zero_start
    sources = [[5, 9, 200, 320, 3], [270, 3], [300] * 9 + [3]]
    targets = [[301, 5, 6], [9] * 7, [7, 3, 8]]
    orders = {"source": ids, "target": ids}
    assert_equal_logits(folder, model.eval(), sources, targets, orders)
    # And back again.
    from_huggingface(tmp_path / "marian", tmp_path / "back")
    assert_equal_logits(tmp_path / "back", model, [[5, 6, 0]], [[8, 9]])


def test_two_tokenizers_are_exported_as_two_vocabularies(transformers, tmp_path):
    folder = tmp_path / "model"
    config = load_model_dir(save_random_model(tmp_path / "one")).config
    one = load_model_dir(tmp_path / "one").source_tokenizer
    (tmp_path / "other.model").write_bytes(train_tokenizer(SENTENCES, vocab_size=320)[0])
    other = SentencePieceTokenizer(tmp_path / "other.model")
    assert one.vocab_size != other.vocab_size
    for sizes in ((one, other), (other, one)):
        config.src_vocab_size, config.tgt_vocab_size = (t.vocab_size for t in sizes)
        config.tie = "target"
        made = Transformer(config)
        weights = {k: v.detach() for k, v in made.state_dict().items()}
        save_model_dir(folder, config, weights, *sizes, overwrite=True)
        to_huggingface(folder, tmp_path / "marian", overwrite=True)
        model = transformers.MarianMTModel.from_pretrained(tmp_path / "marian").eval()
        tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "marian")
        ids = {
            "source": order_of(tmp_path / "marian" / "vocab.json", sizes[0], pad=0),
            "target": order_of(tmp_path / "marian" / "target_vocab.json", sizes[1]),
        }
        sources = [[*sizes[0].encode(text), 3] for text in SENTENCES]
        targets = [sizes[1].encode(text) for text in SENTENCES]
        for text, source, target in zip(SENTENCES, sources, targets, strict=True):
            assert [ids["source"][id] for id in tokenizer(text).input_ids] == source
            found = tokenizer(text_target=text).input_ids
            assert [ids["target"][id] for id in found] == [*target, 3]
        assert_equal_logits(folder, model, sources, targets, ids)


def test_an_imported_model_is_exported_as_it_was(transformers, tmp_path):
    theirs = write_marian_dir(tmp_path / "marian")
    # The vocabulary of the helper ends with padding, as Marian's do.
    from_huggingface(tmp_path / "marian", tmp_path / "model")
    to_huggingface(tmp_path / "model", tmp_path / "again")
    before, after = (Tensors(tmp_path / f / "model.safetensors") for f in ("marian", "again"))
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    names = ("vocab.json", "source.spm", "target.spm")
    vocabularies = [
        json.loads((tmp_path / f / "vocab.json").read_text()) for f in ("marian", "again")
    ]
    assert vocabularies[0] == vocabularies[1]
    for name in names[1:]:
        assert (tmp_path / "marian" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    config = transformers.MarianConfig.from_pretrained(tmp_path / "again")
    for field in ("pad_token_id", "decoder_start_token_id", "eos_token_id", "activation_function"):
        assert getattr(config, field) == getattr(theirs.config, field)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"norm_first": True}, r"norm_first: got true, .* expected false \(post-norm\)"),
        ({"final_norm": True}, "final_norm: got true, .* expected false"),
        ({"norm": "rms"}, "norm: got \"rms\", .* expected 'layer'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps: got 1e-06, .* expected 1e-05"),
        ({"embedding_norm": True}, "embedding_norm: got true, .* expected false"),
        ({"activation": "swiglu"}, 'activation: got "swiglu", .* expected relu, gelu'),
        ({"positions": "rope"}, "positions: got rope, .* expected sinusoidal"),
        ({"positions": "none"}, "positions: got none, .* expected sinusoidal"),
        ({"head_dim": 5}, "head_dim: got 5, .* expected d_model / nhead .8."),
    ),
)
def test_what_cannot_be_exported_is_named(changes, message, tmp_path):
    folder = save_random_model(tmp_path / "model", **changes)
    with pytest.raises(HuggingFaceError, match=message):
        to_huggingface(folder, tmp_path / "marian")
    assert not (tmp_path / "marian").exists()


# --- translations -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A post-norm model that has half learned to turn a sentence into the next, in a second."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_random_model(folder, tie="all", d_model=32)
    model = load_model_dir(folder)
    tokenizer = model.source_tokenizer
    made = Transformer(model.config).train()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    sources = [[*tokenizer.encode(text), 3] for text in SENTENCES]
    targets = sources[1:] + sources[:1]
    src = padded(sources, 0)
    tgt = padded([[2, *target] for target in targets], 0)
    for _ in range(120):
        optimizer.zero_grad()
        logits = made.logits(src, tgt[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0, label_smoothing=0.1
        )
        loss.backward()
        optimizer.step()
    save_model_dir(folder, model.config, made.state_dict(), tokenizer, tokenizer, overwrite=True)
    return folder


LINES = [
    *SENTENCES,
    "Close the dialog.",
    "Save the file before you open the table.",
    "The button has a table.",
    "Datei",
]


@pytest.mark.parametrize("beam_size", (1, 4))
@pytest.mark.parametrize("zero_start", (False, True))
def test_translations_are_those_of_generate(transformers, trained, beam_size, zero_start, tmp_path):
    to_huggingface(trained, tmp_path, zero_start=zero_start)
    model = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    options = SearchOptions.preset("huggingface", beam_size=beam_size, max_length=60)
    ids = order_of(tmp_path / "vocab.json", load_model_dir(trained).target_tokenizer)
    with Translator(trained, threads=1) as translator:
        sources = translator.encode(LINES)
        batch = tokenizer(LINES, return_tensors="pt", padding=True)
        for row, source in zip(batch.input_ids.tolist(), sources, strict=True):
            assert [ids[id] for id in row[: len(source)]] == source
        found = model.generate(
            **batch, num_beams=beam_size, max_length=None, max_new_tokens=60
        ).tolist()
        ours = translator.translate(LINES, options)
    theirs = []
    for row in found:
        row = row[1:]
        ended = 0 in row
        theirs.append(([ids[id] for id in row[: row.index(0) if ended else 60]], ended))
    mine = [(t.tokens, t.hypotheses[0].ended) for t in ours]
    for number, gap in rescoring.differences(trained, sources, mine, theirs, options):
        assert abs(gap) < 1e-4, (number, gap)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    for our, (tokens, _), text in zip(ours, theirs, texts, strict=True):
        assert our.tokens != tokens or our.text == text
    assert len({t.text for t in ours}) > 4 and sum(h[1] for h in mine) > 4


def test_a_difference_is_measured_in_float64(trained):
    options = SearchOptions.preset("huggingface", max_length=20)
    with Translator(trained, threads=1) as translator:
        sources = translator.encode(LINES[:2])
        results = translator.translate(LINES[:2], options, num_hypotheses=4)
    best, second = (
        [(r.hypotheses[i].tokens, r.hypotheses[i].ended) for r in results] for i in (0, 1)
    )
    assert rescoring.differences(trained, sources, best, best, options) == []
    found = rescoring.differences(trained, sources, best, second, options)
    assert [number for number, _ in found] == [0, 1]
    for number, gap in found:
        scores = [hypothesis.score for hypothesis in results[number].hypotheses]
        assert gap == pytest.approx(scores[0] - scores[1], abs=1e-5)
        assert gap > 0


@pytest.mark.parametrize("beam_size", (1, 4))
def test_ctranslate2s_converter_reads_an_export(transformers, trained, beam_size, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    to_huggingface(trained, tmp_path / "marian", zero_start=True)
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "marian"))
    converter.convert(str(tmp_path / "ct2"))
    theirs = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    options = SearchOptions.preset("ctranslate2", beam_size=beam_size, max_length=40, min_length=0)
    with Translator(trained, threads=1) as translator:
        tokenizer = translator.source_tokenizer
        ours = translator.translate(LINES, options)
        found = theirs.translate_batch(
            [tokenizer.pieces(ids) for ids in translator.encode(LINES)],
            beam_size=beam_size,
            max_decoding_length=40,
            min_decoding_length=0,
            return_scores=True,
        )
        sources = translator.encode(LINES)
    model = rescoring.model_in_float64(trained)
    for source, mine, other in zip(sources, ours, found, strict=True):
        assert tokenizer.pieces(mine.tokens) == other.hypotheses[0]
        # CTranslate2 has no row for the start token.
        score = rescoring.score_in_float64(
            model, source, mine.tokens, mine.hypotheses[0].ended, options, absent=[2]
        )
        assert other.scores[0] == pytest.approx(score, abs=1e-5)


# --- the command --------------------------------------------------------------------------------


def test_the_command_converts_there_and_back(trained, tmp_path, capsys):
    marian, back = str(tmp_path / "marian"), str(tmp_path / "back")
    assert convert.main(["--to-huggingface", str(trained), "--output", marian]) == 0
    out = capsys.readouterr().out
    assert "post-norm" in out and "3 -> 0" in out and "which is <pad>" in out
    assert convert.main(["--from-huggingface", marian, "--output", back]) == 0
    out = capsys.readouterr().out
    assert "float32" in out and "end of sentence 0, unknown 1" in out and back in out
    with Translator(trained, threads=1) as ours, Translator(back, threads=1) as again:
        assert [t.text for t in ours.translate(LINES)] == [t.text for t in again.translate(LINES)]
    names = {path.name for path in (tmp_path / "marian").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.spm",
        "target.spm",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_the_command_replaces_only_what_it_may(trained, tmp_path, capsys):
    def run(output, *more):
        status = convert.main(["--to-huggingface", str(trained), "--output", str(output), *more])
        return status, capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty")[0] == 0
    status, error = run(tmp_path / "empty")
    assert status == 2 and "not empty; --overwrite replaces it" in error and error.count("\n") == 1
    assert run(tmp_path / "empty", "--overwrite") == (0, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    status, error = run(tmp_path / "mine", "--overwrite")
    assert status == 2 and "holds no config.json" in error
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    status, error = run(trained, "--overwrite")
    assert status == 2 and "expected another folder than the one to be converted" in error
    status, error = run(tmp_path / "mine" / "thesis.txt", "--overwrite")
    assert status == 2 and "error:" in error
    assert load_model_dir(trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_wrong_command_lines(trained, tmp_path, capsys):
    output = ["--output", str(tmp_path / "x")]
    for words, message in (
        (output, "one of the arguments --from-huggingface --to-huggingface is required"),
        (["--from-huggingface", "a", "--to-huggingface", "b", *output], "not allowed with"),
        (["--from-huggingface", "a", "--zero-start", *output], "expected --to-huggingface with it"),
        (["--to-hugingface", "a", *output], "--to-huggingface"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert convert.main(["--from-huggingface", str(tmp_path / "none"), *output]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder\n"
    assert convert.main(["--to-huggingface", str(tmp_path / "none"), *output]) == 2
    assert "no such model directory" in capsys.readouterr().err


def test_vocabularies_of_the_helper_are_as_marians(tmp_path):
    sizes, pad = write_tokenizers(tmp_path)
    assert sizes == [pad + 1] * 2
