"""The model: configuration (without torch) and modules (with it, loaded when first asked for)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_ext.model.config import PRESETS, TransformerConfig, preset

if TYPE_CHECKING:
    from transformer_ext.model.transformer import Transformer, make_model

__all__ = ["PRESETS", "Transformer", "TransformerConfig", "make_model", "preset"]


def __getattr__(name: str) -> Any:
    if name in ("Transformer", "make_model"):
        from transformer_ext.model import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
