"""Fine-tuning: a training that begins with the weights of a model directory.

Weights, architecture and tokenizers are those of the model; optimizer, schedule and the count of
steps begin anew. The run keeps a copy of it in its folder, so that going on with the run does not
need the model directory, and the two can be compared at the end.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext.config import ConfigError, DataConfig, TrainConfig
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.corpus import file_digest
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import CONFIG_FILE, ModelDir, atomic_directory, load_model_dir
from transformer_ext.model.config import PRESETS, TransformerConfig

__all__ = ["Parent", "misfit"]

#: The copy in the folder of the run.
COPY = "init"

_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")


@dataclass(frozen=True)
class Parent:
    """The model that a fine-tuning begins with.

    Attributes:
        name: the folder as it was named by the user.
        model: the model directory, or the run's copy of it.
        sha256: of the file of its weights.
    """

    name: str
    model: ModelDir
    sha256: str

    @classmethod
    def open(cls, config: TrainConfig) -> Parent:
        """The model of ``--init-from``; that of a run to go on with is the run's own copy.

        Raises:
            ConfigError: an option contradicts it.
            FileError: there is no usable model.
        """
        assert config.init_from is not None
        folder, output = Path(config.init_from), config.output.output
        if config.output.resume and output is not None:
            folder = Path(output) / COPY
        elif config.output.overwrite and output is not None:
            if Path(output).resolve() in (folder.resolve(), *folder.resolve().parents):
                raise ConfigError(
                    f"--overwrite: would remove {folder}, which --init-from reads; choose another "
                    "--output"
                )
        model = load_model_dir(folder)
        parent = cls(config.init_from, model, file_digest(str(model.weights.path)))
        parent._check_preset(config.preset)
        parent.architecture(config.model)
        parent._check_data(config.data)
        return parent

    @property
    def config(self) -> TransformerConfig:
        """Its architecture."""
        return self.model.config

    def _refuse(self, name: str, value: Any, own: str) -> None:
        raise ConfigError(
            f"--{name.replace('_', '-')}: got {_said(value)}, but the model of --init-from {self.name} "
            f"{own}; leave the option out"
        )

    def _check_preset(self, preset: str | None) -> None:
        if preset is None:
            return
        for name, value in PRESETS[preset].items():
            own = getattr(self.config, name)
            if name not in _DROPOUTS and own != value:
                self._refuse("preset", f"{preset} ({name} {value})", f"has {name} {_said(own)}")

    def architecture(self, options: dict[str, Any]) -> TransformerConfig:
        """Its architecture, with the dropout of the options.

        Raises:
            ConfigError: an option is about something else, and not as the model has it.
        """
        changes = {name: options[name] for name in _DROPOUTS if options.get(name) is not None}
        for name, value in options.items():
            own = getattr(self.config, name)
            if name not in _DROPOUTS and value is not None and value != own:
                self._refuse(name, value, f"has {_said(own)}")
        if "dropout" in changes:
            # Those that were the same follow, as where only one is given for a new model.
            for name in _DROPOUTS[1:]:
                if getattr(self.config, name) == self.config.dropout:
                    changes.setdefault(name, changes["dropout"])
        try:
            return dataclasses.replace(self.config, **changes)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None

    def _check_data(self, data: DataConfig) -> None:
        default, own = DataConfig(), "has a tokenizer, which is kept"
        for name in (
            *("tokenizer", "src_tokenizer", "tgt_tokenizer"),
            *("tokenizer_type", "character_coverage"),
        ):
            if getattr(data, name) != getattr(default, name):
                self._refuse(name, getattr(data, name), own)
        source, target = self.model.source_tokenizer, self.model.target_tokenizer
        sizes = sorted({source.vocab_size, target.vocab_size})
        if data.vocab_size is not None and sizes != [data.vocab_size]:
            pieces = " and ".join(f"{size}" for size in sizes)
            self._refuse("vocab_size", data.vocab_size, f"has a tokenizer of {pieces} pieces")
        if not data.joint_vocab and source is target:
            self._refuse("joint_vocab", False, "has one for both languages")

    def notes(self) -> dict[str, Any]:
        """Where the fine-tuned model comes from, for its config.json."""
        return {"path": self.name, "weights_sha256": self.sha256, "training": self.model.training}

    def copied_to(self, run: Path) -> Parent:
        """The same from its copy in the folder of a run, which is made if it is not there."""
        folder = run / COPY
        if not folder.is_dir():
            model = self.model
            names = {CONFIG_FILE, model.weights.path.name}
            for tokenizer in (model.source_tokenizer, model.target_tokenizer):
                names |= {p.name for p in (tokenizer.path, tokenizer.vocabulary) if p is not None}
            with atomic_directory(folder) as temporary:
                for name in names:
                    shutil.copyfile(model.path / name, temporary / name)
        return dataclasses.replace(self, model=load_model_dir(folder))


def _said(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def misfit(data: ParallelDataset, source: Tokenizer, target: Tokenizer) -> list[str]:
    """What of a text a tokenizer that was not made for it does not know, one line each.

    Args:
        data: the text as token ids; some thousand pairs of it are looked at.
        source: of the source language.
        target: of the target language.

    Raises:
        ConfigError: much of it is unknown.
    """
    rows = pick_evenly(len(data), 5000)
    messages = []
    for side, tokenizer, gather in (
        ("source", source, data.gather_source),
        ("target", target, data.gather_target),
    ):
        ids = gather(rows)[0]
        pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        spelt = np.array([re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None for piece in pieces])
        unknown = float(np.mean(ids == tokenizer.unk_id)) if len(ids) else 0.0
        in_bytes = float(np.mean(spelt[ids])) if len(ids) else 0.0
        # A word that is unknown as a whole is often two tokens, its beginning a known one.
        if unknown >= 0.3:
            raise ConfigError(
                f"--init-from: its tokenizer {tokenizer.path} does not fit the {side} text: "
                f"{100 * unknown:.0f} % of the tokens are unknown to it"
            )
        if unknown >= 0.005:
            messages.append(
                f"warning: {100 * unknown:.1f} % of the tokens of the {side} text are unknown to "
                "the model's tokenizer"
            )
        if in_bytes >= 0.01:
            messages.append(
                f"warning: {100 * in_bytes:.1f} % of the tokens of the {side} text are single "
                "bytes: the model's tokenizer was made for other text"
            )
    return messages
