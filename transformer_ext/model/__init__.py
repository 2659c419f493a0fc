"""The models: configurations (without torch) and modules (with it, loaded when first asked for)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformer_ext.model.config import (
    PRESETS,
    LanguageModelConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    classifier_preset,
    language_model_preset,
    preset,
)

if TYPE_CHECKING:
    from transformer_ext.model.base import Model
    from transformer_ext.model.language_model import LanguageModel
    from transformer_ext.model.text_encoder import TextEncoder
    from transformer_ext.model.transformer import Transformer, make_model

__all__ = [
    "PRESETS",
    "TextEncoder",
    "TextEncoderConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Model",
    "ModelConfig",
    "Transformer",
    "TransformerConfig",
    "classifier_preset",
    "language_model_preset",
    "make_model",
    "preset",
]

_MODULES = {
    "TextEncoder": "text_encoder",
    "LanguageModel": "language_model",
    "Model": "base",
    "Transformer": "transformer",
    "make_model": "transformer",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
