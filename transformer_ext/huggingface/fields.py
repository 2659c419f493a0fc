"""What a ``config.json`` of Hugging Face says, read with care: each value is used, or refused by name."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformer_ext.files import FileError, read_json

#: transformers' name of an activation -> ours.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
#: And back.
THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "swish"}

_LARGEST = 2**31 - 1
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


class HuggingFaceError(FileError):
    """A model that one side has and the other cannot hold; the message names the field."""


class Fields:
    """The values of a JSON file by key.

    A value of null is as if the key were not there, as transformers has it.

    Args:
        path: the file, for messages.
        values: what it holds.
        aliases: other names that a key may have.

    Raises:
        HuggingFaceError: a key and its alias have two values.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.values = {key: value for key, value in values.items() if value is not None}
        for key, alias in (aliases or {}).items():
            if (
                alias in self.values
                and self.values.setdefault(key, self.values[alias]) != (self.values[alias])
            ):
                self.fail(alias, f"{self.values[key]!r:.40} as {key} is")

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Those of a file, none where there is no such file."""
        return cls(path, read_json(path) if path.is_file() else {})

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands there."""
        return self.values.get(key, default)

    def fail(self, key: str, expected: str) -> NoReturn:
        """Refuse the value of a key."""
        if key not in self.values:
            raise HuggingFaceError(f"{self.path}: {key} is missing, expected {expected}")
        raise HuggingFaceError(
            f"{self.path}: {key}: got {_SHOWN.repr(self.values[key])}, expected {expected}"
        )

    def integer(
        self, key: str, default: int | None = None, *, least: int = 0, most: int = _LARGEST
    ) -> int:
        """A whole number, or a list of one; without a default it must be there."""
        value = self.values.get(key, default)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if type(value) is not int or not least <= value <= most:
            self.fail(
                key,
                f"an integer from {least} to {most}"
                if most < _LARGEST
                else f"an integer of at least {least}",
            )
        return value

    def number(self, key: str, default: float, *, least: float, below: float) -> float:
        """A number of a range."""
        value = self.values.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or not least <= value < below
        ):
            self.fail(key, f"a number from {least:g} to below {below:g}")
        return value

    def probability(self, key: str, default: float) -> float:
        """The rate of a dropout."""
        return float(self.number(key, default, least=0.0, below=1.0))

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            self.fail(key, "a text")
        return value

    def token(self, key: str, default: str) -> str:
        """The text of a special token, which may be given with how it is found in a text."""
        value = self.values.get(key, default)
        if isinstance(value, dict):
            value = value.get("content")
        if not isinstance(value, str):
            self.fail(key, "a text")
        return value

    def activation(self, key: str, default: str) -> str:
        """Our name of an activation."""
        name = self.values.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            self.fail(key, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def only(self, key: str, value: Any, why: str) -> None:
        """Refuse any other value of a key, which may be missing."""
        got = self.values.get(key, value)
        if type(got) is not type(value) or got != value:
            self.fail(key, f"{_as_json(value)}: {why}")

    def absent(self, key: str, why: str) -> None:
        """Refuse any value of a key but null, false and nothing in it."""
        if self.values.get(key):
            self.fail(key, f"null: {why}")

    def unknown(self, known: Collection[str]) -> list[str]:
        """Keys that nobody has heard of.

        Raises:
            HuggingFaceError: one is nearly the name of a known key that is missing.
        """
        found = [key for key in self.values if key not in known]
        missing = [key for key in known if key not in self.values]
        for key in found:
            near = difflib.get_close_matches(key, missing, n=1, cutoff=0.9)
            if near:
                raise HuggingFaceError(
                    f"{self.path}: unknown key {key!r:.80}; did you mean {near[0]!r}?"
                )
        return found


def _as_json(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
