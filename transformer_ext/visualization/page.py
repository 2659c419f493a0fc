"""Attention as an interactive page: one HTML file that needs no network and no library."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext.files import atomic_write, write_error
from transformer_ext.visualization.attention import AttentionMap
from transformer_ext.visualization.figure import check_output

__all__ = ["attention_page", "page_data", "save_attention_page"]

#: Each is a byte in the browser's memory; it takes as long to draw them.
_MOST_WEIGHTS = 32_000_000

#: What the kinds are called in the choice of the page.
_NAMES = {
    "cross": "translation to source",
    "encoder": "encoder to itself",
    "decoder": "decoder to itself",
}


def page_data(
    maps: Mapping[str, AttentionMap],
    *,
    title: str,
    texts: Sequence[str] = (),
    special: Collection[str] = (),
) -> dict[str, Any]:
    """What the page is drawn from, as it stands in it.

    Weights are rounded to 1/255, a byte each: [layers, heads, rows, columns], deflated (RFC 1950)
    and then base64.

    Args:
        maps: by kind, as they are to be offered.
        title: of the page.
        texts: that stand below it, source and translation.
        special: pieces that stand for no text, drawn more quietly.

    Raises:
        ValueError: no map, or more weights than a browser shows with ease.
    """
    if not maps:
        raise ValueError("maps: got none, the model has no layer to look at")
    count = sum(found.weights.size for found in maps.values())
    if count > _MOST_WEIGHTS:
        longest = max(max(found.weights.shape[2:]) for found in maps.values())
        raise ValueError(
            f"page: would hold {count:,} weights, expected at most {_MOST_WEIGHTS:,}; give a text of "
            f"fewer pieces (it has {longest:,}), or draw some layers and heads as a picture"
        )
    return {
        "title": title,
        "texts": list(texts),
        "maps": [
            {
                "name": _NAMES.get(kind, kind),
                "title": found.title,
                "rows": [[piece, piece in special] for piece in found.rows],
                "columns": [[piece, piece in special] for piece in found.columns],
                "layers": found.weights.shape[0],
                "heads": found.weights.shape[1],
                "weights": base64.b64encode(
                    zlib.compress(
                        np.rint(255.0 * found.weights.clip(0.0, 1.0)).astype(np.uint8).tobytes(), 9
                    )
                ).decode("ascii"),
            }
            for kind, found in maps.items()
        ],
    }


def attention_page(data: Mapping[str, Any]) -> str:
    """The page as HTML."""
    template = Path(__file__).with_name("attention_page.html").read_text(encoding="utf-8")
    # Inside of a script element only "<" could end it or begin a comment.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    # A lone surrogate, which no piece should have, is not UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    before, after = template.split("__DATA__")
    return before + text + after


def save_attention_page(data: Mapping[str, Any], output: str | os.PathLike[str]) -> None:
    """Writes the page; all of it or nothing.

    Raises:
        ValueError: the output is no .html file, or its folder is not there.
        OSError: the file cannot be written.
    """
    path = check_output(output, (".html",))
    try:
        atomic_write(path, attention_page(data))
    except OSError as error:
        raise write_error(path, error) from error
