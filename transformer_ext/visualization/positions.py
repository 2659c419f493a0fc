"""Positional encoding (paper section 3.5): the table as a map, and some of its columns as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from transformer_ext.visualization.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LAYOUTS", "draw_positions", "position_table"]

#: layout -> what stands in it
LAYOUTS = {
    "sinusoidal": "sine and cosine in turn (the paper)",
    "sinusoidal_halves": "all sines, then all cosines (the layout of Tensor2Tensor and Marian)",
}


def position_table(length: int, d_model: int, layout: str = "sinusoidal") -> NDArray[np.float32]:
    """What is added to the embeddings: ``[length, d_model]``.

    Args:
        length: positions, from 0.
        d_model: width of the model, even.
        layout: one of :data:`LAYOUTS`.

    Raises:
        ValueError: an unknown layout, or sizes that there is no table of.
    """
    from transformer_ext.ops import sinusoidal_positions

    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if length < 1:
        raise ValueError(f"length: got {length}, expected at least 1")
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model: got {d_model}, expected an even number above 0")
    table: NDArray[np.float32] = sinusoidal_positions(
        length, d_model, halves=layout == "sinusoidal_halves"
    ).numpy()
    return table


def draw_positions(
    length: int = 20,
    d_model: int = 512,
    *,
    curve_length: int = 100,
    curve_d_model: int = 20,
    dimensions: Sequence[int] = (4, 5, 6, 7),
) -> Figure:
    """The map in both layouts, and below it columns as curves over more positions.

    Args:
        length, d_model: size of the map.
        curve_length: positions of the curves.
        curve_d_model: width of the model whose columns they are; a small one shows more waves.
        dimensions: which columns, from 0.

    Raises:
        ValueError: impossible sizes, or a column that is not there.
    """
    maps = {layout: position_table(length, d_model, layout) for layout in LAYOUTS}
    columns = position_table(curve_length, curve_d_model)
    for dimension in dimensions:
        if not 0 <= dimension < curve_d_model:
            raise ValueError(f"dimension: got {dimension}, expected 0 to {curve_d_model - 1}")
    figure = new_figure(9.5, 8.0)
    *upper, curves = figure.subplots(3, 1)
    for axes, (layout, table) in zip(upper, maps.items(), strict=True):
        image = axes.imshow(
            table, vmin=-1.0, vmax=1.0, cmap="RdBu_r", aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"{layout}: {LAYOUTS[layout]}", fontsize=10)
        axes.set_xlabel(f"dimension (of {d_model})")
        axes.set_ylabel("position")
    figure.colorbar(image, ax=list(upper), shrink=0.7, pad=0.01, label="value")
    for dimension in dimensions:
        curves.plot(columns[:, dimension], label=f"dimension {dimension}")
    curves.set_title(f"columns of the table of the paper, d_model {curve_d_model}", fontsize=10)
    curves.set_xlabel("position")
    curves.set_ylabel("value")
    curves.set_ylim(-1.1, 1.6)
    curves.grid(alpha=0.3)
    curves.legend(loc="upper center", ncols=len(dimensions), fontsize=9)
    return figure
