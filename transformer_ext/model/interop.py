"""Weights from and to PyTorch's own ``nn.Transformer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transformer_ext.model.stacks import DecoderLayer, EncoderLayer
from transformer_ext.model.transformer import Transformer


def copy_nn_transformer(model: Transformer, source: nn.Transformer) -> None:
    """Copy the weights of an ``nn.Transformer`` into a model of the same sizes.

    ``nn.Transformer`` holds the two stacks only: embeddings and the output projection of ``model``
    stay as they are. It always normalises after each stack, so ``model`` needs ``final_norm=True``.

    Args:
        model: of the same d_model, heads, depths and norm order.
        source: the module to copy from.

    Raises:
        ValueError: the two are not of one architecture.
    """
    if model.encoder.norm is None or model.decoder.norm is None:
        raise ValueError("model: nn.Transformer has a norm after each stack; set final_norm=True")
    # Their layers are typed as bare modules: what is in them is known here only.
    encoder: Any = source.encoder
    decoder: Any = source.decoder
    for mine, others, name in (
        (model.encoder.layers, encoder.layers, "encoder"),
        (model.decoder.layers, decoder.layers, "decoder"),
    ):
        if len(mine) != len(others):
            raise ValueError(f"model: expected {len(others)} {name} layers, has {len(mine)}")
    config = model.config
    expected = {
        "d_model": source.d_model,
        "nhead": source.nhead,
        "num_kv_heads": source.nhead,
        "head_dim": source.d_model // source.nhead,
    }
    for other in (*encoder.layers, *decoder.layers):
        expected["norm_first"] = other.norm_first
        expected["dim_feedforward"] = other.linear1.out_features
        expected["bias"] = other.linear1.bias is not None
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"model: {field}: expected {value} as of nn.Transformer, got "
                f"{getattr(config, field)}"
            )
    with torch.no_grad():
        for layer, other in zip(model.encoder.layers, encoder.layers, strict=True):
            assert isinstance(layer, EncoderLayer)
            _copy_layer(layer, other)
        for layer, other in zip(model.decoder.layers, decoder.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            _copy_layer(layer, other)
            _copy_cross_attention(layer, other.multihead_attn)
            _copy(layer.cross_attention_norm, other.norm2)
        _copy(model.encoder.norm, encoder.norm)
        _copy(model.decoder.norm, decoder.norm)


def _copy(ours: nn.Module, theirs: Any) -> None:
    """Copy ``weight`` and ``bias``, whose names are the same in both."""
    ours.load_state_dict(theirs.state_dict())


def _copy_layer(ours: EncoderLayer | DecoderLayer, theirs: Any) -> None:
    attention = theirs.self_attn
    ours.self_attention.in_projection.load_state_dict(
        {"weight": attention.in_proj_weight, "bias": attention.in_proj_bias}
    )
    _copy(ours.self_attention.out_projection, attention.out_proj)
    _copy(ours.self_attention_norm, theirs.norm1)
    _copy(ours.feed_forward.in_projection, theirs.linear1)
    _copy(ours.feed_forward.out_projection, theirs.linear2)
    last_norm = theirs.norm3 if isinstance(ours, DecoderLayer) else theirs.norm2
    _copy(ours.feed_forward_norm, last_norm)


def _copy_cross_attention(ours: DecoderLayer, theirs: Any) -> None:
    width = theirs.embed_dim
    cross = ours.cross_attention
    cross.query_projection.load_state_dict(
        {"weight": theirs.in_proj_weight[:width], "bias": theirs.in_proj_bias[:width]}
    )
    cross.key_value_projection.load_state_dict(
        {"weight": theirs.in_proj_weight[width:], "bias": theirs.in_proj_bias[width:]}
    )
    _copy(cross.out_projection, theirs.out_proj)
