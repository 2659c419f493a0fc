"""What a search can be told, and what it gives back. The engine and the plain search share both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from transformer_ext.config import ConfigError, nearest, option, options

StopReason = Literal["exact", "first", "max_length"]


@dataclass(frozen=True)
class SearchOptions:
    """Options of beam search; the defaults are those of "Attention Is All You Need" (section 6.1).

    A hypothesis with log-probability ``s`` (the sum over its tokens, end of sentence included) and
    length ``n`` has the score ``s / penalty(n)``. At each step the ``2 * beam_size`` best
    continuations of all live hypotheses are looked at, best first. One that ends the sentence is
    finished if it is among the first ``beam_size``; the first ``beam_size`` others live on. Equal
    ones are ordered by hypothesis, then by token id. A beam of 1 is greedy search, and ends with
    the first end of sentence.

    Raises:
        ConfigError: a value of a wrong type or out of its range.
    """

    beam_size: int = option(4, help="hypotheses kept at each step; 1 is greedy search", minimum=1)
    num_hypotheses: int = option(
        1, help="hypotheses returned per sentence, at most the beam size", minimum=1
    )
    length_penalty: float = option(
        0.6, help="exponent alpha of the length penalty; 0 is no penalty", minimum=0.0
    )
    length_penalty_kind: Literal["gnmt", "divide", "none"] = option(
        "gnmt",
        help="what a log-probability is divided by for length n: gnmt is ((5 + n) / 6)^alpha "
        "(Wu et al. 2016, equation 14), divide is n^alpha, none is 1",
    )
    length_counts_eos: bool = option(
        True, help="count the end of sentence as a token in the length that is penalised"
    )
    max_length: int | None = option(
        None,
        help="longest output, its end of sentence counted",
        unit="tokens",
        minimum=1,
        auto="max_length_a times the source's length plus max_length_b",
    )
    max_length_a: float = option(
        1.0,
        help="tokens of output allowed per token of source (end of sentence counted)",
        minimum=0.0,
    )
    max_length_b: int = option(50, help="tokens of output allowed beside those", minimum=0)
    min_length: int = option(
        0, help="tokens that come before the end of sentence at least", unit="tokens", minimum=0
    )
    early_stopping: Literal["exact", "first"] = option(
        "exact",
        help="when a sentence is done: exact is when no live hypothesis could still become one of "
        "those returned, first is as soon as beam_size hypotheses have ended",
    )

    def __post_init__(self) -> None:
        for entry in options(type(self)):
            object.__setattr__(self, entry.name, entry.check(getattr(self, entry.name)))
        if self.num_hypotheses > self.beam_size:
            raise ConfigError(
                f"num_hypotheses: got {self.num_hypotheses}, expected at most beam_size "
                f"({self.beam_size})"
            )

    def replace(self, **changes: Any) -> SearchOptions:
        """A copy with other values.

        Raises:
            ConfigError: an unknown name (with the nearest known one), or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown search option {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def length_limit(self, source_length: int, positions: int | None = None) -> int:
        """Tokens, end of sentence included, after which a search stops: at least 1.

        Args:
            source_length: tokens of the source, as the encoder reads them.
            positions: number of learned target positions, where the model has those.
        """
        if self.max_length is not None:
            limit = self.max_length
        else:
            limit = max(1, int(self.max_length_a * source_length) + self.max_length_b)
        return limit if positions is None else min(limit, positions)

    def penalty(self, tokens: int, ended: bool) -> float:
        """What the log-probability of ``tokens`` tokens, end of sentence excluded, is divided by.

        Args:
            tokens: number of tokens before the end of sentence.
            ended: whether an end of sentence follows them.
        """
        length = max(1, tokens + (1 if ended and self.length_counts_eos else 0))
        if self.length_penalty_kind == "gnmt":
            return float(((5.0 + length) / 6.0) ** self.length_penalty)
        if self.length_penalty_kind == "divide":
            return float(length) ** self.length_penalty
        return 1.0


@dataclass(frozen=True)
class Hypothesis:
    """One output of a search.

    Attributes:
        tokens: ids, without start and end of sentence.
        score: ``log_prob`` divided by the length penalty; hypotheses are ordered by it.
        log_prob: natural logarithm of the probability of the tokens (and of the end of sentence,
            where there is one).
        token_scores: the summands of ``log_prob``, the end of sentence's last.
        ended: False where the longest length was reached before an end of sentence.
    """

    tokens: list[int]
    score: float
    log_prob: float
    token_scores: list[float]
    ended: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one sentence.

    Attributes:
        hypotheses: best first: those that ended, then, where these are fewer than asked for, the
            best of those that did not.
        stop: why it stopped: ``exact`` (nothing better could come), ``first`` (enough hypotheses
            had ended), or ``max_length``.
        steps: tokens generated.
    """

    hypotheses: list[Hypothesis]
    stop: StopReason
    steps: int
