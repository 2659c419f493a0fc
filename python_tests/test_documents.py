"""The Python of the documentation runs and prints what the pages say; links lead somewhere."""

from __future__ import annotations

import codeop
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module
    spec.loader.exec_module(module)
    return module


pages = _load_pages()
DOCUMENTS = [*pages.pages(), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]
#: Their code opens models that the reader has trained.
NEED_A_MODEL = {"tasks.md"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "path",
    [p for p in pages.pages() if p.name not in NEED_A_MODEL and pages.read_page(p).blocks],
    ids=_name,
)
def test_code_of_a_page_prints_and_draws_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = pages.read_page(path)
    pages.run_page(page, tmp_path)
    assert not pages.differences(page, tmp_path)
    _check_pictures(page, tmp_path)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if pages.read_page(p).blocks], ids=_name)
def test_blocks_can_be_pasted_into_the_prompt_of_python(path):
    for block in pages.read_page(path).blocks:
        entered: list[str] = []
        for number, line in enumerate([*block.code.splitlines(), ""], block.line):
            entered.append(line)
            try:
                statement = codeop.compile_command("\n".join(entered), symbol="single")
            except SyntaxError as error:
                pytest.fail(
                    f"{_name(path)}:{number}: {error.msg}; the prompt needs an empty line behind "
                    "a loop, function or class, and none within it"
                )
            if statement is not None:
                entered = []
        assert not "".join(entered).strip(), f"{_name(path)}:{block.line}: unfinished: {entered}"


def _check_pictures(page, folder: Path) -> None:
    """The pictures of the repository are of the same kind as those drawn now."""
    from matplotlib.image import imread

    for picture in page.pictures:
        kept, drawn = imread(page.path.parent / picture), imread(folder / picture)
        assert drawn.std() > 0.01, f"{picture} is empty"
        # Fonts differ between versions of matplotlib, and with them the layout a little.
        assert abs(kept.mean() - drawn.mean()) < 0.05, f"{picture} has changed: draw it anew"


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_of_a_page_lead_to_files_and_headings_that_are_there(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{_name(path)}: {target} is not there"
        if heading:
            assert heading in _anchors(linked), f"{_name(path)}: {target} has no such heading"


def _anchors(path: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", path.read_text(encoding="utf-8"), flags=re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_a_page_that_prints_something_else_is_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nprint('a', 0.125, 3)\n```\n\n```text\na 0.126 3\n```\n"
        "```python\nprint('b', 0.125)\n```\n\n```text\nb 0.127\n```\n"
        "```python\nprint('c', 3)\n```\n\n```text\nc 4\n```\n"
        "```python\nprint('d', 3)\n```\n\n```text measured\nd 4\n```\n"
        "```python\nprint('e', 3)\n```\n\n```text measured\nx 3\n```\n"
        "```python\nprint('f')\n```\n\nText.\n\n```text\nnot its output\n```\n"
        "![f](pictures/f.png)\n"
    )
    page = pages.read_page(path)
    pages.run_page(page, tmp_path)
    found = [message.splitlines()[-1] for message in pages.differences(page, tmp_path)]
    assert [f.rpartition(": ")[2] for f in found] == [
        "b 0.125",
        "c 3",
        "e 3",
        "prints what the page does not show",
        "pictures/f.png is shown, but not drawn",
    ]


def test_an_error_in_a_page_names_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Page\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        pages.run_page(pages.read_page(path), tmp_path)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(path), 5)


def test_reference_has_every_op_option_and_command(tmp_path, monkeypatch):
    """Written from the package; the site is built from it by sphinx in .ci/run."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reference

    from transformer_ext import ops
    from transformer_ext.__main__ import available
    from transformer_ext.config import TrainConfig, options
    from transformer_ext.inference.options import SearchOptions

    reference.write(tmp_path / "reference")

    def page(name: str) -> str:
        return (tmp_path / "reference" / f"{name}.md").read_text(encoding="utf-8")

    documented = page("ops")
    for name in ops.__all__:
        assert f"::{name}\n" in documented, name
    for entry in [*options(TrainConfig), *options(SearchOptions)]:
        assert f"| `{entry.key}` |" in page("options")
    for command in available():
        found = page(f"commands/{command}")
        for action in reference.parser_of(command)._actions:
            for flag in action.option_strings:
                assert f"`{flag}`" in found, (command, flag)
    assert "`--head`" in page("commands/visualize")
