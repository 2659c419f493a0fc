"""The compiled decoding engine, on token ids: encoder, decoder with a cache, beam search, in C++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from transformer_ext._native import native
from transformer_ext.files import parameter_shapes
from transformer_ext.inference.options import Hypothesis, SearchOptions, SearchResult
from transformer_ext.inference.search import empty_result, never_proposed
from transformer_ext.model.config import TransformerConfig


class UnsupportedModelError(ValueError):
    """A model with a part that the compiled engine does not have; the message names it.

    ``transformer_ext.inference.search.beam_search`` decodes such a model, slowly.
    """


class Engine:
    """A model ready to decode on the CPU, in float32, without torch.

    Any number of threads may call one engine at once; the interpreter's lock is not held meanwhile.
    A sentence's result is the same, bit for bit, in any batch and for any number of threads.

    Args:
        config: the architecture.
        weights: float32 arrays by parameter name, as in ``model.safetensors``. They are copied: what
            happens to them afterwards has no effect.
        threads: threads at work on one call; None takes as many as there are physical cores that
            this process may use.

    Raises:
        UnsupportedModelError: the model has a part that the engine does not know.
        ValueError: a weight is missing or has a wrong shape or type; ``threads`` is below 1.
        NativeError: the compiled part of the package is missing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int | None = None,
    ) -> None:
        self.config = config
        compiled = native()
        expected = parameter_shapes(config)
        unknown = [name for name in weights if name not in expected]
        if unknown:
            raise UnsupportedModelError(
                f"the model has a part that the engine does not know: {unknown[0]!r}"
                + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            )
        arrays: dict[str, np.ndarray] = {}
        for name in weights:
            array = weights[name]
            if array.dtype != np.float32:
                raise ValueError(f"weight {name}: got {array.dtype}, expected float32")
            arrays[name] = np.ascontiguousarray(array)
        if threads is None:
            threads = compiled.default_threads()
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads: got {threads!r}, expected an integer of at least 1")
        try:
            self._engine: Any = compiled.Engine(config.to_dict(), arrays, threads)
        except compiled.UnsupportedModel as error:
            raise UnsupportedModelError(str(error)) from None

    @property
    def threads(self) -> int:
        """Threads at work on one call."""
        return int(self._open().threads)

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model has positions for; None: any."""
        return self.config.max_positions if self.config.positions == "learned" else None

    def close(self) -> None:
        """Give the memory back; the engine cannot be used afterwards."""
        self._engine = None

    def _open(self) -> Any:
        if self._engine is None:
            raise ValueError("this engine (or translator) is closed")
        return self._engine

    def search(
        self,
        sources: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        batch_size: int = 64,
    ) -> list[SearchResult]:
        """Beam search.

        Args:
            sources: token ids of each sentence, end of sentence included.
            options: how to search; the defaults if None.
            batch_size: sentences decoded together, those of similar length.

        Returns:
            a result for each source, in order; an empty source gives one empty hypothesis.

        Raises:
            ValueError: an id that is not in the vocabulary, a source longer than the model's
                positions, or weights that give NaN.
        """
        options = options or SearchOptions()
        results = [empty_result() for _ in sources]
        for batch in self._batches(sources, batch_size):
            limits = [options.length_limit(len(sources[i]), self.positions) for i in batch]
            ended, cut = _penalties(options, max(limits))
            found = self._open().search(
                sources=[list(sources[i]) for i in batch],
                limits=limits,
                beam_size=options.beam_size,
                num_hypotheses=options.num_hypotheses,
                min_length=options.min_length,
                stop_at_first=options.early_stopping == "first",
                start_id=self.config.decoder_start_id,
                eos_id=self.config.eos_id,
                suppressed=sorted(never_proposed(self.config)),
                ended_penalty=ended,
                cut_penalty=cut,
            )
            for i, result in zip(batch, found, strict=True):
                results[i] = SearchResult(
                    [
                        Hypothesis(h.tokens, h.score, h.log_prob, h.token_scores, h.ended)
                        for h in result.hypotheses
                    ],
                    result.stop,
                    result.steps,
                )
        return results

    def score(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        batch_size: int = 64,
    ) -> list[list[float]]:
        """Log-probability of each token of given targets (teacher forcing).

        Args:
            sources: token ids of each sentence, end of sentence included.
            targets: token ids of each translation, end of sentence included if it is to count.
            batch_size: sentences scored together.

        Returns:
            for each target, natural logarithms, one a token; none where the source is empty.

        Raises:
            ValueError: as :meth:`search`, and where the numbers of sources and targets differ.
        """
        if len(sources) != len(targets):
            raise ValueError(
                f"targets: got {len(targets)}, expected one for each of the {len(sources)} sources"
            )
        scores: list[list[float]] = [[] for _ in sources]
        for batch in self._batches(sources, batch_size):
            found = self._open().score(
                sources=[list(sources[i]) for i in batch],
                targets=[list(targets[i]) for i in batch],
                start_id=self.config.decoder_start_id,
            )
            for i, row in zip(batch, found, strict=True):
                scores[i] = row
        return scores

    def _batches(self, sources: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
        """Numbers of the sources that are not empty, longest first, in batches."""
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        order = sorted(
            (i for i, source in enumerate(sources) if len(source)), key=lambda i: -len(sources[i])
        )
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@lru_cache(maxsize=64)
def _penalties(options: SearchOptions, limit: int) -> tuple[list[float], list[float]]:
    """What log-probabilities of 0 .. ``limit`` tokens are divided by: ended, and cut off."""
    lengths = range(limit + 1)
    return (
        [options.penalty(length, ended=True) for length in lengths],
        [options.penalty(length, ended=False) for length in lengths],
    )
