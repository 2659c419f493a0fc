"""Folders of ``sentence-transformers``: what makes one vector of a text out of BERT's states."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_ext.files import FileError, is_file_name, write_json
from transformer_ext.huggingface.fields import Fields, HuggingFaceError

MODULES_FILE = "modules.json"
_POOLINGS = {"cls_token": "first", "mean_tokens": "mean"}


@dataclass(frozen=True)
class SentenceModules:
    """The modules of a folder.

    Attributes:
        transformer: folder of the encoder.
        pooling: ours: ``first`` or ``mean``.
        normalize: whether vectors are divided by their length.
        lower_case: whether texts are lower-cased before they are cut into tokens.
        max_length: tokens of a text that are read, special ones included; None: not told.
    """

    transformer: Path
    pooling: str
    normalize: bool
    lower_case: bool
    max_length: int | None


def read_modules(folder: Path) -> SentenceModules:
    """What ``modules.json`` of a folder lists.

    Raises:
        FileError: broken files.
        HuggingFaceError: another module than encoder, pooling and normalisation, or one of these
            with a setting that is not supported.
    """
    path = folder / MODULES_FILE
    kinds: list[str] = []
    folders: list[Path] = []
    for number, module in enumerate(_read_list(path)):
        if not isinstance(module, dict):
            raise FileError(f"{path}: module {number}: expected an object with keys")
        kind, place = module.get("type"), module.get("path", "")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise FileError(f"{path}: module {number}: expected the texts type and path")
        # A surrogate is no part of any name of a file.
        within = len(place) < 1000 and place.encode(errors="ignore").decode() == place
        if not (within and all(map(is_file_name, Path(place).parts))):
            raise FileError(
                f"{path}: module {number}: path: got {place!r:.60}, expected a folder within"
            )
        kinds.append(kind.rpartition(".")[2])
        folders.append(folder / place)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise HuggingFaceError(
            f"{path}: got the modules {', '.join(kinds)[:200] or 'none'}, expected Transformer, "
            "Pooling and possibly Normalize"
        )
    general = Fields.read(folder / "config_sentence_transformers.json")
    general.only("model_type", "SentenceTransformer", "one vector of a text")
    general.absent("default_prompt_name", "texts have no prompt before them")
    general.absent("truncate_dim", "vectors are as wide as the model")
    settings = Fields.read(folders[0] / "sentence_bert_config.json")
    settings.only("transformer_task", "feature-extraction", "states of the encoder are pooled")
    settings.only("module_output_name", "token_embeddings", "states of the encoder are pooled")
    # Newer versions have it with the tokenizer.
    lengths = (settings, "max_seq_length")
    if "max_seq_length" not in settings:
        lengths = (Fields.read(folders[0] / "tokenizer_config.json"), "model_max_length")
    return SentenceModules(
        folders[0],
        _pooling(folders[1]),
        len(kinds) == 3,
        settings.boolean("do_lower_case", False),
        _longest(*lengths),
    )


def _longest(fields: Fields, key: str) -> int | None:
    """Tokens of a text; a number as large as a tokenizer without a limit has is none."""
    value = fields.get(key)
    if value is None or (isinstance(value, (int, float)) and value > 2**31 - 1):
        return None
    return fields.integer(key, least=3)


def _pooling(folder: Path) -> str:
    fields = Fields.read(folder / "config.json")
    prefix = "pooling_mode_"
    modes = [
        key.removeprefix(prefix)
        for key in fields.values
        if key.startswith(prefix) and fields.boolean(key, False)
    ]
    if "pooling_mode" in fields:  # of newer versions, a text
        names = {"cls": "cls_token", "mean": "mean_tokens"}
        mode = fields.text("pooling_mode", "")
        modes = [names.get(mode, mode)]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise HuggingFaceError(
            f"{fields.path}: got the pooling {' and '.join(modes)[:200] or 'none'}, expected "
            f"{' or '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _read_list(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: broken, not JSON: {error}") from None
    if not isinstance(values, list):
        raise FileError(f"{path}: got {type(values).__name__}, expected a list of modules")
    return values


def write_modules(folder: Path, width: int, pooling: str, normalize: bool, longest: int) -> None:
    """Write the files of ``sentence-transformers`` beside those of an encoder.

    Args:
        folder: of the encoder.
        width: of its states.
        pooling: ours: ``first`` or ``mean``.
        normalize: whether vectors are divided by their length.
        longest: tokens of a text that are read.
    """
    names = ["Transformer", "Pooling", "Normalize"][: 3 if normalize else 2]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{name}" if number else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for number, name in enumerate(names)
    ]
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    (folder / MODULES_FILE).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            **{f"pooling_mode_{mode}": _POOLINGS.get(mode) == pooling for mode in modes},
        },
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
