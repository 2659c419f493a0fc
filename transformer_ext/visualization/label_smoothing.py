"""Label smoothing (paper section 5.4): the targets, and the loss of a model that is ever surer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from transformer_ext.training.sizing import Recipe
from transformer_ext.visualization.figure import SMALL_TEXT, WEIGHT_COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CURVES", "confidence_curve", "draw_label_smoothing", "smoothed_targets"]

#: Of the curves: none, that of a training, and more than one would take.
CURVES = (0.0, Recipe.label_smoothing, 0.3)
#: Tokens of the map, and of the curves.
_COLUMNS, _LARGEST = 10, 256_000


def smoothed_targets(
    targets: Sequence[int], vocab_size: int, label_smoothing: float, pad_id: int | None = 0
) -> NDArray[np.float32]:
    """The distribution that each position is trained towards: ``[positions, vocab_size]``.

    A position of padding counts for nothing: its row is 0.

    Args:
        targets: token ids.
        vocab_size: size of the vocabulary.
        label_smoothing: share that is spread over the whole vocabulary.
        pad_id: id of the padding; None: none.
    """
    ids = np.asarray(targets, dtype=np.int64)
    rows = np.full((len(ids), vocab_size), label_smoothing / vocab_size, dtype=np.float32)
    rows[np.arange(len(ids)), ids] += 1.0 - label_smoothing
    rows[ids == pad_id] = 0.0
    return rows


def confidence_curve(
    odds: Sequence[float], vocab_size: int, label_smoothing: float
) -> NDArray[np.float64]:
    """The loss of a model that is right, by how sure it is of that.

    Args:
        odds: how much more probable than each other token the right one is.
        vocab_size: size of the vocabulary.
        label_smoothing: as the loss has it.
    """
    import torch

    from transformer_ext.ops import label_smoothing_loss

    # The logits: 0 for each other token, the logarithm of the odds for the right one.
    logits = torch.zeros(len(odds), vocab_size)
    logits[:, 0] = torch.tensor(list(odds)).log()
    target = torch.zeros(1, dtype=torch.int64)
    losses = [
        label_smoothing_loss(row[None], target, label_smoothing=label_smoothing, ignore_index=-1)
        for row in logits
    ]
    return np.array([float(loss.loss) for loss in losses])


def draw_label_smoothing(
    label_smoothing: float = Recipe.label_smoothing,
    targets: Sequence[int] | None = None,
    vocab_size: int = 5,
    curves: Sequence[float] = CURVES,
) -> Figure:
    """The targets as a map with their numbers, and beside it the curves of over-confidence.

    Args:
        label_smoothing: of the map; a training's default.
        targets: token ids of the map; 0 is padding; None: some that there are.
        vocab_size: of both; the map has the first tokens of a larger one.
        curves: values of label smoothing, a curve each.

    Raises:
        ValueError: a number out of its range.
    """
    for value in (label_smoothing, *curves):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"label_smoothing: got {value}, expected a number from 0 to 1")
    if not 2 <= vocab_size <= _LARGEST:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 2 to {_LARGEST}")
    shown = min(vocab_size, _COLUMNS)
    if targets is None:
        targets = [min(target, vocab_size - 1) for target in (2, 1, 0, 3, 3)]
    for target in targets:
        if not 0 <= target < shown:
            raise ValueError(f"target: got {target}, expected 0 to {shown - 1}")
    table = smoothed_targets(targets, vocab_size, label_smoothing)[:, :shown]
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2)
    image = left.imshow(table, vmin=0.0, vmax=1.0, cmap=WEIGHT_COLORS)
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value > 0.6 else "black"
        text = f"{value:.2f}" if value == 0.0 or value >= 0.005 else f"{value:.0e}"
        left.text(column, row, text, ha="center", va="center", color=color, fontsize=SMALL_TEXT)
    names = [f"{target} (padding)" if target == 0 else f"{target}" for target in targets]
    left.set_yticks(range(len(targets)), names)
    left.set_xticks(range(shown))
    left.set_ylabel("right token of each position")
    few = "" if shown == vocab_size else f" (the first {shown} of {vocab_size:,})"
    left.set_xlabel(f"token of the vocabulary{few}")
    left.set_title(f"targets with label smoothing {label_smoothing:g}", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.8, label="probability")
    # With much smoothing the least loss is where the odds are near the number of tokens.
    odds = np.geomspace(1.0, max(1e4, 1e3 * vocab_size), 100)
    for value in curves:
        losses = confidence_curve(list(odds), vocab_size, value)
        right.semilogx(odds, losses, label=f"label smoothing {value:g}")
    right.set_title(f"loss of a model that is right, vocabulary of {vocab_size:,}", fontsize=10)
    right.set_xlabel("odds of the right token against each other one")
    right.set_ylabel("loss, nats")
    right.set_ylim(bottom=0.0)
    right.grid(alpha=0.3)
    right.legend()
    return figure
