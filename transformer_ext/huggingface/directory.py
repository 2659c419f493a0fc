"""A directory of ``transformers`` with BERT or GPT-2, opened as a model directory."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.data.tokenizer import TokenizerError
from transformer_ext.files import (
    CONFIG_FILE,
    FileError,
    ModelDir,
    check_kind,
    parameter_shapes,
    read_json,
)
from transformer_ext.huggingface.architecture import Imported
from transformer_ext.huggingface.bert import import_bert
from transformer_ext.huggingface.checkpoint import Checkpoint, ConvertedWeights
from transformer_ext.huggingface.fields import Fields, HuggingFaceError
from transformer_ext.huggingface.gpt2 import ALIASES, import_gpt2
from transformer_ext.huggingface.pooling import MODULES_FILE, SentenceModules, read_modules
from transformer_ext.model.config import LanguageModelConfig, ModelConfig, TextEncoderConfig

#: Our kind of model by their name of it.
_KINDS: dict[str, type[ModelConfig]] = {"bert": TextEncoderConfig, "gpt2": LanguageModelConfig}


@dataclass(frozen=True)
class Opened:
    """A directory of theirs.

    Attributes:
        model: as one of ours.
        source: name of their class.
        types: of the elements of its weights, for a person to read.
        notes: what is worth saying.
    """

    model: ModelDir[ModelConfig]
    source: str
    types: str
    notes: list[str]


def load_huggingface_dir(
    path: Path, values: Mapping[str, Any], kind: type[ModelConfig]
) -> ModelDir[ModelConfig]:
    """See :func:`transformer_ext.files.load_model_dir`.

    Args:
        path: the folder.
        values: of its config.json; empty where that lies in the folder that modules.json names.
        kind: class of the configuration that is expected.

    Raises:
        HuggingFaceError: the model has something that ours cannot hold.
        FileError: broken files, or a model of another kind.
    """
    return open_huggingface_dir(path, values, kind).model


def open_huggingface_dir(
    path: Path, values: Mapping[str, Any], kind: type[ModelConfig] = ModelConfig
) -> Opened:
    """:func:`load_huggingface_dir`, and what is worth saying about it."""
    modules: SentenceModules | None = None
    folder = path
    if (path / MODULES_FILE).is_file():
        modules = read_modules(path)
        if modules.transformer.resolve() != path.resolve() or not values:
            folder = modules.transformer
            values = read_json(folder / CONFIG_FILE)
    config_path = folder / CONFIG_FILE
    name = values.get("model_type")
    if name == "marian":
        raise HuggingFaceError(
            f"{path}: a folder of Hugging Face's MarianMT, which is to be converted first: python "
            f"-m transformer_ext.convert --from-huggingface {shlex.quote(str(path))} --output NEW_DIR"
        )
    fields = Fields(config_path, values, ALIASES if name == "gpt2" else None)
    if not isinstance(name, str) or name not in _KINDS:
        fields.fail("model_type", f"one of {', '.join(_KINDS)}, marian")
    check_kind(path, _KINDS[name], kind)
    if modules is not None and name != "bert":
        fields.fail("model_type", f"'bert' in a folder with {MODULES_FILE}")
    found = Checkpoint(folder)
    try:
        tokenizer = JsonTokenizer.from_huggingface(folder)
    except TokenizerError as error:
        raise FileError(str(error)) from None
    imported: Imported[Any]
    try:
        if name == "bert":
            imported = import_bert(fields, found, tokenizer, modules)
        else:
            imported = import_gpt2(fields, found, tokenizer)
    except FileError:
        raise
    except (ValueError, TypeError) as error:
        raise HuggingFaceError(f"{config_path}: {error}") from None
    weights = ConvertedWeights(found, imported.parts, parameter_shapes(imported.config))
    found.refuse_left(imported.foreign)
    training: dict[str, Any] = {"converted_from": imported.source}
    if imported.generation:
        training["generation_not_used"] = dict(imported.generation)
    if modules is not None:
        letters = " ".join(string.ascii_lowercase)
        if modules.lower_case and tokenizer.encode(letters.upper()) != tokenizer.encode(letters):
            raise HuggingFaceError(
                f"{folder / 'sentence_bert_config.json'}: do_lower_case: got True, expected False "
                "with a tokenizer that tells upper from lower case"
            )
        if modules.max_length is not None:
            positions = imported.config.max_positions
            training["max_seq_length"] = min(modules.max_length, positions)
    model = ModelDir(path, imported.config, weights, tokenizer, tokenizer, training)
    return Opened(model, imported.source, found.types, imported.notes)
