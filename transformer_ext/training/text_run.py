"""What the tasks on texts of one side share: language modelling and classification."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from transformer_ext.config import ConfigError, TrainConfig
from transformer_ext.data import BatchSampler
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.text import TextBatch
from transformer_ext.data.text_preparation import PreparedTexts
from transformer_ext.files import load_model_dir, write_model_files
from transformer_ext.model import Model, ModelConfig
from transformer_ext.training.batches import BatchStream, Position
from transformer_ext.training.machine import Machine
from transformer_ext.training.parent import Parent, misfit
from transformer_ext.training.report import Console
from transformer_ext.training.run import Run
from transformer_ext.training.sizing import Recipe

__all__ = ["Examples", "TextRun", "one_stack"]

#: Validation reads at most so many examples, spread evenly over the held-out text.
_VALIDATION_EXAMPLES = 2000


class Examples(Protocol):
    """A data set as what a model reads."""

    #: int32 [examples], tokens of each.
    lengths: np.ndarray

    def __call__(self, indices: np.ndarray) -> TextBatch: ...


def one_stack(model: Mapping[str, Any], depth: str, other: str, kind: str) -> dict[str, Any]:
    """The fields of a model of one stack, from options that are named after a model of two.

    Args:
        model: the ``model`` part of a configuration.
        depth: the option that is the depth here.
        other: the option that has no meaning here.
        kind: of model, for the message.

    Raises:
        ConfigError: an option that has no meaning here was given.
    """
    fields = dict(model)
    if other in fields:
        raise ConfigError(f"model.{other}: {kind} has none; its depth is model.{depth}")
    if depth in fields:
        fields["num_layers"] = fields.pop(depth)
    return fields


class TextRun(Run):
    """A task on texts of one side.

    Args:
        config: What the user asked for.
        machine: What to train on.
        console: Where people read.
        recipe: Fills in what the configuration leaves open.
        prepared: The texts as token ids.
        parent: The model whose weights it begins with.

    Attributes:
        architecture: Configuration of the model, set by :meth:`make_model`.
        examples: Those to train on.
    """

    #: Whether each token is a label, else each text is.
    token_labels: ClassVar[bool]
    #: What one text is called, in the plural.
    what: ClassVar[str]

    architecture: ModelConfig

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        console: Console,
        recipe: Recipe,
        prepared: PreparedTexts,
        parent: Parent[Any] | None = None,
    ) -> None:
        self.prepared = prepared
        self.parent = parent
        self._chosen = config
        if parent is not None:
            prepared.messages += misfit(prepared.train, prepared.tokenizer, None)
        self.examples = self.make_examples(prepared.train)
        tokens = int(self.examples.lengths.sum(dtype=np.int64))
        super().__init__(config, machine, console, recipe, tokens)
        self._check_sizes()

    @abstractmethod
    def make_examples(self, dataset: ParallelDataset) -> Examples:
        """The data set as what the model reads."""

    def _check_sizes(self) -> None:
        """What goes together only with this text, before anything is written."""
        longest = int(self.examples.lengths.max())
        max_tokens = self.config.training.max_tokens
        assert max_tokens is not None
        if longest > max_tokens:
            raise ConfigError(
                f"--max-tokens: got {max_tokens}, but the longest of the {self.what} has {longest} "
                f"tokens; expected at least {longest}"
            )
        most = self.architecture.longest
        if most is None:
            return
        longest = max(
            int(self.make_examples(dataset).lengths.max())
            for dataset in (self.prepared.train, self.prepared.dev_set, self.prepared.test_set)
            if dataset is not None
        )
        if longest > most and self.parent is not None:
            raise ConfigError(
                f"--init-from: the model of {self.parent.name} has {most} positions, but the longest "
                f"of the {self.what} has {longest} tokens; expected {self._shorter(most)}"
            )
        if longest > most:
            raise ConfigError(
                f"--max-positions: got {most}, but the longest of the {self.what} has {longest} "
                f"tokens; expected at least {longest}"
            )

    def _shorter(self, most: int) -> str:
        """What makes texts fit into so many positions."""
        return f"shorter {self.what}"

    def use_folder(self, folder: Path) -> None:
        """Keeps a copy of the model that it begins with there."""
        super().use_folder(folder)
        if self.parent is not None and self.machine.world.first:
            self.parent = self.parent.copied_to(folder)
            # Its files are copied to every checkpoint.
            self.prepared.tokenizer = self.parent.model.source_tokenizer

    def _special_ids(self) -> dict[str, int]:
        names = ("pad_id", "unk_id", "bos_id", "eos_id")
        return {name: getattr(self.prepared.tokenizer, name) for name in names}

    def _placed(self, model: Model) -> Model:
        return model.to(self.machine.device).set_precision(self.machine.precision)

    def describe(self) -> Sequence[str]:
        """What was read and skipped; size and kind of the model."""
        c = self.architecture
        count = sum(p.numel() for p in self.parameters.values())
        name, begins = self.config.preset, []
        if self.parent is not None:
            name = "its architecture"
            begins = [
                f"init       weights and tokenizer ({self.prepared.tokenizer.vocab_size:,} pieces) of "
                f"{self.parent.name}, SHA-256 {self.parent.sha256[:16]}; optimizer and schedule "
                "begin anew",
                *(f"init       {change}" for change in self.changes()),
            ]
        return [
            *(f"data       {message}" for message in self.prepared.messages),
            *begins,
            f"model      {name}, {c.kind}: {c.layers} layers, width {c.d_model}, "
            f"{c.nhead} heads, feed-forward {c.dim_feedforward}, "
            f"{'pre' if c.norm_first else 'post'}-norm, dropout {c.dropout}; "
            f"{count / 1e6:.1f} million parameters",
        ]

    def facts(self) -> dict[str, Any]:
        """Name of the text, and how much there is; the model that it began with."""
        facts: dict[str, Any] = {"corpus": self.prepared.name, "texts": len(self.prepared.train)}
        if self.parent is not None:
            facts["init_from"] = self.parent.notes()
        return facts

    def changes(self) -> Sequence[str]:
        """What is not as in the model that it begins with, for people."""
        return ()

    # Training -------------------------------------------------------------------------------------

    def _label_counts(self, examples: Examples) -> np.ndarray:
        return examples.lengths if self.token_labels else np.ones(len(examples.lengths), np.int32)

    def make_stream(self, start: Position | None) -> BatchStream:
        """Batches of a budget of tokens."""
        training, world, examples = self.config.training, self.machine.world, self.examples
        assert training.max_tokens is not None
        return BatchStream(
            examples,
            BatchSampler(examples.lengths, examples.lengths, training.max_tokens, training.seed),
            self._label_counts(examples),
            accum_steps=training.accum_steps,
            rank=world.rank,
            world_size=world.size,
            start=start,
            workers=self.data_workers,
            content=self.prepared.train.digest(),
        )

    def batches(
        self, dataset: ParallelDataset | None, most: int | None = None
    ) -> list[Callable[[], TextBatch]]:
        """Each gives one batch; at most so many examples, spread evenly, or all."""
        if dataset is None:
            return []
        examples = self.make_examples(dataset)
        total, max_tokens = len(examples.lengths), self.config.training.max_tokens
        assert max_tokens is not None
        rows = pick_evenly(total, total if most is None else most)
        lengths = examples.lengths[rows]
        sampler = BatchSampler(lengths, lengths, max(max_tokens, int(lengths.max())))
        return [functools.partial(examples, rows[indices]) for indices in sampler.epoch(0)]

    def validation_batches(self) -> list[Callable[[], Any]]:
        """At most some thousand examples of the held-out text."""
        return list(self.batches(self.prepared.dev_set, _VALIDATION_EXAMPLES))

    def write_model(self, folder: Path, weights: Mapping[str, Any], notes: dict[str, Any]) -> None:
        """The one tokenizer is source and target."""
        tokenizer = self.prepared.tokenizer
        write_model_files(
            folder,
            self.architecture,
            weights,
            tokenizer,
            tokenizer,
            {
                "max_train_length": int(self.examples.lengths.max()),
                **self.facts(),
                "precision": self.machine.precision,
                **notes,
            },
        )

    def read_model(self, folder: Path) -> Mapping[str, Any]:
        """Checks that architecture and tokenizer are those of this run."""
        saved = load_model_dir(folder, type(self.architecture))
        if saved.config != self.architecture:
            raise ConfigError(f"{folder}: its model differs from the one described by the options")
        if saved.source_tokenizer.sha256 != self.prepared.tokenizer.sha256:
            raise ConfigError(f"{folder}: its tokenizer differs: the training text has changed")
        return saved.weights
