"""The course of a training, from its ``log.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformer_ext.visualization.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_training", "training_curves"]

_LOSS = "negative log-likelihood a token, nats"
#: title of a panel -> what its numbers are, where the title does not say it
_AXES = {_LOSS: "nats", "validation": "score"}
#: field of a validation -> its name, and what makes a percentage of it
_SCORES = {
    "bleu": ("BLEU", 1.0),
    "chrf": ("chrF", 1.0),
    "macro_f1": ("macro-F1", 1.0),
    "exact": ("exactly right, %", 1.0),
    "accuracy": ("accuracy, %", 100.0),
}


def training_curves(
    events: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Panel -> curve -> (optimizer step, value); what was not measured is left out.

    Args:
        events: of a log, see :func:`transformer_ext.training.report.read_log`.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {
        _LOSS: {},
        "validation": {},
        "learning rate": {},
        "norm of the gradient": {},
    }
    loss, validation, rate, norm = panels.values()
    for event in events:
        kind = event.get("event")
        if kind == "train":
            found = [
                (loss, "training", "nll", 1.0),
                (rate, "learning rate", "learning_rate", 1.0),
                (norm, "before clipping", "gradient_norm", 1.0),
            ]
        elif kind == "validation":
            found = [(loss, "validation", "nll", 1.0)]
            found += [(validation, name, key, factor) for key, (name, factor) in _SCORES.items()]
        else:
            continue
        step = event.get("step")
        if not isinstance(step, int):
            continue
        for panel, name, key, factor in found:
            value = event.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                panel.setdefault(name, []).append((step, factor * value))
    return {title: curves for title, curves in panels.items() if curves}


def draw_training(events: Iterable[Mapping[str, Any]], title: str = "Training") -> Figure:
    """Loss, scores of the validations, learning rate and gradient norm against the steps.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    panels = training_curves(events) or {_LOSS: {}}
    rows = -(-len(panels) // 2)
    figure = new_figure(6.0 * min(2, len(panels)), 3.4 * rows + 0.4)
    grid = figure.subplots(rows, min(2, len(panels)), squeeze=False).flat
    for axes, (label, curves) in zip(grid, panels.items(), strict=False):
        for name, points in curves.items():
            few = "validation" in (label, name)
            axes.plot(*zip(*points, strict=True), "o-" if few else "-", markersize=3, label=name)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(_AXES.get(label, label))
        axes.grid(alpha=0.3)
        if len(curves) > 1 or label == "validation":
            axes.legend()
        if label in ("learning rate", "norm of the gradient"):
            axes.set_ylim(bottom=0.0)
    for axes in list(grid):
        axes.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure
