"""What the pictures have in common: figures without a display, fonts, labels, files."""

from __future__ import annotations

import io
import os
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_ext.files import atomic_write, check_writable, write_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FORMATS",
    "SIGNED_COLORS",
    "SMALL_TEXT",
    "WEIGHT_COLORS",
    "check_output",
    "new_figure",
    "piece_labels",
    "save_figure",
    "text_width",
]

FORMATS = (".png", ".svg", ".pdf")

#: Colour map of weights and probabilities, from 0 to 1: the more, the darker.
WEIGHT_COLORS = "Blues"
#: Colour map of numbers of both signs, 0 in the middle: white is 0, red above, blue below.
SIGNED_COLORS = "RdBu_r"
#: The least size of a text, in points.
SMALL_TEXT = 8.0

#: Tried in this order for the characters that the ones before lack. DejaVu comes with matplotlib.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)

#: In one picture; beyond this a PNG takes a gigabyte to draw and nobody reads it.
_MOST_INCHES = 300.0
_MOST_SQUARE_INCHES = 8_000.0


def new_figure(
    width: float, height: float, layout: Any = "constrained", advice: str = "choose fewer of them"
) -> Figure:
    """An empty figure of that many inches, drawn without a display.

    Args:
        width, height: in inches.
        layout: see matplotlib.
        advice: what to do about one that is too large.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
        ValueError: larger than anything that can be looked at.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}); install it: pip install matplotlib"
        ) from None
    if max(width, height) > _MOST_INCHES or width * height > _MOST_SQUARE_INCHES:
        raise ValueError(
            f"picture: would be {width:,.0f} x {height:,.0f} inches, expected at most "
            f"{_MOST_INCHES:.0f} a side and {_MOST_SQUARE_INCHES:,.0f} square inches; {advice}"
        )
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _usable_fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def check_output(output: str | os.PathLike[str], formats: Iterable[str] = FORMATS) -> Path:
    """The path of a picture that can be written, which is tried: a command does so before its work.

    Raises:
        ValueError: another ending, a folder that is not there, or a folder in its place.
        OSError: nothing can be written there.
    """
    path = Path(output)
    formats = tuple(formats)
    if path.suffix.lower() not in formats:
        raise ValueError(f"output: expected a file in {', '.join(formats)}, got {str(output)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"output: {path.parent} is no folder")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder, expected a file")
    try:
        check_writable(path)
    except OSError as error:
        raise ValueError(f"output: {path} cannot be written: {error.strerror or error}") from error
    return path


def save_figure(figure: Figure, output: str | os.PathLike[str], dpi: float = 100) -> None:
    """Writes a figure as PNG, SVG or PDF, by the file's ending; all of it or nothing.

    A character that no font has is drawn as a box, with one warning for all of them.

    Raises:
        ValueError: see :func:`check_output`.
        OSError: the file cannot be written.
    """
    import matplotlib

    path = check_output(output)
    content = io.BytesIO()
    kind = path.suffix.lower()[1:]
    # Without the date a picture drawn again is the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    settings: Any = {"font.family": _usable_fonts(), "svg.hashsalt": "transformer_ext"}
    with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in figure.findobj(matplotlib.text.Text):
            if "monospace" not in text.get_fontfamily():
                text.set_fontfamily(_usable_fonts())
        figure.savefig(content, format=kind, dpi=dpi, metadata=metadata)
    lost = [str(w.message) for w in caught if "missing from" in str(w.message)]
    for warning in caught:
        if "missing from" not in str(warning.message):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if lost:
        warnings.warn(
            f"{path}: no font here has some of the characters ({len(set(lost))}), which are drawn "
            "as boxes; fonts for all languages: fonts-noto, fonts-noto-cjk",
            stacklevel=2,
        )
    try:
        atomic_write(path, content.getvalue())
    except OSError as error:
        raise write_error(path, error) from error


def piece_labels(pieces: Iterable[str]) -> list[str]:
    """Pieces of text as labels: no line breaks, no blanks at their ends, nothing that matplotlib
    reads as a formula."""
    labels = []
    for piece in pieces:
        label = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
            for c in piece
        )
        label = label.replace("\u2581", "_").strip() or "_"
        labels.append(label.replace("$", r"\$"))
    return labels


def text_width(text: str) -> int:
    """Width of a text, in letters: those of East Asia count twice."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
