"""Configuration: dataclasses are the one definition, YAML files and the command line its readers.

A configuration is a dataclass of plain fields and of groups (fields that are dataclasses
themselves)::

    @dataclass
    class TrainingOptions:
        max_steps: int | None = option(None, help="optimizer steps", unit="steps", minimum=1)

The field is ``--max-steps 4000`` on the command line, ``training: {max_steps: 4000}`` in YAML.
A field may also be a list of dataclasses; such a list is given in YAML only, a mapping for each.
The command line wins over the YAML file, the file over the defaults. A field of an optional type
whose value is None is left to the program (its help says how it is then chosen); ``auto`` on the
command line or ``null`` in YAML asks for that again.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from transformer_ext.model.config import PRESETS, TransformerConfig

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A configuration that cannot be used: which key, what came, what was expected."""


def option(
    default: Any,
    *,
    help: str,
    unit: str = "",
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    auto: str = "",
) -> Any:
    """A dataclass field with what the command line and the YAML file need to know about it.

    Args:
        default: the value where neither file nor command line give one; a list is copied.
        help: one sentence without a full stop.
        unit: what the number counts, for example ``tokens`` or ``minutes``.
        choices: the strings allowed (a ``Literal`` annotation says the same).
        minimum: least number allowed.
        maximum: greatest number allowed.
        auto: for a default of None, what happens then, in a few words.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
        "auto": auto,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: Callable[[], Any], *, help: str) -> Any:
    """A field that is a dataclass of options."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


def overrides(cls: type, *, help: str, exclude: Sequence[str] = ()) -> Any:
    """A field of type ``dict`` that holds only the given fields of ``cls``, checked as that says.

    Args:
        cls: a dataclass.
        help: one sentence without a full stop.
        exclude: fields of ``cls`` that are not options.
    """
    metadata = {"help": help, "overrides": cls, "exclude": tuple(exclude)}
    return dataclasses.field(default_factory=dict, metadata=metadata)


def plain(value: Any) -> Any:
    """The value; of numpy or torch, that of Python, which for an array is a list."""
    return value.tolist() if hasattr(value, "tolist") else value


@dataclass(frozen=True)
class Option:
    """One option as found in a configuration dataclass.

    Attributes:
        group: name of the group, empty at the top.
        name: field name.
        kind: the plain type: bool, int, float or str; or, for a list in YAML only, a dataclass.
        optional: whether None is allowed.
        length: 0 for a single value, -1 for a list, n for a tuple of n values.
        default: value where none is given; None too where ``partial``.
        partial: whether the option is one of an overrides group, absent unless given.
        help, unit, choices, minimum, maximum, auto: see :func:`option`.
    """

    group: str
    name: str
    kind: type
    optional: bool
    length: int
    default: Any
    partial: bool
    help: str
    unit: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    auto: str

    @property
    def key(self) -> str:
        """The name in messages, ``group.name``."""
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def records(self) -> bool:
        """Whether it is a list of dataclasses, which only a YAML file can give."""
        return dataclasses.is_dataclass(self.kind)

    def expected(self, absent: str = "null") -> str:
        """What a value has to be, in words; ``absent`` stands for None."""
        if self.records:
            names = ", ".join(field.name for field in dataclasses.fields(self.kind))
            text = f"a mapping with keys of {names}"
        elif self.choices:
            text = "one of " + ", ".join(self.choices)
        else:
            text = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[
                self.kind
            ]
            if self.minimum is not None and self.maximum is not None:
                text += f" from {self.minimum} to {self.maximum}"
            elif self.minimum is not None:
                text += f" of at least {self.minimum}"
            elif self.maximum is not None:
                text += f" of at most {self.maximum}"
        if self.length:
            text = ("a list, each " if self.length < 0 else f"{self.length} values, each ") + text
        return text + (f", or {absent}" if self.optional else "")

    def description(self) -> str:
        """Help, unit, choices and default in one line."""
        parts = [self.unit] if self.unit else []
        if self.choices:
            parts.append(" | ".join(self.choices))
        if self.default not in (None, [], ()) and not self.partial:
            default = self.default
            if isinstance(default, (list, tuple)):
                default = " ".join(str(value) for value in default)
            elif isinstance(default, bool):
                default = "yes" if default else "no"
            parts.append(f"default: {default}")
        elif self.auto:
            parts.append(f"default: {self.auto}")
        return self.help + (f" ({'; '.join(parts)})" if parts else "")

    def check(self, value: Any, where: str = "") -> Any:
        """The value as the field holds it.

        Args:
            value: as read from YAML or given in Python.
            where: the file it came from, for the message.

        Raises:
            ConfigError: it is not what :meth:`expected` says.
        """
        value = plain(value)
        if value is None and self.optional:
            return None
        if self.records:
            if not isinstance(value, (list, tuple)):
                self._refuse(value, where)
            return [self._check_record(item, number, where) for number, item in enumerate(value)]
        if self.length:
            values = [value] if self.length < 0 and isinstance(value, str) else value
            wrong = not isinstance(values, (list, tuple))
            if wrong or (self.length > 0 and len(values) != self.length):
                self._refuse(value, where)
            checked = [self._check_one(plain(item), value, where) for item in values]
            return checked if self.length < 0 else tuple(checked)
        return self._check_one(value, value, where)

    def _check_record(self, value: Any, number: int, where: str) -> Any:
        if isinstance(value, self.kind):
            return value
        prefix = f"{where}: " if where else ""
        place = f"{prefix}{self.key}[{number}]: "
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{place}got {value!r}, expected {self.expected().removeprefix('a list, each ')}"
            )
        try:
            return from_dict(self.kind, value)
        except ConfigError as error:
            raise ConfigError(f"{place}{error}") from None

    def parse(self, text: str) -> Any:
        """One value of the command line.

        Raises:
            ConfigError: it is not what :meth:`expected` says.
        """
        if text == "auto" and self.optional:
            return None
        value: Any = text
        try:
            if self.kind is int:
                value = int(text)
            elif self.kind is float:
                value = float(text)
        except ValueError:
            self._refuse(text, absent="auto")
        return self._check_one(value, value, absent="auto")

    def _check_one(self, value: Any, whole: Any, where: str = "", absent: str = "null") -> Any:
        if self.kind is float and not isinstance(value, bool):
            # YAML 1.1 reads 1e-3, which has no dot, as a string.
            if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+e[-+]?[0-9]+", value.lower()):
                value = float(value)
            elif isinstance(value, int):
                try:
                    value = float(value)
                except OverflowError:
                    self._refuse(whole, where, absent)
        if type(value) is not self.kind:
            self._refuse(whole, where, absent)
        if self.choices and value not in self.choices:
            self._refuse(whole, where, absent)
        if isinstance(value, (int, float)) and not (
            (isinstance(value, int) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        ):
            self._refuse(whole, where, absent)
        return value

    def _refuse(self, value: Any, where: str = "", absent: str = "null") -> NoReturn:
        prefix = f"{where}: " if where else ""
        hint = ""
        if self.choices and isinstance(value, str):
            hint = nearest(value, self.choices)
        raise ConfigError(
            f"{prefix}{self.key}: got {value!r}, expected {self.expected(absent)}{hint}"
        )


def nearest(name: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` with the known name most like ``name``, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _docstring_help(cls: type) -> dict[str, str]:
    """The texts of the ``Attributes:`` section of a class and its bases, by field name."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts.update(_own_docstring_help(base))
    return texts


def _own_docstring_help(cls: type) -> dict[str, str]:
    lines = inspect.cleandoc(cls.__doc__ or "").split("\n")
    if "Attributes:" not in lines:
        return {}
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        head = re.match(r"    ([a-z_][\w, ]*): (.*)", line)
        if head:
            names = [name.strip() for name in head[1].split(",")]
            texts.update(dict.fromkeys(names, head[2]))
        elif names:
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return {name: text.replace("``", "").strip().rstrip(".") for name, text in texts.items()}


def _plain_type(
    hint: Any, where: str, in_list: bool = False
) -> tuple[type, bool, int, tuple[str, ...]]:
    """(kind, optional, length, choices) of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in args and len(args) == 2:
        inner = next(arg for arg in args if arg is not type(None))
        kind, _, length, choices = _plain_type(inner, where)
        return kind, True, length, choices
    if origin is Literal:
        return str, False, 0, args
    if origin is list:
        kind, _, _, choices = _plain_type(args[0], where, in_list=True)
        return kind, False, -1, choices
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        kind, _, _, choices = _plain_type(args[0], where)
        return kind, False, -1, choices
    if origin is tuple and len(set(args)) == 1:
        kind, _, _, choices = _plain_type(args[0], where)
        return kind, False, len(args), choices
    if hint in (bool, int, float, str):
        return hint, False, 0, ()
    if in_list and dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, False, 0, ()
    raise TypeError(f"{where}: an option cannot have the type {hint!r}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _group_options(
    cls: type, name: str, partial: bool = False, exclude: Sequence[str] = ()
) -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    texts = _docstring_help(cls)
    for field in dataclasses.fields(cls):
        if field.name in exclude or _group_class(field, hints) is not None:
            continue
        kind, optional, length, choices = _plain_type(hints[field.name], field.name)
        metadata = field.metadata
        yield Option(
            group=name,
            name=field.name,
            kind=kind,
            optional=optional,
            length=length,
            default=_default(field),
            partial=partial,
            help=metadata.get("help", texts.get(field.name, "")),
            unit=metadata.get("unit", ""),
            choices=metadata.get("choices") or choices,
            minimum=metadata.get("minimum"),
            maximum=metadata.get("maximum"),
            auto=metadata.get("auto", ""),
        )


def _group_class(field: dataclasses.Field[Any], hints: Mapping[str, Any]) -> type | None:
    if "overrides" in field.metadata:
        return typing.cast(type, field.metadata["overrides"])
    hint = hints[field.name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def _groups(cls: type) -> dict[str, tuple[str, tuple[Option, ...]]]:
    """Help text and options by group name; the fields at the top are the group ``""``."""
    hints = typing.get_type_hints(cls)
    groups = {"": ("", tuple(_group_options(cls, "")))}
    for field in dataclasses.fields(cls):
        inner = _group_class(field, hints)
        if inner is not None:
            partial = "overrides" in field.metadata
            exclude = field.metadata.get("exclude", ())
            found = tuple(_group_options(inner, field.name, partial, exclude))
            groups[field.name] = (field.metadata.get("help", ""), found)
    return groups


def options(cls: type) -> list[Option]:
    """Every option of a configuration dataclass, those of its groups too, in order."""
    return [found for _, group_options in _groups(cls).values() for found in group_options]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values (tuples become lists) for YAML and JSON, as :func:`from_dict` takes."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return typing.cast("dict[str, Any]", plain(dataclasses.asdict(config)))


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """A configuration from nested plain values.

    Args:
        cls: the dataclass.
        values: by group name, then by field name; absent ones take the default.
        where: the file they came from, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of a wrong type or out
            of its range.
    """
    prefix = f"{where}: " if where else ""
    groups = _groups(cls)
    top = {found.name: found for found in groups[""][1]}
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in top:
            result[key] = top[key].check(value, where)
        elif key in groups and key:
            result[key] = _group_from_dict(cls, key, value, where)
        else:
            owners = [found for found in options(cls) if found.name == key and found.group]
            if owners and isinstance(value, Mapping):
                hint = f"; {owners[0].key} is a single value, not a group of keys"
                hint += _place(cls, next(iter(value), None))
            elif owners:
                hint = f"; it belongs under {owners[0].group!r}"
            else:
                hint = nearest(str(key), [*top, *filter(None, groups)])
            raise ConfigError(f"{prefix}unknown key {key!r}{hint}")
    try:
        return cls(**result)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _place(cls: type, key: Any) -> str:
    """``; 'max_steps' belongs under 'training'`` for the name of an option, or nothing."""
    found = next((entry for entry in options(cls) if entry.name == key), None)
    if found is None:
        return ""
    return f"; {key!r} belongs " + (f"under {found.group!r}" if found.group else "at the top")


def _group_from_dict(cls: type, name: str, values: Any, where: str) -> Any:
    prefix = f"{where}: " if where else ""
    known = {found.name: found for found in _groups(cls)[name][1]}
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix}{name}: got {values!r}, expected a group of keys")
    checked = {}
    for key, value in values.items():
        if key not in known:
            hint = nearest(str(key), list(known))
            others = [found for found in options(cls) if found.name == key]
            if others:
                place = f"under {others[0].group!r}" if others[0].group else "at the top"
                hint = f"; it belongs {place}"
            raise ConfigError(f"{prefix}unknown key {f'{name}.{key}'!r}{hint}")
        checked[key] = known[key].check(value, where)
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if "overrides" in field.metadata:
        return checked
    try:
        inner = _group_class(field, typing.get_type_hints(cls))
        assert inner is not None
        return inner(**checked)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or something else than a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML keeps the last of two equal keys; here that is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"{path}:{line}: the key {key_node.value!r} is given twice")
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader)  # noqa: S506 (a subclass of SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
        raise ConfigError(f"{path}{place}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {type(values).__name__}, expected a mapping of keys")
    return values


def from_yaml(cls: type[ConfigT], path: str) -> ConfigT:
    """A configuration from a YAML file.

    Raises:
        ConfigError: see :func:`read_yaml` and :func:`from_dict`.
    """
    return from_dict(cls, read_yaml(path), path)


def to_commented_yaml(config: Any) -> str:
    """The configuration as YAML in which every option stands under its help text.

    Reading it back gives an equal configuration. Options of an overrides group that are not given
    stand there commented out.
    """
    import yaml

    def scalar(value: Any) -> str:
        text: str = yaml.safe_dump(
            value, default_flow_style=True, width=math.inf, allow_unicode=True
        )
        return text.removesuffix("\n").removesuffix("\n...")

    values = to_dict(config)
    lines: list[str] = []
    for name, (text, found) in _groups(type(config)).items():
        indent = "  " if name else ""
        if name:
            lines += ["", f"# {text}", f"{name}:"]
        group_values = values[name] if name else values
        for entry in found:
            lines += textwrap.wrap(
                entry.description(),
                96,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
            )
            if entry.partial and entry.name not in group_values:
                lines.append(f"{indent}# {entry.name}: {scalar(entry.default)}")
            elif entry.records and group_values[entry.name]:
                lines.append(f"{indent}{entry.name}:")
                for record in group_values[entry.name]:
                    lines += [
                        f"{indent}{'  - ' if number == 0 else '    '}{key}: {scalar(value)}"
                        for number, (key, value) in enumerate(record.items())
                    ]
            else:
                lines.append(f"{indent}{entry.name}: {scalar(group_values[entry.name])}")
    return "\n".join(lines) + "\n"


def add_arguments(
    parser: argparse.ArgumentParser, cls: type, defaults: Mapping[str, Any] | None = None
) -> None:
    """Add every option of a configuration dataclass to a parser, a section for each group.

    The parsed namespace holds only the options given; :func:`given` collects them.

    Args:
        parser: of the command.
        cls: the dataclass.
        defaults: what the help calls the default, by key, where the command has another one.
    """
    for name, (text, found) in _groups(cls).items():
        section = parser.add_argument_group(name or "general", text or None)
        for entry in found:
            if entry.records:
                continue
            shown = entry
            if defaults and entry.key in defaults:
                shown = dataclasses.replace(entry, default=defaults[entry.key])
            help = shown.description().replace("%", "%%")
            keywords: dict[str, Any] = {"dest": _dest(entry), "default": argparse.SUPPRESS}
            if entry.kind is bool:
                section.add_argument(
                    entry.flag, action=argparse.BooleanOptionalAction, help=help, **keywords
                )
                continue
            if entry.length:
                keywords["nargs"] = "+" if entry.length < 0 else entry.length
            kind = {int: "N", float: "X", str: "TEXT"}[entry.kind]
            section.add_argument(
                entry.flag, type=_Parse(entry), metavar=kind, help=help, **keywords
            )


def _dest(entry: Option) -> str:
    return f"option:{entry.key}"


@dataclass(frozen=True, eq=False)
class _Parse:
    """Parses one command line value; argparse shows the message of the error."""

    entry: Option

    def __call__(self, text: str) -> Any:
        try:
            return self.entry.parse(text)
        except ConfigError as error:
            message = str(error).removeprefix(f"{self.entry.key}: ")
            raise argparse.ArgumentTypeError(message) from None


def given(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options that the command line gave, nested by group."""
    result: dict[str, Any] = {}
    for entry in options(cls):
        if hasattr(namespace, _dest(entry)):
            value = getattr(namespace, _dest(entry))
            target = result.setdefault(entry.group, {}) if entry.group else result
            target[entry.name] = value
    return result


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of both, those of ``upper`` where both have them."""
    result = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with the nearest option in the message for an unknown one, and short usage."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("usage", "%(prog)s [options]")
        super().__init__(allow_abbrev=False, **keywords)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; exits with status 2 and one message on a wrong command line."""
        arguments = list(sys.argv[1:] if args is None else args)
        known = [text for action in self._actions for text in action.option_strings]
        # Before anything else is looked at: a misspelt option that is required would otherwise only
        # be reported as missing.
        ends = arguments.index("--") if "--" in arguments else len(arguments)
        for argument in arguments[:ends]:
            flag = argument.split("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"unknown option {argument!r}{nearest(flag, known)}")
        result, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            # argparse looks for no files after an option once it has found one argument in place.
            result, unknown = self.parse_known_intermixed_args(arguments, namespace)
        if unknown:
            self.error(f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}")
        return result

    def with_flags(self, message: str) -> str:
        """A message in which ``beam_size`` is ``--beam-size`` where the command has that option.

        So are messages alone that begin with a name and a colon: one that begins with a file means
        the keys of that file. Names without an underscore may be words in the rest.
        """
        if not re.match("[a-z_]+: ", message):
            return message

        def flag(name: re.Match[str]) -> str:
            found = "--" + name[0].replace("_", "-")
            return found if found in self._option_string_actions else name[0]

        name = r"""(?<![\w'"./=-])[a-z]+(?:_[a-z]+)+(?![\w'"./=-])|^[a-z]+(?=: )"""
        return re.sub(name, flag, message)

    def error(self, message: str) -> NoReturn:
        """Print the message, its options by their names here, and exit with status 2."""
        message = self.with_flags(message)
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists the options)\n")


def text_argument(text: str) -> str:
    """The ``type`` of an argument that is read, not opened: a file may be named by any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected UTF-8") from None
    return text


def recipes() -> dict[str, Path]:
    """The YAML files that come with the package, by the names that ``--config`` takes."""
    here = Path(__file__).parent
    # Installed they lie in the package, in a clone beside it.
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def _config_file(name: str) -> str:
    """The file that ``--config`` names: a path, or the name of a recipe.

    Raises:
        ConfigError: it is neither.
    """
    if os.path.exists(name):
        return name
    known = recipes()
    if name in known:
        return str(known[name])
    # A path is reported as the file that it is not.
    if Path(name).name != name or name.endswith((".yaml", ".yml")) or not known:
        return name
    raise ConfigError(
        f"--config: {name} is neither a file nor a recipe of the package "
        f"({', '.join(known)}){nearest(name, list(known))}"
    )


def parse_arguments(
    cls: type[ConfigT],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    file_cls: type | None = None,
) -> ConfigT:
    """A command's configuration: defaults, then the file of ``--config``, then the command line.

    ``--print-config`` prints it as commented YAML and exits. A wrong option or file ends the
    process with status 2 and one message on stderr.

    Args:
        cls: the configuration dataclass.
        argv: the arguments; None takes the process's.
        prog: the command as the user typed it.
        description: the text at the top of ``--help``.
        file_cls: what the file may hold, a dataclass with the groups of ``cls`` and others; None is
            ``cls`` itself.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the options below, or the name of one that comes with the "
        f"package: {', '.join(recipes())}",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every option as a commented YAML file, which --config reads back, and exit",
    )
    add_arguments(parser, cls)
    namespace = parser.parse_args(argv)
    try:
        values = given(namespace, cls)
        if namespace.config is not None:
            path = _config_file(namespace.config)
            # Read on its own first: its mistakes are then reported with its name.
            from_yaml(file_cls or cls, path)
            known = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
            file_values = read_yaml(path)
            values = merge({key: file_values[key] for key in file_values if key in known}, values)
        config = from_dict(cls, values)
    except ConfigError as error:
        parser.error(str(error))
    if namespace.print_config:
        sys.stdout.write(to_commented_yaml(config))
        parser.exit()
    return config


FROM_PRESET = "follows from the preset"
FROM_DATA = "follows from the data"


#: What a tag may not be: pieces that a tokenizer has for itself.
_OWN_PIECES = ("<pad>", "<unk>", "<s>", "</s>")


@dataclass
class CorpusConfig:
    """One of several corpora to train on, in the YAML file's ``data.corpora``."""

    name: str = option("", help="what it is called in reports")
    src: list[str] = option([], help="files of the source side, plain, .gz or .xz")
    tgt: list[str] = option([], help="files of the target side, as many")
    pairs: list[str] = option(
        [], help="files with both sides: .tsv, .jsonl or .json, also .gz, .xz"
    )
    weight: float | None = option(
        None,
        help="how many times an epoch has each pair: 2 is twice, 0.5 half of the pairs, others in "
        "the next epoch",
        minimum=0.0,
        auto="1",
    )
    source_tag: str | None = option(
        None, help="a token before each source sentence, such as <2de>", auto="none"
    )
    target_prefix: str | None = option(
        None, help="a token before each target sentence, such as <de>", auto="none"
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: got none, expected a name for reports")
        check_sides("", self.src, self.tgt)
        if not self.src and not self.pairs:
            raise ConfigError(f"corpus {self.name!r}: expected files: src and tgt, or pairs")
        if self.weight == 0:
            raise ConfigError("weight: got 0.0, expected a number above 0; or leave the corpus out")
        for key in ("source_tag", "target_prefix"):
            tag = getattr(self, key)
            if tag is None:
                continue
            wrong = (
                not tag
                or any(character.isspace() or character in ",\u2581" for character in tag)
                or tag in _OWN_PIECES
                or re.fullmatch("<0x[0-9A-Fa-f]{2}>", tag)
            )
            if wrong:
                raise ConfigError(
                    f"{key}: got {tag!r}, expected a text without spaces and commas, such as <2de>, "
                    f"and none of {', '.join(_OWN_PIECES)} or a byte such as <0x0A>"
                )


def check_sides(key: str, src: Sequence[str], tgt: Sequence[str]) -> None:
    """Refuse unequal numbers of files; ``key`` is ``data.{}_train``, or empty."""
    if len(src) != len(tgt):
        names = [key.format(side) if key else side for side in ("src", "tgt")]
        raise ConfigError(
            f"{names[0]} has {len(src)} files and {names[1]} {len(tgt)}, expected as many of each"
        )


@dataclass
class DataConfig:
    """The text, how it is cut into tokens, and which sentence pairs are used."""

    src_train: list[str] = option(
        [], help="source side of the training text: one or more files, plain, .gz or .xz"
    )
    tgt_train: list[str] = option(
        [], help="target side, as many files as --src-train, aligned line by line"
    )
    src_dev: list[str] = option(
        [], help="source side of the text for validation; without it a part of the training text"
    )
    tgt_dev: list[str] = option([], help="target side of the text for validation")
    src_test: list[str] = option([], help="source side of the text for the final BLEU")
    tgt_test: list[str] = option([], help="target side of the text for the final BLEU")
    pairs_train: list[str] = option(
        [],
        help="training text with both sides in a file: .tsv (source, tab, target), or .jsonl or "
        ".json (an object a line), also .gz and .xz",
    )
    pairs_dev: list[str] = option([], help="such files for validation")
    pairs_test: list[str] = option([], help="such files for the final BLEU")
    pair_keys: tuple[str, str] = option(
        ("src", "tgt"),
        help="where the source and the target stand in the objects of JSON files; a dot goes into "
        "an object in it, as in translation.en",
    )
    corpora: list[CorpusConfig] = option(
        [],
        help="several corpora to train on instead of --src-train and --pairs-train, each a mapping "
        "with keys of name, src, tgt, pairs, weight, source_tag, target_prefix (in a YAML file "
        "only)",
    )
    temperature: float | None = option(
        None,
        help="draw from a corpus of n pairs in proportion to n^(1/temperature) instead of n: above "
        "1 small corpora come more often",
        minimum=0.01,
        auto="each pair once an epoch, or as the weights say",
    )
    held_out: float = option(
        0.01,
        help="part of the training pairs held out for validation where no dev files are given, "
        "at most 2000 pairs; the same ones for every run and seed",
        minimum=0.0,
        maximum=0.5,
    )
    bad_lines: Literal["error", "skip"] = option(
        "error",
        help="what to do with a pair that has an empty line or undecodable bytes: stop at the "
        "first, or skip all and report how many",
    )
    max_length: int = option(
        256, help="longer training pairs are skipped and counted", unit="tokens a side", minimum=1
    )
    long_lines: Literal["error", "skip"] = option(
        "skip", help="whether longer pairs, or pairs of too unequal length, are an error instead"
    )
    max_length_ratio: float | None = option(
        None,
        help="training pairs in which one side has this many times the tokens of the other are "
        "skipped and counted",
        minimum=1.0,
        auto="no limit",
    )
    duplicates: Literal["keep", "drop"] = option(
        "keep", help="what to do with training pairs that were there before, letter for letter"
    )
    identical: Literal["keep", "drop"] = option(
        "keep", help="what to do with training pairs of the same text on both sides"
    )
    tokenizer_type: Literal["bpe", "unigram"] = option(
        "bpe", help="kind of SentencePiece model to train"
    )
    vocab_size: int | None = option(
        None, help="size of the vocabulary", unit="pieces", minimum=264, auto=FROM_DATA
    )
    joint_vocab: bool = option(
        True, help="one vocabulary for both languages; without it one for each"
    )
    character_coverage: float = option(
        1.0,
        help="part of the characters in the text that get a piece of their own; the rest falls "
        "back to bytes (0.9995 suits Chinese and Japanese)",
        minimum=0.9,
        maximum=1.0,
    )
    tokenizer: str | None = option(
        None,
        help="a SentencePiece model of yours for both languages, or a folder with a tokenizer of "
        "BERT or GPT-2",
        auto="one is trained",
    )
    src_tokenizer: str | None = option(
        None, help="a SentencePiece model of yours for the source", auto="one is trained"
    )
    tgt_tokenizer: str | None = option(
        None, help="a SentencePiece model of yours for the target", auto="one is trained"
    )
    cache: str | None = option(
        None,
        help="folder for token ids, kept from run to run",
        auto="$TRANSFORMER_EXT_CACHE, else ~/.cache/transformer_ext",
    )
    prepare_workers: int | None = option(
        None,
        help="processes that turn text into token ids; 0 does it in this one; the result is the "
        "same",
        minimum=0,
        maximum=256,
        auto="as many as CPUs may be used, none for little text",
    )

    @property
    def shipped(self) -> bool:
        """Whether no text is named, so that the shipped one is meant."""
        return not (self.src_train or self.pairs_train or self.corpora)

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):
            key = "data.{}_" + name
            check_sides(key, getattr(self, f"src_{name}"), getattr(self, f"tgt_{name}"))
            sides = [getattr(self, f"{side}_{name}") for side in ("src", "tgt", "pairs")]
            seen: set[tuple[str, ...]] = set()
            for files in (*zip(*sides[:2], strict=True), *zip(sides[2])):
                place = tuple(map(os.path.realpath, files))
                if place in seen:
                    raise ConfigError(
                        f"{key.format('src' if len(files) == 2 else 'pairs')}: "
                        f"{' with '.join(files)} is given twice; data.corpora with a weight has a "
                        "text more often"
                    )
                seen.add(place)
        others = (*self.src_dev, *self.src_test, *self.pairs_dev, *self.pairs_test)
        if others and self.shipped:
            raise ConfigError("data.src_train: got no file, expected one beside dev or test files")
        if self.corpora and (self.src_train or self.pairs_train):
            given = "src_train" if self.src_train else "pairs_train"
            raise ConfigError(f"data.corpora and data.{given}: expected one of them")
        names = [corpus.name for corpus in self.corpora]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"data.corpora: the name {twice!r} is given twice")
        if self.temperature is not None:
            weighted = next((c.name for c in self.corpora if c.weight is not None), None)
            if weighted is not None:
                raise ConfigError(
                    f"data.temperature and the weight of corpus {weighted!r}: expected one of them"
                )
            if len(self.corpora) < 2:
                raise ConfigError(
                    f"data.temperature: got {self.temperature} without several data.corpora, "
                    "between which it chooses"
                )
        if (self.src_tokenizer is None) != (self.tgt_tokenizer is None):
            raise ConfigError("data.src_tokenizer and data.tgt_tokenizer: expected both or neither")
        if self.tokenizer is not None and self.src_tokenizer is not None:
            raise ConfigError("data.tokenizer: expected it or src_tokenizer and tgt_tokenizer")


@dataclass
class OptimizerConfig:
    """Adam, the learning rate and the loss."""

    learning_rate: float | None = option(
        None,
        help="highest learning rate (for the noam schedule: the factor before its formula)",
        minimum=0.0,
        maximum=1000.0,
        auto=FROM_PRESET,
    )
    schedule: Literal["noam", "inverse_sqrt", "cosine", "linear", "constant"] | None = option(
        None,
        help="course of the learning rate after warm-up; noam is that of the paper, section 5.3",
        auto=FROM_PRESET,
    )
    warmup_steps: int | None = option(
        None,
        help="steps in which the learning rate rises from 0",
        unit="steps",
        minimum=0,
        auto=FROM_PRESET,
    )
    betas: tuple[float, float] = option(
        (0.9, 0.98), help="Adam's decay of the two moments, below 1", minimum=0.0, maximum=1.0
    )
    eps: float = option(1e-9, help="Adam's denominator offset, above 0", minimum=0.0, maximum=1.0)
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0.0, maximum=100.0)
    clip_norm: float = option(
        1.0, help="gradients are scaled down to this norm; 0 is never", minimum=0.0
    )
    label_smoothing: float | None = option(
        None,
        help="label smoothing of the training loss, below 1, section 5.4",
        minimum=0.0,
        maximum=1.0,
        auto="0.1 for translation, 0 for the other tasks",
    )

    def __post_init__(self) -> None:
        if self.learning_rate == 0.0:
            raise ConfigError("optimizer.learning_rate: got 0.0, expected a number above 0")
        if max(self.betas) >= 1.0:
            got = " and ".join(map(str, self.betas))
            raise ConfigError(f"optimizer.betas: got {got}, expected numbers below 1")
        if self.eps == 0.0:
            raise ConfigError("optimizer.eps: got 0.0, expected a number above 0")
        if self.label_smoothing is not None and self.label_smoothing >= 1.0:
            raise ConfigError(
                f"optimizer.label_smoothing: got {self.label_smoothing}, expected a number below 1: "
                "no probability would be left for the right token"
            )


@dataclass
class TrainingConfig:
    """Batches, length of the training, device."""

    max_tokens: int | None = option(
        None,
        help="size of a batch without padding",
        unit="target tokens a device",
        minimum=1,
        auto=FROM_PRESET,
    )
    accum_steps: int = option(
        1,
        help="batches whose gradients are added up for one step",
        unit="batches",
        minimum=1,
        maximum=10_000,
    )
    max_steps: int | None = option(
        None, help="end after this many steps", unit="steps", minimum=1, auto=FROM_PRESET
    )
    max_epochs: int | None = option(
        None, help="end after this many passes over the data", minimum=1, auto="no limit"
    )
    max_minutes: float | None = option(
        None, help="end after this long", unit="minutes", minimum=0.0, auto="no limit"
    )
    validate_every: int | None = option(
        None, help="steps between validations", unit="steps", minimum=1, auto=FROM_PRESET
    )
    early_stop_patience: int | None = option(
        None,
        help="end after this many validations without a better result; 0 is never",
        unit="validations",
        minimum=0,
        auto=FROM_PRESET,
    )
    ema_decay: float = option(
        0.0,
        help="validate, translate and keep an exponential moving average of the weights with this "
        "decay a step, for example 0.999; 0 is none",
        minimum=0.0,
        maximum=0.999999,
    )
    max_skipped_steps: int = option(
        20,
        help="end with an error when more steps since the last validation had a loss or gradients "
        "that are NaN or infinite; such a step is skipped, its batches are saved",
        unit="steps",
        minimum=0,
    )
    log_every: int = option(
        50, help="steps between lines of a log that is not a terminal", unit="steps", minimum=1
    )
    seed: int = option(
        1, help="of weights, order of batches and dropout", minimum=0, maximum=2**63 - 1
    )
    device: str = option(
        "auto", help="auto, cpu, cuda, cuda:1, mps; auto takes a GPU if there is one"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type of the activations; weights are always float32"
    )
    cuda_graphs: bool = option(
        True,
        help="record the steps on a GPU and replay them as CUDA graphs, one for each shape of the "
        "batches; the numbers are the same without",
    )
    threads: int | None = option(
        None,
        help="CPU threads",
        minimum=1,
        maximum=1024,
        auto="the physical cores this process may use",
    )
    data_workers: int | None = option(
        None,
        help="threads that read the next batches while a step is computed; 0 reads each when it is "
        "needed; the batches are the same for any number",
        minimum=0,
        maximum=64,
        auto="1 beside a GPU, 0 on the CPU, where they take the step's time",
    )
    subword_dropout: float = option(
        0.0,
        help="cuts the training text into other pieces each time it is read: the share of a BPE "
        "model's merges that are left out, or a unigram model's alpha; the papers take 0.1; 0 is "
        "never",
        minimum=0.0,
        maximum=1.0,
    )
    subword_dropout_sides: Literal["both", "source", "target"] = option(
        "both", help="where --subword-dropout acts"
    )

    def __post_init__(self) -> None:
        if self.subword_dropout_sides != "both" and not self.subword_dropout:
            raise ConfigError(
                "training.subword_dropout_sides: has no effect without training.subword_dropout"
            )


@dataclass
class EvaluationConfig:
    """How validation and the final test translate."""

    # The same ranges as in SearchOptions, so that a mistake is found before the training.

    beam_size: int = option(
        4, help="beam size of the final test", unit="hypotheses", minimum=1, maximum=1000
    )
    length_penalty: float = option(
        0.6, help="GNMT length penalty of the final test", minimum=0.0, maximum=50.0
    )
    validation_beam_size: int = option(
        1,
        help="beam size at each validation; 1 is greedy",
        unit="hypotheses",
        minimum=1,
        maximum=1000,
    )
    validation_metric: Literal["nll", "accuracy", "bleu", "chrf", "exact", "macro_f1"] = option(
        "nll",
        help="what says which validation is the best, for the checkpoints kept and for early "
        "stopping: negative log-likelihood or accuracy per label, or a score of the task: bleu and "
        "chrf of translations, exact of made-up sequences, macro_f1 of labels",
    )
    validation_sentences: int = option(
        300, help="dev sentences translated at each validation", unit="sentences", minimum=0
    )


@dataclass
class OutputConfig:
    """Where the model goes, and what is kept."""

    output: str | None = option(
        None, help="folder of the run: models, checkpoints, log, results", auto="a new one in runs/"
    )
    overwrite: bool = option(False, help="replace the run that lies in the output folder")
    resume: bool = option(False, help="go on with the run that lies in the output folder")
    dry_run: bool = option(
        False,
        help="load everything, run 20 steps (on a GPU 120), estimate time and memory, write no model",
    )
    tensorboard: bool = option(
        False,
        help="write the figures of the log for TensorBoard, too, into tensorboard/ of the run",
    )
    checkpoint_every: int | None = option(
        None, help="steps between checkpoints", unit="steps", minimum=1, auto="at each validation"
    )
    keep_checkpoints: int = option(5, help="newest checkpoints kept", minimum=1)
    keep_best: int = option(1, help="best checkpoints kept beside the newest ones", minimum=1)
    average_last: int | None = option(
        None,
        help="newest checkpoints averaged into the final model; 1 is none",
        minimum=1,
        auto="5, or keep_checkpoints where that is less",
    )
    average_best: int = option(
        1, help="best checkpoints averaged instead of the newest ones; 1 is none", minimum=1
    )

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise ConfigError("output.overwrite and output.resume: expected one of them")
        if self.overwrite and self.output is None:
            raise ConfigError("output.overwrite: expected output beside it, the folder to replace")
        if self.average_last is not None and self.average_last > self.keep_checkpoints:
            raise ConfigError(
                f"output.average_last: got {self.average_last}, expected at most keep_checkpoints, "
                f"{self.keep_checkpoints}: the others are not there any more"
            )
        if self.average_best > self.keep_best:
            raise ConfigError(
                f"output.average_best: got {self.average_best}, expected at most keep_best, "
                f"{self.keep_best}: the others are not there any more"
            )

    @property
    def averaged_last(self) -> int:
        """``average_last``, or what takes its place."""
        return min(5, self.keep_checkpoints) if self.average_last is None else self.average_last


@dataclass
class SyntheticConfig:
    """Sequences of numbers to copy, sort or reverse."""

    symbols: int = option(
        20, help="how many different numbers there are", minimum=2, maximum=10_000
    )
    sequence_lengths: tuple[int, int] = option(
        (4, 12), help="numbers in the shortest and in the longest sequence", minimum=1, maximum=500
    )
    sequences: int = option(20_000, help="sequences to train on", minimum=1)

    def __post_init__(self) -> None:
        shortest, longest = self.sequence_lengths
        if shortest > longest:
            raise ConfigError(
                f"synthetic.sequence_lengths: got {shortest} {longest}, expected the shortest first"
            )


@dataclass
class LanguageModelTaskConfig:
    """Text for a language model."""

    text_train: list[str] = option(
        [],
        help="text to train on, one or more files, plain, .gz or .xz: lines, or .jsonl or .json "
        "with an object a line that has a text",
    )
    text_dev: list[str] = option(
        [], help="text for validation; without it a part of the training text"
    )
    text_test: list[str] = option([], help="text for the final perplexity")
    block_size: int | None = option(
        None,
        help="join the lines and cut them into sequences of this length",
        unit="tokens",
        minimum=2,
        auto="each line is a sequence",
    )
    prompts: list[str] = option(
        [],
        help="beginnings that the final model continues",
    )

    def __post_init__(self) -> None:
        if (self.text_dev or self.text_test) and not self.text_train:
            raise ConfigError(
                "language_model.text_train: got no file, expected one beside dev or test files"
            )


@dataclass
class ClassificationConfig:
    """Labelled text for a classifier."""

    labelled_train: list[str] = option(
        [],
        help="texts to train on, one or more files, plain, .gz or .xz: lines of a label, a tab and "
        "a text, or .jsonl or .json with an object a line that has a label and a text",
    )
    labelled_dev: list[str] = option(
        [], help="texts for validation; without them a part of the training texts"
    )
    labelled_test: list[str] = option([], help="texts for the final test")
    pooling: Literal["first", "mean"] | None = option(
        None,
        help="what stands for a text: the state of its first token, or the mean of all",
        auto="mean, or as the model of --init-from has it",
    )
    pooler: bool | None = option(
        None,
        help="whether a projection with tanh follows, as in BERT",
        auto="no, or as the model of --init-from has it",
    )

    def __post_init__(self) -> None:
        if (self.labelled_dev or self.labelled_test) and not self.labelled_train:
            raise ConfigError(
                "classification.labelled_train: got no file, expected one beside dev or test files"
            )


#: The group of options that belongs to each task; translation has its own among ``data``.
_TASK_GROUPS = {
    "copy": "synthetic",
    "sort": "synthetic",
    "reverse": "synthetic",
    "language-model": "language_model",
    "classify": "classification",
}
#: Options of ``data`` that have a meaning for every task, for texts of one side, and for made-up
#: sequences; the rest is about pairs of sentences.
_TEXT_OPTIONS = (
    *("held_out", "bad_lines", "max_length", "long_lines", "tokenizer_type", "vocab_size"),
    *("character_coverage", "tokenizer", "cache"),
)
_SYNTHETIC_OPTIONS = ("cache",)


@dataclass
class TrainConfig:
    """Everything that ``python -m transformer_ext.train`` can be told.

    A value of None is chosen by the trainer from the preset, the data and the device.
    """

    task: Literal["translate", "copy", "sort", "reverse", "language-model", "classify"] = option(
        "translate",
        help="what to learn: a translation; to copy, sort or reverse numbers, which are made for "
        "it; to go on with a text (decoder only); or to label texts (encoder only)",
    )
    preset: str | None = option(
        None,
        help="size of the model, with a schedule that suits it",
        choices=tuple(PRESETS),
        auto="follows from the number of pairs and the device",
    )
    init_from: str | None = option(
        None,
        help="begin with the weights of this model directory (fine-tuning); its tokenizer and "
        "architecture are kept, dropout aside",
        auto="random weights",
    )
    data: DataConfig = group(DataConfig, help="Text and tokens; without files, the shipped corpus.")
    model: dict[str, Any] = overrides(
        TransformerConfig,
        help="The model; what is not given follows from the preset.",
        exclude=(
            "src_vocab_size",
            "tgt_vocab_size",
            "pad_id",
            "unk_id",
            "bos_id",
            "eos_id",
            "decoder_start_id",
        ),
    )
    optimizer: OptimizerConfig = group(OptimizerConfig, help="Adam, learning rate, loss.")
    training: TrainingConfig = group(TrainingConfig, help="Batches, length of training, device.")
    evaluation: EvaluationConfig = group(
        EvaluationConfig, help="Translation at validation and in the final test."
    )
    output: OutputConfig = group(OutputConfig, help="Where the model goes, and what is kept.")
    synthetic: SyntheticConfig = group(
        SyntheticConfig, help="Numbers to copy, sort or reverse (--task copy, sort, reverse)."
    )
    language_model: LanguageModelTaskConfig = group(
        LanguageModelTaskConfig,
        help="Text for --task language-model; without files, the English side of the shipped text.",
    )
    classification: ClassificationConfig = group(
        ClassificationConfig,
        help="Labelled text for --task classify; without files, matching and other shipped pairs.",
    )

    def __post_init__(self) -> None:
        for name in dict.fromkeys(_TASK_GROUPS.values()):
            if _TASK_GROUPS.get(self.task) == name:
                continue
            tasks = [task for task, group in _TASK_GROUPS.items() if group == name]
            values = getattr(self, name)
            for entry in _group_options(type(values), name):
                if getattr(values, entry.name) != entry.default:
                    raise ConfigError(
                        f"{entry.key}: is an option of task {' or '.join(tasks)}, but the task is "
                        f"{self.task}; --task {tasks[0]} takes {entry.flag}"
                    )
        if self.task == "translate":
            return
        if self.training.subword_dropout:
            raise ConfigError(
                f"--subword-dropout: --task {self.task} reads its text as it is; leave it out"
            )
        synthetic = _TASK_GROUPS[self.task] == "synthetic"
        if self.init_from is not None and synthetic:
            raise ConfigError(
                f"--init-from: --task {self.task} begins with random weights; leave it out"
            )
        known = _SYNTHETIC_OPTIONS if synthetic else _TEXT_OPTIONS
        for entry in _group_options(DataConfig, "data"):
            if entry.name not in known and getattr(self.data, entry.name) != entry.default:
                raise ConfigError(f"{entry.key}: has no meaning for the task {self.task}")
