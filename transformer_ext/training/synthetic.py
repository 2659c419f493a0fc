"""Synthetic tasks: learn to copy, sort or reverse sequences of numbers.

Copying is the first example of the Annotated Transformer. The sequences are made here and are then
text like any other, one piece for each number: the model is trained, checked and resumed as one that
translates, and ``python -m transformer_ext.translate`` reads it. What is judged is how many unseen
sequences come out without one wrong number.
"""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext.config import ConfigError, SyntheticConfig, TrainConfig
from transformer_ext.data import (
    ParallelDataset,
    SentencePieceTokenizer,
    build_dataset,
    train_tokenizer,
)
from transformer_ext.data.dataset import DATASET_VERSION
from transformer_ext.data.preparation import PreparedData, cache_folder, cached
from transformer_ext.files import atomic_write
from transformer_ext.training.machine import Machine
from transformer_ext.training.report import Console
from transformer_ext.training.scoring import Decoder, print_samples
from transformer_ext.training.sizing import Recipe
from transformer_ext.training.translation import TranslationRun

__all__ = ["RULES", "ExactScorer", "Sequences", "SyntheticRun", "make_sequences"]

#: What becomes of a sequence, by the name of the task.
RULES: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": list,
    "sort": sorted,
    "reverse": lambda numbers: numbers[::-1],
}
_DEV = _TEST = 500

Pairs = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a task as (source, target); none occurs twice.

    Attributes:
        train: to learn from.
        dev: for validation.
        test: for the final test, of the same lengths.
        longer: longer than any in training.
    """

    train: Pairs
    dev: Pairs
    test: Pairs
    longer: Pairs


def make_sequences(task: str, config: SyntheticConfig, seed: int = 0) -> Sequences:
    """Random sequences, the same ones for the same arguments.

    Raises:
        ConfigError: there are not as many different ones.
    """
    rule, generator = RULES[task], np.random.default_rng([seed, config.symbols])
    seen: set[tuple[int, ...]] = set()

    def some(count: int, shortest: int, longest: int) -> Pairs:
        found: Pairs = []
        # So many in vain, and most of what there is has been found.
        tries = 20 * count + 1000
        while len(found) < count:
            length = int(generator.integers(shortest, longest + 1))
            numbers = generator.integers(1, config.symbols + 1, length).tolist()
            tries -= 1
            if not tries:
                raise ConfigError(
                    f"synthetic.sequences: there are not {config.sequences:,} different sequences "
                    f"of {shortest} to {longest} out of {config.symbols} symbols beside those for "
                    "validation and test; expected fewer, more symbols, or longer sequences"
                )
            if tuple(numbers) not in seen:
                seen.add(tuple(numbers))
                found.append((_text(numbers), _text(rule(numbers))))
        return found

    shortest, longest = config.sequence_lengths
    longer = some(_TEST, longest + 1, longest + max(1, longest // 2))
    dev, test = some(_DEV, shortest, longest), some(_TEST, shortest, longest)
    return Sequences(some(config.sequences, shortest, longest), dev, test, longer)


def _text(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _tokenizer_of(symbols: int, path: Path) -> None:
    """A SentencePiece model in which each number is a piece."""
    words = [str(number) for number in range(1, symbols + 1)]
    # All merges that the words have are made: fewer than one for each of their characters.
    size = 300 + sum(len(word) + 1 for word in words)
    path.write_bytes(train_tokenizer([" ".join(words)] * 4, vocab_size=size)[0])
    tokenizer = SentencePieceTokenizer(path)
    assert all(len(tokenizer.encode(word)) == 1 for word in words)


def prepare(config: TrainConfig, say: Callable[[str], None]) -> tuple[PreparedData, Sequences]:
    """Tokenizer and data set of a task; the latter is made once and then cached."""
    sequences = make_sequences(config.task, config.synthetic)
    cache = cache_folder(config.data)
    symbols = config.synthetic.symbols
    folder = cached(
        cache, "symbols", {"symbols": symbols}, lambda f: _tokenizer_of(symbols, f / "t.model")
    )
    tokenizer = SentencePieceTokenizer(folder / "t.model")

    def as_set(name: str, pairs: Pairs) -> ParallelDataset:
        key = {
            "task": config.task,
            "synthetic": dataclasses.asdict(config.synthetic),
            "part": name,
            "tokenizer": tokenizer.sha256,
            "dataset": DATASET_VERSION,
        }
        found = cached(
            cache, "synthetic", key, lambda f: build_dataset(f, pairs, tokenizer, tokenizer)
        )
        return ParallelDataset(found)

    say(f"making {config.synthetic.sequences:,} sequences")
    train = as_set("train", sequences.train)
    shortest, longest = config.synthetic.sequence_lengths
    messages = [
        f"task: {config.task}; {len(train):,} sequences of {shortest} to {longest} numbers from 1 "
        f"to {symbols}",
        f"validation and test: {_DEV} and {_TEST} others, and {_TEST} longer ones of {longest + 1} "
        f"to {longest + max(1, longest // 2)} numbers",
    ]
    prepared = PreparedData(
        name=config.task,
        train=train,
        source_tokenizer=tokenizer,
        target_tokenizer=tokenizer,
        dev=sequences.dev,
        test=sequences.test,
        dev_set=as_set("dev", sequences.dev),
        corpus_weights=[1.0],
        messages=messages,
    )
    return prepared, sequences


def recipe(device_type: str) -> Recipe:
    """A minute or less on two CPU cores."""
    return Recipe(
        preset="tiny",
        vocab_size=None,
        # Nothing is learnt by heart that dropout would have to prevent: there are enough examples.
        model={"norm_first": True, "dropout": 0.0},
        learning_rate=2e-3,
        schedule="linear",
        warmup_steps=100,
        max_tokens=1024 if device_type == "cpu" else 4096,
        max_steps=600,
        validate_every=150,
        early_stop_patience=None,
        label_smoothing=0.0,
    )


class ExactScorer:
    """The share of sequences that come out without a wrong number.

    Args:
        pairs: Source and target of each.
        decoder: Writes the outputs, greedily.
    """

    def __init__(self, pairs: Pairs, decoder: Decoder) -> None:
        self._pairs = pairs
        self._decoder = decoder

    def outputs(self, directory: Path) -> list[str]:
        """What the model in ``directory`` makes of each source."""
        return self._decoder(directory, [source for source, _ in self._pairs], 1)

    def share(self, outputs: Sequence[str]) -> float:
        """How many of the outputs are right, in percent."""
        right = sum(o == target for o, (_, target) in zip(outputs, self._pairs, strict=True))
        return 100.0 * right / len(self._pairs)

    def __call__(self, directory: Path) -> dict[str, float]:
        """The score ``exact``."""
        return {"exact": self.share(self.outputs(directory))}


class SyntheticRun(TranslationRun):
    """Learns one of :data:`RULES`."""

    sequences: Sequences

    @staticmethod
    def preferences(config: TrainConfig) -> TrainConfig:
        """One thread and float32: for a model so small more of either cost more than they bring."""
        training = config.training
        return dataclasses.replace(
            config,
            training=dataclasses.replace(
                training,
                threads=training.threads or 1,
                precision="float32" if training.precision == "auto" else training.precision,
            ),
        )

    @staticmethod
    def prepare(config: TrainConfig, machine: Machine, console: Console) -> SyntheticRun:
        """Makes the sequences.

        Raises:
            ValueError: There are not as many different ones.
        """
        with machine.world.first_goes_first():
            prepared, sequences = prepare(
                config, lambda text: console.print(f"data       {text} ...")
            )
        run = SyntheticRun(config, machine, console, prepared)
        run.sequences = sequences
        return run

    def _recipe(self, config: TrainConfig, device: str, tokens_per_pair: float) -> Recipe:
        return recipe(device)

    all_scores = ("exact",)

    @property
    def scores(self) -> tuple[str, ...]:
        """What is right as a whole, in percent."""
        return self.all_scores if self.config.evaluation.validation_sentences else ()

    def make_scorer(self) -> Any:
        """Some of the unseen sequences."""
        count = self.config.evaluation.validation_sentences
        return ExactScorer(self.sequences.dev[:count], self.decoder) if count else None

    def test(self, model: Path) -> dict[str, Any]:
        """Unseen sequences of the lengths of training, and longer ones."""
        assert self.folder is not None
        results: dict[str, Any] = {}
        shortest, longest = self.config.synthetic.sequence_lengths
        for part, pairs, lengths in (
            ("test", self.sequences.test, f"{shortest} to {longest} numbers"),
            ("longer", self.sequences.longer, f"more than {longest} numbers, as none in training,"),
        ):
            scorer = ExactScorer(pairs, self.decoder)
            with warnings.catch_warnings():
                # That they are longer than any in training is the point.
                warnings.simplefilter("ignore", UserWarning)
                outputs = scorer.outputs(model)
            results[f"{part}_exact"] = scorer.share(outputs)
            self.console.print(
                f"{part}: {results[f'{part}_exact']:.1f} % of {len(pairs)} unseen sequences of "
                f"{lengths} come out without a wrong number"
            )
            atomic_write(self.folder / f"{part}.output.txt", "".join(f"{o}\n" for o in outputs))
            if part == "test":
                self.console.print()
                print_samples(self.console, pairs, outputs, [0, 1])
        return results

    def farewell(self, model: Path) -> Sequence[str]:
        """How to try it."""
        return [
            f"try        echo {shlex.quote(self.sequences.test[0][0])} | "
            f"python -m transformer_ext.translate {shlex.quote(str(model))}"
        ]
