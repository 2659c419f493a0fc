"""Links of the site: to files of the repository that are no page of it, and the check of all of them.

A page of ``docs/`` links to kernels, tests and README as they lie in the repository. The site shows each
such file on a page of its own, in ``docs/reference/files/``, and links lead there; a link to a folder
becomes text.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["dead_links", "inward", "write"]

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FILES = DOCS / "reference" / "files"

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".cpp": "cpp",
    ".h": "cpp",
    ".cu": "cuda",
    ".cuh": "cuda",
    ".py": "python",
    ".cmake": "cmake",
    ".sh": "bash",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}


def _targets(text: str, origin: Path) -> Iterator[Path]:
    for match in _LINK.finditer(text):
        target = (origin.parent / match[2]).resolve()
        if not target.is_relative_to(DOCS) and target.is_file():
            yield target


def inward(text: str, origin: Path, page: Path) -> str:
    """The text of ``origin`` with its links as ``page`` of the site needs them."""

    def link(match: re.Match[str]) -> str:
        target = (origin.parent / match[2]).resolve()
        if target.is_dir():
            return match[1]
        if not target.is_relative_to(DOCS):
            target = _page_of(target)
        return f"[{match[1]}]({os.path.relpath(target, page.parent)}{match[3] or ''})"

    return _LINK.sub(link, text)


def _page_of(file: Path) -> Path:
    path = FILES / file.relative_to(ROOT)
    return path if path.suffix == ".md" else path.with_name(f"{path.name}.md")


def write(pages: list[Path]) -> None:
    """Writes a page for each file that these pages, or files of text among those, link to."""
    shutil.rmtree(FILES, ignore_errors=True)
    wanted, found = list(pages), []
    while wanted:
        origin = wanted.pop()
        for target in _targets(origin.read_text(encoding="utf-8"), origin):
            if target not in found:
                found.append(target)
                if target.suffix == ".md":
                    wanted.append(target)
    for file in found:
        page = _page_of(file)
        page.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text = inward(file.read_text(encoding="utf-8"), file, page)
        else:
            name = file.relative_to(ROOT).as_posix()
            text = (
                f"# `{name}`\n\n```{{literalinclude}} {os.path.relpath(file, page.parent)}\n"
                f":language: {_LANGUAGES.get(file.suffix, 'text')}\n:linenos:\n```\n"
            )
        page.write_text(text, encoding="utf-8")
    entries = sorted(_page_of(file).relative_to(FILES).with_suffix("").as_posix() for file in found)
    (FILES / "index.md").write_text(
        "# Files of the repository\n\nThose that the pages name.\n\n"
        "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(entries) + "\n```\n",
        encoding="utf-8",
    )


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        # What a browser fetches to show the page; a link it follows only when told.
        elif tag in ("link", "script", "img", "source", "iframe"):
            self.parts += [values[name] for name in ("href", "src") if name in values]


def dead_links(site: Path) -> list[str]:
    """Links within a built site that lead nowhere, and parts of its pages that are not in it."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for part in page.parts:
            if urlsplit(part).scheme or urlsplit(part).netloc:
                wrong.append(f"{name}: {part} would be fetched from elsewhere")
        for link in [*page.links, *page.parts]:
            split = urlsplit(link)
            if split.scheme or split.netloc:
                continue
            target = (path.parent / unquote(split.path)).resolve() if split.path else path
            if not target.is_file():
                wrong.append(f"{name}: {link}: no such file")
            elif split.fragment and target in pages:
                if unquote(split.fragment) not in pages[target].anchors:
                    wrong.append(f"{name}: {link}: no such heading")
    return wrong
