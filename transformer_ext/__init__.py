"""The Transformer of "Attention Is All You Need" and its family, on compiled C++ and CUDA ops.

Importing this package imports neither torch nor numpy; each name below is loaded when first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it.
_LAZY: dict[str, str] = {
    "TextEncoder": "transformer_ext.model.text_encoder",
    "TextEncoderConfig": "transformer_ext.model.config",
    "LanguageModel": "transformer_ext.model.language_model",
    "LanguageModelConfig": "transformer_ext.model.config",
    "SentenceEncoder": "transformer_ext.inference.sentence_encoder",
    "Packed": "transformer_ext.packed",
    "Transformer": "transformer_ext.model.transformer",
    "TransformerConfig": "transformer_ext.model.config",
    "Translator": "transformer_ext.inference.translator",
    "make_model": "transformer_ext.model.transformer",
    "pipeline": "transformer_ext.pipelines",
    "preset": "transformer_ext.model.config",
    "set_backend": "transformer_ext.ops._backend",
}

__all__ = ["__version__"]
__all__ += list(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
