"""A small text and a small model, for tests that train."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest

from transformer_ext.training.trainer import Trainer

_NOUNS = {"cat": "Katze", "dog": "Hund", "house": "Haus", "tree": "Baum", "book": "Buch"}
_VERBS = {"sees": "sieht", "finds": "findet", "likes": "mag", "opens": "öffnet"}
_ADJECTIVES = {"old": "alte", "small": "kleine", "red": "rote", "new": "neue"}

#: A model of some thousand parameters, as options of the command.
SMALL_MODEL = (
    "--preset tiny --d-model 32 --nhead 2 --dim-feedforward 64 --num-encoder-layers 1 "
    "--num-decoder-layers 1 --vocab-size 330 --max-tokens 300 --precision float32 --threads 1 "
    "--device cpu"
).split()


def write_text(folder: Path, pairs: int = 300, seed: int = 0) -> tuple[Path, Path]:
    """Writes ``text.en`` and ``text.de``; returns their paths."""
    generator = random.Random(seed)
    english, german = [], []
    for _ in range(pairs):
        nouns = generator.choices(list(_NOUNS), k=2)
        verb = generator.choice(list(_VERBS))
        adjectives = generator.choices(list(_ADJECTIVES), k=generator.randint(0, 2))
        english.append(" ".join([nouns[0], verb, *adjectives, nouns[1]]))
        words = [_NOUNS[nouns[0]], _VERBS[verb], *(_ADJECTIVES[a] for a in adjectives)]
        german.append(" ".join([*words, _NOUNS[nouns[1]]]))
    paths = folder / "text.en", folder / "text.de"
    for path, lines in zip(paths, (english, german), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def undocumented_files(folder: Path) -> list[str]:
    """The files in a folder that the tables of docs/formats.md and docs/data.md do not name."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    pages = [(docs / name).read_text(encoding="utf-8") for name in ("formats.md", "data.md")]
    rows = [line for page in pages for line in page.splitlines() if line.startswith("|")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    return [file for file in files if not any(fnmatch(file, name) for name in names)]


@contextmanager
def interrupted_after(*steps: int) -> Iterator[None]:
    """Trainings within the block get a SIGINT, as from Ctrl-C, when these steps are done."""
    train_step = Trainer.train_step

    def interrupted(self: Trainer) -> None:
        train_step(self)
        if self.progress.step in steps:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        yield
