"""Language modelling: a decoder alone learns to go on with a text, judged by perplexity."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from transformer_ext.config import ConfigError, TrainConfig
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.corpus import counted, shipped_corpus
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.text import Blocks, Lines, TextCounts, read_texts
from transformer_ext.data.text_preparation import TextFiles, prepare_texts
from transformer_ext.files import atomic_write
from transformer_ext.inference.compiled import UnsupportedModelError
from transformer_ext.inference.continuation import continuations
from transformer_ext.inference.options import SearchOptions, SearchResult
from transformer_ext.inference.torch_engine import TorchLanguageModel
from transformer_ext.model import LanguageModel, LanguageModelConfig, language_model_preset
from transformer_ext.training.distributed import World
from transformer_ext.training.machine import Machine
from transformer_ext.training.parent import Parent
from transformer_ext.training.report import Console, JsonLog
from transformer_ext.training.sizing import Recipe, fill, recipe_for, text_tuning_recipe
from transformer_ext.training.text_run import Examples, TextRun, one_stack
from transformer_ext.training.trainer import LossModule, Trainer, evaluate_loss

__all__ = ["LanguageModelRun", "text_perplexities"]


def text_perplexities(nll: float, tokens: int, texts: Sequence[str]) -> dict[str, float]:
    """How well a text was predicted, in figures of which those by word and byte do not depend on
    the vocabulary.

    Args:
        nll: negative log-likelihood of the whole, in nats: of all tokens and all ends of lines.
        tokens: their number.
        texts: the lines. A word is what stands between spaces, or the end of a line; a byte is one
            of UTF-8, the end of a line among them.
    """
    words = sum(len(text.split()) + 1 for text in texts)
    size = sum(len(text.encode()) + 1 for text in texts)
    return {
        "token_perplexity": math.exp(min(nll / tokens, 700.0)),
        "word_perplexity": math.exp(min(nll / words, 700.0)),
        "bits_per_byte": nll / math.log(2) / size,
    }


def shipped_recipe(device_type: str) -> Recipe:
    """The recipe of the shipped text."""
    return Recipe(
        preset="small",
        vocab_size=4000,
        model={"norm_first": True, "dropout": 0.2},
        learning_rate=2e-3,
        schedule="linear",
        warmup_steps=200,
        max_tokens=1024 if device_type == "cpu" else 8192,
        max_steps=2500,
        validate_every=500,
        early_stop_patience=None,
        label_smoothing=0.0,
    )


def _line(text: str) -> str:
    """A text, which byte-level BPE may give several lines, in one."""
    return re.sub("[\r\n]+", " ", text)


def _fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of the model that the options name."""
    return one_stack(config.model, "num_decoder_layers", "num_encoder_layers", "a language model")


class LanguageModelRun(TextRun):
    """Learns to go on with a text."""

    token_labels: ClassVar[bool] = True
    what: ClassVar[str] = "lines"
    batch_unit: ClassVar[str] = "tokens"

    architecture: LanguageModelConfig

    @staticmethod
    def prepare(config: TrainConfig, machine: Machine, console: Console) -> LanguageModelRun:
        """Reads the text, trains the tokenizer, makes the token ids, or finds them done.

        Raises:
            ValueError: The text cannot be used.
        """
        options, device = config.language_model, machine.device.type
        parent = None
        if config.init_from is not None:
            _fields(config)
            parent = Parent.open(config, LanguageModelConfig)
        shipped = not options.text_train
        data = config.data
        if shipped and parent is None:
            data = fill(config, shipped_recipe(device)).data
        corpus = shipped_corpus()

        def reader(paths: Sequence[str], counts: TextCounts) -> Iterator[tuple[str, str]]:
            return read_texts(paths, data.bad_lines, counts)

        files = TextFiles(
            "the English of " + corpus.name if shipped else Path(options.text_train[0]).name,
            corpus.train.src if shipped else options.text_train,
            corpus.dev.src if shipped else options.text_dev,
            corpus.test.src if shipped else options.text_test,
            reader,
            "lines",
        )
        with machine.world.first_goes_first():
            prepared = prepare_texts(
                data,
                files,
                what="lines",
                # Blocks cut a long line, too.
                max_length=None if options.block_size else data.max_length,
                report=lambda text: console.print(f"data       {text} ..."),
                tokenizer=None if parent is None else parent.model.source_tokenizer,
            )
        lengths = prepared.train.source_lengths
        if parent is not None:
            tokens = int(lengths.sum(dtype=np.int64))
            recipe = text_tuning_recipe(tokens, device, parent.config.d_model)
        elif shipped:
            recipe = shipped_recipe(device)
        else:
            recipe = dataclasses.replace(
                recipe_for(len(lengths), float(lengths.mean()), device, config.preset),
                label_smoothing=0.0,
            )
        return LanguageModelRun(config, machine, console, recipe, prepared, parent)

    def make_examples(self, dataset: ParallelDataset) -> Examples:
        """Lines or blocks."""
        size = self._chosen.language_model.block_size
        return Lines(dataset) if size is None else Blocks(dataset, size)

    def make_model(self) -> LanguageModel:
        """The decoder of the preset, with the options' changes, or the parent."""
        if self.parent is not None:
            self.architecture = self.parent.architecture(self.config.model)
            model = LanguageModel(self.architecture).load_weights(self.parent.model.weights)
            self._placed(model)
            return model
        fields = _fields(self.config)
        if "tie" in fields:
            fields["tie"] = fields["tie"] != "none"
        assert self.config.preset is not None
        self.architecture = language_model_preset(
            self.config.preset,
            self.prepared.tokenizer.vocab_size,
            **fields,
            **self._special_ids(),
        )
        model = LanguageModel(self.architecture)
        self._placed(model)
        return model

    def _check_sizes(self) -> None:
        """The lines, and the beginnings that the user wants continued."""
        super()._check_sizes()
        for text in self.config.language_model.prompts:
            size = len(self.prepared.tokenizer.encode(text))
            if not self._has_room(size):
                most = self.architecture.max_positions
                raise ConfigError(
                    f"--prompts: {text[:40]!r} ... has {size} tokens, but the model has learned "
                    f"positions for {most}; expected fewer, so that something can follow"
                )

    def _shorter(self, most: int) -> str:
        return (
            f"--block-size {most} or less, which cuts them; or --max-length {most}, which leaves "
            "longer ones out of the training"
        )

    def make_trainer(self, log: JsonLog, resume_from: int | None) -> Trainer:
        """Says first how the model that it begins with does on the new text."""
        trainer = super().make_trainer(log, resume_from)
        if self.parent is not None:
            self.judge_parent(trainer, log, resume_from)
        return trainer

    def _has_room(self, tokens: int) -> bool:
        """Whether anything can follow so many tokens."""
        longest = self.architecture.longest
        return longest is None or tokens < longest

    # The end --------------------------------------------------------------------------------------

    def test(self, model: Path) -> dict[str, Any]:
        """Perplexity of the test text (or, without one, that for validation), and samples."""
        assert self.folder is not None
        prepared, say = self.prepared, self.console.print
        part = "test" if prepared.test else "validation"
        texts = [text for text, _ in prepared.test or prepared.dev]
        dataset = prepared.test_set if prepared.test else prepared.dev_set
        results: dict[str, Any] = {}
        if dataset is not None:
            batches = self.batches(dataset)
            tokens = int(self.make_examples(dataset).lengths.sum())
            _, nll, accuracy = evaluate_loss(
                LossModule(self.model, 0.0), batches, World(0, 1, self.machine.device)
            )
            figures = text_perplexities(nll * tokens, tokens, texts)
            results = {f"{part}_{name}": value for name, value in figures.items()}
            results[f"{part}_accuracy"] = accuracy
            say(
                f"{part} text, {counted(len(texts), 'lines')}: perplexity {figures['token_perplexity']:.2f} a "
                f"token, {figures['word_perplexity']:.1f} a word; {figures['bits_per_byte']:.3f} "
                f"bits a byte; {100 * accuracy:.1f} % of the tokens foretold"
            )
            say()
        samples = self._continued(texts)
        for sample in samples:
            say(f"  beginning  {sample['beginning'] or '(none)'}")
            say(f"  greedy     {sample['greedy']}")
            say(f"  sampled    {sample['sampled']}")
            say()
        lines = (f"{s['beginning']}\t{s['greedy']}\t{s['sampled']}\n" for s in samples)
        atomic_write(self.folder / "continuations.tsv", "".join(lines))
        return {**results, "samples": samples}

    def _continued(self, texts: Sequence[str]) -> list[dict[str, str]]:
        beginnings = list(self.config.language_model.prompts)
        if not beginnings:
            long = [text for text in texts if len(text.split()) >= 8]
            beginnings = [
                " ".join(long[number].split()[:3]) for number in pick_evenly(len(long), 3)
            ] + [""]
        tokenizer = self.prepared.tokenizer
        # Lines that are cut into blocks may be of any length.
        beginnings = [text for text in beginnings if self._has_room(len(tokenizer.encode(text)))]
        ids = [tokenizer.encode(text) for text in beginnings]
        found = [
            self._continuations(ids, options)
            for options in (
                SearchOptions(beam_size=1, max_length=40),
                SearchOptions(
                    sampling=True, top_p=0.9, seed=self.config.training.seed, max_length=40
                ),
            )
        ]
        greedy, sampled = (
            [
                tokenizer.decode([*prompt, *result.hypotheses[0].tokens])
                for prompt, result in zip(ids, results, strict=True)
            ]
            for results in found
        )
        return [
            {"beginning": b, "greedy": _line(g), "sampled": _line(s)}
            for b, g, s in zip(beginnings, greedy, sampled, strict=True)
        ]

    def _continuations(
        self, ids: Sequence[Sequence[int]], options: SearchOptions
    ) -> list[SearchResult]:
        try:
            return TorchLanguageModel(self.model).search(ids, options)
        except UnsupportedModelError:
            # With a part of the user's own.
            training = self.model.training
            self.model.eval()
            found = continuations(self.model, ids, options)
            self.model.train(training)
            return found

    def farewell(self, model: Path) -> Sequence[str]:
        """How to let it write."""
        return [
            "continue   echo 'The function returns' | python -m transformer_ext.generate "
            f"{shlex.quote(str(model))}"
        ]
