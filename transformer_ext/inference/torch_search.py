"""Beam search and sampling of a whole batch in torch, on the device that the model is on.

The rules are those of :mod:`transformer_ext.inference.search`, which is written to be read; here
sentences, hypotheses and vocabulary are dimensions of tensors, and nothing of a step goes to the
host or waits for the device. Every :data:`CHECK_EVERY` steps the host asks which sentences are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_ext.inference.options import (
    LEAST_COVERAGE,
    Hypothesis,
    HypothesisStop,
    SearchOptions,
    SearchResult,
    StopReason,
)
from transformer_ext.inference.search import uniform_number
from transformer_ext.inference.shared import make_hypothesis

#: Steps between two questions of the host which sentences are done.
CHECK_EVERY = 8

#: Steps, and tokens held of a hypothesis, that there is room for at first; doubled as they fill.
_ROOM = 512

#: Columns whose greatest is looked at first, see :func:`best_of`.
_GROUP = 64

# Numbers of the reasons to stop on the device; 0: goes on.
_REASONS: tuple[StopReason, ...] = get_args(StopReason)
_NUMBER = {reason: number for number, reason in enumerate(_REASONS, 1)}


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of each row, best first, equal ones in the order of their columns.

    ``torch.topk`` leaves the order of equal ones open, and lower precisions make many. The best n of
    a row lie in those n groups of its columns whose greatest are the best.

    Args:
        scores: ``[rows, columns]``; a NaN is above all.
        count: how many, fewer where there are not as many columns.

    Returns:
        their values and columns, ``[rows, count]`` each.
    """
    columns = scores.shape[1]
    whole, rest = divmod(columns, _GROUP)
    if whole <= 2 * count:
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :count], order[:, :count]
    greatest = scores[:, : whole * _GROUP].unflatten(1, (whole, _GROUP)).amax(2)
    if rest:
        greatest = torch.cat([greatest, scores[:, whole * _GROUP :].amax(1, keepdim=True)], 1)
    groups = (
        greatest.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    )
    within = torch.arange(_GROUP, device=scores.device)
    places = (groups[:, :, None] * _GROUP + within).flatten(1)
    found = scores.gather(1, places.clamp(max=columns - 1))
    found = found.masked_fill(places >= columns, -math.inf)
    values, order = found.sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order[:, :count]).clamp(max=columns - 1)
    return values[:, :count], places


@dataclass(frozen=True)
class Task:
    """What is searched for one sentence.

    Attributes:
        limit: most tokens, end of sentence included.
        minimum: tokens before the end of sentence at least.
        number: of the sentence, for the random numbers.
        prompt: tokens before the output that count for what is not to be repeated.
        prefix: tokens that the output begins with.
        fed: the last token before the output.
        source_length: of the source, for its attention.
    """

    limit: int
    minimum: int
    number: int
    fed: int
    prompt: Sequence[int] = ()
    prefix: Sequence[int] = ()
    source_length: int = 0


@dataclass(frozen=True)
class Decoding:
    """What computes the models' side of a step.

    Attributes:
        step: ``step(tokens, longest)``: of the tokens ``[rows]`` fed, of which the longest
            hypothesis has ``longest`` (those before the output not counted), the scores of what
            comes next ``[rows, vocabulary]``, before their softmax (of an ensemble, logarithms of
            mean probabilities), and where the options need it ``[rows, source length]`` what each
            attended to.
        reorder: ``reorder(rows)``, after a step: what row i was goes on from row ``rows[i]``; None:
            all as they are.
        keep: ``keep(sentences)``: of all sentences only some go on.
        grow: ``grow(steps)``: make room for so many steps.
    """

    step: Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
    reorder: Callable[[Tensor | None], None]
    keep: Callable[[Tensor], None]
    grow: Callable[[int], None]


def room_at_first(limits: Sequence[int]) -> int:
    """Steps that a batch has room for before it grows."""
    return min(max(limits), _ROOM)


class TorchSearch:
    """Search for a batch of sentences.

    Args:
        decoding: the models' side.
        tasks: the sentences.
        options: how to search.
        eos_id: token that ends a sentence.
        suppressed: ids never proposed, beside those of the options.
        device: where.
    """

    def __init__(
        self,
        decoding: Decoding,
        tasks: Sequence[Task],
        options: SearchOptions,
        *,
        eos_id: int,
        suppressed: Sequence[int],
        device: torch.device,
    ) -> None:
        self.decoding = decoding
        self.tasks = list(tasks)
        self.options = options
        self.eos_id = eos_id
        self.device = device
        self.width = options.num_hypotheses if options.sampling else options.beam_size
        self.steps_done = 0
        self._sentences = list(range(len(self.tasks)))
        self._room = room_at_first([task.limit for task in self.tasks])
        self._longest_prefix = max(len(task.prefix) for task in self.tasks)
        self._repeats = options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0
        ids = sorted({*suppressed, *options.suppressed_tokens})
        self._suppressed = torch.tensor(ids, dtype=torch.int64, device=device)
        # Nothing below is made from what the device computed: the host knows it all.
        longest = max(task.limit for task in self.tasks)
        self._ended_penalty = self._penalties(longest, ended=True)
        self._cut_penalty = self._penalties(longest, ended=False)
        self._now = torch.zeros(1, dtype=torch.int64, device=device)
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._of_sentence = self._begin()
        self._of_step = self._history(0, self._room)

    # --- state ------------------------------------------------------------------------------------

    def _penalties(self, longest: int, *, ended: bool) -> Tensor:
        values = [self.options.penalty(length, ended) for length in range(longest + 1)]
        return self._doubles(values)

    def _doubles(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def _integers(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _begin(self) -> dict[str, Tensor]:
        """What is known of each sentence, before the first step; sentences are the first dimension."""
        options, count, width = self.options, len(self.tasks), self.width
        total = torch.zeros(count, width, dtype=torch.float64, device=self.device)
        if not options.sampling:
            total[:, 1:] = -math.inf
        kept = width if options.sampling else max(width, options.num_hypotheses)
        largest = [
            max(
                options.penalty(task.limit - 1, ended=True),
                options.penalty(task.limit, ended=False) if options.rank_unfinished else 0.0,
            )
            for task in self.tasks
        ]
        state = {
            "token": self._integers([[task.fed] * width for task in self.tasks]),
            "total": total,
            "stop": self._integers([0] * count),
            "steps": self._integers([0] * count),
            "limit": self._integers([task.limit for task in self.tasks]),
            "minimum": self._integers([task.minimum for task in self.tasks]),
            "largest": self._doubles(largest),
            "ended": self._integers([0] * count),
            # The best that have ended: scores, where they lie in the history, and the log-probability
            # of their last token.
            "score": torch.full_like(total[:, :1], -math.inf).repeat(1, kept),
            "place": self._integers([[-1] * kept] * count),
            "last": torch.zeros(count, kept, device=self.device),
        }
        if options.sampling:
            state["alive"] = torch.ones(count, width, dtype=torch.bool, device=self.device)
            state["no_token"] = torch.zeros_like(state["alive"])
            state["uniform"] = self._uniform(0, self._room)
        if self._longest_prefix:
            rows = [self._padded(task.prefix, self._longest_prefix) for task in self.tasks]
            state["prefix"] = self._integers(rows)
        if self._repeats:
            longest = max(len(task.prompt) for task in self.tasks)
            rows = [self._padded(task.prompt, longest + self._room, 0) for task in self.tasks]
            state["said"] = self._integers(rows)[:, None].repeat(1, width, 1)
            state["said_length"] = self._integers([len(task.prompt) for task in self.tasks])
        if options.coverage_penalty > 0.0:
            longest = max(task.source_length for task in self.tasks)
            lengths = self._integers([task.source_length for task in self.tasks])
            state["real"] = torch.arange(longest, device=self.device) < lengths[:, None]
            state["coverage"] = torch.zeros(
                count, width, longest, dtype=torch.float64, device=self.device
            )
        return state

    @staticmethod
    def _padded(values: Sequence[int], length: int, fill: int = -1) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    def _uniform(self, first: int, last: int) -> Tensor:
        """Random numbers of the steps from ``first`` to ``last``, ``[sentences, samples, steps]``."""
        numbers = [self.tasks[i].number for i in self._sentences]
        grid = np.meshgrid(
            np.array(numbers, np.uint64),
            np.arange(self.width, dtype=np.uint64),
            np.arange(first, last, dtype=np.uint64),
            indexing="ij",
        )
        return self._doubles(uniform_number(self.options.seed, *grid))

    def _history(self, first: int, last: int) -> dict[str, Tensor]:
        """Room for what steps find; they are the first dimension, sentences the second."""
        shape = (last - first, len(self._sentences), self.width)
        history = {
            "token": torch.zeros(shape, dtype=torch.int32, device=self.device),
            "parent": torch.zeros(shape, dtype=torch.int32, device=self.device),
            "token_score": torch.zeros(shape, device=self.device),
        }
        if self.options.return_attention or self.options.return_alignment:
            longest = max(task.source_length for task in self.tasks)
            history["attention"] = torch.zeros(*shape, longest, device=self.device)
        return history

    def _grow(self) -> None:
        """Room for twice as many steps, or as many as there can be."""
        before = self._room
        self._room = min(2 * before, max(self.tasks[i].limit for i in self._sentences))
        more = self._history(before, self._room)
        self._of_step = {name: torch.cat([old, more[name]]) for name, old in self._of_step.items()}
        state = self._of_sentence
        if "uniform" in state:
            state["uniform"] = torch.cat([state["uniform"], self._uniform(before, self._room)], 2)
        if "said" in state:
            state["said"] = torch.nn.functional.pad(state["said"], (0, self._room - before))
        self.decoding.grow(self._room)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> list[SearchResult]:
        """A result for each sentence.

        Raises:
            ValueError: a NaN among the scores.
        """
        results: list[SearchResult | None] = [None] * len(self.tasks)
        while self._sentences:
            if self.steps_done == self._room:
                self._grow()
            self.step()
            left = max(self.tasks[i].limit for i in self._sentences) - self.steps_done
            if self.steps_done % CHECK_EVERY == 0 or left == 0:
                self._retire(results)
        return cast("list[SearchResult]", results)

    def step(self) -> None:
        """One token more of each hypothesis. Nothing is asked of the device."""
        state = self._of_sentence
        scores, attention = self.decoding.step(state["token"].flatten(), self.steps_done + 1)
        if scores.dtype != torch.float64:
            # From a score to its log-probability and back, float32 loses digits of those near 0.
            scores = scores.double() if self.options.penalty_on_logits else scores.float()
        log_probs = scores.log_softmax(1)
        penalised = self._without_repetition(log_probs, scores) if self._repeats else log_probs
        adjusted = self._allowed(penalised, log_probs)
        # Where nothing was penalised, what is allowed was written over the log-probabilities.
        raw = adjusted if penalised is log_probs else log_probs
        if attention is not None:
            attention = attention.float().unflatten(0, (-1, self.width))
            if "attention" in self._of_step:
                self._of_step["attention"].index_copy_(0, self._now, attention[None])
        if self.options.sampling:
            self._follow_samples(adjusted, raw, attention)
            self.decoding.reorder(None)
        else:
            self.decoding.reorder(self._follow_beam(adjusted, raw, attention))
        self._now += 1
        self.steps_done += 1

    def _rows(self, of_sentence: Tensor) -> Tensor:
        """``[sentences]`` -> ``[rows, 1]``."""
        return of_sentence.repeat_interleave(self.width)[:, None]

    def _without_repetition(self, log_probs: Tensor, scores: Tensor) -> Tensor:
        options, state = self.options, self._of_sentence
        said, length = state["said"].flatten(0, 1), self._rows(state["said_length"])
        adjusted = log_probs
        if options.repetition_penalty != 1.0:
            penalty = options.repetition_penalty
            zero: Tensor | float = 0.0
            if options.penalty_on_logits:
                zero = scores.logsumexp(1, keepdim=True)
            here = torch.arange(said.shape[1], device=self.device) < length
            shifted = log_probs.gather(1, said) + zero
            penalised = torch.where(shifted > 0.0, shifted / penalty, shifted * penalty) - zero
            # A penalty never raises a score, so that of a token said twice, and of the filling behind
            # what was said, is the least of those written.
            penalised = penalised.masked_fill(~here, math.inf)
            adjusted = adjusted.scatter_reduce(1, said, penalised, "amin")
        size = options.no_repeat_ngram_size
        if 0 < size <= said.shape[1]:
            context = length - size + 1 + torch.arange(size - 1, device=self.device)
            windows = said.unfold(1, size, 1)
            same = (windows[..., :-1] == said.gather(1, context.clamp(min=0))[:, None]).all(2)
            starts = torch.arange(windows.shape[1], device=self.device)
            same = same & (starts <= length - size)
            banned = torch.full_like(same, math.inf, dtype=adjusted.dtype)
            banned = banned.masked_fill(same, -math.inf)
            adjusted = adjusted.scatter_reduce(1, windows[..., -1], banned, "amin")
        return adjusted

    def _allowed(self, adjusted: Tensor, log_probs: Tensor) -> Tensor:
        """-inf for what may not follow; written over ``adjusted``."""
        state = self._of_sentence
        forced = None
        if self.steps_done < self._longest_prefix:
            forced = self._rows(state["prefix"].index_select(1, self._now)[:, 0])
            forced_scores = log_probs.gather(1, forced.clamp(min=0))
        adjusted.index_fill_(1, self._suppressed, -math.inf)
        early = self._rows(self._now < state["minimum"])[:, 0]
        adjusted[:, self.eos_id].masked_fill_(early, -math.inf)
        if forced is not None:
            columns = torch.arange(adjusted.shape[1], device=self.device)
            alone = torch.where(columns == forced, forced_scores, -math.inf)
            adjusted = torch.where(forced >= 0, alone, adjusted)
        return adjusted

    # --- beam search ------------------------------------------------------------------------------

    def _follow_beam(self, adjusted: Tensor, raw: Tensor, attention: Tensor | None) -> Tensor:
        state, width = self._of_sentence, self.width
        sentences = len(self._sentences)
        values, columns = best_of(adjusted, 2 * width)
        self._failed |= values.isnan().any()
        raw_values = (values if raw is adjusted else raw.gather(1, columns)).float()
        each = values.shape[1]
        totals = state["total"][:, :, None] + values.reshape(sentences, width, each)
        # Stable: equal ones stay in the order of (hypothesis, token).
        ranked, order = totals.flatten(1).sort(dim=1, descending=True, stable=True)
        ranked, order = ranked[:, : 2 * width], order[:, : 2 * width]
        parent = order // each
        token = columns.reshape(sentences, -1).gather(1, order)
        score = raw_values.reshape(sentences, -1).gather(1, order)
        valid = ranked > -math.inf
        going = state["stop"] == 0
        stuck = going & ~valid[:, 0]
        acting = going & ~stuck
        is_end = token == self.eos_id
        rank = torch.arange(ranked.shape[1], device=self.device)
        ends = valid & is_end & (rank < width) & acting[:, None]
        self._finish(ranked, ends, parent, score, attention)
        # The first of those that go on, in their order.
        lives = valid & ~is_end
        first = (~lives).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
        total = ranked.gather(1, first).masked_fill(~lives.gather(1, first), -math.inf)
        parent, token, score = (part.gather(1, first) for part in (parent, token, score))
        self._write(token, parent, score)
        self._extend_coverage(attention, parent, acting)
        state["total"] = torch.where(acting[:, None], total, state["total"])
        state["token"] = token
        self._say(token, parent)
        state["steps"] = torch.where(acting, self._now + 1, state["steps"])
        reason = torch.where(acting, self._reason(), state["stop"])
        state["stop"] = torch.where(stuck, _NUMBER["no_token"], reason)
        starts = torch.arange(sentences, device=self.device)[:, None] * width
        return (starts + parent).flatten()

    def _finish(
        self, totals: Tensor, ends: Tensor, parent: Tensor, score: Tensor, attention: Tensor | None
    ) -> None:
        """Merge those that end into the best that have."""
        state = self._of_sentence
        scores = totals / self._ended_penalty.index_select(0, self._now)
        if "coverage" in state:
            assert attention is not None
            scores = scores + self._coverage_scores(attention).gather(1, parent)
        scores = scores.masked_fill(~ends, -math.inf)
        kept = state["score"].shape[1]
        merged, order = torch.cat([state["score"], scores], 1).sort(
            dim=1, descending=True, stable=True
        )
        order = order[:, :kept]
        state["score"] = merged[:, :kept]
        place = torch.cat([state["place"], self._now * self.width + parent], 1)
        state["place"] = place.gather(1, order)
        state["last"] = torch.cat([state["last"], score], 1).gather(1, order)
        state["ended"] = state["ended"] + ends.sum(1)

    def _coverage_scores(self, attention: Tensor | None) -> Tensor:
        """Of each hypothesis, with the attention of one more token."""
        state = self._of_sentence
        coverage = state["coverage"] if attention is None else state["coverage"] + attention
        logs = coverage.clamp(LEAST_COVERAGE, 1.0).log()
        logs = logs.masked_fill(~state["real"][:, None], 0.0)
        return self.options.coverage_penalty * logs.sum(2)

    def _extend_coverage(self, attention: Tensor | None, parent: Tensor, acting: Tensor) -> None:
        state = self._of_sentence
        if "coverage" not in state:
            return
        assert attention is not None
        coverage = state["coverage"] + attention
        coverage = coverage.gather(1, parent[:, :, None].expand_as(coverage))
        acting = acting.view(acting.shape[0], -1, 1)
        state["coverage"] = torch.where(acting, coverage, state["coverage"])

    def _write(self, token: Tensor, parent: Tensor, score: Tensor) -> None:
        history = self._of_step
        history["token"].index_copy_(0, self._now, token[None].int())
        history["parent"].index_copy_(0, self._now, parent[None].int())
        history["token_score"].index_copy_(0, self._now, score[None])

    def _say(self, token: Tensor, parent: Tensor | None) -> None:
        state = self._of_sentence
        if "said" not in state:
            return
        said = state["said"]
        if parent is not None:
            said = said.gather(1, parent[:, :, None].expand_as(said))
        # A sentence that is done may wait longer than there is room for.
        place = state["said_length"].clamp(max=said.shape[2] - 1)
        place = place[:, None, None].expand(-1, self.width, 1)
        state["said"] = said.scatter(2, place, token[:, :, None])
        state["said_length"] = state["said_length"] + 1

    def _reason(self) -> Tensor:
        """Number of the reason to stop after this step, 0 to go on."""
        options, state = self.options, self._of_sentence
        ended, best = state["ended"], state["total"][:, 0]
        steps = self._now + 1
        # From the last reason to the first: the first that holds is written last.
        reason = torch.where(steps >= state["limit"], _NUMBER["max_length"], 0)
        if options.early_stopping == "exact":
            # A total only falls from here on, a length penalty only grows with the length, and the
            # coverage penalty is never above 0.
            wanted = options.num_hypotheses
            reached = best / state["largest"] <= state["score"][:, wanted - 1]
            reason = torch.where((ended >= wanted) & reached, _NUMBER["exact"], reason)
        elif options.early_stopping == "heuristic":
            now = best / self._cut_penalty.index_select(0, steps)
            reached = now <= state["score"][:, options.beam_size - 1]
            reached = (ended >= options.beam_size) & reached
            reason = torch.where(reached, _NUMBER["heuristic"], reason)
        reason = torch.where(best == -math.inf, _NUMBER["exact"], reason)
        if options.early_stopping == "first":
            enough = max(options.num_hypotheses, options.beam_patience * options.beam_size)
            reason = torch.where(ended >= enough, _NUMBER["first"], reason)
        if options.beam_size == 1:
            reason = torch.where(ended > 0, _NUMBER["first"], reason)
        return reason

    # --- sampling ---------------------------------------------------------------------------------

    def _follow_samples(self, adjusted: Tensor, raw: Tensor, attention: Tensor | None) -> None:
        options, state, width = self.options, self._of_sentence, self.width
        sentences = len(self._sentences)
        values, columns = best_of(adjusted, options.top_k or adjusted.shape[1])
        self._failed |= values[:, 0].isnan().any()
        best = values[:, :1].double()
        none = best == -math.inf
        weights = ((values.double() - best) / options.temperature).exp().masked_fill(none, 0.0)
        sums = weights.cumsum(1)
        count = (values > -math.inf).sum(1, keepdim=True)
        if options.top_p < 1.0:
            # The first n with at least the wanted part of the sum.
            wanted = torch.searchsorted(sums, options.top_p * sums[:, -1:]) + 1
            count = torch.minimum(wanted, count)
        count = count.clamp(min=1)
        uniform = state["uniform"].index_select(2, self._now).view(-1, 1)
        drawn = uniform * sums.gather(1, count - 1)
        chosen = torch.minimum(torch.searchsorted(sums, drawn, right=True), count - 1)
        token = columns.gather(1, chosen).view(sentences, width)
        value = values.gather(1, chosen).view(sentences, width)
        score = raw.gather(1, columns.gather(1, chosen)).view(sentences, width).float()
        stuck = none.view(sentences, width) & state["alive"]
        acting = state["alive"] & ~stuck
        ends = acting & (token == self.eos_id)
        # A sample that ends has its place among those that have.
        cut = state["total"] / self._cut_penalty.index_select(0, self._now)
        total = torch.where(acting, state["total"] + value, state["total"])
        ended = total / self._ended_penalty.index_select(0, self._now)
        if "coverage" in state:
            cut = cut + self._coverage_scores(None)
            ended = ended + self._coverage_scores(attention)
        done = stuck | ends
        state["score"] = torch.where(ends, ended, torch.where(stuck, cut, state["score"]))
        parent = torch.arange(width, device=self.device).expand(sentences, width)
        state["place"] = torch.where(done, self._now * width + parent, state["place"])
        state["last"] = torch.where(ends, score, state["last"])
        state["no_token"] = state["no_token"] | stuck
        going = state["stop"] == 0
        state["alive"] = state["alive"] & ~done
        self._write(token, parent, score)
        self._extend_coverage(attention, parent, acting)
        state["total"] = total
        state["token"] = token
        self._say(token, None)
        state["steps"] = torch.where(going, self._now + 1, state["steps"])
        reason = torch.where(self._now + 1 >= state["limit"], _NUMBER["max_length"], 0)
        reason = torch.where(state["alive"].any(1), reason, _NUMBER["sampled"])
        state["stop"] = torch.where(going, reason, state["stop"])
        # What was left alive at the longest length says nothing more.
        state["alive"] = state["alive"] & (state["stop"] == 0)[:, None]

    # --- results ----------------------------------------------------------------------------------

    def _retire(self, results: list[SearchResult | None]) -> None:
        """Ask which sentences are done, take their results, and go on without them."""
        state = self._of_sentence
        # The one place where the host waits for the device.
        stop, failed = (
            torch.cat([state["stop"], self._failed[None]]).cpu().split([len(self._sentences), 1])
        )
        if failed:
            raise ValueError(f"log-probabilities up to step {self.steps_done}: NaN among them")
        reasons = stop.tolist()
        done = [row for row, reason in enumerate(reasons) if reason]
        left = [row for row, reason in enumerate(reasons) if not reason]
        # A copy of the rest pays where many go.
        if not done or (left and 4 * len(done) < len(reasons)):
            return
        found = self._take(self._integers(done))
        for at, row in enumerate(done):
            number = self._sentences[row]
            results[number] = self._result(found, at, self.tasks[number].source_length)
        self._sentences = [self._sentences[row] for row in left]
        if left:
            rows = self._integers(left)
            self._of_sentence = {k: v.index_select(0, rows) for k, v in state.items()}
            self._of_step = {k: v.index_select(1, rows) for k, v in self._of_step.items()}
            self.decoding.keep(rows)

    def _take(self, rows: Tensor) -> dict[str, NDArray[Any]]:
        """What the results of some sentences are made of, on the host."""
        state = self._of_sentence
        names = ["stop", "steps", "total", "score", "place", "last"]
        names += ["no_token"] if self.options.sampling else []
        found = {name: state[name].index_select(0, rows) for name in names}
        if "coverage" in state:
            found["coverage"] = self._coverage_scores(None).index_select(0, rows)
        for name, history in self._of_step.items():
            found[f"history_{name}"] = history[: self.steps_done].index_select(1, rows)
        return {name: value.cpu().numpy() for name, value in found.items()}

    def _result(self, found: dict[str, NDArray[Any]], at: int, source_length: int) -> SearchResult:
        """Of one sentence, as :meth:`SentenceSearch.result` has it."""
        options = self.options
        stop = _REASONS[found["stop"][at] - 1]
        steps = int(found["steps"][at])
        # Score, how it ends, last step, row of the last token, log-probability of the end.
        Entry = tuple[float, HypothesisStop, int, int, float]
        entries: list[Entry] = []
        ended = [i for i, place in enumerate(found["place"][at].tolist()) if place >= 0]
        if options.sampling:
            # In the order in which they ended.
            ended.sort(key=lambda i: int(found["place"][at, i]))
        for i in ended:
            step, row = divmod(int(found["place"][at, i]), self.width)
            kind: HypothesisStop = "eos"
            if options.sampling and found["no_token"][at, i]:
                kind = "no_token"
            entries.append(
                (float(found["score"][at, i]), kind, step - 1, row, float(found["last"][at, i]))
            )
        if stop in ("max_length", "no_token"):
            for row, total in enumerate(found["total"][at].tolist()):
                if total == -math.inf or (options.sampling and found["place"][at, row] >= 0):
                    continue
                score = total / options.penalty(steps, ended=False)
                if "coverage" in found:
                    score += float(found["coverage"][at, row])
                entries.append((score, cast(HypothesisStop, stop), steps - 1, row, 0.0))
        if options.rank_unfinished:
            entries.sort(key=lambda entry: -entry[0])
        else:
            entries.sort(key=lambda entry: (entry[1] != "eos", -entry[0]))
        hypotheses = [
            self._hypothesis(found, at, source_length, *entry)
            for entry in entries[: options.num_hypotheses]
        ]
        return SearchResult(hypotheses, stop, steps)

    def _hypothesis(
        self,
        found: dict[str, NDArray[Any]],
        at: int,
        source_length: int,
        score: float,
        kind: HypothesisStop,
        step: int,
        row: int,
        last: float,
    ) -> Hypothesis:
        """Followed back from its last token before the end of sentence."""
        tokens: list[int] = []
        scores: list[float] = []
        attentions: list[NDArray[Any]] = []
        attention = found.get("history_attention")
        if kind == "eos":
            scores.append(last)
            if attention is not None:
                attentions.append(attention[step + 1, at, row])
        for t in range(step, -1, -1):
            tokens.append(int(found["history_token"][t, at, row]))
            scores.append(float(found["history_token_score"][t, at, row]))
            row = int(found["history_parent"][t, at, row])
            if attention is not None:
                attentions.append(attention[t, at, row])
        rows = None
        if attentions:
            rows = np.array(attentions[::-1], np.float32)[:, :source_length]
        scores.reverse()
        return make_hypothesis(
            self.options, tokens[::-1], score, float(sum(scores)), scores, kind, rows
        )
