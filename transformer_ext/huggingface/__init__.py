"""Models from and to the directories of Hugging Face's ``transformers``, which is not needed for it.

Directories of BERT and GPT-2 are opened wherever a model directory is taken
(:func:`transformer_ext.files.load_model_dir`): what ``config.json`` says is taken over or refused by
name, weights are converted as they are asked for. :func:`from_huggingface` writes a model directory
of such a folder, and of one of MarianMT; :func:`to_huggingface` goes the other way.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_ext.huggingface.conversion import Conversion
    from transformer_ext.huggingface.convert import from_huggingface, to_huggingface
    from transformer_ext.huggingface.fields import HuggingFaceError

__all__ = ["Conversion", "HuggingFaceError", "from_huggingface", "to_huggingface"]

# Opening a folder needs none of them: each is loaded when first used.
_MODULES = {
    "Conversion": "conversion",
    "HuggingFaceError": "fields",
    "from_huggingface": "convert",
    "to_huggingface": "convert",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
