"""The compiled decoding engine, on token ids: encoder, decoder with a cache, search, in C++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformer_ext.inference.compiled import (
    CompiledModel,
    UnsupportedModelError,
    batches_by_length,
    integer_rows,
    integers,
    resolve_compute_type,
)
from transformer_ext.inference.native_search import native_options, read_result
from transformer_ext.inference.options import (
    BATCH_SIZES,
    SearchOptions,
    SearchResult,
    chosen_options,
)
from transformer_ext.inference.shared import (
    attention_layer,
    check_ensemble,
    check_source_lengths,
    empty_result,
    never_proposed,
)
from transformer_ext.model.config import TransformerConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Engine", "UnsupportedModelError", "resolve_compute_type"]

#: Most sentences, and most source tokens (counted as the longest of them times their number), that
#: are decoded together where a call does not say otherwise. The first fills the cores, the second
#: bounds memory: a base model with a beam of 4 takes 140 KB for each source token where outputs are as
#: long as their sources (85 KB in bfloat16 and int8), 210 KB where they are 1.8 times as long.
BATCH_SIZE = BATCH_SIZES[0]
BATCH_TOKENS = 4096

#: Most hypotheses that are searched for together, whatever the batch: memory grows with them too.
MOST_HYPOTHESES = 2048


class Engine(CompiledModel[TransformerConfig]):
    """An encoder-decoder ready to decode on the CPU, without torch.

    A sentence's result is the same, bit for bit, in any batch and for any number of threads.

    :class:`CompiledModel` has the arguments, and what all engines have in common.
    """

    _KIND = TransformerConfig

    def __init__(
        self,
        config: TransformerConfig,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int | None = None,
        compute_type: str = "float32",
    ) -> None:
        super().__init__(config, weights, threads=threads, compute_type=compute_type)
        self._others: list[Engine] = []
        self._configs = [config]

    @classmethod
    def ensemble(cls, engines: Sequence[Engine]) -> Engine:
        """Several models as one: a token has the mean of the probabilities that they give to it.

        Its attention is their mean too, each of the layer asked for.

        Args:
            engines: with equal vocabularies and special tokens; depth and width may differ. The
                threads of the first are at work.

        Raises:
            ValueError: no engine, or one that does not fit the first.
        """
        if not engines:
            raise ValueError("engines: got none, expected at least one")
        first, *others = engines
        check_ensemble([engine.config for engine in engines])
        together = cls.__new__(cls)
        together.config = first.config
        together.compute_type = first.compute_type
        together._engine = first._open()
        together._others = [*first._others, *others]
        together._configs = [engine.config for engine in (first, *together._others)]
        return together

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model has positions for; None: any."""
        limits = [c.longest for c in self._configs if c.longest is not None]
        return min(limits, default=None)

    def _forget(self) -> None:
        # In this order, see _members().
        super()._forget()
        self._others = []

    def _members(self) -> tuple[Any, list[Any]]:
        """The compiled engine and the others of an ensemble, for a call during which it may be closed."""
        others = self._others
        return self._open(), [other._open() for other in others]

    def search(
        self,
        sources: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        numbers: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[SearchResult]:
        """Beam search, or sampling.

        Args:
            sources: token ids of each sentence, end of sentence included.
            options: how to search; the defaults if None.
            prefixes: for each source, ids that its output begins with.
            numbers: for each source, the number that its random numbers depend on; its place in
                ``sources`` if None.
            batch_size: most sentences decoded together, those of similar length; fewer where they
                would have more than :data:`MOST_HYPOTHESES` hypotheses.
            batch_tokens: most source tokens decoded together; a longer sentence is alone.

        Returns:
            a result for each source, in order; an empty source gives one empty hypothesis. Batches
            have no influence on it.

        Raises:
            TypeError: no sequences of integers.
            ValueError: an id that is not in the vocabulary, a source longer than the model's
                positions or ``max_source_length``, a prefix as long as the longest output, numbers
                of prefixes and sources that differ, or weights that give NaN.
        """
        options = chosen_options(options)
        engine, others = self._members()
        sources = integer_rows("sources", sources, self.config.src_vocab_size - 1)
        if prefixes is not None:
            prefixes = integer_rows("prefixes", prefixes, self.config.tgt_vocab_size - 1)
        if numbers is not None:
            numbers = integers("numbers", numbers, 2**64 - 1)
        for name, values in (("prefixes", prefixes), ("numbers", numbers)):
            if values is not None and len(values) != len(sources):
                raise ValueError(
                    f"{name}: got {len(values)}, expected one for each of the "
                    f"{len(sources)} sources"
                )
        layers = self._attention_layers(options)
        check_source_lengths(sources, options.max_source_length)
        results = [empty_result(options) for _ in sources]
        width = options.num_hypotheses if options.sampling else options.beam_size
        narrow = min(batch_size, max(1, MOST_HYPOTHESES // width)) if batch_size > 0 else batch_size
        for batch in batches_by_length(sources, narrow, batch_tokens):
            lengths = [len(sources[i]) for i in batch]
            limits = [options.length_limit(length, self.positions) for length in lengths]
            found = engine.search(
                sources=[sources[i] for i in batch],
                prefixes=[[] if prefixes is None else prefixes[i] for i in batch],
                limits=limits,
                minima=[options.length_minimum(length) for length in lengths],
                numbers=[i if numbers is None else numbers[i] for i in batch],
                options=native_options(
                    options,
                    max(limits),
                    never=never_proposed(self.config),
                    eos_id=self.config.eos_id,
                    start_id=self.config.decoder_start_id,
                ),
                others=others,
                attention_layers=layers,
            )
            for i, result in zip(batch, found, strict=True):
                results[i] = read_result(options, result)
        return results

    def _attention_layers(self, options: SearchOptions) -> list[int]:
        """Of each model; empty where the options need no attention."""
        layers = [attention_layer(options, config) for config in self._configs]
        return [layer for layer in layers if layer is not None]

    def score(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[list[float]]:
        """Log-probability of each token of given targets (teacher forcing).

        Args:
            sources: token ids of each sentence, end of sentence included.
            targets: token ids of each translation, end of sentence included if it is to count.
            batch_size: most sentences scored together.
            batch_tokens: most source tokens scored together.

        Returns:
            for each target, natural logarithms, one a token; none where the source is empty.

        Raises:
            TypeError, ValueError: as :meth:`search`, and where the numbers of sources and targets differ.
        """
        return [
            log_probs
            for log_probs, _ in self._score(sources, targets, [], batch_size, batch_tokens)
        ]

    def align(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        layer: int | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[tuple[list[float], NDArray[np.float32]]]:
        """:meth:`score`, with what each token of the targets attends to.

        Args:
            sources: see there.
            targets: see there.
            layer: decoder layer, from 0; None: the last.
            batch_size: see there.
            batch_tokens: see there.

        Returns:
            for each target, its log-probabilities and float32 ``[tokens, source tokens]``, averaged
            over the heads.

        Raises:
            TypeError, ValueError: as :meth:`score`, and for a layer that the model does not have.
        """
        import numpy as np

        asked = SearchOptions(return_attention=True, attention_layer=layer)
        layers = self._attention_layers(asked)
        # Once: what may be read only once, too.
        sources = integer_rows("sources", sources, self.config.src_vocab_size - 1)
        found = self._score(sources, targets, layers, batch_size, batch_tokens)
        return [
            (log_probs, np.zeros((0, len(source)), np.float32) if attention is None else attention)
            for source, (log_probs, attention) in zip(sources, found, strict=True)
        ]

    def _score(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        attention_layers: list[int],
        batch_size: int,
        batch_tokens: int,
    ) -> list[tuple[list[float], NDArray[np.float32] | None]]:
        engine, others = self._members()
        sources = integer_rows("sources", sources, self.config.src_vocab_size - 1)
        targets = integer_rows("targets", targets, self.config.tgt_vocab_size - 1)
        if len(sources) != len(targets):
            raise ValueError(
                f"targets: got {len(targets)}, expected one for each of the {len(sources)} sources"
            )
        scores: list[tuple[list[float], NDArray[np.float32] | None]] = [([], None)] * len(sources)
        for batch in batches_by_length(sources, batch_size, batch_tokens):
            found = engine.score(
                sources=[sources[i] for i in batch],
                targets=[targets[i] for i in batch],
                start_id=self.config.decoder_start_id,
                others=others,
                attention_layers=attention_layers,
            )
            for i, row in zip(batch, found, strict=True):
                scores[i] = row.log_probs, row.attention
        return scores
