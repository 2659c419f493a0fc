"""Options and results of a search as the compiled engine has them."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from transformer_ext.inference.options import SearchOptions, SearchResult
from transformer_ext.inference.shared import make_hypothesis


def native_options(
    options: SearchOptions,
    limit: int,
    *,
    never: Collection[int],
    eos_id: int,
    start_id: int | None,
) -> dict[str, Any]:
    """The fields of SearchOptions in csrc/engine/search.h.

    Args:
        options: see there.
        limit: most tokens of any output.
        never: ids that are never proposed, beside those of the options.
        eos_id: token that ends an output.
        start_id: first token fed; None: that of the prompt.
    """
    ended, cut = _penalties(options, limit)
    return {
        "beam_size": options.beam_size,
        "num_hypotheses": options.num_hypotheses,
        "early_stopping": options.early_stopping,
        "beam_patience": options.beam_patience,
        "rank_unfinished": options.rank_unfinished,
        "coverage_penalty": options.coverage_penalty,
        "return_attention": options.return_attention or options.return_alignment,
        "sampling": options.sampling,
        "seed": options.seed,
        "suppressed": sorted({*never, *options.suppressed_tokens}),
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "repetition_penalty": options.repetition_penalty,
        "penalty_on_logits": options.penalty_on_logits,
        "eos_id": eos_id,
        "top_k": options.top_k or 0,
        "top_p": options.top_p,
        "temperature": options.temperature,
        "start_id": -1 if start_id is None else start_id,
        "ended_penalty": ended,
        "cut_penalty": cut,
    }


def read_result(options: SearchOptions, found: Any) -> SearchResult:
    """What the engine found for one sentence."""
    hypotheses = [
        make_hypothesis(options, h.tokens, h.score, h.log_prob, h.token_scores, h.end, h.attention)
        for h in found.hypotheses
    ]
    return SearchResult(hypotheses, found.stop, found.steps)


@lru_cache(maxsize=64)
def _penalties(options: SearchOptions, limit: int) -> tuple[list[float], list[float]]:
    """What log-probabilities of 0 .. ``limit`` tokens are divided by: ended, and cut off."""
    lengths = range(limit + 1)
    return (
        [options.penalty(length, ended=True) for length in lengths],
        [options.penalty(length, ended=False) for length in lengths],
    )
