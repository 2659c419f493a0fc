"""Attention by layer and head: what attends to what in one sentence, or in a sentence pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_ext.visualization.figure import (
    SMALL_TEXT,
    WEIGHT_COLORS,
    new_figure,
    piece_labels,
    text_width,
)
from transformer_ext.visualization.pieces import readable_pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transformer_ext.data.tokenizer import Tokenizer
    from transformer_ext.model import LanguageModel, TextEncoder, Transformer
    from transformer_ext.model.trace import Trace

__all__ = ["AttentionMap", "draw_attention", "of_kind", "text_attention", "translation_attention"]


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of one kind, of all layers.

    Attributes:
        title: what attends to what, for people.
        rows: what attends: a piece for each query.
        columns: what is attended to: a piece for each key.
        weights: ``[layers, heads, rows, columns]`` float32; each row adds up to 1.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.weights.shape
        if len(shape) != 4 or shape[2:] != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"weights: got {list(shape)}, expected [layers, heads, {len(self.rows)}, "
                f"{len(self.columns)}] for {len(self.rows)} rows and {len(self.columns)} columns"
            )


def translation_attention(
    model: Transformer,
    source_ids: Sequence[int],
    target_ids: Sequence[int],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
) -> dict[str, AttentionMap]:
    """What an encoder-decoder attends to while it translates a sentence.

    Args:
        model: the model.
        source_ids: token ids of the source, without its end.
        target_ids: token ids of the translation, without start and end.
        source_tokenizer, target_tokenizer: the model's.

    Returns:
        ``cross`` (a row is the piece that is written, its end of sentence the last), ``encoder``
        and ``decoder`` (rows and columns are the pieces read); without those of which the model
        has no layers.

    Raises:
        ValueError: an empty source, or what the model's ``trace`` refuses.
    """
    import torch

    if not source_ids:
        raise ValueError("source_ids: got none, expected at least one token")
    source = [*source_ids, source_tokenizer.eos_id]
    read = [model.config.decoder_start_id, *target_ids]
    device = next(model.parameters()).device
    trace = model.trace(torch.tensor([source], device=device), torch.tensor([read], device=device))
    source_pieces = readable_pieces(source_tokenizer, source)
    read_pieces = readable_pieces(target_tokenizer, read)
    written = readable_pieces(target_tokenizer, [*target_ids, target_tokenizer.eos_id])
    depths = {"encoder": len(model.encoder.layers), "decoder": len(model.decoder.layers)}
    found = {
        "cross": (
            "What each piece that is written attends to in the source",
            written,
            source_pieces,
            _weights(trace, "decoder.layers.{}.cross_attention", depths["decoder"]),
        ),
        "encoder": (
            "Self-attention of the encoder",
            source_pieces,
            source_pieces,
            _weights(trace, "encoder.layers.{}.self_attention", depths["encoder"]),
        ),
        "decoder": (
            "Self-attention of the decoder",
            read_pieces,
            read_pieces,
            _weights(trace, "decoder.layers.{}.self_attention", depths["decoder"]),
        ),
    }
    return {
        kind: AttentionMap(title, rows, columns, weights)
        for kind, (title, rows, columns, weights) in found.items()
        if weights is not None
    }


def text_attention(
    model: LanguageModel | TextEncoder, ids: Sequence[int], tokenizer: Tokenizer
) -> dict[str, AttentionMap]:
    """What a model of one stack attends to in a text.

    Args:
        model: a language model or a text encoder.
        ids: token ids of the text, without special tokens.
        tokenizer: the model's.

    Returns:
        one entry: ``decoder`` of a language model, ``encoder`` of a text encoder; none where it
        has no layers.

    Raises:
        ValueError: an empty text, or what the model's ``trace`` refuses.
    """
    import torch

    from transformer_ext.inference.shared import fed_tokens
    from transformer_ext.model import LanguageModel

    if not ids:
        raise ValueError("ids: got none, expected at least one token")
    if isinstance(model, LanguageModel):
        stack, name, layers = "decoder", "language model", model.decoder.layers
        read = fed_tokens(model.config, ids)
    else:
        stack, name, layers = "encoder", "text encoder", model.encoder.layers
        read = [model.config.bos_id, *ids, model.config.eos_id]
    device = next(model.parameters()).device
    lengths = torch.tensor([len(read)], device=device)
    trace = model.trace(torch.tensor([read], device=device), lengths)
    weights = _weights(trace, f"{stack}.layers.{{}}.self_attention", len(layers))
    if weights is None:
        return {}
    pieces = readable_pieces(tokenizer, read)
    title = f"Self-attention of the {name}"
    return {stack: AttentionMap(title, pieces, pieces, weights)}


def _weights(trace: Trace, name: str, depth: int) -> NDArray[np.float32] | None:
    """``[layers, heads, queries, keys]`` of the first sentence; None where there is no layer."""
    if not depth:
        return None
    layers = [trace.attentions[name.format(layer)].weights[0] for layer in range(depth)]
    return np.stack([layer.float().cpu().numpy() for layer in layers])


def of_kind(maps: Mapping[str, AttentionMap], kind: str) -> AttentionMap:
    """One of them.

    Raises:
        ValueError: there is none of that kind.
    """
    if kind not in maps:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(maps) or 'none'}")
    return maps[kind]


def _numbers(name: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    numbers = list(range(1, count + 1)) if wanted is None else list(wanted)
    for number in numbers:
        if not 1 <= number <= count:
            raise ValueError(f"{name}: got {number}, expected 1 to {count}")
    return numbers


def draw_attention(
    attention: AttentionMap,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """One panel for each layer (down) and head (across).

    Args:
        attention: what to draw.
        layers, heads: which of them, from 1; all if None.

    Raises:
        ValueError: a layer or head that is not there, or more than a picture can show.
    """
    layers = _numbers("layer", layers, attention.weights.shape[0])
    heads = _numbers("head", heads, attention.weights.shape[1])
    rows, columns = piece_labels(attention.rows), piece_labels(attention.columns)
    line = SMALL_TEXT * 1.25 / 72  # inches that a label takes
    letters = SMALL_TEXT * 0.62 / 72
    width = max(1.4, line * len(columns)) + 0.15
    height = max(1.0, line * len(rows)) + 0.3
    left = letters * max(map(text_width, rows)) + 0.5
    bottom = letters * max(map(text_width, columns)) + 0.5
    total = max(left + width * len(heads) + 1.2, 0.08 * len(attention.title) + 0.4)
    figure = new_figure(
        total,
        bottom + height * len(layers) + 0.6,
        advice="choose fewer layers or heads (--layer, --head), or a shorter text",
    )
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    for i, layer in enumerate(layers):
        for j, head in enumerate(heads):
            axes: Any = grid[i][j]
            weights = attention.weights[layer - 1, head - 1]
            # One scale for all panels, so that they can be compared.
            image = axes.imshow(weights, vmin=0.0, vmax=1.0, cmap=WEIGHT_COLORS, aspect="auto")
            axes.set_title(f"layer {layer}, head {head}", fontsize=SMALL_TEXT)
            axes.tick_params(length=0, pad=2)
            axes.set_yticks(range(len(rows)), rows if j == 0 else [], fontsize=SMALL_TEXT)
            axes.set_xticks(
                range(len(columns)),
                columns if i == len(layers) - 1 else [],
                fontsize=SMALL_TEXT,
                rotation=90,
            )
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3.0 / (height * len(layers))), pad=0.01)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=SMALL_TEXT)
    figure.supylabel("attends", fontsize=9)
    figure.supxlabel("is attended to", fontsize=9)
    figure.suptitle(attention.title, fontsize=10)
    return figure
