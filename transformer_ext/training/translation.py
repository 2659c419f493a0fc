"""Translation: from parallel text to a model directory, judged by BLEU and chrF."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformer_ext.config import ConfigError, TrainConfig
from transformer_ext.data import BatchSampler, collate
from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.corpus import counted
from transformer_ext.data.preparation import PreparedData, prepare_data
from transformer_ext.data.subwords import SampledBatches, SubwordSampler
from transformer_ext.files import atomic_write, load_model_dir, write_model_files
from transformer_ext.model import Transformer, TransformerConfig, preset
from transformer_ext.training.batches import BatchStream, Position
from transformer_ext.training.machine import Machine
from transformer_ext.training.parent import Parent, misfit
from transformer_ext.training.report import Console, JsonLog, duration
from transformer_ext.training.run import Run
from transformer_ext.training.scoring import (
    Decoder,
    Scorer,
    pick_samples,
    print_samples,
    score,
)
from transformer_ext.training.sizing import (
    Recipe,
    fill,
    fine_tuning_recipe,
    recipe_for,
    shipped_recipe,
)
from transformer_ext.training.trainer import Trainer

__all__ = ["TranslationRun"]

#: Validation loss reads at most so many pairs, spread evenly over the held-out text.
_VALIDATION_PAIRS = 2000
#: Pieces of a vocabulary as good as any other.
_ANY_VOCABULARY = 1000
#: Of fewer sentences BLEU and chrF tell little.
_FEW_SENTENCES = 100


class TranslationRun(Run):
    """Learns to translate.

    Args:
        config: What the user asked for.
        machine: What to train on.
        console: Where people read.
        prepared: The text as token ids.
        parent: The model whose weights it begins with.
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        console: Console,
        prepared: PreparedData,
        parent: Parent[TransformerConfig] | None = None,
    ) -> None:
        self.prepared = prepared
        self.parent = parent
        if prepared.dev_set is None:
            if config.training.early_stop_patience:
                raise ConfigError(
                    f"--early-stop-patience: got {config.training.early_stop_patience}, but there "
                    "is no text for validation; expected --held-out above 0, or dev files"
                )
            training = dataclasses.replace(config.training, early_stop_patience=0)
            config = dataclasses.replace(config, training=training)
        self.shipped = config.data.shipped
        self.pairs = len(prepared.train)
        self.corpora = [
            (rows.begin, rows.end, weight)
            for rows, weight in zip(prepared.train.corpora, prepared.corpus_weights, strict=True)
        ]
        lengths = prepared.train.target_lengths
        epoch_tokens = sum(
            repetition * float(lengths[begin:end].sum()) for begin, end, repetition in self.corpora
        )
        recipe = self._recipe(config, machine.device.type, float(lengths.mean()))
        super().__init__(config, machine, console, recipe, round(epoch_tokens))
        self._check_sizes()
        self._sampled = self._sampled_batches()
        self.decoder = Decoder(
            self.model,
            prepared.source_tokenizer,
            prepared.target_tokenizer,
            console,
            length_penalty=config.evaluation.length_penalty,
            threads=machine.threads,
        )

    def _check_sizes(self) -> None:
        """What goes together only with this text and this vocabulary.

        Raises:
            ConfigError: It does not.
        """
        pieces = self.architecture.tgt_vocab_size
        for name in ("beam_size", "validation_beam_size"):
            wanted = getattr(self.config.evaluation, name)
            if wanted > pieces:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: got {wanted}, expected at most the {pieces} "
                    "pieces of the vocabulary"
                )
        train, dev = self.prepared.train, self.prepared.dev_set
        max_tokens = self.config.training.max_tokens
        assert max_tokens is not None
        # As BatchSampler has it, but before anything is written.
        for side, lengths, share in (
            ("target", train.target_lengths, 1),
            ("source", train.source_lengths, 2),
        ):
            longest = int(lengths.max(initial=1))
            if longest > share * max_tokens:
                raise ConfigError(
                    f"--max-tokens: got {max_tokens}, but the longest {side} sentence has {longest} "
                    f"tokens; expected at least {-(-longest // share)}, or a lower --max-length, "
                    "which leaves such pairs out"
                )
        most = self.architecture.longest
        if most is not None:
            sets = [train] if dev is None else [train, dev]
            sides = [side for data in sets for side in (data.source_lengths, data.target_lengths)]
            longest = max(int(lengths.max(initial=1)) for lengths in sides)
            if longest > most:
                raise ConfigError(
                    f"--max-positions: got {most}, but the longest "
                    f"sentence has {longest} tokens; expected at least {longest}, or a lower "
                    "--max-length, which leaves such pairs out of the training"
                )

    def _recipe(self, config: TrainConfig, device: str, tokens_per_pair: float) -> Recipe:
        """What fills in the options that were left open."""
        if self.parent is not None:
            width = self.parent.config.d_model
            return fine_tuning_recipe(self.pairs, tokens_per_pair, device, width)
        if self.shipped:
            return shipped_recipe(device, config.preset)
        return recipe_for(self.pairs, tokens_per_pair, device, config.preset)

    @staticmethod
    def prepare(config: TrainConfig, machine: Machine, console: Console) -> TranslationRun:
        """Reads the text, trains the tokenizer, makes the token ids, or finds them done.

        Raises:
            ValueError: The text cannot be used.
        """
        data, size, parent, tokenizers = config.data, config.preset, None, None
        if config.init_from is not None:
            parent = Parent.open(config, TransformerConfig)
            tokenizers = parent.model.source_tokenizer, parent.model.target_tokenizer
        elif data.shipped:
            filled = fill(config, shipped_recipe(machine.device.type, config.preset))
            data, size = filled.data, filled.preset
        if parent is None and size is not None:
            # Fields that do not go together are found before the text is read; which vocabulary they
            # are for does not matter.
            preset(size, _ANY_VOCABULARY, _ANY_VOCABULARY, **config.model)
        with machine.world.first_goes_first():
            prepared = prepare_data(
                data, lambda text: console.print(f"data       {text} ..."), tokenizers
            )
        if tokenizers is not None:
            prepared.messages += misfit(prepared.train, *tokenizers)
        return TranslationRun(config, machine, console, prepared, parent)

    def use_folder(self, folder: Path) -> None:
        """Keeps a copy of the model that it begins with there."""
        super().use_folder(folder)
        if self.parent is not None and self.machine.world.first:
            self.parent = self.parent.copied_to(folder)
            # Their files are copied to every checkpoint.
            model, before = self.parent.model, self.prepared
            copies = [
                copy.with_tags(old.given_source_tags, old.target_prefixes)
                for copy, old in (
                    (model.source_tokenizer, before.source_tokenizer),
                    (model.target_tokenizer, before.target_tokenizer),
                )
            ]
            one = before.source_tokenizer is before.target_tokenizer
            before.source_tokenizer, before.target_tokenizer = copies[0], copies[0 if one else 1]

    def make_model(self) -> Transformer:
        """The encoder-decoder of the preset, with the options' changes, or the parent."""
        if self.parent is not None:
            self.architecture = self.parent.architecture(self.config.model)
            model = Transformer(self.architecture).load_weights(self.parent.model.weights)
            return model.to(self.machine.device).set_precision(self.machine.precision)
        source, target = self.prepared.source_tokenizer, self.prepared.target_tokenizer
        changes = dict(self.config.model)
        if source is not target:
            if changes.setdefault("tie", "target") == "all":
                raise ConfigError(
                    "--tie: got all, but source and target have a vocabulary each; expected target "
                    "or none, or --joint-vocab"
                )
        for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
            changes[name] = getattr(target, name)
        assert self.config.preset is not None
        self.architecture = preset(
            self.config.preset, source.vocab_size, target.vocab_size, **changes
        )
        model = Transformer(self.architecture)
        return model.to(self.machine.device).set_precision(self.machine.precision)

    def describe(self) -> Sequence[str]:
        """What was read and skipped; size and kind of the model."""
        c, preset_name = self.architecture, self.config.preset
        count = sum(p.numel() for p in self.parameters.values())
        why = (
            ""
            if self.shipped
            else f" (for {counted(self.pairs, 'pairs')}; --preset chooses another size)"
        )
        begins = []
        if self.parent is not None:
            preset_name, why = "its architecture", ""
            both = self.prepared.source_tokenizer, self.prepared.target_tokenizer
            sizes = " and ".join(dict.fromkeys(f"{t.vocab_size:,}" for t in both))
            begins = [
                f"init       weights and tokenizer ({sizes} pieces) of {self.parent.name}, "
                f"SHA-256 {self.parent.sha256[:16]}; optimizer and schedule begin anew"
            ]
        return [
            *(f"data       {message}" for message in self.prepared.messages),
            *begins,
            f"model      {preset_name}: {c.num_encoder_layers}+{c.num_decoder_layers} layers, "
            f"width {c.d_model}, {c.nhead} heads, feed-forward {c.dim_feedforward}, "
            f"{'pre' if c.norm_first else 'post'}-norm, dropout {c.dropout}; "
            f"{count / 1e6:.1f} million parameters{why}",
        ]

    def facts(self) -> dict[str, Any]:
        """Name and number of pairs of the text; the model that it began with."""
        facts: dict[str, Any] = {"corpus": self.prepared.name, "pairs": self.pairs}
        if self.parent is not None:
            facts["init_from"] = self.parent.notes()
        return facts

    # Training -------------------------------------------------------------------------------------

    def make_stream(self, start: Position | None) -> BatchStream:
        """Batches of a budget of target tokens."""
        training, world, train = self.config.training, self.machine.world, self.prepared.train
        assert training.max_tokens is not None
        return BatchStream(
            functools.partial(collate, train, start_id=self.architecture.decoder_start_id),
            BatchSampler(
                train.source_lengths,
                train.target_lengths,
                training.max_tokens,
                training.seed,
                corpora=self.corpora,
            ),
            train.target_lengths,
            accum_steps=training.accum_steps,
            rank=world.rank,
            world_size=world.size,
            start=start,
            resample=self._sampled,
            workers=self.data_workers,
            content=train.digest([weight for _, _, weight in self.corpora]),
        )

    def _sampled_batches(self) -> SampledBatches | None:
        training = self.config.training
        p, sides = training.subword_dropout, training.subword_dropout_sides
        if not p:
            return None
        source, target = self.prepared.source_tokenizer, self.prepared.target_tokenizer
        longest = self.architecture.longest
        make = functools.cache(lambda of: SubwordSampler(of, p, training.seed, longest))
        return SampledBatches(
            make(source) if sides != "target" else None, make(target) if sides != "source" else None
        )

    def validation_batches(self) -> list[Callable[[], Any]]:
        """At most some thousand pairs of the held-out text."""
        max_tokens, dev = self.config.training.max_tokens, self.prepared.dev_set
        assert max_tokens is not None
        if dev is None:
            return []
        rows = pick_evenly(len(dev), _VALIDATION_PAIRS)
        source, target = dev.source_lengths[rows], dev.target_lengths[rows]
        sampler = BatchSampler(
            source,
            target,
            max(max_tokens, int(target.max())),
            max_source_tokens=max(2 * max_tokens, int(source.max())),
        )
        start_id = self.architecture.decoder_start_id
        return [
            functools.partial(collate, dev, rows[indices], start_id) for indices in sampler.epoch(0)
        ]

    all_scores: ClassVar[tuple[str, ...]] = ("bleu", "chrf")

    @property
    def scores(self) -> tuple[str, ...]:
        """None where nothing is translated."""
        judged = self.prepared.dev and self.config.evaluation.validation_sentences
        return self.all_scores if judged else ()

    def make_scorer(self) -> Scorer | None:
        """Translates some of the held-out text."""
        if not self.scores:
            return None
        evaluation = self.config.evaluation
        return Scorer(
            self.prepared.dev,
            self.decoder,
            self.console,
            beam_size=evaluation.validation_beam_size,
            sentences=evaluation.validation_sentences,
        )

    def score_in_memory(self) -> bool:
        """On another device than the CPU: the weights stay there."""
        return self.decoder.in_memory

    def make_trainer(self, log: JsonLog, resume_from: int | None) -> Trainer:
        """Says first how the model that it begins with does on the new text."""
        trainer = super().make_trainer(log, resume_from)
        if self.parent is not None:
            self.judge_parent(trainer, log, resume_from)
        return trainer

    def write_model(self, folder: Path, weights: Mapping[str, Any], notes: dict[str, Any]) -> None:
        """As ``translate`` reads it."""
        train = self.prepared.train
        longest = max(int(train.source_lengths.max()), int(train.target_lengths.max()))
        write_model_files(
            folder,
            self.architecture,
            weights,
            self.prepared.source_tokenizer,
            self.prepared.target_tokenizer,
            {
                "max_train_length": longest,
                **self.facts(),
                "text_sha256": self.prepared.digests,
                "precision": self.machine.precision,
                **notes,
            },
        )

    def read_model(self, folder: Path) -> Mapping[str, Any]:
        """Checks that architecture and tokenizers are those of this run."""
        saved = load_model_dir(folder)
        if saved.config != self.architecture:
            raise ConfigError(f"{folder}: its model differs from the one described by the options")
        tokenizers = (self.prepared.source_tokenizer, self.prepared.target_tokenizer)
        if [t.sha256 for t in tokenizers] != [
            saved.source_tokenizer.sha256,
            saved.target_tokenizer.sha256,
        ]:
            raise ConfigError(f"{folder}: its tokenizer differs: the training text has changed")
        return saved.weights

    # The end --------------------------------------------------------------------------------------

    def test(self, model: Path) -> dict[str, Any]:
        """Translates the test text (or, without one, that for validation) and draws attention."""
        assert self.folder is not None
        say, evaluation = self.console.print, self.config.evaluation
        pairs = self.prepared.test or self.prepared.dev
        part, name = ("test", "test") if self.prepared.test else ("validation", "dev")
        results: dict[str, Any] = {"test_bleu": None}
        if not pairs:
            return results
        sentences = counted(len(pairs), "sentences")
        say(f"translating the {part} text: {sentences}, beam {evaluation.beam_size}")
        began = time.monotonic()
        outputs = self.decoder(model, [src for src, _ in pairs], evaluation.beam_size)
        scores = score(outputs, [tgt for _, tgt in pairs])
        say(
            f"{part} BLEU {scores.bleu:.2f}  ({scores.bleu_signature}); "
            f"chrF {scores.chrf:.2f}  ({scores.chrf_signature}); "
            f"in {duration(time.monotonic() - began)}"
        )
        if len(pairs) < _FEW_SENTENCES:
            say(
                f"warning: scores of {sentences} say little about the model; --src-{name} and "
                f"--tgt-{name} take a text of some hundreds"
            )
        results |= {
            f"{part}_bleu": round(scores.bleu, 3),
            f"{part}_chrf": round(scores.chrf, 3),
            "bleu_signature": scores.bleu_signature,
            "chrf_signature": scores.chrf_signature,
            "decoding_seconds": round(time.monotonic() - began, 2),
        }
        if self.parent is not None and not self.decoder.refused:
            texts = [src for src, _ in pairs]
            before = score(
                self.decoder(self.parent.model.path, texts, evaluation.beam_size),
                [tgt for _, tgt in pairs],
            )
            say(
                f"before fine-tuning ({self.parent.name}): {part} BLEU {before.bleu:.2f}; chrF "
                f"{before.chrf:.2f}"
            )
            results |= {
                f"{part}_bleu_before": round(before.bleu, 3),
                f"{part}_chrf_before": round(before.chrf, 3),
            }
        say()
        samples = pick_samples(pairs, 5)
        print_samples(self.console, pairs, outputs, samples)
        results["samples"] = [
            {"source": pairs[i][0], "reference": pairs[i][1], "output": outputs[i]} for i in samples
        ]
        atomic_write(self.folder / f"{part}.output.txt", "".join(f"{o}\n" for o in outputs))
        self._draw_attention(
            pairs[samples[0]][0], outputs[samples[0]], self.folder / "attention.png"
        )
        return results

    def _draw_attention(self, source: str, output: str, picture: Path) -> None:
        from transformer_ext.visualization.attention import draw_attention, translation_attention
        from transformer_ext.visualization.figure import save_figure

        source_tokenizer = self.prepared.source_tokenizer
        target_tokenizer = self.prepared.target_tokenizer
        try:
            maps = translation_attention(
                self.model,
                source_tokenizer.encode(source),
                target_tokenizer.encode(output),
                source_tokenizer,
                target_tokenizer,
            )
            if "cross" in maps:
                save_figure(draw_attention(maps["cross"]), picture)
        except ValueError as error:
            # A sentence may be longer than a picture is wide; the training is done all the same.
            self.console.print(f"{picture.name} is not drawn: {error}")

    def farewell(self, model: Path) -> Sequence[str]:
        """How to translate with it."""
        pairs = self.prepared.test or self.prepared.dev
        example = pairs[pick_samples(pairs, 1)[0]][0] if pairs else "Click the button."
        lines = [
            f"translate  echo {shlex.quote(example)} | python -m transformer_ext.translate "
            f"{shlex.quote(str(model))}"
        ]
        if self.shipped and self.parent is None:
            lines.append(
                f"this model has read {self.pairs:,} sentences of software help and nothing else; "
                f"for your own text: {self.command} --src-train my.en --tgt-train my.de"
            )
        return lines
