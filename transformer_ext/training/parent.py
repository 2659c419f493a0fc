"""Fine-tuning: a training that begins with the weights of a model directory.

Weights, architecture and tokenizers are those of the model (a head for other labels is new);
optimizer, schedule and the count of steps begin anew. The run keeps a copy of it in its folder, so
that going on with the run does not need the model directory, and the two can be compared at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from transformer_ext.config import ConfigError, DataConfig, TrainConfig
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.corpus import file_digest
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import (
    CONFIG_FILE,
    ModelDir,
    Tensors,
    atomic_directory,
    load_model_dir,
    save_model_dir,
)
from transformer_ext.model.config import (
    PRESETS,
    LanguageModelConfig,
    ModelConfig,
    TextEncoderConfig,
)

__all__ = ["Parent", "misfit"]

#: The copy in the folder of the run.
COPY = "init"

_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
#: The option that is the depth of a model of one stack.
_DEPTHS = {
    LanguageModelConfig.kind: "num_decoder_layers",
    TextEncoderConfig.kind: "num_encoder_layers",
}

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


@dataclass(frozen=True)
class Parent(Generic[ConfigT]):
    """The model that a fine-tuning begins with.

    Attributes:
        name: the folder as it was named by the user.
        model: the model directory, or the run's copy of it.
        sha256: of the file of its weights.
    """

    name: str
    model: ModelDir[ConfigT]
    sha256: str

    @classmethod
    def open(cls, config: TrainConfig, kind: type[ConfigT]) -> Parent[ConfigT]:
        """The model of ``--init-from``; that of a run to go on with is the run's own copy.

        Args:
            config: what the user asked for.
            kind: class of the configuration that the task needs.

        Raises:
            ConfigError: an option contradicts it.
            FileError: there is no usable model, or its weights are no numbers.
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
        model = load_model_dir(folder, kind)
        parent = Parent(config.init_from, model, _digest(model))
        parent._check_preset(config.preset)
        parent.architecture(config.model)
        parent._check_data(config.data)
        model.weights.check_finite()
        return parent

    @property
    def config(self) -> ConfigT:
        """Its architecture."""
        return self.model.config

    def _refuse(self, name: str, value: Any, own: str) -> None:
        raise ConfigError(
            f"--{name.replace('_', '-')}: got {said(value)}, but the model of --init-from {self.name} "
            f"{own}; leave the option out"
        )

    def _check_preset(self, preset: str | None) -> None:
        if preset is None:
            return
        for name, value in PRESETS[preset].items():
            own = getattr(self.config, self._field(name), value)
            if name not in _DROPOUTS and own != value:
                self._refuse("preset", f"{preset} ({name} {value})", f"has {name} {said(own)}")

    def _field(self, option: str) -> str:
        """The field of the architecture that an option of the model is about."""
        return "num_layers" if _DEPTHS.get(self.config.kind) == option else option

    def architecture(self, options: dict[str, Any]) -> ConfigT:
        """Its architecture, with the dropout of the options.

        Raises:
            ConfigError: an option is about something else, and not as the model has it.
        """
        changes = {name: options[name] for name in _DROPOUTS if options.get(name) is not None}
        for name, value in options.items():
            field = self._field(name)
            if not hasattr(self.config, field):
                self._refuse(name, value, "has no such thing")
            own = getattr(self.config, field)
            if name == "tie" and isinstance(own, bool):
                own = "all" if own else "none"
                value = value and ("none" if value == "none" else "all")
            if name not in _DROPOUTS and value is not None and value != own:
                self._refuse(name, value, f"has {said(own)}")
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

    def copied_to(self, run: Path) -> Parent[ConfigT]:
        """The same from its copy in the folder of a run, which is made if it is not there."""
        folder, model = run / COPY, self.model
        if not folder.is_dir() and not isinstance(model.weights, Tensors):
            # A directory of Hugging Face becomes one of ours.
            save_model_dir(
                folder,
                model.config,
                model.weights,
                model.source_tokenizer,
                model.target_tokenizer,
                model.training,
            )
        elif not folder.is_dir():
            names = {CONFIG_FILE, model.weights.path.name}
            for tokenizer in (model.source_tokenizer, model.target_tokenizer):
                names |= {p.name for p in (tokenizer.path, tokenizer.vocabulary) if p is not None}
            with atomic_directory(folder) as temporary:
                for name in names:
                    shutil.copyfile(model.path / name, temporary / name)
        copy = load_model_dir(folder, type(self.config))
        return dataclasses.replace(self, model=copy, sha256=_digest(copy))


def _digest(model: ModelDir[Any]) -> str:
    """Of the file of its weights, or of the digests of several."""
    digests = [file_digest(str(path)) for path in model.weights.files]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def said(value: Any) -> Any:
    """A value of an option as messages say it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def misfit(data: ParallelDataset, source: Tokenizer, target: Tokenizer | None) -> list[str]:
    """What of a text a tokenizer that was not made for it does not know, one line each.

    Args:
        data: the text as token ids; some thousand pairs of it are looked at.
        source: of the source language.
        target: of the target language; None: the text has one side.

    Raises:
        ConfigError: much of it is unknown.
    """
    rows = pick_evenly(len(data), 5000)
    messages = []
    sides: list[tuple[str, Tokenizer, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]] = [
        ("source text" if target is not None else "text", source, data.gather_source)
    ]
    if target is not None:
        sides.append(("target text", target, data.gather_target))
    for side, tokenizer, gather in sides:
        ids = gather(rows)[0]
        pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        spelt = np.array([re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None for piece in pieces])
        # Byte-level BPE knows everything: its unknown token is the end of a text.
        unknowable = tokenizer.unk_id == tokenizer.eos_id
        unknown = float(np.mean(ids == tokenizer.unk_id)) if len(ids) and not unknowable else 0.0
        in_bytes = float(np.mean(spelt[ids])) if len(ids) else 0.0
        # A word that is unknown as a whole is often two tokens, its beginning a known one.
        if unknown >= 0.3:
            raise ConfigError(
                f"--init-from: its tokenizer {tokenizer.path} does not fit the {side}: "
                f"{100 * unknown:.0f} % of the tokens are unknown to it"
            )
        if unknown >= 0.005:
            messages.append(
                f"warning: {100 * unknown:.1f} % of the tokens of the {side} are unknown to the "
                "model's tokenizer"
            )
        if in_bytes >= 0.01:
            messages.append(
                f"warning: {100 * in_bytes:.1f} % of the tokens of the {side} are single bytes: "
                "the model's tokenizer was made for other text"
            )
    return messages
