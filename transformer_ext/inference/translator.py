"""Text in, text out: tokenizer, compiled engine, tokenizer."""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import FileError, load_model_dir, naming_damage
from transformer_ext.inference.engine import BATCH_SIZE, Engine
from transformer_ext.inference.options import (
    Hypothesis,
    SearchOptions,
    SearchResult,
    chosen_options,
)
from transformer_ext.inference.shared import Closing, at_once, device_name, torch_compute_type
from transformer_ext.inference.text_model import check_iterable, check_texts
from transformer_ext.model.config import TransformerConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from transformer_ext.inference.torch_engine import TorchEngine


@dataclass(frozen=True)
class TextHypothesis(Hypothesis):
    """A hypothesis with its text.

    Attributes:
        text: the decoded tokens, always one line.
    """

    text: str = ""


@dataclass(frozen=True)
class Translation:
    """The translation of one text.

    Attributes:
        text: of the best hypothesis.
        tokens: its ids in the target vocabulary, without end of sentence.
        score: its score, see :class:`transformer_ext.inference.options.Hypothesis`.
        hypotheses: ``num_hypotheses`` of them, best first.
    """

    text: str
    tokens: list[int]
    score: float
    hypotheses: list[TextHypothesis]


class Translator(Closing):
    """Translates with a model directory: on the CPU without importing torch, elsewhere with it.

    ::

        with Translator("runs/my-model") as translator:
            print(translator.translate("Click the button.").text)
            for translation in translator.translate(lines, beam_size=8, num_hypotheses=3):
                print(translation.text, translation.score)

    One translator may be used by any number of threads at once.

    Args:
        model_dir: folder with ``config.json``, ``model.safetensors`` and the tokenizer; or several,
            as an ensemble: of each token counts the mean of the probabilities that they give to it.
        threads: threads at work on one call; None takes as many as there are physical cores that
            this process may use.
        compute_type: ``float32``, ``bfloat16``, ``int8`` or ``auto``; see
            :class:`transformer_ext.inference.engine.Engine`. On another device ``float32``,
            ``bfloat16``, ``float16`` or ``auto``.
        options: how to search where a call does not say otherwise; the defaults if None.
        device: ``cpu``, where the compiled engine computes, or a device of PyTorch's or its name, such
            as ``cuda``; see :class:`transformer_ext.inference.torch_engine.TorchEngine`.

    Attributes:
        config: the architecture.
        options: how to search where a call does not say otherwise.
        source_tokenizer: of the source language.
        target_tokenizer: of the target language.
        max_train_length: longest sentence trained on, in tokens, where the model says so.

    Raises:
        FileError: something in the folder is missing, broken, or does not fit the rest; the models
            of an ensemble have different tokenizers.
        UnsupportedModelError: the model has a part that the engine does not know.
        ValueError: ``threads`` is below 1, or given for another device; ``compute_type`` is unknown
            or not to be had here; PyTorch does not have the device.
    """

    def __init__(
        self,
        model_dir: str | Path | Sequence[str | Path],
        threads: int | None = None,
        *,
        compute_type: str = "float32",
        options: SearchOptions | None = None,
        device: str | int | torch.device = "cpu",
    ) -> None:
        folders: list[Any]
        if isinstance(model_dir, (str, bytes, Path)) or not isinstance(model_dir, Iterable):
            folders = [model_dir]
        else:
            folders = list(model_dir)
        device = device_name(device)
        if not folders:
            raise ValueError("model_dir: got no folder, expected at least one")
        models = [load_model_dir(folder) for folder in folders]
        model = models[0]
        for other in models[1:]:
            for side in ("source_tokenizer", "target_tokenizer"):
                if getattr(other, side).sha256 != getattr(model, side).sha256:
                    raise FileError(
                        f"{other.path}: its {side.replace('_', ' ')} is not that of {model.path}, "
                        "which the models of an ensemble must share"
                    )
        engine: Engine | TorchEngine
        if device == "cpu":
            engines = [
                Engine(each.config, each.weights, threads=threads, compute_type=compute_type)
                for each in models
            ]
            engine = engines[0] if len(engines) == 1 else Engine.ensemble(engines)
        else:
            compute_type = torch_compute_type(threads, compute_type, device)
            from transformer_ext.inference.torch_engine import TorchEngine

            pairs = [(each.config, each.weights) for each in models]
            engine = TorchEngine.of_weights(pairs, device, compute_type)
        longest = [each.training.get("max_train_length") for each in models]
        self._set_up(
            engine,
            model.source_tokenizer,
            model.target_tokenizer,
            min((length for length in longest if isinstance(length, int)), default=None),
            options,
            [model.path for model in models],
        )

    @classmethod
    def from_weights(
        cls,
        config: TransformerConfig,
        weights: Mapping[str, np.ndarray],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer | None = None,
        *,
        threads: int | None = None,
        compute_type: str = "float32",
        options: SearchOptions | None = None,
    ) -> Translator:
        """A translator of weights in memory, as of a model in training.

        Args:
            config: the architecture.
            weights: float32 arrays by parameter name, as in ``model.safetensors``; copied.
            source_tokenizer: of the source language.
            target_tokenizer: of the target language; None: the same.
            threads, compute_type, options: see the class.

        Raises:
            UnsupportedModelError, ValueError: see :class:`transformer_ext.inference.engine.Engine`.
        """
        translator = cls.__new__(cls)
        translator._set_up(
            Engine(config, weights, threads=threads, compute_type=compute_type),
            source_tokenizer,
            target_tokenizer or source_tokenizer,
            None,
            options,
        )
        return translator

    def _set_up(
        self,
        engine: Engine | TorchEngine,
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        max_train_length: int | None,
        options: SearchOptions | None,
        folders: Sequence[Path] = (),
    ) -> None:
        self._engine = engine
        self._folders = folders
        self.config: TransformerConfig = engine.config
        self.options = chosen_options(options)
        self.source_tokenizer = source_tokenizer
        self.target_tokenizer = target_tokenizer
        self.max_train_length = max_train_length

    @property
    def compute_type(self) -> str:
        """What the matrix products multiply: ``auto`` resolved."""
        return self._engine.compute_type

    @property
    def threads(self) -> int:
        """Threads at work on one call; on another device than the CPU, 1."""
        return self._engine.threads

    @property
    def longest_source(self) -> int | None:
        """Longest source that can be translated, in tokens; None: any."""
        return self._engine.positions

    def _part(self) -> Closing:
        return self._engine

    def encode(self, texts: Sequence[str], source_tag: str | None = None) -> list[list[int]]:
        """Source ids of each text, end of sentence included; none for empty text or white space.

        Args:
            texts: the texts; a tag that one begins with is one token.
            source_tag: the tag that all of them begin with, if they have none yet.

        Raises:
            ValueError: the model was not trained with this tag.
        """
        texts = check_texts("texts", texts)
        eos = self.source_tokenizer.eos_id
        if source_tag is not None:
            self.check_source_tag(source_tag)
            texts = [f"{source_tag} {text}" if text.strip() else text for text in texts]
        ids = self.source_tokenizer.encode_batch(texts)
        return [[*row, eos] if text.strip() else [] for text, row in zip(texts, ids, strict=True)]

    def check_source_tag(self, tag: str, name: str = "source_tag") -> None:
        """Refuse a tag that the model was not trained with.

        Args:
            tag: the tag.
            name: of the argument, for the message.

        Raises:
            ValueError: the message lists those that it knows.
        """
        known = self.source_tokenizer.source_tags
        if tag not in known:
            expected = (
                f"expected one of {', '.join(known)}" if known else "but this model knows no tags"
            )
            raise ValueError(f"{name}: got {tag!r}, {expected}")

    @overload
    def translate(
        self,
        text: str,
        options: SearchOptions | None = None,
        *,
        target_prefix: str | None = None,
        source_tag: str | None = None,
        **changes: Any,
    ) -> Translation: ...

    @overload
    def translate(
        self,
        text: Sequence[str],
        options: SearchOptions | None = None,
        *,
        target_prefix: Sequence[str] | None = None,
        source_tag: str | None = None,
        **changes: Any,
    ) -> list[Translation]: ...

    def translate(
        self,
        text: str | Sequence[str],
        options: SearchOptions | None = None,
        *,
        target_prefix: str | Sequence[str] | None = None,
        source_tag: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> Translation | list[Translation]:
        """Translate a text, or each of many.

        A text longer than any that the model was trained on is translated like the others; one
        warning says how many there were.

        Args:
            text: one text, or a sequence of them; each is one sentence for the model.
            options: how to search; the translator's own if None.
            target_prefix: what the translation is to begin with: a text for one text, a sequence of
                as many for a sequence. It is cut into tokens by itself, so the word that it ends
                with may go on. A target prefix of the training (``<de>``) is not shown in the text.
            source_tag: a tag of the training (``<2de>``) that each text gets; the texts may begin
                with tags of their own instead.
            batch_size: most texts decoded together; it has no influence on the results.
            batch_tokens: most tokens decoded together, which bounds memory; the same.
            changes: single search options, as ``beam_size=8``.

        Returns:
            one :class:`Translation` for one text, a list for a sequence. An empty text,
            or one of white space, gives an empty one.

        Raises:
            ConfigError: an unknown search option, or a wrong value.
            TypeError: neither a text nor a sequence of texts.
            ValueError: a text longer than the learned positions of the model, a prefix as long as
                the longest output, not as many prefixes as texts, or an unknown source tag.
        """
        texts = _texts("text", text)
        prefixes = None
        if target_prefix is not None:
            if isinstance(target_prefix, str) != isinstance(text, str):
                raise TypeError(
                    "target_prefix: expected a text for one text, a sequence of texts for a "
                    "sequence"
                )
            prefixes = self.encode_prefixes(_texts("target_prefix", target_prefix))
            if len(prefixes) != len(texts):
                raise ValueError(
                    f"target_prefix: got {len(prefixes)}, expected one for each of the "
                    f"{len(texts)} texts"
                )
        sources = self.encode(texts, source_tag)
        over_long = self.count_over_long(sources)
        if over_long:
            warnings.warn(self.over_long_message(over_long), stacklevel=2)
        results = self.translate_ids(
            sources,
            options,
            prefixes=prefixes,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            **changes,
        )
        translations = [self.translation(result) for result in results]
        return translations[0] if isinstance(text, str) else translations

    def translate_iter(
        self,
        texts: Iterable[str],
        options: SearchOptions | None = None,
        *,
        target_prefix: Iterable[str] | None = None,
        source_tag: str | None = None,
        read_ahead: int = 4 * BATCH_SIZE,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> Iterator[Translation]:
        """:meth:`translate` for texts without end, in bounded memory.

        ::

            with open("corpus.en") as lines:
                for translation in translator.translate_iter(lines, beam_size=1):
                    print(translation.text)

        Args:
            texts: any iterable, read only as translations are asked for.
            options: see :meth:`translate`.
            target_prefix: what each translation is to begin with, as many as texts.
            source_tag: see :meth:`translate`.
            read_ahead: texts that are read, sorted by length, translated and held at once.
            batch_size: see :meth:`translate`.
            batch_tokens: see there.
            changes: see there.

        Yields:
            a :class:`Translation` for each text, in order, the same as :meth:`translate` of a list
            of all gives.

        Raises:
            ConfigError, TypeError, ValueError: as :meth:`translate`, options at once, the rest when
                the text is reached.
        """
        check_iterable("texts", texts, "an iterable of texts")
        if target_prefix is not None:
            check_iterable("target_prefix", target_prefix, "an iterable of texts")
        if not isinstance(read_ahead, int) or read_ahead < 1:
            raise ValueError(f"read_ahead: got {read_ahead!r}, expected an integer of at least 1")
        options = chosen_options(options, self.options, **changes)
        if source_tag is not None:
            self.check_source_tag(source_tag)
        return self._translate_blocks(
            iter(texts),
            None if target_prefix is None else iter(target_prefix),
            source_tag,
            options,
            read_ahead,
            batch_size,
            batch_tokens,
        )

    def _translate_blocks(
        self,
        texts: Iterator[str],
        prefixes: Iterator[str] | None,
        source_tag: str | None,
        options: SearchOptions,
        read_ahead: int,
        batch_size: int | None,
        batch_tokens: int | None,
    ) -> Iterator[Translation]:
        number = 0
        warned = False
        while block := list(itertools.islice(texts, read_ahead)):
            sources = self.encode(check_texts("texts", block, number), source_tag)
            prefix_ids = None
            if prefixes is not None:
                beginnings = list(itertools.islice(prefixes, len(block)))
                if len(beginnings) < len(block):
                    raise ValueError(
                        f"target_prefix: got {number + len(beginnings)}, expected one for each text"
                    )
                prefix_ids = self.encode_prefixes(check_texts("target_prefix", beginnings, number))
            over_long = self.count_over_long(sources)
            if over_long and not warned:
                warnings.warn(self.over_long_message(over_long), stacklevel=2)
                warned = True
            results = self.translate_ids(
                sources,
                options,
                prefixes=prefix_ids,
                numbers=range(number, number + len(block)),
                batch_size=batch_size,
                batch_tokens=batch_tokens,
            )
            number += len(block)
            for result in results:
                yield self.translation(result)

    def translate_ids(
        self,
        sources: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> list[SearchResult]:
        """:meth:`translate` on token ids.

        Args:
            sources: ids of each sentence, end of sentence included.
            options: how to search; the translator's own if None.
            prefixes: for each source, ids that its output begins with.
            numbers: for each source, the number that its random numbers depend on when sampling;
                its place in ``sources`` if None.
            batch_size: most sentences decoded together.
            batch_tokens: most source tokens decoded together.
            changes: single search options.

        Returns:
            for each source, hypotheses of ids; an empty source gives one empty hypothesis.

        Raises:
            TypeError: no sequences of integers.
            ConfigError, ValueError: see :meth:`translate`; an id that is not in the vocabulary.
        """
        options = chosen_options(options, self.options, **changes)
        with naming_damage(self._folders):
            return self._engine.search(
                sources,
                options,
                prefixes=prefixes,
                numbers=numbers,
                **at_once(batch_size, batch_tokens),
            )

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
    ) -> list[list[float]]:
        """Log-probability of each token of given translations, the end of sentence's last.

        Args:
            sources: source texts.
            targets: a translation of each.
            batch_size: most pairs scored together.
            batch_tokens: most source tokens scored together.

        Returns:
            natural logarithms, one for each token of the target and one for the end of sentence;
            none for an empty source.

        Raises:
            TypeError: no sequences of texts.
            ValueError: the numbers of sources and targets differ, or a text is longer than the
                learned positions of the model.
        """
        source_ids, target_ids = self._encode_pairs(sources, targets)
        with naming_damage(self._folders):
            return self._engine.score(
                source_ids,
                target_ids,
                **at_once(batch_size, batch_tokens),
            )

    def align(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        layer: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
    ) -> list[tuple[list[float], NDArray[np.float32]]]:
        """:meth:`score`, with the attention of each token of given translations to the source.

        Args:
            sources: source texts.
            targets: a translation of each.
            layer: decoder layer, from 0, over whose heads is averaged; None: the last.
            batch_size: see :meth:`score`.
            batch_tokens: see there.

        Returns:
            for each pair, the log-probabilities and float32 ``[target tokens, source tokens]``, the
            end of sentence among both.

        Raises:
            TypeError, ValueError: as :meth:`score`, and for a layer that the model does not have.
        """
        source_ids, target_ids = self._encode_pairs(sources, targets)
        with naming_damage(self._folders):
            return self._engine.align(
                source_ids,
                target_ids,
                layer=layer,
                **at_once(batch_size, batch_tokens),
            )

    def _encode_pairs(
        self, sources: Sequence[str], targets: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        eos = self.config.eos_id
        given = self.target_tokenizer.encode_batch(check_texts("targets", targets))
        return self.encode(check_texts("sources", sources)), [[*ids, eos] for ids in given]

    def encode_prefixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Target ids of the beginnings of translations."""
        return self.target_tokenizer.encode_batch(check_texts("texts", texts))

    def count_over_long(self, sources: Sequence[Sequence[int]]) -> int:
        """How many sources are longer than any sentence that the model was trained on."""
        longest = self.max_train_length
        return 0 if longest is None else sum(len(source) > longest for source in sources)

    def over_long_message(self, count: int) -> str:
        """The warning for so many."""
        lines = "1 text is" if count == 1 else f"{count} texts are"
        return (
            f"{lines} longer than any that this model was trained on ({self.max_train_length} "
            "tokens); the translation may be poor: give it one sentence at a time"
        )

    def translation(self, result: SearchResult) -> Translation:
        """A result of :meth:`translate_ids` as text."""
        hypotheses = [
            TextHypothesis(
                h.tokens,
                h.score,
                h.log_prob,
                h.token_scores,
                h.stop,
                h.attention,
                h.alignment,
                self.target_tokenizer.decode(h.tokens),
            )
            for h in result.hypotheses
        ]
        best = hypotheses[0]
        return Translation(best.text, best.tokens, best.score, hypotheses)


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    """The value as a list.

    Raises:
        TypeError: it is neither a text nor a sequence of texts.
        TextError: a text with half a character.
    """
    if isinstance(value, str):
        value = [value]
    check_iterable(name, value, "a text or a sequence of texts")
    return check_texts(name, value)


def open_translator(
    arguments: argparse.Namespace, options: SearchOptions | None = None
) -> Translator:
    """The translator that a command's arguments name (``add_engine_arguments``, and ``model``).

    Which type ``auto`` became is said on stderr.

    Raises:
        As :class:`Translator`.
    """
    translator = Translator(
        [arguments.model, *arguments.ensemble],
        arguments.threads,
        compute_type=arguments.compute_type,
        options=options,
        device=arguments.device,
    )
    if arguments.compute_type == "auto":
        print(f"compute type: {translator.compute_type}", file=sys.stderr)
    return translator
