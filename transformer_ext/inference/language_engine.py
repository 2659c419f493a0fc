"""The compiled engine for language models, on token ids: prompts at once, then a search with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformer_ext.inference.compiled import CompiledModel, integer_rows, integers
from transformer_ext.inference.native_search import native_options, read_result
from transformer_ext.inference.options import (
    BATCH_SIZES,
    SearchOptions,
    SearchResult,
    check_at_once,
    chosen_options,
)
from transformer_ext.inference.shared import continuation_limits, fed_tokens, never_proposed
from transformer_ext.model.config import LanguageModelConfig

#: Most texts that are continued together, and most tokens of which keys and values are held for
#: them (those of a prompt once, those that follow it once for each hypothesis), where a call does
#: not say otherwise. Of GPT-2 small a token takes 72 KB, in bfloat16 and int8 half as much.
BATCH_SIZE = BATCH_SIZES[0]
BATCH_TOKENS = 8192


class LanguageModelEngine(CompiledModel[LanguageModelConfig]):
    """A language model ready on the CPU, without torch.

    Any number of threads may call one engine at once; the interpreter's lock is not held meanwhile.
    A text's result is the same, bit for bit, in any batch and for any number of threads, and the
    score of a token is the same whether it was given or found.

    Args:
        config: the architecture.
        weights: see :class:`transformer_ext.inference.engine.Engine`, and for the errors.
        threads: see there.
        compute_type: see there.
    """

    _KIND = LanguageModelConfig

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[SearchResult]:
        """What follows each prompt, by beam search or sampling.

        Args:
            prompts: token ids of each, possibly none; a start token is put before those of a model
                whose texts begin with one (``prepend_bos``), and before an empty prompt.
            options: how to search; the defaults if None. ``max_length`` counts what follows (50
                tokens by default, fewer where the learned positions end before); options that
                concern a source have no meaning here.
            numbers: for each prompt, the number that its random numbers depend on; its place in
                ``prompts`` if None.
            batch_size: most prompts worked on together.
            batch_tokens: most tokens held for them, see :data:`BATCH_TOKENS`; a prompt that needs
                more is alone.

        Returns:
            a result for each prompt, in order, with the new tokens only. Batches have no influence
            on it.

        Raises:
            TypeError: no sequences of integers.
            ValueError: an id that is not in the vocabulary, a prompt longer than the model's
                positions, options that need a source, numbers of prompts and ``numbers`` that
                differ, or weights that give NaN.
        """
        options = chosen_options(options)
        engine = self._open()
        given = integer_rows("prompts", prompts, self.config.vocab_size - 1)
        if numbers is not None:
            numbers = integers("numbers", numbers, 2**64 - 1)
        fed = [fed_tokens(self.config, prompt) for prompt in given]
        limits = continuation_limits(self.config, options, fed, numbers)
        width = options.num_hypotheses if options.sampling else options.beam_size
        sizes = [len(f) + width * limit for f, limit in zip(fed, limits, strict=True)]
        results: list[SearchResult | None] = [None] * len(given)
        for batch in _batches(sizes, batch_size, batch_tokens):
            found = engine.search(
                sources=[],
                prefixes=[[] for _ in batch],
                limits=[limits[i] for i in batch],
                minima=[options.length_minimum(0) for _ in batch],
                numbers=[i if numbers is None else numbers[i] for i in batch],
                options=native_options(
                    options,
                    max(limits[i] for i in batch),
                    never=never_proposed(self.config),
                    eos_id=self.config.eos_id,
                    start_id=None,
                ),
                others=[],
                attention_layers=[],
                prompts=[fed[i] for i in batch],
            )
            for i, result in zip(batch, found, strict=True):
                results[i] = read_result(options, result)
        return [result for result in results if result is not None]

    def score(
        self,
        texts: Sequence[Sequence[int]],
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[list[float]]:
        """Log-probability of each token of given texts.

        Args:
            texts: token ids of each, the end of the text included if it is to count.
            batch_size: most texts scored together.
            batch_tokens: most of their tokens.

        Returns:
            for each text, natural logarithms, one a token; the first token of a text that begins
            without a start token (``prepend_bos`` is False) has none, as nothing comes before it.

        Raises:
            TypeError, ValueError: as :meth:`search`.
        """
        engine = self._open()
        start_id = self.config.bos_id if self.config.prepend_bos else -1
        given = integer_rows("texts", texts, self.config.vocab_size - 1)
        scores: list[list[float]] = [[] for _ in given]
        for batch in _batches([len(text) for text in given], batch_size, batch_tokens):
            found = engine.score(
                sources=[],
                targets=[given[i] for i in batch],
                start_id=start_id,
                others=[],
                attention_layers=[],
            )
            for i, row in zip(batch, found, strict=True):
                scores[i] = row.log_probs
        return scores


def _batches(sizes: Sequence[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts in their order, in batches."""
    check_at_once("batch_size", batch_size)
    check_at_once("batch_tokens", batch_tokens)
    batch: list[int] = []
    held = 0
    for number, size in enumerate(sizes):
        if batch and (len(batch) == batch_size or held + size > batch_tokens):
            yield batch
            batch, held = [], 0
        batch.append(number)
        held += size
    if batch:
        yield batch
