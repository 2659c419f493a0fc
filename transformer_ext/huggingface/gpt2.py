"""GPT-2 (Radford et al. 2019): ``GPT2Model`` and ``GPT2LMHeadModel``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import ModelDir, save_tensors, write_json
from transformer_ext.huggingface.architecture import (
    LEAST_EPS,
    Imported,
    check_common,
    check_depth,
    check_exportable,
    check_tokenizer,
    joined,
    unused_keys,
)
from transformer_ext.huggingface.checkpoint import Checkpoint, Parts
from transformer_ext.huggingface.conversion import split_heads
from transformer_ext.huggingface.fields import THEIR_ACTIVATIONS, Fields
from transformer_ext.model.config import LanguageModelConfig

if TYPE_CHECKING:
    import numpy as np

#: Names that transformers takes for these keys too.
ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
_ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
_KEYS = (
    *("vocab_size", "n_ctx", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop"),
    *("attn_pdrop", "layer_norm_epsilon", "scale_attn_weights", "reorder_and_upcast_attn"),
    *("scale_attn_by_inverse_layer_idx", "summary_type", "summary_use_proj"),
    *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *ALIASES,
    *ALIASES.values(),
)
#: Beginnings of names, and what such tensors are of.
_FOREIGN = {
    "score.": "a head for labels",
    "classifier.": "a head for the labels of tokens",
    "multiple_choice_head.": "a head for choices",
    "qa_outputs.": "a head for question answering",
}
#: Keys of ``generation_config.json`` that change no text that is generated here.
_NO_SETTINGS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "use_cache", "cache_implementation", "cache_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    "return_dict_in_generate",
}
#: What text generation does of itself; a setting that says so needs not be taken over.
_USUAL_SETTINGS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 1.0,
    "max_new_tokens": 256,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "typical_p": 1.0,
    "min_length": 0,
    "early_stopping": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}


def _settings(generation: Fields) -> dict[str, Any]:
    """Those of ``generation_config.json`` that ask for another text than is generated here."""
    return {
        key: value
        for key, value in generation.values.items()
        if not key.startswith("_")
        and key not in _NO_SETTINGS
        and value not in ([], {})
        and not (key in _USUAL_SETTINGS and value == _USUAL_SETTINGS[key])
    }


def _prepends_bos(folder: Path) -> bool:
    """Whether their tokenizer puts a start token before every text.

    transformers heeds the setting where it makes the tokenizer from the vocabulary files.
    """
    settings = Fields.read(folder / "tokenizer_config.json")
    asked = settings.boolean("add_bos_token", False)
    return asked and not (folder / "tokenizer.json").is_file()


def _linear_names(depth: int) -> dict[str, list[str]]:
    """Our name of each projection in the layers, and theirs, which has inputs for rows."""
    names: dict[str, list[str]] = {}
    for index in range(depth):
        ours, theirs = f"decoder.layers.{index}", f"h.{index}"
        names[f"{ours}.self_attention.in_projection"] = [f"{theirs}.attn.c_attn"]
        names[f"{ours}.self_attention.out_projection"] = [f"{theirs}.attn.c_proj"]
        names[f"{ours}.feed_forward.in_projection"] = [f"{theirs}.mlp.c_fc"]
        names[f"{ours}.feed_forward.out_projection"] = [f"{theirs}.mlp.c_proj"]
    return names


def _norm_names(depth: int) -> dict[str, list[str]]:
    names = {"decoder.norm": ["ln_f"]}
    for index in range(depth):
        names[f"decoder.layers.{index}.self_attention_norm"] = [f"h.{index}.ln_1"]
        names[f"decoder.layers.{index}.feed_forward_norm"] = [f"h.{index}.ln_2"]
    return names


_TABLES = {
    "embedding.weight": "wte.weight",
    "decoder.positions.weight": "wpe.weight",
    "generator.weight": "lm_head.weight",
}


# --- import -------------------------------------------------------------------------------------


def import_gpt2(
    fields: Fields, found: Checkpoint, tokenizer: Tokenizer
) -> Imported[LanguageModelConfig]:
    """Architecture and weights of a GPT-2; arguments and errors as of ``import_bert``."""
    architecture = check_common(fields, _ARCHITECTURES, _KEYS)
    fields.only("scale_attn_weights", True, "scores are divided by the root of a head's width")
    fields.only("scale_attn_by_inverse_layer_idx", False, "all layers scale alike")
    found.rename({name: name.removeprefix("transformer.") for name in found.shapes})
    notes = unused_keys(fields, _KEYS)
    width = fields.integer("n_embd", 768, least=1)
    heads = fields.integer("n_head", 12, least=1)
    if width % heads:
        fields.fail("n_head", f"a divisor of n_embd ({width})")
    vocabulary = fields.integer("vocab_size", 50257, least=1)
    check_tokenizer(fields, vocabulary, tokenizer, tokenizer.path)
    generation = Fields.read(fields.path.with_name("generation_config.json"))
    for ends in (fields, generation):
        if "eos_token_id" in ends:
            end = ends.integer("eos_token_id", most=vocabulary - 1)
            if end != tokenizer.eos_id:
                ends.fail("eos_token_id", f"{tokenizer.eos_id} as in {tokenizer.path.name}")
    settings = _settings(generation)
    if settings:
        notes.append(f"not used: {', '.join(settings)} of {generation.path.name}")
    dropout = fields.probability("resid_pdrop", 0.1)
    if fields.probability("embd_pdrop", 0.1) != dropout:
        notes.append("not used: embd_pdrop; in training it is resid_pdrop")
    config = LanguageModelConfig(
        vocab_size=vocabulary,
        num_layers=check_depth(fields, "n_layer", 12, found),
        tie=_tied(fields, found, architecture),
        prepend_bos=_prepends_bos(fields.path.parent),
        d_model=width,
        nhead=heads,
        dim_feedforward=fields.integer("n_inner", 4 * width, least=1),
        dropout=dropout,
        attention_dropout=fields.probability("attn_pdrop", 0.1),
        activation_dropout=0.0,
        activation=fields.activation("activation_function", "gelu_new"),
        layer_norm_eps=fields.number("layer_norm_epsilon", 1e-5, least=LEAST_EPS, below=1.0),
        norm_first=True,
        positions="learned",
        max_positions=fields.integer("n_positions", 1024, least=1),
        scale_embedding=False,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    parts = joined(_linear_names(config.num_layers), transposed=True)
    parts |= joined(_norm_names(config.num_layers))
    parts |= {ours: Parts((theirs,)) for ours, theirs in _TABLES.items()}
    for name in found.shapes:
        # The causal mask, which older versions stored.
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            found.ignore(name)
    return Imported(config, parts, architecture or "GPT2LMHeadModel", notes, _FOREIGN, settings)


def _tied(fields: Fields, found: Checkpoint, architecture: str) -> bool:
    """Whether the output projection is the embedding."""
    table, output = _TABLES["embedding.weight"], _TABLES["generator.weight"]
    if output not in found:
        if not fields.boolean("tie_word_embeddings", True):
            fields.fail("tie_word_embeddings", f"true where there is no {output}")
        return True
    if found.shapes[output] != found.shapes.get(table) or not found.equal(output, table):
        return False
    found.ignore(output)
    return True


# --- export -------------------------------------------------------------------------------------


def export_gpt2(model: ModelDir[LanguageModelConfig], folder: Path) -> list[str]:
    """Write weights and configuration of a language model as a GPT-2; returns notes.

    Raises:
        HuggingFaceError: the model has something that a GPT-2 cannot hold.
    """
    _check_exportable(model.path, model.config)
    save_tensors(folder / "model.safetensors", _export_weights(model), {"format": "pt"})
    write_json(folder / "config.json", _export_config(model.config))
    return []


def _check_exportable(path: Path, config: LanguageModelConfig) -> None:
    expected = {
        "norm_first": (config.norm_first, "true (pre-norm)"),
        "final_norm": (config.final_norm, "true"),
        "norm": (config.norm == "layer", "layer"),
        "embedding_norm": (not config.embedding_norm, "false"),
        "positions": (config.positions == "learned", "learned"),
        "scale_embedding": (not config.scale_embedding, "false"),
        "activation": (config.activation in THEIR_ACTIVATIONS, ", ".join(THEIR_ACTIVATIONS)),
        "head_dim": (
            config.head_dim * config.nhead == config.d_model,
            f"d_model / nhead ({config.d_model / config.nhead:g})",
        ),
        "output_bias": (not config.output_bias, "false"),
        "prepend_bos": (not config.prepend_bos, "false (texts begin without a start token)"),
    }
    check_exportable(path, config, "a GPT-2 is a pre-norm decoder", expected)


def _export_weights(model: ModelDir[LanguageModelConfig]) -> dict[str, np.ndarray]:
    """Weights by their names."""
    import numpy as np

    config, weights = model.config, model.weights
    tensors: dict[str, np.ndarray] = {}
    for ours, theirs in _TABLES.items():
        if ours in weights:
            prefix = "" if ours == "generator.weight" else "transformer."
            tensors[prefix + theirs] = weights[ours]
    linear = _linear_names(config.num_layers)
    for ours, (theirs,) in {**linear, **_norm_names(config.num_layers)}.items():
        weight = weights[f"{ours}.weight"]
        if f"{ours}.bias" in weights:
            bias = weights[f"{ours}.bias"]
        else:
            bias = np.zeros(len(weight), np.float32)
        if ours.endswith("self_attention.in_projection"):
            weight, bias = (np.concatenate(split_heads(config, x, 3)) for x in (weight, bias))
        tensors[f"transformer.{theirs}.weight"] = (
            np.ascontiguousarray(weight.T) if ours in linear else weight
        )
        tensors[f"transformer.{theirs}.bias"] = bias
    return tensors


def _export_config(config: LanguageModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.nhead,
        "n_inner": config.dim_feedforward,
        "n_positions": config.max_positions,
        "activation_function": THEIR_ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "dtype": "float32",
    }
