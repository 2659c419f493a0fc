"""Damages directories of BERT and GPT-2 in many ways and loads them: each must be one clear error, or
a model that computes.

    python python_tests/fuzz_huggingface.py --cases 100000 --seed 7

As fuzz_model_dir.py, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzz_model_dir import (
    MISSING,
    VALUES,
    Fuzz,
    cut,
    flip,
    flipped_header,
    header_of,
    limit_memory,
    some_header,
    some_header_text,
    some_json,
    some_length,
    with_header,
)
from huggingface_helpers import TEXTS, write_bert_dir, write_gpt2_dir

from transformer_ext.files import load_model_dir
from transformer_ext.inference.encoder_engine import EncoderEngine
from transformer_ext.inference.language_engine import LanguageModelEngine
from transformer_ext.inference.options import SearchOptions
from transformer_ext.model.config import LanguageModelConfig, ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", INDEX),
    "generation_config.json",
)
WORDS = [
    *("bert", "gpt2", "marian", "BertModel", "BertForMaskedLM", "GPT2LMHeadModel", "gelu", "silu"),
    *("gelu_new", "absolute", "relative_key", "single_label_classification", "regression"),
    *("[MASK]", "[SEP]", "<|endoftext|>", "WordPiece", "BPE", "vocab.txt", "model.safetensors"),
]
KEYS = [
    *("model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "n_embd"),
    *("num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob", "n_layer"),
    *("attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size", "n_head"),
    *("layer_norm_eps", "position_embedding_type", "is_decoder", "add_cross_attention", "n_inner"),
    *("pad_token_id", "tie_word_embeddings", "id2label", "problem_type", "auto_map", "unheard_of"),
    *("quantization_config", "rope_scaling", "n_positions", "activation_function", "eos_token_id"),
    *("scale_attn_weights", "layer_norm_epsilon", "resid_pdrop", "num_labels", "pruned_heads"),
    *("classifier_dropout", "format_version", "dtype"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to the values within a value; of long lists and dictionaries, to a few."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)[:40]
    elif isinstance(value, list):
        keys = list(range(len(value)))[:10]
    found = [(*path, key) for key in keys]
    return found + [way for key in keys for way in places(value[key], (*path, key))]


def some_values(chance: random.Random, data: bytes) -> bytes:
    """Values anywhere in a JSON file are others, gone, or each other's."""
    values = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        ways = places(values)
        if not ways:
            break
        *path, key = chance.choice(ways)
        inner = values
        for step in path:
            inner = inner[step]
        new = chance.choice((*VALUES, *WORDS))
        kind = chance.randrange(4)
        if kind == 0 and isinstance(inner, dict):
            inner[chance.choice((*KEYS, "x"))] = inner[key] if new is MISSING else new
        elif new is MISSING or kind == 1:
            del inner[key]
        else:
            inner[key] = new
    return json.dumps(values).encode()


def some_numbers(chance: random.Random, data: bytes) -> bytes:
    """Weights that are no numbers, or large ones."""
    header, rest = header_of(data)
    text = data[8 : len(data) - len(rest)]
    changed = bytearray(rest)
    at = 4 * chance.randrange(len(rest) // 4)
    number = chance.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF))
    changed[at : at + 4] = number.to_bytes(4, "little")
    return with_header(text, bytes(changed))


class HuggingFaceFuzz(Fuzz):
    """A directory of theirs."""

    success = "computed"
    mutations = [
        *((CONFIG, change) for change in (some_values, some_values, some_json, flip, cut)),
        *((WEIGHTS, change) for change in (some_header, some_header, some_length)),
        *((WEIGHTS, change) for change in (some_header_text, flipped_header, flip, cut)),
        (WEIGHTS, some_numbers),
        *((TORCH, change) for change in (flip, flip, cut)),
        *((name, change) for name in JSON_FILES for change in (some_values, some_json, flip, cut)),
        *((name, change) for name in ("vocab.txt", "merges.txt") for change in (flip, cut)),
    ]
    fields = [(key,) for key in KEYS]
    misfits = ("as config.json has it", "does not fit config.json", WEIGHTS, TORCH)

    def names(self, changed: str) -> tuple[str, ...]:
        if changed in (WEIGHTS, TORCH):
            return (changed,)
        # These are read together.
        return (*self.files, str(self.folder))

    def use(self, folder: Path) -> Any:
        model = load_model_dir(folder, ModelConfig)
        ids = model.source_tokenizer.encode(TEXTS[0])
        config = model.config
        if isinstance(config, LanguageModelConfig):
            engine = LanguageModelEngine(config, model.weights, threads=1)
            (found,) = engine.search([ids[:8]], SearchOptions(beam_size=1, max_length=2))
            return found.hypotheses[0].tokens
        encoder = EncoderEngine(config, model.weights, threads=1)
        return encoder.pooled([[config.bos_id, *ids[:8], config.eos_id]]).tolist()


def make(folder: Path) -> list[HuggingFaceFuzz]:
    """Directories of every form."""
    write_bert_dir(folder / "masked", "BertForPreTraining")
    write_bert_dir(folder / "labels", "BertForSequenceClassification", num_hidden_layers=1)
    sentences = folder / "sentences"
    write_bert_dir(sentences)
    types = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.{name}"}
        for i, name in enumerate(types)
    ]
    (sentences / "modules.json").write_text(json.dumps(modules))
    (sentences / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (sentences / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    settings = {"max_seq_length": 20, "do_lower_case": False}
    (sentences / "sentence_bert_config.json").write_text(json.dumps(settings))
    write_gpt2_dir(folder / "gpt2")
    parts = write_gpt2_dir(folder / "parts", n_layer=1)
    (folder / "parts" / WEIGHTS).unlink()
    parts.save_pretrained(folder / "parts", max_shard_size="20KB")
    theirs = write_gpt2_dir(folder / "torch", n_layer=1)
    (folder / "torch" / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), folder / "torch" / TORCH)
    # As a program of ours writes them, with tokenizer.json.
    from transformer_ext.huggingface import from_huggingface, to_huggingface

    from_huggingface(folder / "masked", folder / "converted")
    to_huggingface(folder / "converted", folder / "written")
    names = ("masked", "labels", "sentences", "gpt2", "parts", "torch", "written")
    return [HuggingFaceFuzz(folder / name) for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=400, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = make(Path(folder))
        limit_memory()
        for fuzz in all_of_them[:1] + all_of_them[3:4]:
            fuzz.every_field(1 if arguments.cases >= 1000 else 4)
        for number, fuzz in enumerate(all_of_them):
            cases = (arguments.cases + number) // len(all_of_them)
            fuzz.random_cases(cases, arguments.seed + number)
    print(dict(sum((fuzz.outcomes for fuzz in all_of_them), Counter())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
