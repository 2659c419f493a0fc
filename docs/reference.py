"""Writes the reference pages of the site: every public function and class, option and command.

All of it is read from the package: from docstrings, from the dataclasses of the options, and from the
commands' own parsers. ``docs/conf.py`` calls it; the pages lie in ``docs/reference/`` and are no part
of the repository.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from transformer_ext.__main__ import available
from transformer_ext.config import ArgumentParser, TrainConfig, options
from transformer_ext.inference.options import SearchOptions

__all__ = ["parser_of", "public_objects", "write"]

#: Page -> title and the modules that it holds: these, and those within them.
PAGES = {
    "ops": ("Ops", ["ops", "packed"]),
    "model": ("Models", ["model"]),
    "inference": ("Translation and other uses of a model", ["inference", "pipelines"]),
    "training": ("Training", ["training", "average"]),
    "data": ("Text and data sets", ["data"]),
    "files": ("Files and conversion", ["files", "huggingface"]),
    "pictures": ("Pictures", ["visualization", "visualize"]),
    "configuration": ("Configuration", ["config"]),
}


class _Parser(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: str, *arguments: str) -> argparse.ArgumentParser:
    """The parser that a command makes for itself, given these arguments."""

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Parser(self)

    main = importlib.import_module(f"transformer_ext.{command.replace('-', '_')}").main
    main = getattr(main, "__wrapped__", main)
    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            main([*arguments, "--help"])
        except _Parser as found:
            return found.parser
    raise RuntimeError(f"{command}: makes no ArgumentParser")


def _modules(names: list[str]) -> list[ModuleType]:
    found = []
    for name in names:
        module = importlib.import_module(f"transformer_ext.{name}")
        found.append(module)
        for inner in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
            if not inner.name.rpartition(".")[2].startswith("_"):
                found.append(importlib.import_module(inner.name))
    return found


def _names(module: ModuleType) -> list[str]:
    """Those that are public: in ``__all__``, or what a module without one defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def public_objects(module: ModuleType) -> list[str]:
    """Public functions and classes that the module itself defines.

    A package also has those that come from a module in it that is private or does not name them.
    """
    names = []
    for name in _names(module):
        value = getattr(module, name)
        place = getattr(value, "__module__", None) or ""
        defined = place == module.__name__
        if place.startswith(f"{module.__name__}."):
            inner = place.rpartition(".")[2]
            defined = inner.startswith("_") or name not in _names(sys.modules[place])
        if name != "main" and defined and (inspect.isclass(value) or inspect.isfunction(value)):
            names.append(name)
    return names


def _escape(text: str) -> str:
    """Text in a cell of a Markdown table."""
    for letter in "\\|*_<>[]$`":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _api_page(title: str, names: list[str]) -> str:
    parts = [f"# {title}\n"]
    if names[0] == "ops":
        parts.append(
            "All of them are in `transformer_ext.ops`: `ops.attention`, `ops.linear`, ...\n"
        )
    for module in _modules(names):
        public = public_objects(module)
        if not public:
            continue
        parts.append(f"## `{module.__name__}`\n")
        directives = [
            f".. py:currentmodule:: {module.__name__}\n",
            f".. automodule:: {module.__name__}\n",
        ]
        for name in public:
            kind = "class" if inspect.isclass(getattr(module, name)) else "function"
            members = "   :members:\n" if kind == "class" else ""
            directives.append(f".. auto{kind}:: {module.__name__}::{name}\n{members}")
        parts.append("```{eval-rst}\n" + "\n".join(directives) + "```\n")
    return "\n".join(parts)


def _command_page(command: str, what: str) -> str:
    parts = [f"# {command}\n", f"{what[0].upper()}{what[1:]}: `python -m {_module(command)}`.\n"]
    parts.append(_parser_text(parser_of(command)))
    # visualize has a parser for each kind of picture.
    for name in getattr(importlib.import_module(_module(command)), "PICTURES", ()):
        parts += [f"## {command} {name}\n", _parser_text(parser_of(command, name))]
    return "\n".join(parts)


def _module(command: str) -> str:
    return f"transformer_ext.{command.replace('-', '_')}"


def _parser_text(parser: argparse.ArgumentParser) -> str:
    parts = ["```\n" + parser.format_usage().removeprefix("usage: ").strip() + "\n```\n"]
    if parser.description:
        parts.append(_escape(parser.description) + "\n")
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS:
                continue
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
            value = action.metavar or ("" if action.nargs == 0 else action.dest)
            if action.choices and not action.metavar:
                value = " | ".join(map(str, action.choices))
            if isinstance(value, tuple):
                value = " ".join(value)
            shown = parser._get_formatter()._expand_help(action) if action.help else ""
            rows.append([flags or f"`{value}`", _escape(value) if flags else "", _escape(shown)])
        if rows:
            title = {
                "options": "Options",
                "positional arguments": "Arguments",
                "general": "General",
            }.get(group.title or "", group.title or "Options")
            parts.append(f"**{_escape(title)}**\n")
            if group.description:
                parts.append(_escape(group.description) + "\n")
            parts.append(_table(["option", "value", "meaning"], rows))
    if parser.epilog:
        parts.append(f"```\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def _options_page() -> str:
    parts = [
        "# Options\n",
        "Every option has a name in YAML and Python (`group.name`), and one on the command line. "
        "`python -m transformer_ext.train --print-config` writes those of a training with their values.\n",
    ]
    for title, cls in (("Training", TrainConfig), ("Search", SearchOptions)):
        parts.append(f"## {title}\n")
        rows: dict[str, list[list[str]]] = {}
        for entry in options(cls):
            values = [
                f"`{entry.key}`",
                "in YAML only" if entry.records else f"`{entry.flag}`",
                _escape(entry.expected()),
                _escape(entry.description()),
            ]
            rows.setdefault(entry.group, []).append(values)
        for group, values in rows.items():
            if group:
                parts.append(f"### {title}: {group}\n")
            parts.append(_table(["name", "command line", "expects", "meaning"], values))
    return "\n".join(parts)


def write(folder: Path) -> None:
    """Writes all pages into ``folder``, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "commands").mkdir(parents=True)
    for name, (title, modules) in PAGES.items():
        (folder / f"{name}.md").write_text(_api_page(title, modules), encoding="utf-8")
    commands = available()
    for command, what in commands.items():
        text = _command_page(command, what)
        (folder / "commands" / f"{command}.md").write_text(text, encoding="utf-8")
    (folder / "options.md").write_text(_options_page(), encoding="utf-8")
    toctree = "\n".join(
        ["options", *(f"commands/{name}" for name in commands), *PAGES, "files/index"]
    )
    (folder / "index.md").write_text(
        "# Reference\n\n```{toctree}\n:maxdepth: 1\n\n" + toctree + "\n```\n", encoding="utf-8"
    )
