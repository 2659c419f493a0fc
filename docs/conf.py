"""Settings of Sphinx: ``sphinx-build -W docs build/site`` makes the site (``pip install ".[docs]"``)."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import links  # noqa: E402
import pages  # noqa: E402
import reference  # noqa: E402
from docutils.nodes import SkipNode  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from sphinx.util import logging  # noqa: E402

from transformer_ext import __version__ as release  # noqa: E402

project = "transformer_ext"
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
# A block that does not name its language is what a terminal shows.
highlight_language = "text"
html_theme = "alabaster"
html_theme_options = {
    "page_width": "1240px",
    "body_max_width": "none",
    "description": "Transformers on compiled ops",
}
# Without a font that is made for formulas, a browser draws them badly: this one goes with the site.
FONT = resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
html_static_path = ["static", str(FONT)]
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


# What the converter leaves to the browser, which then takes these for operators between two things
# and a function for a variable.
_SPACING = [
    (re.compile("<mo>(&#x0221E;|&#x02202;)</mo>"), r"<mi mathvariant='normal'>\1</mi>"),
    (re.compile("(<mrow>)<mo>(&#x0003C;|&#x02212;)"), r'\1<mo lspace="0" rspace="0">\2'),
    (
        re.compile("(?<!<msub>)(?<!<msup>)(<mi>(?:log|sin|cos)</mi>)(?=<mi>)"),
        r'\1<mspace width="0.17em"/>',
    ),
    (re.compile("(<msub><mi>log</mi><mi>.</mi></msub>)(?=<mi>)"), r'\1<mspace width="0.17em"/>'),
]


def _mathml(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw themselves: no script, and nothing to fetch."""
    text = convert(latex, display=display)
    for pattern, replacement in _SPACING:
        text = pattern.sub(replacement, text)
    return text


def _visit_math(self: Any, node: Any) -> None:
    self.body.append(_mathml(node.astext(), "inline"))
    raise SkipNode


def _visit_math_block(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{_mathml(node.astext(), "block")}</div>')
    raise SkipNode


def _source_read(app: Any, name: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    # The reference is written with links as they should be.
    if not page.is_relative_to(DOCS / "reference"):
        source[0] = links.inward(source[0], page, page)


def _check(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        for link in links.dead_links(Path(app.outdir)):
            logging.getLogger(__name__).warning(link)


def setup(app: Any) -> None:
    reference.write(DOCS / "reference")
    links.write(pages.pages())
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.connect("source-read", _source_read)
    app.connect("build-finished", _check)
