"""Beam search and sampling in plain Python: what the compiled engine is tested against, and what
decodes a model that the engine does not know.

It is written to be read. It keeps no cache: each step runs the model over the whole prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_ext.inference.options import (
    LEAST_COVERAGE,
    Hypothesis,
    HypothesisStop,
    SearchOptions,
    SearchResult,
    StopReason,
)
from transformer_ext.inference.shared import (
    attention_layer,
    check_source_lengths,
    empty_result,
    make_hypothesis,
    never_proposed,
)

if TYPE_CHECKING:
    from transformer_ext.model.transformer import Transformer

#: ``step(sentences, prefixes)``: log-probabilities ``[rows, vocabulary]`` of the token after each
#: prefix, where ``sentences`` is the number of each row's sentence (ascending) and ``prefixes`` is
#: int64 ``[rows, length]``, each beginning with the start token. Where the options need attention,
#: a pair of these and of what each row's last token attends to, ``[rows, longest source]``. Where
#: they say ``penalty_on_logits``, scores before their softmax in place of log-probabilities.
Step = Callable[[list[int], NDArray[np.int64]], Any]


def repeating_tokens(tokens: Sequence[int], size: int) -> set[int]:
    """The tokens that would repeat a sequence of ``size`` tokens of a hypothesis, if they came next."""
    if size == 0 or len(tokens) < size:
        return set()
    context = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return {tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == context}


def uniform_number(seed: int, sentence: Any, sample: Any, step: Any) -> Any:
    """A random number from [0, 1), as a function of its arguments alone.

    Philox4x32 with 7 rounds (Salmon et al. 2011, section 4.3), key = seed,
    counter = (step, sample, low and high half of sentence); 53 bits of the first two words. All but
    the seed may be arrays of uint64, of one shape.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = step & mask, sample & mask, sentence & mask, sentence >> 32 & mask
    key0, key1 = seed & mask, seed >> 32 & mask
    for _ in range(7):
        product0, product1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            product1 >> 32 ^ b ^ key0,
            product1 & mask,
            product0 >> 32 ^ d ^ key1,
            (product0 & mask),
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return (a << 21 | b >> 11) * 2.0**-53


def draw(adjusted: NDArray[np.float64], options: SearchOptions, uniform: float) -> int | None:
    """A token drawn by ``top_k``, ``top_p`` and ``temperature``.

    Args:
        adjusted: a log-probability for each token of the vocabulary, -inf for those not allowed.
        options: see there.
        uniform: a number from [0, 1): where in the probabilities, laid end to end from the highest
            to the lowest, to take one.

    Returns:
        the token, or None if none is allowed.
    """
    order = np.argsort(-adjusted, kind="stable")
    order = order[adjusted[order] > -np.inf][: options.top_k]
    if not len(order):
        return None
    weights = np.exp((adjusted[order] - adjusted[order[0]]) / options.temperature)
    sums = np.cumsum(weights)
    if options.top_p < 1.0:
        # The first n with at least the wanted part of the sum.
        n = int(np.searchsorted(sums, options.top_p * sums[-1], side="left")) + 1
        sums = sums[:n]
    chosen = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return int(order[min(chosen, len(sums) - 1)])


@dataclass(frozen=True)
class _Live:
    """A hypothesis that has not ended."""

    tokens: tuple[int, ...] = ()
    token_scores: tuple[float, ...] = ()
    total: float = 0.0
    attention: tuple[NDArray[Any], ...] = ()
    sample: int = 0


class SentenceSearch:
    """Beam search or sampling for one sentence, one step at a time.

    Args:
        limit: most tokens, end of sentence included.
        eos_id: the end of sentence.
        options: see there for the rules.
        suppressed: ids never proposed, beside those of the options.
        minimum: tokens before the end of sentence at least.
        prompt: tokens that come before the output and are no part of it, but of what is not to be
            repeated.
        prefix: tokens that the output begins with.
        number: of the sentence, for the random numbers of sampling.

    Raises:
        ValueError: the prefix leaves no room for another token.
    """

    def __init__(
        self,
        limit: int,
        eos_id: int,
        options: SearchOptions,
        suppressed: Collection[int] = (),
        *,
        minimum: int = 0,
        prompt: Sequence[int] = (),
        prefix: Sequence[int] = (),
        number: int = 0,
    ) -> None:
        if len(prefix) >= limit:
            raise ValueError(
                f"prefix: got {len(prefix)} tokens, expected fewer than the longest output of the "
                f"sentence ({limit}, its end of sentence counted)"
            )
        self.limit = limit
        self.eos_id = eos_id
        self.options = options
        self.suppressed = sorted({*suppressed, *options.suppressed_tokens})
        self.minimum = minimum
        self.prompt = tuple(prompt)
        self.prefix = tuple(prefix)
        self.number = number
        samples = options.num_hypotheses if options.sampling else 1
        self.live = [_Live(sample=sample) for sample in range(samples)]
        self.finished: list[Hypothesis] = []
        self.steps = 0
        self.stop: StopReason | None = None

    def advance(self, log_probs: NDArray[Any], attention: NDArray[Any] | None = None) -> None:
        """One step.

        Args:
            log_probs: ``[live hypotheses, vocabulary]``; scores before their softmax, where the
                options say ``penalty_on_logits``.
            attention: ``[live hypotheses, source tokens]``, where the options need it.

        Raises:
            ValueError: a NaN among the log-probabilities.
        """
        scores = np.array(log_probs, dtype=np.float64)
        if np.isnan(scores).any():
            raise ValueError(f"log-probabilities of step {self.steps + 1}: NaN among them")
        zeros = np.zeros((len(scores), 1))
        if self.options.penalty_on_logits:
            zeros = np.logaddexp.reduce(scores, axis=1, keepdims=True)
            scores -= zeros
        adjusted = np.stack(
            [
                self._adjusted(live, row, float(zero))
                for live, row, zero in zip(self.live, scores, zeros[:, 0], strict=True)
            ]
        )
        self._attention = attention
        if self.options.sampling:
            survivors = self._follow_samples(scores, adjusted)
        elif (adjusted > -np.inf).any():
            survivors = self._follow_beam(scores, adjusted)
        else:
            self.stop = "no_token"
            return
        self.live = survivors
        self.steps += 1
        self.stop = self._reason_to_stop()

    def _adjusted(
        self, live: _Live, log_probs: NDArray[np.float64], zero: float
    ) -> NDArray[np.float64]:
        """What the search adds up for each token, -inf for those that may not follow.

        ``zero`` above a log-probability is the score that ``repetition_penalty`` is on.
        """
        adjusted = log_probs.copy()
        if self.steps < len(self.prefix):
            forced = self.prefix[self.steps]
            adjusted[:] = -np.inf
            adjusted[forced] = log_probs[forced]
            return adjusted
        said = (*self.prompt, *live.tokens)
        penalty = self.options.repetition_penalty
        repeated = sorted(set(said))
        penalised = adjusted[repeated] + zero
        adjusted[repeated] = (
            np.where(penalised > 0.0, penalised / penalty, penalised * penalty) - zero
        )
        adjusted[self.suppressed] = -np.inf
        adjusted[sorted(repeating_tokens(said, self.options.no_repeat_ngram_size))] = -np.inf
        if self.steps < self.minimum:
            adjusted[self.eos_id] = -np.inf
        return adjusted

    def _follow_beam(
        self, scores: NDArray[np.float64], adjusted: NDArray[np.float64]
    ) -> list[_Live]:
        totals = adjusted + np.array([live.total for live in self.live])[:, None]
        # Stable: equal ones stay in the order of (hypothesis, token).
        order = np.argsort(-totals, axis=None, kind="stable")
        beam_size = self.options.beam_size
        survivors: list[_Live] = []
        for rank, flat in enumerate(order[: 2 * beam_size].tolist()):
            row, token = divmod(flat, scores.shape[1])
            if adjusted[row, token] == -np.inf:
                break
            extended = self._extended(row, token, scores, adjusted)
            if token == self.eos_id:
                if rank < beam_size:
                    self.finished.append(self._hypothesis(extended, "eos"))
            elif len(survivors) < beam_size:
                survivors.append(extended)
        return survivors

    def _follow_samples(
        self, scores: NDArray[np.float64], adjusted: NDArray[np.float64]
    ) -> list[_Live]:
        survivors: list[_Live] = []
        for row, live in enumerate(self.live):
            uniform = uniform_number(self.options.seed, self.number, live.sample, self.steps)
            token = draw(adjusted[row], self.options, uniform)
            if token is None:
                self.finished.append(self._hypothesis(live, "no_token"))
                continue
            extended = self._extended(row, token, scores, adjusted)
            if token == self.eos_id:
                self.finished.append(self._hypothesis(extended, "eos"))
            else:
                survivors.append(extended)
        return survivors

    def _extended(
        self, row: int, token: int, scores: NDArray[np.float64], adjusted: NDArray[np.float64]
    ) -> _Live:
        live = self.live[row]
        attention = () if self._attention is None else (self._attention[row],)
        return _Live(
            (*live.tokens, token),
            (*live.token_scores, float(scores[row, token])),
            live.total + float(adjusted[row, token]),
            (*live.attention, *attention),
            live.sample,
        )

    def _hypothesis(self, live: _Live, stop: HypothesisStop) -> Hypothesis:
        """A hypothesis as a result; an end of sentence is its last token."""
        ended = stop == "eos"
        tokens = live.tokens[:-1] if ended else live.tokens
        score = live.total / self.options.penalty(len(tokens), ended)
        attention = np.array(live.attention, dtype=np.float32) if live.attention else None
        if self.options.coverage_penalty > 0.0:
            assert self._attention is not None
            coverage = np.zeros(self._attention.shape[1])
            for row in live.attention:
                coverage = coverage + row
            logs = np.log(np.clip(coverage, LEAST_COVERAGE, 1.0))
            score += self.options.coverage_penalty * float(logs.sum())
        return make_hypothesis(
            self.options,
            list(tokens),
            score,
            float(sum(live.token_scores)),
            list(live.token_scores),
            stop,
            attention,
        )

    def _reason_to_stop(self) -> StopReason | None:
        options = self.options
        ended = len(self.finished)
        at_limit: StopReason | None = "max_length" if self.steps >= self.limit else None
        if options.sampling:
            return at_limit if self.live else "sampled"
        if options.beam_size == 1 and ended:
            return "first"
        if options.early_stopping == "first":
            wanted = max(options.num_hypotheses, options.beam_patience * options.beam_size)
            if ended >= wanted:
                return "first"
        if not self.live:
            return "exact"
        best_live = self.live[0].total
        if options.early_stopping == "heuristic" and ended >= options.beam_size:
            now = best_live / options.penalty(self.steps, ended=False)
            if now <= self._ended_score(options.beam_size):
                return "heuristic"
        if options.early_stopping == "exact" and ended >= options.num_hypotheses:
            # A total only falls from here on, a length penalty only grows with the length, and the
            # coverage penalty is never above 0: no descendant of the best live hypothesis can score
            # above this.
            largest = options.penalty(self.limit - 1, ended=True)
            if options.rank_unfinished:
                largest = max(largest, options.penalty(self.limit, ended=False))
            if best_live / largest <= self._ended_score(options.num_hypotheses):
                return "exact"
        return at_limit

    def _ended_score(self, n: int) -> float:
        """The n-th best score of those that have ended."""
        return sorted((hypothesis.score for hypothesis in self.finished), reverse=True)[n - 1]

    def result(self) -> SearchResult:
        """What was found; to be called once :attr:`stop` is set."""
        assert self.stop is not None
        hypotheses = list(self.finished)
        if self.stop == "max_length" or self.stop == "no_token":
            hypotheses += [self._hypothesis(live, self.stop) for live in self.live]
        if self.options.rank_unfinished:
            hypotheses.sort(key=lambda h: -h.score)
        else:
            hypotheses.sort(key=lambda h: (not h.ended, -h.score))
        return SearchResult(hypotheses[: self.options.num_hypotheses], self.stop, self.steps)


#: ``observe(sentence, search)``, called after a step; what it may read are the public attributes.
Observer = Callable[[int, SentenceSearch], None]


def search(
    step: Step,
    limits: Sequence[int],
    options: SearchOptions,
    *,
    start_id: int | None,
    eos_id: int,
    suppressed: Collection[int] = (),
    source_lengths: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> list[SearchResult]:
    """Beam search or sampling over any step function.

    Args:
        step: the model, see :data:`Step`.
        limits: for each sentence, most tokens of output (:meth:`SearchOptions.length_limit`).
        options: how to search.
        start_id: first token of each prefix; None where it is that of the prompt.
        eos_id: token that ends a sentence.
        suppressed: ids never proposed.
        source_lengths: tokens of each sentence's source, for ``min_length_a`` and for cutting the
            attention; none needed where neither is used.
        prompts: for each sentence, tokens before its output, see :class:`SentenceSearch`. ``step``
            is then called once for each length.
        prefixes: for each sentence, tokens that its output begins with.
        numbers: of the sentences, for the random numbers of sampling; 0, 1, ... if None.
        observe: is called after each step of each sentence.

    Returns:
        a result for each sentence.

    Raises:
        ValueError: ``step`` gave a NaN, or no attention where the options need it; a prefix is too
            long.
    """
    count = len(limits)
    if options.min_length_a > 0.0 and source_lengths is None:
        raise ValueError("source_lengths: got none, expected one a sentence for min_length_a")
    lengths = list(source_lengths) if source_lengths is not None else [None] * count
    searches = [
        SentenceSearch(
            limits[i],
            eos_id,
            options,
            suppressed,
            minimum=options.length_minimum(lengths[i] or 0),
            prompt=prompts[i] if prompts is not None else (),
            prefix=prefixes[i] if prefixes is not None else (),
            number=numbers[i] if numbers is not None else i,
        )
        for i in range(count)
    ]
    start = () if start_id is None else (start_id,)
    while active := [index for index, search in enumerate(searches) if search.stop is None]:
        # All outputs have one length, and prefixes of one length fit into an array.
        for length in sorted({len(searches[index].prompt) for index in active}):
            equal = [index for index in active if len(searches[index].prompt) == length]
            rows = [index for index in equal for _ in searches[index].live]
            prefix_rows = [
                [*start, *searches[index].prompt, *live.tokens]
                for index in equal
                for live in searches[index].live
            ]
            found = step(rows, np.array(prefix_rows, dtype=np.int64))
            log_probs, attention = found if isinstance(found, tuple) else (found, None)
            if options.needs_attention and attention is None:
                raise ValueError(
                    "step: got log-probabilities alone, expected attention beside them"
                )
            first = 0
            for index in equal:
                end = first + len(searches[index].live)
                searches[index].advance(
                    log_probs[first:end],
                    attention[first:end, : lengths[index]] if options.needs_attention else None,
                )
                first = end
                if observe is not None:
                    observe(index, searches[index])
    return [search.result() for search in searches]


def mean_log_probs(log_probs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Logarithms of the mean of the probabilities that several models give, for an ensemble."""
    if len(log_probs) == 1:
        return log_probs[0]
    sums: NDArray[Any] = np.logaddexp.reduce([row.astype(np.float64) for row in log_probs])
    return sums - np.log(len(log_probs))


def check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raise a ValueError for an id that is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}: got {token}, expected 0 to {vocabulary - 1}")


def beam_search(
    model: Transformer | Sequence[Transformer],
    sources: Sequence[Sequence[int]],
    options: SearchOptions | None = None,
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> list[SearchResult]:
    """Beam search, or sampling, with a torch model, whatever it is made of.

    Args:
        model: a ``Transformer``, or any module with its ``config``, ``encode_padded`` and
            ``next_log_probs``; put it in evaluation mode before. Several are an ensemble: of each
            token counts the mean of the probabilities that they give to it.
        sources: token ids of each sentence, end of sentence included.
        options: how to search; the defaults if None.
        prefixes: for each sentence, tokens that its output begins with.
        numbers: of the sentences, for the random numbers of sampling; 0, 1, ... if None.
        observe: is called after each step with the number of the sentence and its search.

    Returns:
        a result for each sentence; an empty source gives one empty hypothesis.

    Raises:
        ValueError: an id that is not in the vocabulary, a source or prefix that is too long, or an
            attention layer that the model does not have.
    """
    import torch

    options = options or SearchOptions()
    models: list[Any] = list(model) if isinstance(model, Sequence) else [model]
    config = models[0].config
    layers = [attention_layer(options, each.config) for each in models]
    check_source_lengths(sources, options.max_source_length)
    limits = [m.config.longest for m in models if m.config.longest is not None]
    positions = min(limits, default=None)
    found_numbers = [index for index, source in enumerate(sources) if len(source)]
    results = [empty_result(options) for _ in sources]
    if not found_numbers:
        return results
    check_ids("suppressed_tokens", options.suppressed_tokens, config.tgt_vocab_size)
    for prefix in prefixes or []:
        check_ids("prefix ids", prefix, config.tgt_vocab_size)
    device = next(models[0].parameters()).device
    # The mean of an ensemble has no scores before a softmax.
    normalize = len(models) > 1 or not options.penalty_on_logits
    source_lengths = [len(sources[index]) for index in found_numbers]
    lengths = torch.tensor(source_lengths, device=device)
    padded = torch.full((len(found_numbers), int(lengths.max())), config.pad_id, device=device)
    for row, index in enumerate(found_numbers):
        padded[row, : len(sources[index])] = torch.tensor(list(sources[index]), device=device)

    with torch.inference_mode():
        memories = [each.encode_padded(padded) for each in models]

        def step(rows: list[int], prefix_rows: NDArray[np.int64]) -> Any:
            chosen = torch.tensor(rows, device=device)
            ids = torch.from_numpy(prefix_rows).to(device)
            log_probs, attentions = [], []
            for each, memory, layer in zip(models, memories, layers, strict=True):
                inputs = ids, memory[chosen], lengths[chosen]
                if layer is None:
                    log_probs.append(
                        each.next_log_probs(*inputs, normalize=normalize).cpu().numpy()
                    )
                else:
                    row, attention = each.next_log_probs(
                        *inputs, attention_layer=layer, normalize=normalize
                    )
                    log_probs.append(row.cpu().numpy())
                    attentions.append(attention.cpu().numpy())
            mean = mean_log_probs(log_probs)
            return (mean, np.mean(attentions, axis=0)) if attentions else mean

        found = search(
            step,
            [options.length_limit(length, positions) for length in source_lengths],
            options,
            start_id=config.decoder_start_id,
            eos_id=config.eos_id,
            suppressed=never_proposed(config),
            source_lengths=source_lengths,
            prefixes=None if prefixes is None else [prefixes[i] for i in found_numbers],
            numbers=[i if numbers is None else numbers[i] for i in found_numbers],
            observe=None
            if observe is None
            else lambda row, state: observe(found_numbers[row], state),
        )
    for index, result in zip(found_numbers, found, strict=True):
        results[index] = result
    return results
