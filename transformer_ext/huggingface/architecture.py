"""What the architectures of transformers have in common: fields of ``config.json``, names of heads."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import FileError
from transformer_ext.huggingface.checkpoint import Checkpoint, Parts
from transformer_ext.huggingface.fields import Fields, HuggingFaceError
from transformer_ext.model.config import ModelConfig

ConfigT = TypeVar("ConfigT", bound=ModelConfig)

#: Less would be 0 in float32.
LEAST_EPS = 1e-37

#: Keys of every model's config.json that do not change what it computes, or are checked below.
_COMMON = {
    *("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path"),
    *("torch_dtype", "dtype", "return_dict", "use_return_dict", "torchscript", "use_bfloat16"),
    *("output_hidden_states", "output_attentions", "output_past", "use_cache"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "initializer_range", "_commit_hash"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "tokenizer_class", "prefix", "language", "directionality"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
    *("tie_word_embeddings", "tie_encoder_decoder", "pruned_heads", "auto_map"),
    *("quantization_config", "per_layer_config"),
    # Of generate(), in the files of older versions.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "return_dict_in_generate", "output_scores", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("tf_legacy_loss",),
}
#: Parts of keys that name ways to tell positions which these models do not have.
_OTHER_POSITIONS = ("rope", "rotary", "alibi", "relative_attention")


@dataclass(frozen=True)
class Imported(Generic[ConfigT]):
    """Architecture and weights of a model of theirs.

    Attributes:
        config: the architecture, in our words.
        parts: what each of our weights is made of.
        source: name of their class, for a person to read.
        notes: what is worth saying.
        foreign: beginnings of the names of tensors of other heads, and what such heads are.
        generation: settings of generating that are not taken over.
    """

    config: ConfigT
    parts: dict[str, Parts]
    source: str
    notes: list[str]
    foreign: Mapping[str, str]
    generation: Mapping[str, Any] = field(default_factory=dict)


def check_common(fields: Fields, architectures: Collection[str], known: Collection[str]) -> str:
    """Refuse what none of our models is, by the keys that all models have.

    Args:
        fields: of config.json.
        architectures: classes that we have.
        known: keys that only this model has.

    Returns:
        The class; "" where the file names none.

    Raises:
        HuggingFaceError: a key has a value that is not supported.
    """
    fields.absent("auto_map", "a model that comes with its own program, which is not run")
    fields.absent("quantization_config", "weights in floating point")
    fields.absent("per_layer_config", "layers are all alike")
    fields.absent("pruned_heads", "all layers have all heads")
    fields.absent("is_encoder_decoder", "a single stack")
    fields.absent("is_decoder", "not supported for this model")
    fields.absent("add_cross_attention", "a single stack")
    for key in fields.values:
        if any(part in key for part in _OTHER_POSITIONS):
            fields.absent(key, "positions are learned")
    classes = fields.get("architectures", [])
    if not isinstance(classes, list) or len(classes) > 1:
        fields.fail("architectures", "a list of one class")
    name = classes[0] if classes else ""
    if name and name not in architectures:
        fields.fail("architectures", f"one of {', '.join(architectures)}")
    fields.unknown({*_COMMON, *known})
    return str(name)


def unused_keys(fields: Fields, known: Collection[str]) -> list[str]:
    """A note on the keys of config.json that nobody has heard of, or none."""
    unknown = fields.unknown({*_COMMON, *known})
    if not unknown:
        return []
    shown = ", ".join(json.dumps(key)[:60] for key in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return [f"not used: {shown}{more} of {fields.path.name}"]


def check_depth(fields: Fields, key: str, default: int, found: Checkpoint) -> int:
    """Number of layers, not more than there are tensors."""
    depth = fields.integer(key, default)
    if depth > len(found.shapes):
        raise FileError(
            f"{found.path}: does not fit config.json: {len(found.shapes)} tensors, but {key} is "
            f"{depth}"
        )
    return depth


def check_tokenizer(fields: Fields, vocabulary: int, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that has more ids than the model, or special ones that differ."""
    if tokenizer.vocab_size > vocabulary:
        raise FileError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but vocab_size in "
            f"{fields.path.name} is {vocabulary}"
        )


def joined(names: Mapping[str, list[str]], *, transposed: bool = False) -> dict[str, Parts]:
    """Weight and bias of each of our modules, of theirs."""
    return {
        f"{ours}.{kind}": Parts(
            tuple(f"{name}.{kind}" for name in theirs), transposed and kind == "weight"
        )
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


def check_exportable(
    path: Path, config: ModelConfig, model: str, expected: Mapping[str, tuple[bool, str]]
) -> None:
    """Refuse a model of ours that theirs cannot hold.

    Args:
        path: of the model, for messages.
        config: its architecture.
        model: what theirs is, for messages.
        expected: for each field whether it is as it must be, and how that is.

    Raises:
        HuggingFaceError: the first field that is not.
    """
    for name, (holds, what) in expected.items():
        if not holds:
            value = getattr(config, name)
            got = value if isinstance(value, str) else json.dumps(value)
            raise HuggingFaceError(f"{path}: {name}: got {got}, but {model}: expected {what}")
