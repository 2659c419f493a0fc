"""Classification: an encoder alone learns to label texts, judged by accuracy and macro-F1."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from transformer_ext.config import ConfigError, TrainConfig
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.corpus import ParallelText, counted, read_pairs, shipped_corpus
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.text import Labelled, TextCounts, read_labelled
from transformer_ext.data.text_preparation import PreparedTexts, TextFiles, prepare_texts
from transformer_ext.files import atomic_write
from transformer_ext.inference.classifier import Prediction, TextClassifier
from transformer_ext.model import TextEncoder, TextEncoderConfig, classifier_preset
from transformer_ext.training.machine import Machine
from transformer_ext.training.parent import Parent, said
from transformer_ext.training.report import Console, JsonLog
from transformer_ext.training.sizing import Recipe, fill, recipe_for, text_tuning_recipe
from transformer_ext.training.text_run import Examples, TextRun, one_stack
from transformer_ext.training.trainer import LossModule, Trainer

__all__ = ["ClassificationRun", "accuracy", "confusion_table", "macro_f1", "read_matches"]

#: Rows and columns of the confusion table that are printed.
_TABLE_LABELS = 12


def confusion_table(truth: np.ndarray, found: np.ndarray, labels: int) -> np.ndarray:
    """int64 [labels, labels]: how many texts of each label (rows) were given which (columns)."""
    return np.bincount(truth * labels + found, minlength=labels * labels).reshape(labels, labels)


def accuracy(table: np.ndarray) -> float:
    """Share of the texts with the right label, of a confusion table."""
    return float(np.trace(table) / max(1, table.sum()))


def macro_f1(table: np.ndarray) -> float:
    """Mean over the labels of F1, which is 2 true positives / (texts that have or were given it).

    A label that neither occurs nor is given does not count.
    """
    both = table.sum(0) + table.sum(1)
    used = both > 0
    return float((2 * np.diag(table)[used] / both[used]).mean()) if used.any() else 0.0


def read_matches(paths: Sequence[str], counts: TextCounts) -> Iterator[tuple[str, str]]:
    """Pairs of sentences as one text, ``source ||| target``, that do or do not belong together.

    The target of about half of the pairs, chosen by a hash of the source, is another one of like
    length: that of the next such pair in the order of target lengths. So neither side alone, nor the
    two lengths, tell which is which.

    Args:
        paths: a file of sentences and one of their translations.
        counts: counts what is read.
    """
    source_path, target_path = paths
    pairs = list(read_pairs(ParallelText((source_path,), (target_path,))))
    counts.read += len(pairs)
    moved = [
        i for i, (source, _) in enumerate(pairs) if hashlib.sha256(source.encode()).digest()[0] % 2
    ]
    moved.sort(key=lambda i: (len(pairs[i][1]), i))
    others = {i: pairs[j][1] for i, j in zip(moved, [*moved[1:], *moved[:1]], strict=True)}
    for number, (source, target) in enumerate(pairs):
        other = others.get(number, target)
        yield f"{source} ||| {other}", "translation" if other == target else "other"


def shipped_recipe(device_type: str) -> Recipe:
    """The recipe of the shipped pairs."""
    return Recipe(
        preset="tiny",
        vocab_size=8000,
        model={"norm_first": True, "dropout": 0.1},
        learning_rate=2e-3,
        schedule="linear",
        warmup_steps=200,
        max_tokens=2048 if device_type == "cpu" else 8192,
        max_steps=2400,
        validate_every=400,
        early_stop_patience=None,
        label_smoothing=0.0,
    )


def _fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of the model that the options name."""
    fields = one_stack(config.model, "num_encoder_layers", "num_decoder_layers", "a classifier")
    if "tie" in fields:
        raise ConfigError("model.tie: a classifier has no embedding that could be tied")
    return fields


class ClassificationRun(TextRun):
    """Learns to label texts."""

    token_labels: ClassVar[bool] = False
    what: ClassVar[str] = "texts"
    batch_unit: ClassVar[str] = "tokens"
    counted: ClassVar[str] = "texts"

    architecture: TextEncoderConfig

    @staticmethod
    def prepare(config: TrainConfig, machine: Machine, console: Console) -> ClassificationRun:
        """Reads the texts, trains the tokenizer, makes the token ids, or finds them done.

        Raises:
            ValueError: The texts cannot be used.
        """
        options, device = config.classification, machine.device.type
        parent = None
        if config.init_from is not None:
            _fields(config)
            parent = Parent.open(config, TextEncoderConfig)
        shipped = not options.labelled_train
        if shipped:
            data = config.data if parent else fill(config, shipped_recipe(device)).data
            corpus = shipped_corpus()
            train, dev, test = (
                (*part.src, *part.tgt) for part in (corpus.train, corpus.dev, corpus.test)
            )
            name = f"pairs of {corpus.name}, half of them exchanged"
            files = TextFiles(name, train, dev, test, read_matches, "matches")
        else:
            data = config.data

            def reader(paths: Sequence[str], counts: TextCounts) -> Iterator[tuple[str, str]]:
                return read_labelled(paths, data.bad_lines, counts)

            files = TextFiles(
                Path(options.labelled_train[0]).name,
                options.labelled_train,
                options.labelled_dev,
                options.labelled_test,
                reader,
                "labelled",
            )
        with machine.world.first_goes_first():
            prepared = prepare_texts(
                data,
                files,
                what="texts",
                max_length=data.max_length,
                report=lambda text: console.print(f"data       {text} ..."),
                tokenizer=None if parent is None else parent.model.source_tokenizer,
            )
        if len(prepared.labels) < 2:
            raise ConfigError(
                f"classification.labelled_train: every text has the label {prepared.labels[0]!r}, "
                "expected two labels or more"
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
        return ClassificationRun(config, machine, console, recipe, prepared, parent)

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        console: Console,
        recipe: Recipe,
        prepared: PreparedTexts,
        parent: Parent[TextEncoderConfig] | None = None,
    ) -> None:
        # Texts of any length are read, as far as the model has positions, as BERT's are.
        self._longest = None if parent is None else parent.config.longest
        super().__init__(config, machine, console, recipe, prepared, parent)
        sets = (prepared.train, prepared.dev_set, prepared.test_set)
        whole = [Labelled(dataset).lengths for dataset in sets if dataset is not None]
        cut = 0 if self._longest is None else sum(int((n > self._longest).sum()) for n in whole)
        if cut:
            prepared.messages.append(
                f"{cut:,} texts are cut to the {self._longest} tokens that the model can read"
            )
        numbers, _ = prepared.train.gather_target(np.arange(len(prepared.train)))
        self.label_counts = np.bincount(numbers, minlength=len(prepared.labels))

    def make_examples(self, dataset: ParallelDataset) -> Examples:
        """Texts with their labels."""
        return Labelled(dataset, self._longest)

    def make_model(self) -> TextEncoder:
        """The encoder of the preset, with the options' changes, or the parent with a head."""
        options = self.config.classification
        if self.parent is not None:
            model = self._begin_with(self.parent)
            self._placed(model)
            return model
        fields = _fields(self.config)
        assert self.config.preset is not None
        self.architecture = classifier_preset(
            self.config.preset,
            self.prepared.tokenizer.vocab_size,
            self.prepared.labels,
            pooling=options.pooling or "mean",
            pooler=bool(options.pooler),
            **fields,
            **self._special_ids(),
        )
        model = TextEncoder(self.architecture)
        self._placed(model)
        return model

    def _begin_with(self, parent: Parent[TextEncoderConfig]) -> TextEncoder:
        """The parent's weights, with a new head unless it has one for these labels."""
        options, labels = self.config.classification, self.prepared.labels
        own = parent.architecture(self.config.model)
        pooling = options.pooling or own.pooling
        pooler = own.pooler if options.pooler is None else options.pooler
        self._changes = []
        for name, value in (("pooling", pooling), ("pooler", pooler)):
            before = getattr(own, name)
            if value != before:
                self._changes.append(f"{name}: {said(value)} instead of {said(before)}")
        same = sorted(own.labels) == labels and not self._changes
        self._new_head = not same
        self.architecture = dataclasses.replace(
            own,
            labels=labels,
            pooling=pooling,
            pooler=pooler,
            masked_lm_head=False,
            normalize=own.normalize and same,
            output_bias=own.output_bias or not same,
        )
        model = TextEncoder(self.architecture)
        old, weights = parent.model.weights, {}
        for name, parameter in model.named_parameters():
            if name not in old or name.startswith("generator.") and not same:
                weights[name] = parameter.detach().numpy()
            elif name.startswith("generator."):
                # The order of the labels is that of the data here.
                weights[name] = old[name][[own.labels.index(label) for label in labels]]
            else:
                weights[name] = old[name]
        if not same:
            self._changes.append(
                f"new: the head for {len(labels)} labels (the model has {len(own.labels) or 'none'})"
            )
        if own.normalize and not same:
            self._changes.append("vectors of texts are no longer scaled to length 1")
        if own.masked_lm_head:
            self._changes.append("left out: the head for masked tokens")
        return model.load_weights(weights)

    def changes(self) -> Sequence[str]:
        """The head, where it is new, and what has changed with it."""
        return self._changes

    def make_trainer(self, log: JsonLog, resume_from: int | None) -> Trainer:
        """Says first how a model that knows these labels does on the new texts."""
        trainer = super().make_trainer(log, resume_from)
        if self.parent is not None and not self._new_head:
            self.judge_parent(trainer, log, resume_from)
        return trainer

    def describe(self) -> Sequence[str]:
        """What was read; the labels and how many texts have each."""
        lines = list(super().describe())
        shares = [
            f"{name!r} {100 * count / self.label_counts.sum():.1f} %"
            for name, count in zip(self.prepared.labels, self.label_counts, strict=True)
        ]
        more = f" and {len(shares) - 10} more" if len(shares) > 10 else ""
        return [*lines[:-1], f"data       labels: {', '.join(shares[:10])}{more}", lines[-1]]

    # Judging --------------------------------------------------------------------------------------

    def _validation_table(self) -> np.ndarray:
        """The confusion table, with the weights of the moment, of what the loss is taken of."""
        losses = LossModule(self.model, 0.0)
        table = np.zeros((len(self.prepared.labels),) * 2, np.int64)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for make in self.validation_batches():
                batch = make()
                inputs = losses.load(batch, self.machine.device).inputs
                logits = self.model.generator.logits(self.model.forward_packed(*inputs))
                found = logits.float().argmax(-1).cpu().numpy()
                table += confusion_table(batch.labels, found, len(table))
        self.model.train(training)
        return table

    all_scores = ("macro_f1",)

    @property
    def scores(self) -> tuple[str, ...]:
        """The accuracy is always there; macro-F1 where there are texts for validation."""
        return self.all_scores if self.prepared.dev_set is not None else ()

    def score_in_memory(self) -> bool:
        """Always."""
        return True

    def make_scorer(self) -> Callable[[Path | None], dict[str, float]] | None:
        """Macro-F1 of the validation texts, in percent."""
        if self.prepared.dev_set is None:
            return None
        return lambda directory: {"macro_f1": 100 * macro_f1(self._validation_table())}

    def test(self, model: Path) -> dict[str, Any]:
        """Accuracy, macro-F1 and confusion table of the test texts, or of those for validation."""
        assert self.folder is not None
        prepared, say = self.prepared, self.console.print
        part = "test" if prepared.test else "validation"
        texts = prepared.test or prepared.dev
        if not texts:
            return {}
        self.model.eval()
        classifier = TextClassifier.from_model(self.model, prepared.tokenizer)
        found = classifier([text for text, _ in texts], truncation=self._longest is not None)
        numbers = {label: number for number, label in enumerate(prepared.labels)}
        table = confusion_table(
            np.array([numbers[label] for _, label in texts]),
            np.array([numbers[prediction.label] for prediction in found]),
            len(numbers),
        )
        majority = int(self.label_counts.argmax())
        baseline = np.zeros_like(table)
        baseline[:, majority] = table.sum(1)
        results = {
            f"{part}_accuracy": accuracy(table),
            f"{part}_macro_f1": macro_f1(table),
            f"{part}_majority_accuracy": accuracy(baseline),
            f"{part}_majority_macro_f1": macro_f1(baseline),
            "labels": prepared.labels,
            "confusion": table.tolist(),
        }
        say(
            f"{part}: {counted(len(texts), 'texts')}, accuracy {100 * accuracy(table):.2f} %, macro-F1 "
            f"{100 * macro_f1(table):.2f}; always {prepared.labels[majority]!r} would have "
            f"{100 * accuracy(baseline):.2f} % and {100 * macro_f1(baseline):.2f}"
        )
        say()
        if len(table) <= _TABLE_LABELS:
            self._print_table(table)
        self._write_predictions(part, texts, found)
        return results

    def _print_table(self, table: np.ndarray) -> None:
        names = [name[:16] for name in self.prepared.labels]
        width = max(8, *(len(name) for name in names)) + 2
        say = self.console.print
        say("  rows: the true label; columns: the one found")
        say("  " + " " * width + "".join(f"{name:>{width}}" for name in names))
        for name, row in zip(names, table.tolist(), strict=True):
            say(f"  {name:<{width}}" + "".join(f"{count:>{width},}" for count in row))
        say()

    def _write_predictions(
        self, part: str, texts: Sequence[tuple[str, str]], predictions: Sequence[Prediction]
    ) -> None:
        assert self.folder is not None
        lines = (
            f"{label}\t{found.label}\t{found.probability:.4f}\t{text}\n"
            for (text, label), found in zip(texts, predictions, strict=True)
        )
        atomic_write(self.folder / f"{part}.predictions.tsv", "".join(lines))
        rows = pick_evenly(len(texts), 4)
        for row in rows.tolist():
            (text, label), found = texts[row], predictions[row]
            self.console.print(f"  text       {text}")
            self.console.print(
                f"  label      {label}; found {found.label} ({100 * found.probability:.1f} %)"
            )
            self.console.print()

    def farewell(self, model: Path) -> Sequence[str]:
        """How to label texts with it."""
        texts = self.prepared.test or self.prepared.dev
        example = texts[0][0] if texts else "a text"
        return [
            f"classify   echo {shlex.quote(example)} | python -m transformer_ext.classify "
            f"{shlex.quote(str(model))}"
        ]
