"""Conversions in both directions, by the kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.files import (
    CONFIG_FILE,
    FileError,
    ModelDir,
    atomic_write,
    load_model_dir,
    read_json,
    write_model_files,
)
from transformer_ext.huggingface.bert import export_bert
from transformer_ext.huggingface.conversion import Conversion, output_folder, parameters
from transformer_ext.huggingface.directory import open_huggingface_dir
from transformer_ext.huggingface.fields import HuggingFaceError
from transformer_ext.huggingface.gpt2 import export_gpt2
from transformer_ext.huggingface.marian import from_marian, to_marian
from transformer_ext.huggingface.pooling import MODULES_FILE
from transformer_ext.model.config import LanguageModelConfig, ModelConfig, TextEncoderConfig


def from_huggingface(
    path: str | Path, output: str | Path, *, overwrite: bool = False
) -> Conversion:
    """Make a model directory of a directory of BERT, GPT-2 or MarianMT. Needs no ``transformers``.

    Weights in ``.bin`` files are read by torch, those in safetensors without it. float16 and
    bfloat16 weights become float32. Token ids stay what they were.

    Args:
        path: the directory of Hugging Face.
        output: the model directory to write, which appears when it is complete.
        overwrite: replace a model directory that is there.

    Raises:
        HuggingFaceError: the model has something that ours cannot hold; the message names it.
        FileError: a file is missing, broken, or does not fit the rest; the output is in the way.
    """
    path, output = Path(path), Path(output)
    if not path.is_dir():
        raise FileError(f"{path}: no such folder")
    within = not (path / CONFIG_FILE).is_file() and (path / MODULES_FILE).is_file()
    values = {} if within else read_json(path / CONFIG_FILE)
    if "format_version" in values:
        raise FileError(f"{path}: is a model directory already")
    if values.get("model_type") == "marian":
        return from_marian(path, output, overwrite=overwrite)
    opened = open_huggingface_dir(path, values)
    model = opened.model
    with output_folder(output, path, overwrite) as folder:
        write_model_files(
            folder,
            model.config,
            model.weights,
            model.source_tokenizer,
            model.target_tokenizer,
            model.training,
        )
    messages = [
        f"{path}: {opened.source}, weights of {model.weights.path.name} in {opened.types}"
        + ("" if opened.types == "float32" else ", converted to float32"),
        *_sizes(model.config),
        *opened.notes,
        f"written to {output}",
    ]
    return Conversion(output, model.config, messages)


def to_huggingface(
    path: str | Path, output: str | Path, *, overwrite: bool = False, zero_start: bool = False
) -> Conversion:
    """Make a directory for ``transformers`` of a model directory. Needs neither torch nor it.

    An encoder-decoder becomes a MarianMT (whose token ids change: see
    :func:`transformer_ext.huggingface.marian.to_marian`), a text encoder a BERT, a language model a
    GPT-2, where these can hold them.

    Args:
        path: the model directory.
        output: the directory to write, which appears when it is complete.
        overwrite: replace a directory with a model that is there.
        zero_start: of an encoder-decoder, move the embedding of the start token into the positions.

    Raises:
        HuggingFaceError: the model has something that theirs cannot hold; the message names the
            field and what is expected.
        FileError: the model directory cannot be read; the output is in the way.
    """
    path, output = Path(path), Path(output)
    model = load_model_dir(path, ModelConfig)
    config = model.config
    if not isinstance(config, (TextEncoderConfig, LanguageModelConfig)):
        return to_marian(path, output, overwrite=overwrite, zero_start=zero_start)
    if zero_start:
        raise HuggingFaceError(f"{path}: --zero-start: expected an encoder-decoder with it")
    tokenizer = model.source_tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        raise HuggingFaceError(
            f"{tokenizer.path}: a tokenizer of SentencePiece, which neither BERT nor GPT-2 has; "
            "expected one of the tokenizers library (tokenizer.json)"
        )
    longest = model.training.get("max_seq_length", config.max_positions)
    files = tokenizer.huggingface_files(longest)
    with output_folder(output, path, overwrite) as folder:
        for name, content in files.items():
            atomic_write(folder / name, content)
        if isinstance(config, TextEncoderConfig):
            notes = export_bert(cast("ModelDir[TextEncoderConfig]", model), folder)
        else:
            notes = export_gpt2(cast("ModelDir[LanguageModelConfig]", model), folder)
    if config.activation_dropout:
        notes.append(f"not taken over: activation_dropout {config.activation_dropout:g}")
    name = "BERT" if isinstance(config, TextEncoderConfig) else "GPT-2"
    messages = [
        f"{path}: to {name}, weights in float32",
        *_sizes(config),
        *notes,
        f"written to {output}",
    ]
    return Conversion(output, config, messages)


def _sizes(config: ModelConfig) -> list[str]:
    vocabulary = getattr(config, "vocab_size", 0)
    lines = [
        f"layers: {config.layers} of width {config.d_model} and {config.dim_feedforward}, "
        f"{config.nhead} heads, {config.activation}, {parameters(config):,} parameters",
        f"vocabulary: {vocabulary:,} ids; {config.max_positions:,} positions",
    ]
    if isinstance(config, TextEncoderConfig):
        parts = [f"{len(config.labels)} labels"] if config.labels else []
        parts += ["masked tokens"] if config.masked_lm_head else []
        how = ["first token" if config.pooling == "first" else "mean of all tokens"]
        how += ["pooler"] if config.pooler else []
        how += ["length 1"] if config.normalize else []
        heads = f"heads: {' and '.join(parts)}; " if parts else ""
        lines.append(f"{heads}vector of a text: {', '.join(how)}")
    return lines
