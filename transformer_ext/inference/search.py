"""Beam search in plain Python: what the compiled engine is tested against, and what decodes a model
that the engine does not know.

It is written to be read. It keeps no cache: each step runs the model over the whole prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_ext.inference.options import (
    Hypothesis,
    SearchOptions,
    SearchResult,
    StopReason,
)

if TYPE_CHECKING:
    from transformer_ext.model.config import TransformerConfig
    from transformer_ext.model.transformer import Transformer

#: ``step(sentences, prefixes)``: log-probabilities ``[rows, vocabulary]`` of the token after each
#: prefix, where ``sentences`` is the number of each row's sentence (ascending) and ``prefixes`` is
#: int64 ``[rows, length]``, each beginning with the start token.
Step = Callable[[list[int], NDArray[np.int64]], NDArray[Any]]


def never_proposed(config: TransformerConfig) -> frozenset[int]:
    """Ids that no search proposes: padding, and the tokens that only begin a sentence."""
    never = {config.pad_id, config.bos_id, config.decoder_start_id}
    return frozenset(never - {config.eos_id})


@dataclass(frozen=True)
class _Live:
    """A hypothesis that has not ended."""

    tokens: list[int] = field(default_factory=list)
    token_scores: list[float] = field(default_factory=list)
    log_prob: float = 0.0

    def extended(self, token: int, score: float) -> _Live:
        return _Live([*self.tokens, token], [*self.token_scores, score], self.log_prob + score)


class SentenceSearch:
    """Beam search for one sentence, one step at a time.

    Args:
        limit: most tokens, end of sentence included.
        eos_id: the end of sentence.
        options: see there for the rules.
        suppressed: ids never proposed.
    """

    def __init__(
        self, limit: int, eos_id: int, options: SearchOptions, suppressed: Collection[int] = ()
    ) -> None:
        self.limit = limit
        self.eos_id = eos_id
        self.options = options
        self.suppressed = sorted(suppressed)
        self.live = [_Live()]
        self.finished: list[Hypothesis] = []
        self.steps = 0
        self.stop: StopReason | None = None

    def advance(self, log_probs: NDArray[Any]) -> None:
        """One step.

        Args:
            log_probs: ``[live hypotheses, vocabulary]``.

        Raises:
            ValueError: a NaN among them.
        """
        scores = np.array(log_probs, dtype=np.float64)
        if np.isnan(scores).any():
            raise ValueError(f"log-probabilities of step {self.steps + 1}: NaN among them")
        scores[:, self.suppressed] = -np.inf
        if self.steps < self.options.min_length:
            scores[:, self.eos_id] = -np.inf
        totals = scores + np.array([live.log_prob for live in self.live])[:, None]
        # Stable: equal ones stay in the order of (hypothesis, token).
        order = np.argsort(-totals, axis=None, kind="stable")
        beam_size = self.options.beam_size
        survivors: list[_Live] = []
        for rank, flat in enumerate(order[: 2 * beam_size].tolist()):
            row, token = divmod(flat, scores.shape[1])
            score = float(scores[row, token])
            if score == -np.inf:
                break
            if token == self.eos_id:
                if rank < beam_size:
                    self.finished.append(self._hypothesis(self.live[row], score))
            elif len(survivors) < beam_size:
                survivors.append(self.live[row].extended(token, score))
        self.live = survivors
        self.steps += 1
        self.stop = self._reason_to_stop()

    def _hypothesis(self, live: _Live, end_score: float | None) -> Hypothesis:
        """A live hypothesis as a result: ended with that log-probability, or cut off (None)."""
        ended = end_score is not None
        log_prob = live.log_prob + (end_score or 0.0)
        return Hypothesis(
            tokens=live.tokens,
            score=log_prob / self.options.penalty(len(live.tokens), ended),
            log_prob=log_prob,
            token_scores=[*live.token_scores, *([] if end_score is None else [end_score])],
            ended=ended,
        )

    def _reason_to_stop(self) -> StopReason | None:
        options = self.options
        if options.beam_size == 1 and self.finished:
            return "first"
        if options.early_stopping == "first" and len(self.finished) >= options.beam_size:
            return "first"
        if not self.live:
            return "exact"
        if options.early_stopping == "exact" and len(self.finished) >= options.num_hypotheses:
            # A log-probability only falls from here on and a penalty only grows with the length,
            # so no descendant of the best live hypothesis can score above this.
            best_possible = self.live[0].log_prob / max(
                options.penalty(max(self.steps, options.min_length), ended=True),
                options.penalty(self.limit - 1, ended=True),
            )
            if best_possible <= self._ranked()[options.num_hypotheses - 1].score:
                return "exact"
        return "max_length" if self.steps >= self.limit else None

    def _ranked(self) -> list[Hypothesis]:
        return sorted(self.finished, key=lambda hypothesis: -hypothesis.score)

    def result(self) -> SearchResult:
        """What was found; to be called once :attr:`stop` is set."""
        assert self.stop is not None
        hypotheses = self._ranked()
        if self.stop == "max_length":
            hypotheses += [self._hypothesis(live, None) for live in self.live]
        return SearchResult(hypotheses[: self.options.num_hypotheses], self.stop, self.steps)


def search(
    step: Step,
    limits: Sequence[int],
    options: SearchOptions,
    *,
    start_id: int,
    eos_id: int,
    suppressed: Collection[int] = (),
) -> list[SearchResult]:
    """Beam search over any step function.

    Args:
        step: the model, see :data:`Step`.
        limits: for each sentence, most tokens of output (:meth:`SearchOptions.length_limit`).
        options: how to search.
        start_id: first token of each prefix.
        eos_id: token that ends a sentence.
        suppressed: ids never proposed.

    Returns:
        a result for each sentence.

    Raises:
        ValueError: ``step`` gave a NaN.
    """
    searches = [SentenceSearch(limit, eos_id, options, suppressed) for limit in limits]
    while active := [index for index, search in enumerate(searches) if search.stop is None]:
        rows = [index for index in active for _ in searches[index].live]
        prefixes = [[start_id, *live.tokens] for index in active for live in searches[index].live]
        log_probs = step(rows, np.array(prefixes, dtype=np.int64))
        first = 0
        for index in active:
            count = len(searches[index].live)
            searches[index].advance(log_probs[first : first + count])
            first += count
    return [search.result() for search in searches]


def beam_search(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    options: SearchOptions | None = None,
) -> list[SearchResult]:
    """Beam search with a torch model, whatever it is made of.

    Args:
        model: a ``Transformer``, or any module with its ``config``, ``encode_padded`` and
            ``decode_logits``; put it in evaluation mode before.
        sources: token ids of each sentence, end of sentence included.
        options: how to search; the defaults if None.

    Returns:
        a result for each sentence; an empty source gives one empty hypothesis.
    """
    import torch

    options = options or SearchOptions()
    config = model.config
    positions = config.max_positions if config.positions == "learned" else None
    numbers = [index for index, source in enumerate(sources) if len(source)]
    results = [empty_result() for _ in sources]
    if not numbers:
        return results
    device = next(model.parameters()).device
    lengths = torch.tensor([len(sources[index]) for index in numbers], device=device)
    padded = torch.full((len(numbers), int(lengths.max())), config.pad_id, device=device)
    for row, index in enumerate(numbers):
        padded[row, : len(sources[index])] = torch.tensor(list(sources[index]), device=device)

    with torch.inference_mode():
        memory = model.encode_padded(padded)

        def step(rows: list[int], prefixes: NDArray[np.int64]) -> NDArray[Any]:
            chosen = torch.tensor(rows, device=device)
            ids = torch.from_numpy(prefixes).to(device)
            log_probs = model.decode_logits(ids, memory[chosen], lengths[chosen])
            return log_probs.cpu().numpy()

        found = search(
            step,
            [options.length_limit(len(sources[index]), positions) for index in numbers],
            options,
            start_id=config.decoder_start_id,
            eos_id=config.eos_id,
            suppressed=never_proposed(config),
        )
    for index, result in zip(numbers, found, strict=True):
        results[index] = result
    return results


def empty_result() -> SearchResult:
    """What an empty source gives."""
    return SearchResult([Hypothesis([], 0.0, 0.0, [], True)], "exact", 0)
