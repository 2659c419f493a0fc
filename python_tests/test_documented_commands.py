"""Command lines, options and defaults that the documents name are those of the commands."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from unittest import mock

from test_documents import DOCUMENTS, ROOT, _name

import transformer_ext
from transformer_ext import preset
from transformer_ext.__main__ import available
from transformer_ext.config import TrainConfig, from_dict, given, options
from transformer_ext.inference.options import SearchOptions
from transformer_ext.visualize import PICTURES

#: What pip, cmake, torchrun and GoogleTest call their options.
OTHERS = {
    *("--index-url", "--preset", "--build", "--nproc-per-node", "--max-restarts", "--dist"),
    *("--gtest_filter", "--benchmark_filter", "--gtest_brief"),
}


@functools.cache
def parser(command: str, *first: str) -> argparse.ArgumentParser:
    """The parser that a command makes for itself."""
    return reference().parser_of(command, *first)


def reference():
    with mock.patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        return importlib.import_module("reference")


def refusal(command: str, arguments: list[str], capsys) -> str:
    """What a command says of arguments that it refuses, else an empty text."""
    first = arguments[:1] if command == "visualize" else []
    try:
        parsed = parser(command, *first).parse_args(arguments[len(first) :])
        if command == "train":
            config = from_dict(TrainConfig, given(parsed, TrainConfig))
            preset("tiny", 100, 100, **config.model)
    except ValueError as error:
        return str(error)
    except SystemExit as error:
        said = capsys.readouterr()
        return (
            next(line for line in said.err.splitlines() if ": error: " in line)
            if error.code
            else ""
        )
    return ""


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def shell_lines(text: str) -> Iterator[str]:
    """Lines of blocks of shell, what is typed in blocks of a terminal, and commands within text."""
    for language, content in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.S | re.M):
        lines = content.replace("\\\n", " ").splitlines()
        if language in ("bash", "sh"):
            yield from lines
        elif not language:
            yield from (line for line in lines if " -m transformer_ext." in line)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from (span for span in _spans(outside) if re.search(r"\bpython |transformer-ext ", span))


def commands(text: str) -> Iterator[list[str]]:
    """Programs with their arguments; variables of the shell as they were set."""
    variables: dict[str, str] = {}
    for line in shell_lines(text):
        if loops := re.findall(r"\bfor (\w+) in ([^;]+);", line):
            variables.update((name, values.split()[0]) for name, values in loops)
            continue
        if assigned := re.fullmatch(r'(\w+)="?(.*?)"?', line):
            variables[assigned[1]] = "FOLDER" if assigned[2].startswith("$(") else assigned[2]
            continue
        line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        found: list[str] = []
        redirected = False
        for token in lexer:
            if token in ("|", "&&", ";"):
                yield found
                found = []
            elif token in ("<", ">"):
                redirected = True
            elif redirected:
                redirected = False
            elif token != "..." or found[-1:] == ["--source"]:
                found.append(_number(token))
        yield found


def flags_of_scripts() -> set[str]:
    scripts = [
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("python_tests/*.py"),
        ROOT / "docs/pages.py",
    ]
    text = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
    return set(re.findall(r'add_argument\(\s*"(--[a-z][\w-]*)"', text))


class _Accepted(Exception):
    pass


def refusal_of_script(script: str, arguments: list[str], capsys) -> str:
    """What a script says of arguments that it refuses, else an empty text; it goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise _Accepted

    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            mock.patch.object(sys, "argv", [script, *arguments]),
            mock.patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]),
        ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except _Accepted:
        return ""
    except SystemExit:
        return capsys.readouterr().err.strip().splitlines()[-1]
    raise AssertionError(f"{script}: reads no options")


_SCRIPT = re.compile(r"(docs|benchmarks)/\w+\.py")


def test_command_lines_of_the_pages_are_accepted(capsys):
    wrong, parsed = [], 0
    scripts: dict[tuple[str, ...], str] = {}
    for path in DOCUMENTS:
        for words in commands(path.read_text(encoding="utf-8")):
            line = " ".join(words)
            module = next((w for w in words if w.startswith("transformer_ext.")), None)
            if words[:1] == ["transformer-ext"] and len(words) > 1:
                command, arguments = words[1], words[2:]
            elif module and words[words.index(module) - 1] == "-m":
                command = module.partition(".")[2].replace("_", "-")
                arguments = words[words.index(module) + 1 :]
            else:
                script = next((w for w in words if _SCRIPT.fullmatch(w)), None)
                after = words[words.index(script) + 1 :] if script else []
                if script and not (ROOT / script).is_file():
                    wrong.append(f"{_name(path)}: {script} is not there")
                elif script and any(w.startswith("--") for w in after):
                    scripts.setdefault((script, *after), _name(path))
                continue
            if command not in available():
                wrong.append(f"{_name(path)}: {line}: no such command")
            # A command that is only named stands without its arguments.
            elif (arguments[1:] or "--" in "".join(arguments)) and not re.search(
                r"\bNAME\b|\bPICTURE\b", line
            ):
                parsed += 1
                if said := refusal(command, arguments, capsys):
                    wrong.append(f"{_name(path)}: {line}: {said}")
    for (script, *arguments), name in scripts.items():
        if said := refusal_of_script(script, arguments, capsys):
            wrong.append(f"{name}: {' '.join([script, *arguments])}: {said}")
    assert not wrong, "\n".join(wrong)
    assert parsed > 50 and len(scripts) > 20


@functools.cache
def flags(command: str) -> set[str]:
    parsers = [parser(command)]
    if command == "visualize":
        parsers += [parser(command, picture) for picture in PICTURES]
    return {flag for p in parsers for a in p._actions for flag in a.option_strings}


_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_options_that_the_pages_name_are_there():
    known = set().union(*map(flags, available()), flags_of_scripts(), OTHERS)
    wrong = []
    for path in DOCUMENTS:
        if path.name == "moving.md":  # of other programs too
            continue
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        for span in _spans(text):
            wrong += [f"{_name(path)}: {span}: {f}" for f in _FLAG.findall(span) if f not in known]
    assert not wrong, "\n".join(wrong)


def _found(dotted: str) -> bool:
    """Whether Python finds what is written so, after ``import transformer_ext``."""
    value: object = transformer_ext
    path = "transformer_ext"
    for name in dotted.split(".")[1:]:
        path += f".{name}"
        if hasattr(value, name):
            value = getattr(value, name)
        elif inspect.ismodule(value) and importlib.util.find_spec(path):
            value = importlib.import_module(path)
        else:
            return False
    return True


_DOTTED = re.compile(r"(?:^|(?<=[ (]))(?:transformer_ext|ops)(?:\.\w+)+(?!\w*[./-])")
_FOLDERS = "|".join(path.name.replace(".", r"\.") for path in ROOT.iterdir() if path.is_dir())
_PATH = re.compile(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./*-]*\w")


def test_files_and_functions_that_the_pages_name_are_there():
    wrong = []
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        for span in _spans(text):
            # After `python -m` and `from` stand modules, which functions of the same name may hide.
            names = [] if re.match(r"python|from|import", span) else _DOTTED.findall(span)
            for name in (re.sub(r"^ops\.", "transformer_ext.ops.", name) for name in names):
                if not _found(name):
                    wrong.append(f"{_name(path)}: {span}: no {name}")
            for file in _PATH.findall(span):
                if not file.startswith("build/") and not any(ROOT.glob(file)):
                    wrong.append(f"{_name(path)}: {span}: no {file}")
    assert not wrong, "\n".join(wrong)


def test_every_benchmark_stands_in_their_list():
    folder = ROOT / "benchmarks"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in folder.glob("*.py") if f"`{file.name}`" not in listed] == []


def _rows_of_moving() -> Iterator[tuple[list[str], str]]:
    """Their cells and ours, of each row of the page's tables."""
    ours: int | None = None
    for line in (ROOT / "docs" / "moving.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            ours = None
        elif ours is None:
            names = [
                i for i, cell in enumerate(cells) if re.match(r"here$|options of", cell.strip("| "))
            ]
            ours = names[0] if names else -1
        elif ours >= 0 and not line.startswith("| ---"):
            yield cells[:ours] + cells[ours + 1 :], cells[ours]


def _number(word: str) -> str:
    """A number for a letter that stands for one."""
    return "1" if word in ("P", "W", "F", "N", "X", "FACTOR", "WARMUP") else word


def _wrong_in(span: str, capsys) -> str:
    """What is wrong with a piece of code in our column, else an empty text."""
    command, *words = span.split()
    if span.startswith("--"):
        named = set(_FLAG.findall(span))
        command = next((c for c in ("train", "translate") if named <= flags(c)), "")
        if not command:
            return "no command has these options together"
        words = span.split()
    elif command not in available():
        return ""
    switches = {f for a in parser(command)._actions if a.nargs == 0 for f in a.option_strings}
    arguments = []
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        # An option that is only named stands without its value.
        if not word.startswith("--") or word in switches or not after.startswith("--"):
            arguments.append(_number(word))
    if command == "translate" and arguments[:1] != ["A"]:
        arguments.append("MODEL")
    return refusal(command, arguments, capsys) if len(arguments) > 1 else ""


def test_options_and_defaults_of_moving_are_ours(capsys):
    """Of each table the column of ours: options exist, their values are accepted, defaults are so."""
    entries = {e.flag: e for cls in (TrainConfig, SearchOptions) for e in options(cls)}
    known = set().union(*map(flags, available()))
    rows = list(_rows_of_moving())
    assert len(rows) > 150
    wrong = []
    for theirs, ours in rows:
        if "after its" in ours or " for its " in ours:  # names of theirs follow
            ours = re.split(r",? after its | for its ", ours)[0]
        named = _FLAG.findall(" ".join(_spans(ours)))
        if ours.startswith("the same name"):
            named += ["--" + n.lstrip("-").replace("_", "-") for n in _spans(" ".join(theirs))]
        wrong += [f"{ours}: no {flag}" for flag in named if flag not in known]
        for span in _spans(ours):
            if said := _wrong_in(span, capsys):
                wrong.append(f"{span}: {said}")
        for flag, value in re.findall(r"`(--[\w-]+)` \(([\d. e-]+)\)", ours):
            default = entries[flag].default
            default = list(default) if isinstance(default, (list, tuple)) else [default]
            # None: it follows from the task or the data.
            if default != [None] and [float(number) for number in value.split()] != default:
                wrong.append(f"{flag}: {value} is not its default, {default}")
    assert not wrong, "\n".join(wrong)
