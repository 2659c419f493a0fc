"""Makes a parallel corpus of any size, for measuring what large text costs.

    python benchmarks/corpus.py --pairs 10000000 --folder /tmp/corpus

Each pair is one of the shipped corpus, so that lengths are real, with some words replaced on both
sides: by other words of the corpus, drawn as often as they occur, and by new ones put together from
halves of others or digits. The share of new ones makes the number of different words grow with the
text about as in real text (`--new-words`; different words are counted at the end), which matters for
whatever remembers words. The text means nothing; a model does not learn from it.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from transformer_ext.data import read_pairs, shipped_corpus

_REPLACED = 0.08
_PIECE = 500_000


class _Side:
    def __init__(self, texts: list[str]) -> None:
        self.sentences = [text.split(" ") for text in texts]
        self.words = [word for words in self.sentences for word in words if word]
        self.long = [word for word in self.words if len(word) > 5]

    def write(self, number: int, draw: random.Random, new_words: float) -> str:
        words = self.sentences[number]
        # At least one, so that few pairs occur twice.
        for _ in range(1 + int(len(words) * 2 * _REPLACED * draw.random())):
            words = list(words)
            place = int(draw.random() * len(words))
            if draw.random() * _REPLACED < new_words:
                words[place] = self._new(draw)
            else:
                words[place] = self.words[int(draw.random() * len(self.words))]
        return " ".join(words)

    def _new(self, draw: random.Random) -> str:
        if draw.random() < 0.2:
            return str(int(draw.random() ** 3 * 1e6))
        first = self.long[int(draw.random() * len(self.long))]
        second = self.long[int(draw.random() * len(self.long))]
        return first[: 2 + len(first) // 2] + second[len(second) // 2 :]


def make(
    folder: Path, pairs: int, seed: int = 1, new_words: float = 0.02, first: int = 0
) -> tuple[Path, Path]:
    """Writes ``train.en`` and ``train.de``; returns their paths.

    Args:
        folder: where to.
        pairs: how many.
        seed: of the choices.
        new_words: part of the words that are new.
        first: write the pairs from this one on only, behind what is there; a multiple of _PIECE.
    """
    paths = folder / "train.en", folder / "train.de"
    folder.mkdir(parents=True, exist_ok=True)
    shipped = list(read_pairs(shipped_corpus().train))
    sides = [_Side([pair[side] for pair in shipped]) for side in (0, 1)]
    mode = "a" if first else "w"
    with (
        open(paths[0], mode, encoding="utf-8") as src,
        open(paths[1], mode, encoding="utf-8") as tgt,
    ):
        for pair in range(first, pairs):
            if pair % _PIECE == 0:
                draw = random.Random(seed * 1_000_003 + pair)
            number = int(draw.random() * len(shipped))
            src.write(sides[0].write(number, draw, new_words) + "\n")
            tgt.write(sides[1].write(number, draw, new_words) + "\n")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="append from this pair on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--new-words", type=float, default=0.02, help="part of the words")
    parser.add_argument("--count", action="store_true", help="count the different words")
    arguments = parser.parse_args()
    start = time.perf_counter()
    paths = make(
        arguments.folder, arguments.pairs, arguments.seed, arguments.new_words, arguments.first
    )
    print(f"made in {time.perf_counter() - start:.0f} s")
    for path in paths if arguments.count else ():
        words: set[str] = set()
        count = 0
        with open(path, encoding="utf-8") as file:
            for line in file:
                found = line[:-1].split(" ")
                count += len(found)
                words.update(found)
        print(
            f"{path}: {path.stat().st_size:,} bytes, {count:,} words, {len(words):,} different ones"
        )


if __name__ == "__main__":
    main()
