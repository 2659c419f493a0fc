"""Settings of Sphinx: ``sphinx-build -W docs build/site`` makes the site (``pip install ".[docs]"``)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import reference  # noqa: E402

from transformer_ext import __version__ as release  # noqa: E402

project = "transformer_ext"
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "description": "Transformers on compiled ops"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}

myst_enable_extensions = ["dollarmath"]
# Anchors of headings, as GitHub makes them.
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# An attribute of a dataclass is described once: in the text of its class.
napoleon_use_ivar = True
napoleon_use_rtype = False

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def _outward_links(app: Any, name: str, source: list[str]) -> None:
    """Folders and other pages of the repository are no part of the site: such links become text.

    Files of code are copied to it.
    """

    def text_of(match: re.Match[str]) -> str:
        target = (Path(app.env.doc2path(name)).parent / match[2]).resolve()
        outside = not target.is_relative_to(DOCS)
        return match[1] if outside and (target.is_dir() or target.suffix == ".md") else match[0]

    source[0] = _LINK.sub(text_of, source[0])


def setup(app: Any) -> None:
    reference.write(DOCS / "reference")
    app.connect("source-read", _outward_links)
