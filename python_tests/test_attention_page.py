"""The interactive page of attention: what stands in the file, and how it behaves in Chromium."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Page, browser, needs_chromium

from transformer_ext.visualization import page as page_module
from transformer_ext.visualization.attention import AttentionMap
from transformer_ext.visualization.page import attention_page, page_data, save_attention_page

EVIL = '</script><script>document.title="broken"</script>'
ROWS = ["\u2581Klick", "\u05e9\u05dc\u05d5\u05dd", "\u70b9\u51fb", "</s>"]
COLUMNS = ["\u2581Click", EVIL, "&amp;<b>", "\u2581it", "</s>"]


def maps() -> dict[str, AttentionMap]:
    generator = np.random.default_rng(0)
    cross = generator.dirichlet(np.full(5, 0.3), size=(2, 3, 4)).astype(np.float32)
    encoder = generator.dirichlet(np.ones(5), size=(1, 3, 5)).astype(np.float32)
    return {
        "cross": AttentionMap("across", ROWS, COLUMNS, cross),
        "encoder": AttentionMap("within", COLUMNS, COLUMNS, encoder),
    }


def embedded(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_file_holds_the_data() -> None:
    html = attention_page(page_data(maps(), title=EVIL, texts=["a", "b"], special={"</s>"}))
    data = embedded(html)
    assert data["title"] == EVIL and data["texts"] == ["a", "b"]
    cross, encoder = data["maps"]
    assert cross["rows"] == [[piece, piece == "</s>"] for piece in ROWS]
    assert encoder["columns"][1] == [EVIL, False]
    packed = base64.b64decode(cross["weights"])
    found = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(2, 3, 4, 5)
    np.testing.assert_allclose(found / 255, maps()["cross"].weights, atol=0.5 / 255 + 1e-6)


def test_a_piece_that_is_not_unicode(tmp_path: Path) -> None:
    found = {"encoder": AttentionMap("T", ["\ud800"], ["a"], np.ones((1, 1, 1, 1), np.float32))}
    save_attention_page(page_data(found, title="T"), tmp_path / "page.html")
    data = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert data["maps"][0]["rows"] == [["\ud800", False]]


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = attention_page(page_data(maps(), title="T"))
    assert "default-src 'none'" in html
    assert not re.search(r"\b(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest", html)
    addresses = set(re.findall(r"https?://[^\"' <]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language, not a place


def test_wrong_outputs_are_named(tmp_path: Path) -> None:
    data = page_data(maps(), title="T")
    with pytest.raises(ValueError, match=r"output: expected a file in \.html, got '.*x\.png'"):
        save_attention_page(data, tmp_path / "x.png")
    with pytest.raises(ValueError, match="output: .*nowhere is no folder"):
        save_attention_page(data, tmp_path / "nowhere" / "x.html")
    with pytest.raises(ValueError, match="maps: got none"):
        page_data({}, title="T")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(chromium: Page, tmp_path: Path) -> Iterator[Page]:
    """The page, freshly opened; it must have no error and ask for nothing at its end either."""
    data = page_data(maps(), title=EVIL, texts=["a", "b"], special={"</s>"})
    save_attention_page(data, tmp_path / "page.html")
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    chromium.open(tmp_path / "page.html")
    chromium.eval("ready")
    yield chromium
    chromium.eval("1")
    assert chromium.problems() == []


def token(side: str, index: int) -> str:
    return f".token[data-side={side}][data-index='{index}']"


def texts(page: Page, selector: str) -> list[str]:
    return page.eval(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


LINES = "document.querySelectorAll('#lines line').length"
SAID = "document.getElementById('said').textContent"


def shown(piece: str) -> str:
    """As the page has it."""
    return re.sub("^\u2581", "\u00b7", piece)


def said(page: Page) -> str:
    return re.sub("[\u2068\u2069]", "", page.eval(SAID))


@needs_chromium
def test_tokens_and_texts_are_shown_as_they_are(page: Page) -> None:
    assert page.eval("document.title") == "Attention"
    assert texts(page, "h1") == [EVIL]
    assert texts(page, "#rows .token") == ["\u00b7Klick", *ROWS[1:]]
    assert texts(page, "#columns .token") == ["\u00b7Click", EVIL, "&amp;<b>", "\u00b7it", "</s>"]
    assert texts(page, ".special") == ["</s>", "</s>"]
    assert texts(page, "#layer option") == ["1", "2"]
    assert texts(page, "#heads button") == ["1", "2", "3"]


@needs_chromium
def test_pointing_shows_what_is_attended_to(page: Page) -> None:
    weights = np.rint(255 * maps()["cross"].weights[0]) / 255
    assert page.eval(LINES) == (weights >= 0.04).sum()
    page.point(token("rows", 2))
    assert page.eval(LINES) == (weights[:, 2] >= 0.01).sum()
    mean = weights[:, 2].mean(0)
    shares = page.eval(
        "[...document.querySelectorAll('#columns .token')].map(e => +e.style.getPropertyValue('--share'))"
    )
    np.testing.assert_allclose(shares, mean, atol=1e-3)
    best = int(mean.argmax())
    assert said(page).startswith(
        f"{ROWS[2]} attends to {shown(COLUMNS[best])} {round(100 * mean[best])} %"
    )
    page.point(token("columns", 0))
    assert page.eval(LINES) == (weights[:, :, 0] >= 0.01).sum()
    assert said(page).startswith(f"{shown(COLUMNS[0])} is attended to by")
    page.point("h1")
    assert page.eval(LINES) == (weights >= 0.04).sum() and said(page) == ""


@needs_chromium
def test_a_line_joins_its_pieces_and_shows_its_weight(page: Page) -> None:
    middles = (
        "(side => [...document.querySelectorAll(`.token[data-side=${side}]`)].map(e => "
        "(b => b.top + b.height / 2)(e.getBoundingClientRect())))"
    )
    attributes = (
        "[...document.querySelectorAll('#lines line')].map(e => ['x1', 'x2', 'y1', 'y2', "
        "'stroke-opacity', 'stroke-width'].map(name => +e.getAttribute(name)))"
    )
    # The second of three heads: its lines are not moved aside.
    page.click("#heads button:nth-child(2)", shift=True)
    weights = np.rint(255 * maps()["cross"].weights[0, 1]) / 255
    for row, least in ((None, 0.04), (2, 0.01)):
        page.point("h1" if row is None else token("rows", row))
        wanted = [
            (i, j) for i, j in np.argwhere(weights >= least).tolist() if row is None or i == row
        ]
        tops, rows, columns = page.eval(
            f"(m => [document.getElementById('lines').getBoundingClientRect().top, m('rows'), "
            f"m('columns')])({middles})"
        )
        found = page.eval(attributes)
        assert len(found) == len(wanted) > 1
        for (i, j), (x1, x2, y1, y2, opacity, width) in zip(wanted, found, strict=True):
            value = weights[i, j]
            assert x1 < x2
            assert (y1, y2) == pytest.approx((rows[i] - tops, columns[j] - tops), abs=0.06)
            strength = 0.8 * value if row is None else 0.25 + 0.75 * value
            assert opacity == pytest.approx(strength, abs=6e-4)
            assert width == pytest.approx(2 if row is None else 1 + 2 * value, abs=6e-3)


@needs_chromium
def test_a_click_holds_a_piece(page: Page) -> None:
    page.click(token("rows", 2))
    page.point(token("columns", 0))
    assert said(page).startswith(f"{ROWS[2]} attends to")
    page.point("h1")
    assert said(page).startswith(f"{ROWS[2]} attends to")
    page.click(token("rows", 2))
    assert said(page) == ""
    page.point(token("columns", 0))
    assert said(page).startswith(f"{shown(COLUMNS[0])} is attended to by")


@needs_chromium
def test_heads_layers_and_kinds_are_chosen(page: Page) -> None:
    weights = np.rint(255 * maps()["cross"].weights) / 255
    page.click("#heads button:nth-child(2)")
    pressed = (
        "[...document.querySelectorAll('#heads button')].map(e => e.getAttribute('aria-pressed'))"
    )
    assert page.eval(pressed) == ["true", "false", "true"]
    assert page.eval(LINES) == (weights[0, [0, 2]] >= 0.04).sum()
    page.click("#heads button:nth-child(3)", shift=True)
    assert page.eval(pressed) == ["false", "false", "true"]
    strokes = page.eval("[...document.querySelectorAll('#lines line')].map(e => e.style.stroke)")
    assert len(set(strokes)) == 1
    page.click("#none")
    assert page.eval(LINES) == 0 and said(page) == "No head is chosen."
    page.click("#all")
    assert (
        len(
            set(page.eval("[...document.querySelectorAll('#lines line')].map(e => e.style.stroke)"))
        )
        == 3
    )
    select = "(s => {{ s.value = {}; s.dispatchEvent(new Event('change')) }})(document.getElementById('{}'))"
    page.eval(select.format(1, "layer"))
    assert page.eval(LINES) == (weights[1] >= 0.04).sum()
    page.eval(select.format(1, "map"))
    assert texts(page, "#layer option") == ["1"] and len(texts(page, "#rows .token")) == 5
    within = np.rint(255 * maps()["encoder"].weights[0]) / 255
    assert page.eval(LINES) == (within >= 0.04).sum()


@needs_chromium
def test_the_keyboard_is_enough(page: Page) -> None:
    focused = "(e => [e.dataset.side, +e.dataset.index])(document.activeElement)"
    names = []
    for _ in range(10):
        page.press("Tab")
        names.append(page.eval("document.activeElement.id || document.activeElement.className"))
        if "token" in names[-1]:
            break
    assert names[:2] == ["map", "layer"] and names[-3:-1] == ["all", "none"]
    assert page.eval(focused) == ["rows", 0]
    assert said(page).startswith(f"{shown(ROWS[0])} attends to")
    page.press("ArrowDown")
    assert page.eval(focused) == ["rows", 1]
    page.press("ArrowRight")
    page.press("End")
    assert page.eval(focused) == ["columns", 4] and said(page).startswith("</s> is attended to by")
    page.press("Home")
    assert page.eval(focused) == ["columns", 0]
    page.press("End")
    page.press("ArrowUp")
    assert page.eval(focused) == ["columns", 3]
    page.press("ArrowLeft")
    assert page.eval(focused) == ["rows", 1]
    page.press("Enter")
    page.point(token("columns", 0))
    assert said(page).startswith(f"{shown(ROWS[1])} attends to")
    page.press("Escape")
    assert said(page) == ""


@needs_chromium
def test_light_and_dark(page: Page) -> None:
    found = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.call("Emulation.setEmulatedMedia", features=features)
        found.append(
            page.eval("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        )
    page.call("Emulation.setEmulatedMedia", features=[])
    assert found[0] == ["rgb(255, 255, 255)", "rgb(31, 35, 40)"]
    assert found[1] == ["rgb(13, 17, 23)", "rgb(240, 246, 252)"]


@needs_chromium
def test_one_stack_and_more_lines_than_can_be_drawn(chromium: Page, tmp_path: Path) -> None:
    pieces = [f"p{i}" for i in range(20)]
    weights = np.full((1, 16, 20, 20), 0.05, np.float32)
    weights[0, 3, 7] = np.eye(20)[9]
    data = page_data({"decoder": AttentionMap("within", pieces, pieces, weights)}, title="T")
    save_attention_page(data, tmp_path / "page.html")
    chromium.open(tmp_path / "page.html")
    chromium.eval("ready")
    assert chromium.eval(LINES) == 5000
    assert texts(chromium, "#map option") == ["decoder to itself"]
    left_out = "document.getElementById('left-out').textContent"
    assert chromium.eval(left_out).startswith("The strongest 5000 of 6381 lines are drawn")
    assert (
        chromium.eval("document.querySelector('#lines line').getAttribute('stroke-opacity')")
        == "0.800"
    )
    chromium.click("#heads button:nth-child(4)", shift=True)
    chromium.point(token("rows", 7))
    assert chromium.eval(LINES) == 1 and said(chromium) == "p7 attends to p9 100 %"
    assert chromium.eval(left_out) == "" and chromium.problems() == []


def test_a_page_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_MOST_WEIGHTS", 100)
    with pytest.raises(
        ValueError, match="page: would hold 195 weights, expected at most 100; .* .it has 5.,"
    ):
        page_data(maps(), title="T")
