"""What the compiled engine and the plain search have in common beside their options.

Without numpy, which takes longer to import than the rest of what a translation needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from transformer_ext.inference.options import (
    TORCH_COMPUTE_TYPES,
    Hypothesis,
    HypothesisStop,
    SearchOptions,
    SearchResult,
)
from transformer_ext.model.config import LanguageModelConfig, TransformerConfig

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_Self = TypeVar("_Self", bound="Closing")


def is_many(value: Any) -> bool:
    """Whether this is several of something, in order: neither a text nor without an order."""
    if isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset)):
        return False
    # An array without dimensions can be iterated over only to an error.
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


class Closing:
    """What holds the memory of a model until it is closed, by hand or at the end of a ``with``."""

    #: Class of what was closed, this or what it belongs to; None: it is open.
    _closed: str | None = None

    def close(self) -> None:
        """Give the memory back; calls that begin afterwards are errors.

        On the CPU calls that other threads are in go on to their end, and the memory is given back
        with the last of them; on another device there may be none.
        """
        self._close(type(self).__name__)

    def _close(self, name: str) -> None:
        """:meth:`close`, where ``name`` is the class of what the caller closes."""
        self._closed = self._closed or name
        if (part := self._part()) is not None:
            part._close(name)
        self._forget()

    def _part(self) -> Closing | None:
        """What is closed with this."""
        return None

    def _forget(self) -> None:
        """Let go of the memory that this holds itself, more than once too."""

    def _check_open(self) -> None:
        """Raise a ValueError where this, or what it works with, is closed."""
        if self._closed is not None:
            raise ValueError(f"this {self._closed} is closed")
        if (part := self._part()) is not None:
            part._check_open()

    def __enter__(self: _Self) -> _Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def never_proposed(config: TransformerConfig | LanguageModelConfig) -> frozenset[int]:
    """Ids that no search proposes: padding, and the tokens that only begin a sentence.

    None for a language model whose texts begin without a start token: they are written one behind
    the other, without padding, and any id may name a piece of text, as GPT-2's may.
    """
    if isinstance(config, LanguageModelConfig) and not config.prepend_bos:
        return frozenset()
    never = {config.pad_id, config.bos_id}
    if isinstance(config, TransformerConfig):
        never.add(config.decoder_start_id)
    return frozenset(never - {config.eos_id})


def fed_tokens(config: LanguageModelConfig, prompt: Sequence[int]) -> list[int]:
    """What a language model reads before it goes on: the prompt, with a start token where it needs one."""
    start = [config.bos_id] if config.prepend_bos or not len(prompt) else []
    return [*start, *prompt]


class PromptError(ValueError):
    """A prompt that a language model cannot take.

    Attributes:
        number: of the prompt, from 0.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"prompts: number {number} (from 0) {reason}")
        self.number = number
        self.reason = reason


def asked_of_source(options: SearchOptions) -> str | None:
    """The first option that needs a source; None: there is none."""
    names = ["return_attention", "return_alignment", "coverage_penalty"]
    names += ["max_source_length", "min_length_a"]
    # Presets have 0.
    if options.max_length_a != SearchOptions.max_length_a:
        names.append("max_length_a")
    return next((name for name in names if getattr(options, name)), None)


def continuation_limits(
    config: LanguageModelConfig,
    options: SearchOptions,
    fed: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
) -> list[int]:
    """Most tokens that may follow each of :func:`fed_tokens`.

    Raises:
        ValueError: options that need a source, numbers of another number, or more tokens than
            learned positions.
    """
    asked = asked_of_source(options)
    if asked is not None:
        raise ValueError(
            f"{asked}: got {getattr(options, asked)}, but a language model has no source"
        )
    if numbers is not None and len(numbers) != len(fed):
        raise ValueError(
            f"numbers: got {len(numbers)}, expected one for each of the {len(fed)} prompts"
        )
    limits = []
    for number, tokens in zip(range(len(fed)) if numbers is None else numbers, fed, strict=True):
        # The last token is not fed: there can be one more than positions.
        room = None if config.longest is None else config.longest - len(tokens) + 1
        if room is not None and room < 1:
            raise PromptError(
                number,
                f"has {len(tokens)} tokens (a start token counted), but the model has learned "
                f"positions for {config.max_positions} (max_positions)",
            )
        limits.append(options.length_limit(0, room))
    return limits


def attention_layer(options: SearchOptions, config: TransformerConfig) -> int | None:
    """The decoder layer whose attention the options need; None: they need none.

    Raises:
        ValueError: the model does not have it.
    """
    if not options.needs_attention:
        return None
    layers = config.num_decoder_layers
    layer = layers - 1 if options.attention_layer is None else options.attention_layer
    if not 0 <= layer < layers:
        raise ValueError(f"attention_layer: got {layer}, but the decoder has {layers} layers")
    return layer


def check_ensemble(configs: Sequence[TransformerConfig]) -> None:
    """Raise a ValueError for models whose tokens are not the same."""
    names = ("src_vocab_size", "tgt_vocab_size", "pad_id", "bos_id", "eos_id", "decoder_start_id")
    for number, config in enumerate(configs):
        for name in names:
            got, expected = getattr(config, name), getattr(configs[0], name)
            if got != expected:
                raise ValueError(
                    f"engines: number {number} (from 0) has {name} {got}, expected the "
                    f"{expected} of the first"
                )


def check_source_lengths(sources: Sequence[Sequence[int]], longest: int | None) -> None:
    """Raise a ValueError for a source longer than ``max_source_length``."""
    for number, source in enumerate(sources):
        if longest is not None and len(source) > longest:
            raise ValueError(
                f"sources: number {number} (from 0) has {len(source)} tokens, expected at most "
                f"max_source_length ({longest})"
            )


def make_hypothesis(
    options: SearchOptions,
    tokens: list[int],
    score: float,
    log_prob: float,
    token_scores: list[float],
    stop: HypothesisStop,
    attention: NDArray[Any] | None,
) -> Hypothesis:
    """A hypothesis with as much of its attention as the options ask for."""
    return Hypothesis(
        tokens,
        score,
        log_prob,
        token_scores,
        stop,
        attention if options.return_attention else None,
        alignment_of(attention) if options.return_alignment else None,
    )


def alignment_of(attention: NDArray[Any] | None) -> list[int]:
    """For each row of ``[tokens, source tokens]``, the column with the most, the first of equals."""
    if attention is None or not len(attention):
        return []
    found: list[int] = attention.argmax(axis=1).tolist()
    return found


def at_once(batch_size: int | None, batch_tokens: int | None) -> dict[str, int]:
    """Arguments of an engine: those that are said."""
    said = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    return {name: value for name, value in said.items() if value is not None}


def empty_result(options: SearchOptions | None = None) -> SearchResult:
    """What an empty source gives."""
    options = options or SearchOptions()
    return SearchResult(
        [make_hypothesis(options, [], 0.0, 0.0, [], "eos", None)],
        "exact",
        0,
    )


def device_name(device: str | int | torch.device) -> str:
    """The name of a device; of a GPU's number too, and of -1, which is the CPU."""
    if type(device) is int:
        return "cpu" if device == -1 else f"cuda:{device}"
    # Without importing torch. What is no device at all is refused with the names that there are not.
    return str(device) if type(device).__module__ == "torch" else device  # type: ignore[return-value]


def torch_compute_type(threads: int | None, compute_type: str, device: str) -> str:
    """What PyTorch, which computes on another device than ``cpu``, computes in.

    ``auto`` is, on a GPU, the type of half the bytes that it multiplies fastest.

    Raises:
        ValueError: a device that it does not have, a number of threads, or another compute type
            than those of :data:`~transformer_ext.inference.options.TORCH_COMPUTE_TYPES`.
    """
    import torch

    expected = "expected 'cpu' or a device that PyTorch has here, such as 'cuda:0'"
    if not isinstance(device, str):
        raise ValueError(f"device: got {device!r}, {expected}")
    try:
        torch.empty(0, device=device)
    # An AssertionError comes from a PyTorch that was built without the device.
    except (AssertionError, RuntimeError) as error:
        # Some are pages long, and some list all devices.
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        said = f" ({reason})" if len(reason) < 120 else ""
        raise ValueError(f"device: got {device!r}, {expected}{said}") from None
    if threads is not None:
        raise ValueError(f"threads: got {threads}, expected none on {device}")
    if compute_type not in TORCH_COMPUTE_TYPES:
        raise ValueError(
            f"compute_type: got {compute_type!r}, expected one of "
            f"{', '.join(TORCH_COMPUTE_TYPES)} on {device}"
        )
    if compute_type != "auto":
        return compute_type
    if torch.device(device).type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
