"""What a search can be told, and what it gives back. The engine and the plain search share both."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformer_ext.config import ConfigError, nearest, option, options, plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Why the search for a sentence stopped, see :class:`SearchResult`.
StopReason = Literal["exact", "first", "heuristic", "sampled", "max_length", "no_token"]
#: Why a hypothesis ends where it does, see :class:`Hypothesis`.
HypothesisStop = Literal["eos", "max_length", "no_token"]

#: What an engine may multiply in, see :class:`transformer_ext.inference.engine.Engine`.
COMPUTE_TYPES = ("auto", "float32", "bfloat16", "int8")
#: What PyTorch computes in on another device than the CPU.
TORCH_COMPUTE_TYPES = ("auto", "float32", "bfloat16", "float16")

#: Most hypotheses, or samples, of a sentence: the memory and time of a step grow with them.
MOST_HYPOTHESES = 1_000
#: Longest output: far beyond any sentence, and each token keeps its keys and values.
LONGEST_OUTPUT = 1_000_000
#: Largest factor of the options that are one. With it and :data:`LONGEST_OUTPUT` no score overflows.
LARGEST_FACTOR = 1_000.0
#: Largest exponent of the length penalty: 10^6 to the power of 50 is a double, to that of 52 not.
LARGEST_EXPONENT = 50.0
#: Token ids are 32-bit integers in the engine.
LARGEST_ID = 2**31 - 1

#: Most of what every command and the engine can be told of how much is worked on at once.
MOST_AT_ONCE = {"threads": 1_024, "batch_size": 1_000_000, "batch_tokens": 1_000_000_000}

#: Most sentences that are decoded together where nothing else is said: on the CPU, and on another
#: device, which is not filled by as few.
BATCH_SIZES = (64, 512)

#: The least attention to a source token that the coverage penalty sees.
LEAST_COVERAGE = 1e-10


@dataclass(frozen=True)
class SearchOptions:
    """Options of beam search and of sampling; the defaults are those of "Attention Is All You Need"
    (section 6.1).

    The score of a hypothesis, by which those returned are ordered, is

        (sum of adjusted log-probabilities) / penalty(n) + coverage_penalty * coverage

    with length n (see ``length_penalty_kind``), and coverage = sum over the source's tokens i of
    log min(1, a_i), where a_i is the attention that the whole hypothesis paid to i. A
    log-probability is adjusted by ``repetition_penalty`` alone.

    What a language model continues is no part of its output: it has no share in scores and lengths,
    but its tokens count for ``no_repeat_ngram_size`` and ``repetition_penalty``.

    At each step of a beam search the ``2 * beam_size`` best continuations of all live hypotheses
    are looked at, best first. One that ends the sentence is finished if it is among the first
    ``beam_size``; the first ``beam_size`` others live on. Equal ones are ordered by hypothesis, then
    by token id. A beam of 1 is greedy search, and ends with the first end of sentence.

    Raises:
        ConfigError: a value of a wrong type or out of its range, or two that exclude each other.
    """

    beam_size: int = option(
        4,
        help="hypotheses kept at each step; 1 is greedy search",
        minimum=1,
        maximum=MOST_HYPOTHESES,
    )
    num_hypotheses: int = option(
        1,
        help="hypotheses returned per sentence, best first: at most the beam size, or any number "
        "of samples",
        minimum=1,
        maximum=MOST_HYPOTHESES,
    )
    length_penalty: float = option(
        0.6,
        help="exponent alpha of the length penalty; 0 is no penalty",
        minimum=0.0,
        maximum=LARGEST_EXPONENT,
    )
    length_penalty_kind: Literal["gnmt", "divide", "none"] = option(
        "gnmt",
        help="what a log-probability is divided by for length n: gnmt is ((5 + n) / 6)^alpha "
        "(Wu et al. 2016, equation 14), divide is n^alpha, none is 1",
    )
    length_counts_eos: bool = option(
        True, help="count the end of sentence as a token in the length that is penalised"
    )
    coverage_penalty: float = option(
        0.0,
        help="beta of the coverage penalty, for source tokens that got little attention "
        "(Wu et al. 2016, equation 14); 0 is none",
        minimum=0.0,
        maximum=LARGEST_FACTOR,
    )
    max_length: int | None = option(
        None,
        help="longest output, its end of sentence counted; early_stopping exact searches the "
        "longer, the more it allows",
        unit="tokens",
        minimum=1,
        maximum=LONGEST_OUTPUT,
        auto="max_length_a times the source's length plus max_length_b",
    )
    max_length_a: float = option(
        1.0,
        help="tokens of output allowed per token of source (end of sentence counted)",
        minimum=0.0,
        maximum=LARGEST_FACTOR,
    )
    max_length_b: int = option(
        50,
        help="tokens of output allowed beside those",
        minimum=0,
        maximum=LONGEST_OUTPUT,
    )
    max_source_length: int | None = option(
        None,
        help="a longer source is an error (the translate command cuts it, and says so)",
        unit="tokens, end of sentence counted",
        minimum=1,
        maximum=LONGEST_OUTPUT,
        auto="any length; for the command, 1024 or twice the longest trained on",
    )
    min_length: int = option(
        0,
        help="tokens that come before the end of sentence at least",
        unit="tokens",
        minimum=0,
        maximum=LONGEST_OUTPUT,
    )
    min_length_a: float = option(
        0.0,
        help="the same per token of source; the longer of the two counts",
        minimum=0.0,
        maximum=LARGEST_FACTOR,
    )
    early_stopping: Literal["exact", "first", "heuristic"] = option(
        "exact",
        help="when a sentence is done: exact is when no live hypothesis could still become one of "
        "those returned; first is as soon as beam_patience times beam_size hypotheses have ended; "
        "heuristic is when so many as the beam size have ended, and the best live one, ending "
        "now, would not score above the worst of the best so many",
    )
    beam_patience: float = option(
        1.0,
        help="for early_stopping first: how many hypotheses must have ended, in beam sizes "
        "(Kasai et al. 2022)",
        minimum=0.0,
        maximum=LARGEST_FACTOR,
    )
    rank_unfinished: bool = option(
        False,
        help="order hypotheses that reached the longest length by score among the others, not "
        "behind them",
    )
    no_repeat_ngram_size: int = option(
        0,
        help="never say a sequence of so many tokens twice in a sentence (Paulus et al. 2018, "
        "section 2.5); 0 is off",
        unit="tokens",
        minimum=0,
        maximum=LONGEST_OUTPUT,
    )
    repetition_penalty: float = option(
        1.0,
        help="factor on the log-probability of a token that the hypothesis holds already "
        "(Keskar et al. 2019, section 4.1); 1 is none",
        minimum=1.0,
        maximum=LARGEST_FACTOR,
    )
    repetition_penalty_on: Literal["log_probs", "logits"] = option(
        "log_probs",
        help="what repetition_penalty is a factor on; logits are the model's scores before their "
        "softmax, of which a positive one is divided by it, as generate() of transformers does "
        "where it is greedy or samples: a beam of several, and an ensemble, take "
        "log-probabilities even so",
    )
    suppressed_tokens: tuple[int, ...] = option(
        (),
        help="ids of target tokens that are never proposed",
        minimum=0,
        maximum=LARGEST_ID,
    )
    sampling: bool = option(
        False, help="draw num_hypotheses translations at random, instead of searching for the best"
    )
    top_k: int | None = option(
        None,
        help="sampling: draw among the so many most probable tokens (Fan et al. 2018)",
        unit="tokens",
        minimum=1,
        maximum=LARGEST_ID,
        auto="all tokens",
    )
    top_p: float = option(
        1.0,
        help="sampling: draw among the fewest tokens that have this probability together "
        "(Holtzman et al. 2020, section 3.1); after top_k",
        minimum=0.0,
        maximum=1.0,
    )
    temperature: float = option(
        1.0,
        help="sampling: log-probabilities are divided by it; near 0 takes the best token",
        minimum=0.001,
        maximum=LARGEST_FACTOR,
    )
    seed: int = option(
        0,
        help="sampling: of the random numbers, which depend on nothing but it, the number of the "
        "sentence, of the sample and of the token",
        minimum=0,
        maximum=2**63 - 1,
    )
    return_attention: bool = option(
        False, help="give each token's attention to the source, averaged over heads"
    )
    return_alignment: bool = option(
        False, help="give the source token that each token attends to most"
    )
    attention_layer: int | None = option(
        None,
        help="decoder layer, from 0, whose attention is given, and counted by coverage_penalty",
        minimum=0,
        maximum=LARGEST_ID,
        auto="the last",
    )

    def __post_init__(self) -> None:
        for entry in options(type(self)):
            value = entry.check(getattr(self, entry.name))
            # Tuples, so that options can be keys.
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, entry.name, value)
        if self.num_hypotheses > self.beam_size and not self.sampling:
            raise ConfigError(
                f"num_hypotheses: got {self.num_hypotheses}, expected at most beam_size "
                f"({self.beam_size})"
            )
        if self.max_length is not None and self.min_length > self.max_length:
            raise ConfigError(
                f"min_length: got {self.min_length}, expected at most max_length "
                f"({self.max_length})"
            )
        # What would have no effect. (Options that another one overrides are let be: a preset, or the
        # options of a translator, have them for the calls that do not say otherwise.)
        defaults = {"top_k": None, "top_p": 1.0, "temperature": 1.0, "seed": 0}
        for name, default in defaults.items():
            if not self.sampling and getattr(self, name) != default:
                raise ConfigError(f"{name}: got {getattr(self, name)} without sampling")
        if self.early_stopping != "first" and self.beam_patience != 1.0:
            raise ConfigError(
                f"beam_patience: got {self.beam_patience} with early_stopping "
                f"{self.early_stopping!r}, expected early_stopping 'first'"
            )
        if self.attention_layer is not None and not self.needs_attention:
            raise ConfigError(
                f"attention_layer: got {self.attention_layer} without return_attention, "
                "return_alignment and coverage_penalty"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SearchOptions:
        """The rules of another program, with changes.

        Args:
            name: one of :data:`PRESETS`.
            changes: single options.

        Raises:
            ConfigError: no such preset, an unknown option, or a wrong value.
        """
        if name not in PRESETS:
            raise ConfigError(
                f"preset: got {name!r}, expected one of {', '.join(PRESETS)}"
                + nearest(str(name), list(PRESETS))
            )
        return cls().replace(**{**PRESETS[name], **changes})

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
            limit = min(limit, LONGEST_OUTPUT)
        return limit if positions is None else min(limit, positions)

    def length_minimum(self, source_length: int) -> int:
        """Tokens that come before the end of sentence at least."""
        least = max(self.min_length, int(self.min_length_a * source_length))
        return min(least, LONGEST_OUTPUT)

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

    @property
    def penalty_on_logits(self) -> bool:
        """Whether the model's scores before their softmax are asked for."""
        return (
            self.repetition_penalty_on == "logits"
            and self.repetition_penalty != 1.0
            and (self.sampling or self.beam_size == 1)
        )

    @property
    def needs_attention(self) -> bool:
        """Whether the model has to say what it attends to."""
        return self.return_attention or self.return_alignment or self.coverage_penalty > 0.0


def chosen_options(
    options: SearchOptions | None, default: SearchOptions | None = None, /, **changes: Any
) -> SearchOptions:
    """How a call is to search.

    Args:
        options: as it was told.
        default: where it was not; None: the defaults.
        changes: single options.

    Raises:
        TypeError: the options are something else.
        ConfigError: see :meth:`SearchOptions.replace`.
    """
    if options is None:
        options = default or SearchOptions()
    if not isinstance(options, SearchOptions):
        raise TypeError(
            f"options: got {type(options).__name__}, expected SearchOptions (single options are "
            "keyword arguments, as beam_size=8)"
        )
    return options.replace(**changes)


#: Options by the name of the program that searches so; what is not named is as in the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # generate() of transformers 5: early_stopping=False.
    "huggingface": {
        "length_penalty": 1.0,
        "length_penalty_kind": "divide",
        "early_stopping": "heuristic",
        "rank_unfinished": True,
        "repetition_penalty_on": "logits",
    },
    # Translator of CTranslate2 4.8, which shares the probability of what may not be said among the
    # rest (here it is lost): of padding, of the start token, and of the end below min_length.
    "ctranslate2": {
        "beam_size": 2,
        "length_penalty": 1.0,
        "length_penalty_kind": "divide",
        "early_stopping": "first",
        "rank_unfinished": True,
        "max_length": 256,
        "min_length": 1,
    },
    # SequenceGenerator of fairseq 0.12, which forces an end of sentence at the longest length.
    "fairseq": {
        "beam_size": 5,
        "length_penalty": 1.0,
        "length_penalty_kind": "divide",
        "early_stopping": "first",
        "max_length_a": 0.0,
        "max_length_b": 200,
    },
}


@dataclass(frozen=True)
class Hypothesis:
    """One output of a search.

    Attributes:
        tokens: ids, without start and end of sentence.
        score: what hypotheses are ordered by, see :class:`SearchOptions`.
        log_prob: natural logarithm of the probability that the model gives to the tokens (and to
            the end of sentence, where there is one), whatever the options make of it.
        token_scores: the summands of ``log_prob``, the end of sentence's last.
        stop: why there is no further token: ``eos`` (an end of sentence), ``max_length`` (the
            longest length was reached before one), or ``no_token`` (the options allow none).
        attention: float32 ``[len(token_scores), source tokens]``, what each token attended to,
            where asked for; the source's end of sentence is one of its tokens.
        alignment: for each of ``token_scores``, the source token that was attended to most (the
            first of equal ones), where asked for.
    """

    tokens: list[int]
    score: float
    log_prob: float
    token_scores: list[float]
    stop: HypothesisStop
    attention: NDArray[np.float32] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    alignment: list[int] | None = None

    @property
    def ended(self) -> bool:
        """Whether the model ended the sentence."""
        return self.stop == "eos"


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one sentence.

    Attributes:
        hypotheses: best first: those that ended, then, where these are fewer than asked for, the
            best of those that did not (``rank_unfinished`` puts them in one order).
        stop: why it stopped: ``exact`` (nothing better could come), ``first`` (enough hypotheses
            had ended), ``heuristic`` (see ``early_stopping``), ``sampled`` (every sample ended),
            ``max_length``, or ``no_token`` (the options allow no token after any hypothesis).
        steps: tokens generated.
    """

    hypotheses: list[Hypothesis]
    stop: StopReason
    steps: int


def check_at_once(name: str, value: Any) -> int:
    """The value of an argument that :data:`MOST_AT_ONCE` names.

    Raises:
        ConfigError: it is no integer from 1 to the most.
    """
    most = MOST_AT_ONCE[name]
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name}: got {value!r}, expected an integer from 1 to {most}")
    return int(value)


def _at_once(name: str) -> Callable[[str], int]:
    """What argparse reads such an argument with."""

    def parse(text: str) -> int:
        try:
            value: Any = int(text)
        except ValueError:
            value = text
        try:
            return check_at_once(name, value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from None

    return parse


def add_batch_arguments(
    parser: argparse.ArgumentParser,
    what: str,
    more: str = "",
    *,
    tokens: str | None = None,
    batch_tokens: tuple[int, int] = (4096, 32768),
) -> None:
    """``batch_size`` and ``batch_tokens`` of a command.

    Args:
        parser: of the command.
        what: is done with how many together, "sentences decoded".
        more: to say of the first.
        tokens: what the second counts; None: source tokens of them.
        batch_tokens: its default, on the CPU and on another device.
    """
    parser.add_argument(
        "--batch-size",
        type=_at_once("batch_size"),
        metavar="N",
        help=f"most {what} together{more} (default: {BATCH_SIZES[0]}; on another device than the "
        f"CPU {BATCH_SIZES[1]})",
    )
    parser.add_argument(
        "--batch-tokens",
        type=_at_once("batch_tokens"),
        metavar="N",
        help=f"most {tokens or 'source tokens ' + what.split()[-1]} together, which bounds memory "
        f"(default: {batch_tokens[0]}; on another device than the CPU {batch_tokens[1]})",
    )


def add_engine_arguments(parser: argparse.ArgumentParser, *, ensemble: bool = True) -> None:
    """What every command that decodes says of its engine: ``threads``, ``compute_type``, ``ensemble``."""
    parser.add_argument(
        "--threads",
        type=_at_once("threads"),
        metavar="N",
        help="CPU threads (default: the physical cores that the process may use)",
    )
    parser.add_argument(
        "--compute-type",
        choices=tuple(dict.fromkeys((*COMPUTE_TYPES, *TORCH_COMPUTE_TYPES))),
        default="float32",
        help="of the matrix products: float32, bfloat16 (takes AVX512_BF16), int8 (fastest), or auto: "
        "the fastest that this machine has instructions for; on another device float32, bfloat16, "
        "float16, or auto (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, where the compiled engine computes, or a device of PyTorch's, such as cuda or "
        "cuda:1 (default: %(default)s)",
    )
    if not ensemble:
        return
    parser.add_argument(
        "--ensemble",
        metavar="MODEL_DIR",
        action="append",
        default=[],
        help="another model, with the same tokenizer, that has an equal say in each token; may be "
        "given again",
    )
