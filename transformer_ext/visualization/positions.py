"""Positional encoding (paper section 3.5): the table as a map, and some of its columns as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_ext.visualization.figure import SIGNED_COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LAYOUTS", "draw_positions", "position_table"]

#: layout -> what stands in it
LAYOUTS = {
    "sinusoidal": "sine and cosine in turn (the paper)",
    "sinusoidal_halves": "all sines, then all cosines (as in Sockeye)",
}

#: The dimensions of the third and the fourth frequency, sine and cosine of each, with d_model 20.
_TWO_WAVES = {"sinusoidal": (4, 5, 6, 7), "sinusoidal_halves": (2, 12, 3, 13)}
#: Beyond these a map is larger than a screen by far.
_LONGEST, _WIDEST = 4096, 8192


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
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> Figure:
    """The map in each layout, and below it columns of the first as curves over more positions.

    A cell of a map is a whole number of pixels in a PNG of the usual resolution: columns that
    alternate, drawn at any other width, would show stripes that are not in the table.

    Args:
        length, d_model: size of the maps.
        layouts: of :data:`LAYOUTS`, a map each.

    Raises:
        ValueError: impossible sizes, or an unknown layout.
    """
    if not layouts:
        raise ValueError(f"layouts: got none, expected some of {', '.join(LAYOUTS)}")
    for name, value, most in (("length", length, _LONGEST), ("d_model", d_model, _WIDEST)):
        if value > most:
            raise ValueError(
                f"{name}: got {value}, expected at most {most}: each is a pixel of the picture at least"
            )
    maps = {layout: position_table(length, d_model, layout) for layout in layouts}
    across, down = max(1, round(1024 / d_model)), max(1, round(200 / length))
    wide, tall = across * d_model, down * length
    # All in pixels, from the left and from below.
    left, right, above, below, curves_tall = 75, 145, 30, 52, 195
    full_tall = len(maps) * (above + tall + below) + above + curves_tall + below
    # Narrow maps leave the titles and curves their room.
    full_wide = left + max(wide, 760) + right
    figure = new_figure(full_wide / 100, full_tall / 100, layout=None)

    def panel(x: int, y: int, width: int, height: int, label: str = "") -> Any:
        place = (x / full_wide, y / full_tall, width / full_wide, height / full_tall)
        return figure.add_axes(place, label=label)

    y = full_tall
    for layout, table in maps.items():
        y -= above + tall
        axes = panel(left, y, wide, tall)
        # "none" leaves the cells to what shows an SVG or a PDF, instead of pixels made here.
        image = axes.imshow(
            table, vmin=-1.0, vmax=1.0, cmap=SIGNED_COLORS, aspect="auto", interpolation="none"
        )
        axes.set_title(f"{layout}: {LAYOUTS[layout]}", fontsize=10, loc="left")
        axes.set_xlabel(f"dimension (of {d_model:,})")
        axes.set_ylabel("position")
        for axis, count in ((axes.xaxis, d_model), (axes.yaxis, length)):
            axis.get_major_locator().set_params(integer=True)
            if count <= 8:
                axis.set_ticks(range(count))
        beside = panel(left + wide + 20, y, 18, tall, "<colorbar>")
        bar = figure.colorbar(image, cax=beside, label="value")
        bar.set_ticks([-1.0, -0.5, 0.0, 0.5, 1.0])
        y -= below
    y -= above + curves_tall
    curves = panel(left, y, max(wide, 760), curves_tall)
    first = layouts[0]
    # A narrow model has more waves in so few positions.
    columns = position_table(100, 20, first)
    for dimension in _TWO_WAVES[first]:
        curves.plot(columns[:, dimension], label=f"dimension {dimension}")
    curves.set_title(
        f"columns of {first} with d_model 20: two waves, as sine and as cosine",
        fontsize=10,
        loc="left",
    )
    curves.set_xlabel("position")
    curves.set_ylabel("value")
    curves.set_ylim(-1.1, 1.6)
    curves.grid(alpha=0.3)
    curves.legend(loc="upper center", ncols=4, fontsize=9)
    return figure
