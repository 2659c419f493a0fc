"""Runs the Python code of the documentation.

The ``python`` blocks of a page are one program, run from top to bottom. A ``text`` block right
behind one of them is what that block prints. A comment ``# [2, 5]`` behind an assignment is the shape
of the tensor, of each where several names stand; it is looked at whenever the line has run, and
a word in it (``# [n, 5]``) is any size. What is printed is compared word by word: of numbers with a decimal
point the last digit may differ by one, as sums have another order on another machine. In a block
``text measured`` the numbers are times, or results of a training, which differ from machine to
machine: those are not compared, only the words around them.

A picture that a page shows from ``pictures/`` is drawn by the page, which makes that folder itself: a
page can be pasted into a prompt, block by block, in any folder. Python's own prompt ends a class or
a loop at its first empty line, and needs one behind it, which is why the blocks have them there;
``<!-- fmt: off -->`` before and ``<!-- fmt: on -->`` behind a block keep ruff from adding others.

    python docs/pages.py docs/guide/1-why-attention.md

runs a page in a temporary folder and says what differs. ``--write`` writes what was printed into the
page and the pictures beside it; measured numbers that are there stay, but for ``--measure``, which is
for a machine with nothing else to do.
``--notebook FOLDER`` makes a Jupyter notebook of each page; ``--execute`` runs those as Jupyter would
(``pip install nbclient ipykernel``).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Block", "Page", "differences", "notebook", "pages", "read_page", "run_page"]

FOLDER = Path(__file__).resolve().parent

_FENCE = re.compile(r"^```(\w*) *(.*)$")
_NUMBER = re.compile(r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?")
_SHAPE = re.compile(r"# (?:[^\[]*, )?\[(\w+(?:, \w+)*)\]")
_PICTURE = re.compile(r"!\[[^\]]*\]\((pictures/[^)\s]+)\)")


@dataclass
class Block:
    """A block of Python.

    Attributes:
        line: of the page, from 1, that its first line of code is.
        code: what is run.
        output: what the page says that it prints; None: the page says nothing.
        output_lines: where that stands in the page, as lines from 0: first, and behind the last.
        measured: whether the numbers in it are left out of the comparison.
        printed: what it printed, once it was run.
        shapes: of what it assigned, line, name and shape where a comment says another shape.
    """

    line: int
    code: str
    output: str | None = None
    output_lines: tuple[int, int] = (0, 0)
    measured: bool = False
    printed: str = ""
    shapes: list[str] = field(default_factory=list)


@dataclass
class Page:
    """A page of the documentation with its Python.

    Attributes:
        path: the file.
        blocks: of Python, in order.
        pictures: those that it shows, as paths relative to it.
    """

    path: Path
    blocks: list[Block] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def pages() -> list[Path]:
    """The pages that are run."""
    return sorted([*FOLDER.glob("*.md"), *FOLDER.glob("guide/*.md")])


def read_page(path: Path) -> Page:
    """The blocks and pictures of a page.

    Raises:
        ValueError: A block that is not closed, or an output without code before it.
    """
    page = Page(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    page.pictures = list(dict.fromkeys(_PICTURE.findall("\n".join(lines))))
    # The block that a text block would be the output of: nothing but empty lines lie between.
    last: Block | None = None
    at = 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        if not opened:
            if lines[at].strip() and not lines[at].startswith("<!--"):
                last = None
            at += 1
            continue
        language, info = opened.groups()
        end = next((i for i in range(at + 1, len(lines)) if lines[i].rstrip() == "```"), None)
        if end is None:
            raise ValueError(f"{path}:{at + 1}: a block is not closed")
        content = "\n".join(lines[at + 1 : end])
        if language == "python":
            last = Block(at + 2, content)
            page.blocks.append(last)
        else:
            if language == "text" and last is not None:
                last.output, last.output_lines = content, (at + 1, end)
                last.measured = info == "measured"
            elif info == "measured":
                raise ValueError(f"{path}:{at + 1}: no Python stands before this output")
            last = None
        at = end + 1
    return page


class _ShapeChecks(ast.NodeTransformer):
    """Behind each assignment with a shape in a comment stands a call that looks at what it assigned."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def visit_Assign(self, node: ast.Assign) -> Any:
        said = _SHAPE.search(self.lines[(node.end_lineno or node.lineno) - 1])
        if not said:
            return node
        target = node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        arguments = [node.lineno, said[1], *map(ast.unparse, names)]
        values = ", ".join(map(ast.unparse, names))
        call = ast.parse(f"_look_at_shapes({arguments!r}, [{values}])").body[0]
        for part in ast.walk(call):
            ast.copy_location(part, node)
        return [node, call]


def _shape_fits(said: str, found: list[int]) -> bool:
    sizes = said.split(", ")
    return len(sizes) == len(found) and all(
        not said.isdecimal() or int(said) == size for said, size in zip(sizes, found, strict=True)
    )


def run_page(page: Page, folder: Path) -> None:
    """Runs the blocks in ``folder``, all in one namespace; fills in what they print.

    Raises:
        Exception: What a block raises; the traceback names the line of the page.
    """
    import torch

    lines = page.path.read_text(encoding="utf-8").splitlines()
    block = Block(0, "")

    def look_at_shapes(where: list[Any], values: list[Any]) -> None:
        line, said, *names = where
        for name, value in zip(names, values, strict=True):
            found = list(getattr(value, "shape", ()))
            message = f"{line}: {name} is {found}, not [{said}]"
            if not _shape_fits(said, found) and message not in block.shapes:
                block.shapes.append(message)

    namespace: dict[str, Any] = {"__name__": "__main__", "_look_at_shapes": look_at_shapes}
    before = Path.cwd()
    # A page that measures times sets this.
    threads = torch.get_num_threads()
    os.chdir(folder)
    try:
        for block in page.blocks:
            printed = io.StringIO()
            tree = ast.parse("\n" * (block.line - 1) + block.code, str(page.path))
            code = compile(_ShapeChecks(lines).visit(tree), str(page.path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            block.printed = printed.getvalue()
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")


def differences(page: Page, folder: Path) -> list[str]:
    """What a page that was run in ``folder`` says and does not do, a line for each."""
    found = []
    for block in page.blocks:
        found += [f"{page.path}:{shape}" for shape in block.shapes]
        if block.output is None:
            if block.printed.strip():
                found.append(f"{page.path}:{block.line}: prints what the page does not show")
        elif not _same(block.output, block.printed, block.measured):
            found.append(
                f"{page.path}:{block.output_lines[0] + 1}: the page has\n{block.output}\n"
                f"but the code prints\n{block.printed}"
            )
    return found + _not_drawn(page, folder)


def _not_drawn(page: Page, folder: Path) -> list[str]:
    return [
        f"{page.path}: {picture} is shown, but not drawn"
        for picture in page.pictures
        if not (folder / picture).is_file()
    ]


def _same(expected: str, printed: str, measured: bool) -> bool:
    if " ".join(_NUMBER.sub("#", expected).split()) != " ".join(_NUMBER.sub("#", printed).split()):
        return False
    pairs = zip(_NUMBER.findall(expected), _NUMBER.findall(printed), strict=True)
    return measured or all(_close(*pair) for pair in pairs)


def _close(one: str, other: str) -> bool:
    if one == other:
        return True
    if "." not in one or "." not in other:
        return False
    unit = max(_last_digit(one), _last_digit(other))
    difference = float(one.replace(",", "")) - float(other.replace(",", ""))
    return abs(difference) < 1.5 * unit


def _last_digit(number: str) -> float:
    digits, _, exponent = number.partition("e")
    return float(10.0 ** (int(exponent or 0) - len(digits.partition(".")[2])))


def _write(page: Page, measured: bool) -> None:
    """What was printed goes into the page; that with measured numbers only if the words differ."""
    lines = page.path.read_text(encoding="utf-8").splitlines()
    for block in reversed(page.blocks):
        if block.output is not None and (
            not block.measured or measured or not _same(block.output, block.printed, True)
        ):
            first, end = block.output_lines
            lines[first:end] = [line.rstrip() for line in block.printed.rstrip().splitlines()]
    page.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def notebook(page: Page) -> dict[str, Any]:
    """The page in Jupyter's format: its Python as cells with what the page says that they print."""
    lines = page.path.read_text(encoding="utf-8").splitlines()
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **fields: Any) -> None:
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": text}
        cells.append({**cell, **fields})

    def add_text(first: int, end: int) -> None:
        kept = [line for line in lines[first:end] if not line.startswith("<!--")]
        if text := "\n".join(kept).strip():
            add("markdown", text)

    at = 0
    for block in page.blocks:
        add_text(at, block.line - 2)
        printed: list[dict[str, Any]] = []
        at = block.line + len(block.code.splitlines())
        if block.output is not None:
            text = f"{block.output}\n"
            printed = [{"name": "stdout", "output_type": "stream", "text": text}]
            at = block.output_lines[1] + 1
        add("code", block.code, execution_count=None, outputs=printed)
    add_text(at, len(lines))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _execute(path: Path) -> None:
    """Runs a notebook in a kernel of Jupyter, in a temporary folder; an error in a cell is one here."""
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    with tempfile.TemporaryDirectory() as temporary:
        resources = {"metadata": {"path": temporary}}
        NotebookClient(found, timeout=600, resources=resources).execute()


def _run(page: Page, write: bool, measured: bool) -> list[str]:
    """Runs a page in a temporary folder; a line for each thing that is wrong with it."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            run_page(page, Path(temporary))
        except Exception:  # the other pages are run all the same
            traceback.print_exc()
            return [f"{page.path}: stopped by the error above"]
        if not write:
            return differences(page, Path(temporary))
        # A comment with a shape is not written: its author meant it.
        wrong = [f"{page.path}:{shape}" for block in page.blocks for shape in block.shapes]
        wrong += _not_drawn(page, Path(temporary))
        if not wrong:
            _write(page, measured)
            for picture in page.pictures:
                shutil.copyfile(Path(temporary, picture), page.path.parent / picture)
        return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: all")
    parser.add_argument("--write", action="store_true", help="write what is printed into the page")
    parser.add_argument("--measure", action="store_true", help="with --write: new measurements too")
    parser.add_argument("--notebook", type=Path, metavar="FOLDER", help="write notebooks, run none")
    parser.add_argument(
        "--execute", action="store_true", help="with --notebook: run them in Jupyter"
    )
    options = parser.parse_args(arguments)
    if options.measure and not options.write:
        parser.error("--measure: expected --write too, got none")
    if options.execute and not options.notebook:
        parser.error("--execute: expected --notebook too, got none")
    if options.write and options.notebook:
        parser.error("--write: expected no --notebook, which runs no page, got both")
    os.environ.setdefault("MPLBACKEND", "Agg")
    wrong = []
    for path in options.pages or pages():
        start = time.perf_counter()
        try:
            page = read_page(path.resolve())
            if not page.blocks:
                continue
            if options.notebook:
                options.notebook.mkdir(parents=True, exist_ok=True)
                written = options.notebook / f"{path.stem}.ipynb"
                written.write_text(json.dumps(notebook(page), indent=1) + "\n", encoding="utf-8")
                if options.execute:
                    _execute(written)
                continue
            wrong += _run(page, options.write, options.measure)
        except OSError as error:
            wrong.append(f"{error.filename or path}: {error.strerror or error}")
            continue
        except ValueError as error:
            wrong.append(str(error))
            continue
        print(f"{path}: {len(page.blocks)} blocks, {time.perf_counter() - start:.1f} s")
    if wrong:
        print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
