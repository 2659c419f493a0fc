"""Pictures of what a trained model attends to.

``python -m transformer_ext.visualize MODEL --source "Click the button." --output attention.png``
translates the sentence and draws, for each layer and head, how much each target piece attends to
each source piece (``--kind cross``), or the self-attention of either side.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_picture", "draw_attention", "main", "new_figure"]

#: kind -> name of its attentions in a trace of the model
KINDS = {
    "cross": "decoder.layers.{}.cross_attention",
    "encoder": "encoder.layers.{}.self_attention",
    "decoder": "decoder.layers.{}.self_attention",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, drawn without a display.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}); install it: pip install matplotlib"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_attention(
    weights: Sequence[np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    layer_names: Sequence[str] | None = None,
) -> Figure:
    """One panel for each layer (down) and head (across).

    Args:
        weights: For each layer ``[heads, rows, columns]``, in [0, 1].
        rows: What attends: a label for each query.
        columns: What is attended to: a label for each key.
        title: Above everything.
        layer_names: One for each layer; numbers from 1 by default.

    Raises:
        ValueError: No layer, or weights of another shape than the labels.
    """
    if not weights:
        raise ValueError("weights: got none, expected one array for each layer")
    for array in weights:
        if array.ndim != 3 or array.shape[1:] != (len(rows), len(columns)):
            raise ValueError(
                f"weights: got shape {tuple(array.shape)}, expected (heads, {len(rows)}, "
                f"{len(columns)}) for {len(rows)} rows and {len(columns)} columns"
            )
    heads = max(array.shape[0] for array in weights)
    names = list(layer_names or (f"layer {i + 1}" for i in range(len(weights))))
    panel = max(2.0, 0.17 * max(len(rows), len(columns)) + 0.8)
    figure = new_figure(panel * heads + 1.0, panel * len(weights) + 0.8)
    grid = figure.subplots(len(weights), heads, squeeze=False)
    # A piece of SentencePiece begins a word with U+2581, which many fonts lack.
    row_labels, column_labels = (
        [t.replace("\u2581", "_") for t in side] for side in (rows, columns)
    )
    for layer, array in enumerate(weights):
        for head in range(heads):
            axes = grid[layer][head]
            if head >= array.shape[0]:
                axes.axis("off")
                continue
            image = axes.imshow(array[head], vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            axes.set_title(f"{names[layer]}, head {head + 1}", fontsize=8)
            axes.set_yticks(range(len(rows)), row_labels if head == 0 else [], fontsize=6)
            bottom = layer == len(weights) - 1
            axes.set_xticks(
                range(len(columns)), column_labels if bottom else [], fontsize=6, rotation=90
            )
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def attention_picture(
    model: Any,
    source_ids: Sequence[int],
    target_ids: Sequence[int],
    source_pieces: Sequence[str],
    target_pieces: Sequence[str],
    output: str | os.PathLike[str],
    *,
    kind: str = "cross",
    layers: Sequence[int] | None = None,
) -> None:
    """Draws the attention of a model for one sentence pair into a picture file.

    Args:
        model: A :class:`transformer_ext.model.Transformer`.
        source_ids: Source with end-of-sentence.
        target_ids: Decoder input: start token and target.
        source_pieces: A label for each source id.
        target_pieces: A label for each decoder position; for cross-attention the piece predicted
            there reads best.
        output: PNG, PDF or SVG file, by its ending.
        kind: "cross", "encoder" or "decoder".
        layers: Which layers, by index; all by default.

    Raises:
        ValueError: An unknown kind, a layer that the model has not, or labels that do not fit.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    device = next(model.parameters()).device
    found = model.trace(
        torch.tensor([list(source_ids)], device=device),
        torch.tensor([list(target_ids)], device=device),
    ).attentions
    stack = "encoder" if kind == "encoder" else "decoder"
    count = getattr(model.config, f"num_{stack}_layers")
    chosen = list(range(count)) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layer: got {layer + 1}, expected 1 to {count} ({stack})")
    arrays = [found[KINDS[kind].format(layer)].weights[0].float().cpu().numpy() for layer in chosen]
    rows = source_pieces if kind == "encoder" else target_pieces
    columns = target_pieces if kind == "decoder" else source_pieces
    figure = draw_attention(
        arrays,
        rows,
        columns,
        title={
            "cross": "What each target piece (row) attends to in the source (columns)",
            "encoder": "Self-attention of the encoder",
            "decoder": "Self-attention of the decoder",
        }[kind],
        layer_names=[f"layer {layer + 1}" for layer in chosen],
    )
    figure.savefig(os.fspath(output))


def load_model(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model in a model directory as a torch module in evaluation mode, and what lies beside it.

    Returns:
        (:class:`transformer_ext.model.Transformer`, :class:`transformer_ext.files.ModelDir`).
    """
    from transformer_ext.files import load_model_dir
    from transformer_ext.model import Transformer

    saved = load_model_dir(Path(folder))
    return Transformer(saved.config).load_weights(saved.weights).eval(), saved


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = ArgumentParser(
        prog="python -m transformer_ext.visualize",
        usage="%(prog)s MODEL_DIR --source TEXT [options]",
        description="Draw what a model attends to while it translates a sentence.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument("--source", required=True, metavar="TEXT", help="the sentence to translate")
    parser.add_argument(
        "--target", metavar="TEXT", help="a translation to look at (default: the model's own)"
    )
    parser.add_argument(
        "--kind",
        choices=list(KINDS),
        default="cross",
        help="cross: target to source; encoder, decoder: self-attention (default: %(default)s)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        action="append",
        metavar="N",
        help="layer to draw, from 1; may be given again (default: all)",
    )
    parser.add_argument(
        "--output",
        default="attention.png",
        metavar="FILE",
        help="picture to write: .png, .pdf or .svg (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    target = _draw(options)
    print(f"{options.source}\n{target}\ndrawn into {options.output}")
    return 0


def _draw(options: argparse.Namespace) -> str:
    """Draws what the command was asked for; returns the translation looked at."""
    from transformer_ext.inference.search import beam_search

    model, saved = load_model(options.model)
    source_tokenizer, target_tokenizer = saved.source_tokenizer, saved.target_tokenizer
    source_ids = [*source_tokenizer.encode(options.source), source_tokenizer.eos_id]
    if options.target is None:
        target_ids = beam_search(model, [source_ids])[0].hypotheses[0].tokens
    else:
        target_ids = target_tokenizer.encode(options.target)
    attention_picture(
        model,
        source_ids,
        [saved.config.decoder_start_id, *target_ids],
        source_tokenizer.pieces(source_ids),
        target_tokenizer.pieces([*target_ids, target_tokenizer.eos_id]),
        options.output,
        kind=options.kind,
        layers=None if options.layer is None else [layer - 1 for layer in options.layer],
    )
    text: str = target_tokenizer.decode(target_ids)
    return text


if __name__ == "__main__":
    sys.exit(main())
