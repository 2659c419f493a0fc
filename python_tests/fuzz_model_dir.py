"""Damages a model directory in many ways and loads it: each must be one clear error, or a translation.

    python python_tests/fuzz_model_dir.py --cases 100000 --seed 7

Run by test_files.py with few cases, in a process of its own: a crash, a hang and a huge allocation
are failures too. Prints the number of cases by outcome; the exit status is 1 after the first that
is not allowed, which is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import random
import resource
import shutil
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding_helpers import SENTENCES, save_random_model

from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import load_model_dir, save_model_dir
from transformer_ext.inference.translator import Translator
from transformer_ext.model.config import TransformerConfig

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
VOCABULARY = "vocabulary.json"
# What one case may take, in seconds and in bytes of address space beside what is there.
SECONDS, BYTES = 20, 512 << 20

MISSING = object()
VALUES: list[Any] = [
    *(MISSING, None, True, False, "", "x", "8", [], [1], {}, {"a": 1}),
    *(-(10**30), -(2**31), -1, 0, 1, 2, 3, 5, 7, 9, 31, 33, 64, 1000, 2**31 - 1, 2**31, 2**32 + 4),
    *(2**63 - 1, 2**63, 10**30, float("nan"), float("inf"), float("-inf"), 1e308, 1e-308, -0.5),
    *(0.5, 4.0, "x" * 5000, "\0", "\ud800", "..", "/etc/passwd", "rope", "learned", "none", "rms"),
    *("relu", "swiglu"),
]
FIELDS = [
    *(("model", field.name) for field in dataclasses.fields(TransformerConfig)),
    *(("tokenizer", key) for key in ("source", "target", "sha256", "source_vocabulary")),
    *(("training", key) for key in ("max_train_length", "note")),
    *((key,) for key in ("format_version", "model", "tokenizer", "training", "other")),
    ("model", "unheard_of"),
]


def assign(values: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        values = values.get(key)  # another change took it away
        if not isinstance(values, dict):
            return
    if value is MISSING:
        values.pop(place[-1], None)
    else:
        values[place[-1]] = value


def flip(chance: random.Random, data: bytes, begin: int = 0, end: int | None = None) -> bytes:
    """Some bits, or some bytes, of a part are others."""
    changed = bytearray(data)
    end = len(data) if end is None else end
    for _ in range(chance.choice((1, 1, 2, 8, 60))):
        at = chance.randrange(begin, end)
        changed[at] = chance.choice((changed[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
    return bytes(changed)


def cut(chance: random.Random, data: bytes) -> bytes:
    """Shorter, longer, or without a part."""
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return data + chance.randbytes(chance.choice((1, 4, 8, 1000)))
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice((1, 4, 64, 4096)))
    return data[:begin] + (data[begin:end] * 2 if kind == 2 else b"") + data[end:]


def some_config(chance: random.Random, data: bytes) -> bytes:
    values = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        assign(values, chance.choice(FIELDS), chance.choice(VALUES))
    return json.dumps(values).encode()


def some_json(chance: random.Random, data: bytes) -> bytes:
    """Text that a JSON reader may stumble over."""
    kind = chance.randrange(5)
    if kind == 0:
        return b"[" * chance.choice((10, 1000, 100_000))
    if kind == 1:
        return b'{"a":' * 20_000
    if kind == 2:
        return data.replace(b"1", b"1" * chance.choice((20, 5000)), 1)
    if kind == 3:
        return chance.choice((b"", b"null", b"[]", b"3", b'"x"', b"\xef\xbb\xbf" + data, b"\xff"))
    return data.decode().encode(chance.choice(("utf-16", "utf-32")))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: bytes, rest: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


def some_header(chance: random.Random, data: bytes) -> bytes:
    """Entries of the header are others, others' or twice there."""
    header, rest = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.choice((1, 1, 3))):
        name = chance.choice(names)
        kind = chance.randrange(7)
        if kind == 0:
            assign(header, (name,), chance.choice(VALUES))
        elif kind == 1:
            assign(header, (name, chance.choice(("dtype", "shape"))), chance.choice(VALUES))
        elif kind == 2:
            dtype = chance.choice(("F16", "BF16", "F64", "I32", "I64", "BOOL", "F8_E5M2", "F4"))
            assign(header, (name, "dtype"), dtype)
        elif kind == 3:
            shape = [chance.choice((0, 1, 2, 16, 2**31, 2**62, -1)) for _ in range(3)]
            assign(header, (name, "shape"), chance.choice((shape, shape * 20_000, [1] * 40)))
        elif kind == 4:
            end = len(rest)
            offsets = [chance.choice((0, 4, end // 2, end, end + 4, 2**63, -4)) for _ in range(2)]
            assign(header, (name, "data_offsets"), chance.choice((offsets, offsets[:1], "x")))
        elif kind == 5:
            header[name] = header[chance.choice(names)]
        else:
            assign(header, ("__metadata__",), chance.choice(VALUES))
    return with_header(json.dumps(header).encode(), rest)


def some_length(chance: random.Random, data: bytes) -> bytes:
    length = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data), chance.randrange(len(data))))
    return length.to_bytes(8, "little") + data[8:]


def some_header_text(chance: random.Random, data: bytes) -> bytes:
    header, rest = header_of(data)
    return with_header(some_json(chance, json.dumps(header).encode()), rest)


def some_vocabulary(chance: random.Random, data: bytes) -> bytes:
    values = json.loads(data)
    for _ in range(chance.choice((1, 1, 3))):
        kind = chance.randrange(5)
        pieces = values.get("pieces")
        if kind < 2 or not isinstance(pieces, list) or len(pieces) < 3:
            place = chance.choice(("pieces", "eos", "unk", "pad", "bos", "other"))
            assign(values, (place,), chance.choice(VALUES))
        elif kind == 2:
            chance.shuffle(pieces)
        elif kind == 3:
            pieces[chance.randrange(len(pieces))] = chance.choice((*VALUES[1:], pieces[0]))
        else:
            del pieces[chance.randrange(len(pieces)) :]
    return json.dumps(values).encode()


def flipped_header(chance: random.Random, data: bytes) -> bytes:
    return flip(chance, data, 0, 8 + int.from_bytes(data[:8], "little"))


MUTATIONS: list[tuple[str, Callable[[random.Random, bytes], bytes]]] = [
    *((CONFIG, change) for change in (some_config, some_config, some_config, some_json, flip, cut)),
    (WEIGHTS, some_header),
    *((WEIGHTS, change) for change in (some_header, some_length, some_header_text, flipped_header)),
    *((WEIGHTS, change) for change in (flip, cut)),
    *((TOKENIZER, change) for change in (flip, cut)),
    *((VOCABULARY, change) for change in (some_vocabulary, some_json, flip, cut)),
]


class Fuzz(ABC):
    """A model, another that stays whole, and what came of the damage done to the first.

    Args:
        folder: the model, which is copied.
    """

    #: Name of the outcome that is no error.
    success: str
    #: What may be done to which file.
    mutations: list[tuple[str, Callable[[random.Random, bytes], bytes]]]
    #: Places in the configuration.
    fields: list[tuple[str, ...]]
    #: What a message may say instead of the name of the configuration's file.
    misfits: tuple[str, ...] = ("does not fit the model's configuration",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = Path(shutil.copytree(folder, folder.with_name(f"{folder.name} whole")))
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.expected = self.use(self.whole)
        self.outcomes: Counter[str] = Counter()

    @abstractmethod
    def use(self, folder: Path) -> Any:
        """Load the model and compute something."""

    def names(self, changed: str) -> tuple[str, ...]:
        """What a message about a changed file has one of."""
        # A change of the configuration may be one that the other files do not fit.
        return tuple(self.files) if changed == CONFIG else (changed,)

    def check(self, changed: dict[str, bytes], names: tuple[str, ...], what: str) -> None:
        """Load with these files instead; an error must have one of the names in it."""
        for name, data in changed.items():
            (self.folder / name).write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            self.use(self.folder)
            self.outcomes[self.success] += 1
        except ValueError as error:
            message = str(error)
            self.outcomes[type(error).__name__] += 1
            # Weights that are no longer numbers are seen when they are used.
            if not any(name in message for name in names) and "not finite numbers" not in message:
                raise AssertionError(f"{what}: none of {names} in the message: {message}") from None
            if len(message) > 2000 or "\n" in message:
                raise AssertionError(f"{what}: a message of many lines: {message}") from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        for name in changed:
            (self.folder / name).write_bytes(self.files[name])
        if sum(self.outcomes.values()) % 50 == 0:
            self.check_whole()

    def check_whole(self) -> None:
        assert self.use(self.whole) == self.expected, "another model computes otherwise"

    def every_field(self, step: int = 1) -> None:
        """Each field with each value, or with one of ``step``: the message names the file and, where
        it is no weight's, the field."""
        for number, place in enumerate(self.fields):
            for value in VALUES[number % step :: step]:
                values = json.loads(self.files[CONFIG])
                assign(values, place, value)
                what = f"{CONFIG}: {'.'.join(place)} = {str(value)[:40]!r}"
                changed = {CONFIG: json.dumps(values).encode()}
                self.check(changed, (CONFIG, *self.misfits), what)

    def random_cases(self, cases: int, seed: int) -> None:
        for number in range(cases):
            chance = random.Random(f"{seed} {number}")
            name, change = chance.choice([m for m in self.mutations if m[0] in self.files])
            what = f"case {number} of seed {seed}: {change.__name__} of {name}"
            try:
                changed = {name: change(chance, self.files[name])}
            except UnicodeDecodeError:
                continue
            try:
                self.check(changed, self.names(name), what)
            except AssertionError:
                raise
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        self.check_whole()


class TranslatorFuzz(Fuzz):
    """A model that translates, with a vocabulary beside its tokenizer or without."""

    success = "translated"
    mutations = MUTATIONS
    fields = FIELDS

    def __init__(self, folder: Path, vocabulary: bool) -> None:
        self.folder = save_random_model(folder)
        if vocabulary:
            self.add_vocabulary()
        super().__init__(self.folder)

    def add_vocabulary(self) -> None:
        model = load_model_dir(self.folder)
        tokenizer = model.source_tokenizer
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        special = {name: pieces[getattr(tokenizer, f"{name}_id")] for name in ("eos", "unk", "pad")}
        path = self.folder.parent / VOCABULARY
        path.write_text(json.dumps({"pieces": pieces, **special, "bos": special["pad"]}))
        other = SentencePieceTokenizer(tokenizer.path, path)
        weights = dict(model.weights)
        save_model_dir(self.folder, model.config, weights, other, other, overwrite=True)

    def use(self, folder: Path) -> list[str]:
        with Translator(folder, threads=2) as translator:
            return [t.text for t in translator.translate(SENTENCES[:2], max_length=8)]

    def another_tokenizer(self) -> None:
        other = train_tokenizer(SENTENCES[:4], vocab_size=300)[0]
        self.check({TOKENIZER: other}, (TOKENIZER,), "another tokenizer")


def limit_memory() -> None:
    """From here on a case that allocates much is an error."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=400, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        plain = TranslatorFuzz(Path(folder) / "plain", vocabulary=False)
        other = TranslatorFuzz(Path(folder) / "vocabulary", vocabulary=True)
        limit_memory()
        plain.every_field()
        for fuzz in (plain, other):
            fuzz.another_tokenizer()
            fuzz.random_cases((arguments.cases + 1) // 2, arguments.seed)
    print(dict(plain.outcomes + other.outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
