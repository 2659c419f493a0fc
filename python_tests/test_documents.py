"""The Python of the documentation runs and prints what the pages say; links lead somewhere."""

from __future__ import annotations

import argparse
import codeop
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from decoding_helpers import SENTENCES, save_random_model
from huggingface_helpers import write_bert_dir

import transformer_ext
from transformer_ext import LanguageModel, TextEncoder
from transformer_ext.data import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import save_model_dir

ROOT = Path(__file__).resolve().parent.parent


def _load_pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module
    spec.loader.exec_module(module)
    return module


pages = _load_pages()
DOCUMENTS = [*pages.pages(), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]


def _translation_model(folder: Path) -> None:
    save_random_model(folder, sentences=SENTENCES)


def _masked_bert(folder: Path) -> None:
    write_bert_dir(folder, "BertForMaskedLM")


def _save_small(folder: Path, kind: type, **fields) -> None:
    tokenizer_file = folder.parent / f"{folder.parent.name}.model"
    folder.parent.mkdir(parents=True)
    tokenizer_file.write_bytes(train_tokenizer(SENTENCES, vocab_size=330)[0])
    tokenizer = SentencePieceTokenizer(tokenizer_file)
    model = kind(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        nhead=4,
        num_layers=1,
        dim_feedforward=64,
        **fields,
    )
    save_model_dir(folder, model.config, model.state_dict(), tokenizer, tokenizer, {})


def _language_model(folder: Path) -> None:
    _save_small(folder, LanguageModel)


def _classifier(folder: Path) -> None:
    _save_small(folder, TextEncoder, labels=["other", "translation"])


#: Page -> the folders that its reader has by then, with small models of random weights for them.
STAND_INS = {
    "README.md": {"runs/001/model": _translation_model, "bert-base-uncased": _masked_bert},
    "tasks.md": {"language-model/model": _language_model, "classifier/model": _classifier},
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if pages.read_page(p).blocks], ids=_name)
def test_code_of_a_page_prints_and_draws_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = pages.read_page(path)
    stand_ins = STAND_INS.get(path.name, {})
    for name, make in stand_ins.items():
        make(tmp_path / name)
    pages.run_page(page, tmp_path)
    # What a model of random weights prints is not shown.
    unseen = "prints what the page does not show" if stand_ins else None
    found = pages.differences(page, tmp_path)
    assert not [line for line in found if unseen is None or not line.endswith(unseen)]
    assert all(block.printed.strip() for block in page.blocks if "\nprint(" in f"\n{block.code}")
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


def _grid(picture):
    """Means over 24 x 24 fields."""
    fields = picture[..., :3]
    for axis in (0, 1):
        ends = np.linspace(0, picture.shape[axis], 25).astype(int)
        counts = np.expand_dims(np.diff(ends), (1 - axis, 2))
        fields = np.add.reduceat(fields, ends[:-1], axis=axis) / counts
    return fields


def _alike(one, other) -> bool:
    """Whether two pictures are of the same things.

    Fonts differ between machines, and with them the layout a little. The nearest two of the
    guide's pictures differ by 0.0197.
    """
    sizes = zip(one.shape[:2], other.shape[:2], strict=True)
    return all(abs(a - b) <= 8 for a, b in sizes) and bool(
        np.abs(_grid(one) - _grid(other)).mean() < 0.01
    )


def _check_pictures(page, folder: Path) -> None:
    """The pictures of the repository are of the same kind as those drawn now."""
    from matplotlib.image import imread

    for picture in page.pictures:
        kept, drawn = imread(page.path.parent / picture), imread(folder / picture)
        assert drawn.std() > 0.01, f"{picture} is empty"
        assert _alike(kept, drawn), f"{picture} has changed: draw it anew"


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
        "```python\nimport torch\n\nif True:\n    one, two = torch.zeros(2, 3)  # [3] each\n"
        "    one, two = torch.zeros(2, 3)  # [2] each\n"
        "wide = torch.zeros(2, 3)  # of both, [2, n]\nwide = torch.zeros(2)  # [2, n]: no more\n\n"
        "def inner():\n    low = torch.zeros(1)  # [7]\n\ninner()\n```\n"
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
        "one is [3], not [2]",
        "two is [3], not [2]",
        "wide is [2], not [2, n]",
        "low is [1], not [7]",
        "pictures/f.png is shown, but not drawn",
    ]


def test_a_page_is_written_whole_or_not_at_all(tmp_path, capsys):
    path, undrawn, unclosed = (tmp_path / f"{name}.md" for name in ("page", "undrawn", "unclosed"))
    text = "```python\nprint('a', 2)\n```\n\n```text\nb 1\n```\n\n"
    text += "```python\nprint('c', 4)\n```\n\n```text measured\nc 3\n```\n"
    path.write_text(text)
    undrawn.write_text(f"{text}\n![f](pictures/f.png)\n")
    unclosed.write_text("```python\n")
    files = [str(file) for file in (tmp_path / "nope.md", undrawn, unclosed, path)]
    assert pages.main([*files, "--write"]) == 1
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-3:] == [
        f"{tmp_path / 'nope.md'}: No such file or directory",
        f"{undrawn}: pictures/f.png is shown, but not drawn",
        f"{unclosed}:1: a block is not closed",
    ]
    assert undrawn.read_text() == f"{text}\n![f](pictures/f.png)\n"
    assert path.read_text() == text.replace("b 1", "a 2")
    assert pages.main([str(path), "--write", "--measure"]) == 0
    assert path.read_text() == text.replace("b 1", "a 2").replace("c 3", "c 4")
    for options in (["--measure"], ["--execute"], ["--write", "--notebook", "."]):
        with pytest.raises(SystemExit) as refused:
            pages.main([*files, *options])
        assert refused.value.code == 2
        assert f"error: {options[0]}: expected" in capsys.readouterr().err


def test_an_error_in_a_page_names_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Page\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        pages.run_page(pages.read_page(path), tmp_path)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(path), 5)


@pytest.mark.parametrize("path", [p for p in pages.pages() if pages.read_page(p).blocks], ids=_name)
def test_notebook_of_a_page_has_its_code_and_its_text(path):
    """What runs in it is what was tested here; Jupyter itself runs one in .ci/run."""
    page = pages.read_page(path)
    cells = pages.notebook(page)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in code] == [block.code for block in page.blocks]
    assert [bool(cell["outputs"]) for cell in code] == [b.output is not None for b in page.blocks]
    whole = "\n".join(
        cell["source"] + "".join(output["text"] for output in cell.get("outputs", ()))
        for cell in cells
    )
    fences = ("```python", "```text", "```", "<!--")
    kept = [x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith(fences)]
    assert [x for x in kept if x.strip() and x not in whole] == []


def _in_a_cell(text: str) -> str:
    return re.sub(r"([\\|*_<>\[\]$`])", r"\\\1", " ".join(text.split()))


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
        row = next(r for r in page("options").splitlines() if f"| `{entry.key}` |" in r)
        assert row.endswith(f" | {_in_a_cell(entry.description())} |"), row
    for command in available():
        found = page(f"commands/{command}")
        made = reference.parser_of(command)
        for action in made._actions:
            for flag in action.option_strings:
                assert f"`{flag}`" in found, (command, flag)
            if action.help not in (None, argparse.SUPPRESS):
                meaning = made._get_formatter()._expand_help(action)
                assert f" | {_in_a_cell(meaning)} |\n" in found, (command, action.dest)
    assert "`--head`" in page("commands/visualize")
    everything = "".join(page(name) for name in reference.PAGES)
    for name in transformer_ext.__all__:
        if inspect.isclass(value := getattr(transformer_ext, name)) or inspect.isfunction(value):
            assert f"::{name}\n" in everything, name


def test_links_of_the_site_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    """The site is checked so whenever it is built."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import links

    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.html").write_text('<h1 id="here">A</h1><a href="https://x.org/">out</a>')
    (tmp_path / "sub" / "b.html").write_text(
        '<a href="../a%20b.html#here"></a><a href="../a%20b.html#gone"></a><a href="#gone"></a>'
        '<a href="c.html"></a><img src="c.png"><script src="https://x.org/y.js"></script>'
    )
    assert [line.partition(": ")[2] for line in links.dead_links(tmp_path)] == [
        "https://x.org/y.js would be fetched from elsewhere",
        "../a%20b.html#gone: no such heading",
        "#gone: no such heading",
        "c.html: no such file",
        "c.png: no such file",
    ]


def test_files_that_pages_link_to_have_a_page_of_the_site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import links

    monkeypatch.setattr(links, "FILES", tmp_path / "docs" / "files")
    monkeypatch.setattr(links, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "docs").mkdir()
    (tmp_path / "kernel.cu").write_text("__global__ void kernel();\n")
    (tmp_path / "README.md").write_text("[a](docs/page.md#top), [b](kernel.cu), [c](docs)\n")
    page.write_text("[d](../README.md), [e](../kernel.cu), [f](#top), [g](https://x.org/y)\n")
    links.write([page])
    assert (tmp_path / "docs/files/README.md").read_text() == (
        "[a](../page.md#top), [b](kernel.cu.md), c\n"
    )
    assert "../../kernel.cu\n:language: cuda" in (tmp_path / "docs/files/kernel.cu.md").read_text()
    assert "README\nkernel.cu\n" in (tmp_path / "docs/files/index.md").read_text()
    assert links.inward(page.read_text(), page, page) == (
        "[d](files/README.md), [e](files/kernel.cu.md), [f](#top), [g](https://x.org/y)\n"
    )
