"""What text classifier, mask filler and sentence encoder share: text to token ids, an encoder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from transformer_ext.files import load_model_dir, naming_damage
from transformer_ext.inference.lines import TextLines, input_blocks
from transformer_ext.inference.options import add_engine_arguments
from transformer_ext.inference.shared import (
    Closing,
    device_name,
    is_many,
    torch_compute_type,
)
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from transformer_ext.data.tokenizer import Tokenizer
    from transformer_ext.files import ModelDir
    from transformer_ext.inference.encoder_engine import EncoderEngine
    from transformer_ext.inference.torch_encoder import TorchEncoder
    from transformer_ext.model.text_encoder import TextEncoder

#: Token ids of texts, and their token types where there are pairs of texts.
Sequences = tuple[list[list[int]], list[list[int]] | None]


#: Most lines that a command works on together.
_LINES = 512

_Self = TypeVar("_Self", bound="TextModel")
_Result = TypeVar("_Result")


class TextError(ValueError):
    """A text that a model cannot take.

    Attributes:
        number: its place among the texts, from 0.
        reason: what is wrong with it.
        name: of the argument that it is in.
    """

    def __init__(self, number: int, reason: str, name: str = "texts") -> None:
        super().__init__(f"{name}: number {number} (from 0) {reason}")
        self.number = number
        self.reason = reason
        self.name = name


class TextModel(Closing):
    """Base of the encoder-only models on text.

    Args:
        folder: model directory, or one of Hugging Face's.
        threads: on the CPU; None: as many as there are physical cores that this process may use.
        compute_type: on the CPU, where the compiled engine computes, one of
            :data:`transformer_ext.inference.options.COMPUTE_TYPES`; elsewhere of
            :data:`transformer_ext.inference.options.TORCH_COMPUTE_TYPES`.
        device: ``cpu``, or a device of PyTorch's.

    Attributes:
        config: the architecture.
        tokenizer: of the texts.

    Raises:
        FileError: no such model, one of another kind, or one without the head that is needed.
        ValueError: a compute type that the device does not have, or ``threads`` on another device
            than the CPU.
    """

    #: Of the model; None for one in memory.
    _folder: Path | None = None

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        compute_type: str = "float32",
        device: str | int | torch.device = "cpu",
    ) -> None:
        saved = load_model_dir(folder, TextEncoderConfig)
        self._folder = saved.path
        saved = dataclasses.replace(saved, config=self._configure(saved))
        self.config: TextEncoderConfig = saved.config
        self.tokenizer: Tokenizer = saved.source_tokenizer
        self.encoder: EncoderEngine | TorchEncoder = open_encoder(
            saved, threads, compute_type, device_name(device)
        )

    def _part(self) -> Closing:
        return self.encoder

    @classmethod
    def from_model(cls: type[_Self], model: TextEncoder, tokenizer: Tokenizer) -> _Self:
        """A PyTorch model in memory, as in training, on text.

        Args:
            model: the model; it is put in evaluation mode by the caller.
            tokenizer: of its texts.
        """
        from transformer_ext.inference.torch_encoder import TorchEncoder

        made = cls.__new__(cls)
        made.config = model.config
        made.tokenizer = tokenizer
        made.encoder = TorchEncoder(model)
        return made

    def _configure(self, saved: ModelDir[TextEncoderConfig]) -> TextEncoderConfig:
        """The configuration to be used; raises a FileError for a model without the needed head."""
        return saved.config

    def numbers(self, found: _Result) -> _Result:
        """What the encoder found, an array or several.

        Raises:
            FileError: it is NaN, as the weights of the folder are.
            ValueError: it is NaN though they are not.
        """
        import numpy as np

        arrays = [found] if isinstance(found, np.ndarray) else cast("list[np.ndarray]", found)
        # In training, scores of a model that has failed are figures like others.
        if self._folder is not None and any(np.isnan(array).any() for array in arrays):
            with naming_damage([self._folder]):
                raise ValueError(f"{self._folder}: what the model computes is NaN")
        return found

    def sequences(
        self,
        texts: Iterable[str],
        pairs: Iterable[str | None] | None = None,
        *,
        truncation: bool = False,
        longest: int | None = None,
    ) -> Sequences:
        """Token ids of texts, each with its start and end token.

        Args:
            texts: the texts.
            pairs: for each a second text that belongs to it, or None; or none at all.
            truncation: cut what is longer than the model's positions at its end, the longer text of
                a pair first.
            longest: most tokens of a text, start and end included; None: as the model's positions.

        Returns:
            the ids, and the token types where there are pairs.

        Raises:
            TypeError: something that is no text.
            TextError: a text with more tokens, or with half a character.
            ValueError: a pair for a model without token types.
        """
        ids = self.tokenizer.encode_batch(check_texts("texts", texts))
        seconds: list[list[int] | None] = [None] * len(ids)
        if pairs is not None:
            pairs = check_pairs("pairs", pairs)
        if pairs is not None and any(pair is not None for pair in pairs):
            if self.config.num_token_types < 2:
                raise ValueError("pairs: this model has no token types that tell two texts apart")
            given = [pair for pair in pairs if pair is not None]
            encoded = iter(self.tokenizer.encode_batch(given))
            seconds = [None if pair is None else next(encoded) for pair in pairs]
        if longest is None:
            longest = self.config.longest
        start, end = self.tokenizer.bos_id, self.tokenizer.eos_id
        sequences: list[list[int]] = []
        types: list[list[int]] = []
        for number, (first, second) in enumerate(zip(ids, seconds, strict=True)):
            special = 2 if second is None else 3
            length = len(first) + len(second or []) + special
            if longest is not None and length > longest:
                if not truncation:
                    raise TextError(
                        number,
                        f"has {length} tokens, start and end included, but the model reads at most "
                        f"{longest}; truncation cuts it",
                    )
                if longest < special:
                    raise TextError(
                        number,
                        f"cannot be cut to the {longest} tokens that the model reads at most: its "
                        f"start and end tokens alone are {special}",
                    )
                first, second = _cut(first, second, longest - special)
            behind = [] if second is None else [*second, end]
            sequences.append([start, *first, end, *behind])
            types.append([0] * (len(first) + 2) + [1] * len(behind))
        return sequences, types if any(second is not None for second in seconds) else None


def open_encoder(
    saved: ModelDir[TextEncoderConfig], threads: int | None, compute_type: str, device: str
) -> EncoderEngine | TorchEncoder:
    """The model of a directory: on the CPU compiled, elsewhere in PyTorch."""
    if device == "cpu":
        from transformer_ext.inference.encoder_engine import EncoderEngine

        return EncoderEngine(
            saved.config, saved.weights, threads=threads, compute_type=compute_type
        )
    compute_type = torch_compute_type(threads, compute_type, device)
    from transformer_ext.inference.torch_encoder import TorchEncoder
    from transformer_ext.model.text_encoder import TextEncoder

    model = TextEncoder(saved.config).load_weights(saved.weights).set_precision(compute_type)
    return TorchEncoder(model.to(device).eval())


def check_texts(name: str, texts: Iterable[Any], first: int = 0) -> list[str]:
    """The texts as a list; ``first`` is the position of the first, for messages.

    Raises:
        TypeError: anything but texts.
        TextError: one that cannot be encoded.
    """
    found = check_pairs(name, texts, first)
    if None in found:
        number = first + found.index(None)
        raise TypeError(f"{name}: got NoneType at position {number}, expected a text")
    return [text for text in found if text is not None]


def check_iterable(name: str, texts: Any, expected: str) -> None:
    """Raise a TypeError for what cannot be many texts in order."""
    if not is_many(texts):
        got = "a text" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"{name}: got {got}, expected {expected}")


def check_pairs(name: str, texts: Iterable[Any], first: int = 0) -> list[str | None]:
    """As :func:`check_texts`, of texts some of which may be None."""
    check_iterable(name, texts, "a sequence of texts")
    # An iterator can be read only once.
    found = list(texts)
    for number, text in enumerate(found, first):
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(
                f"{name}: got {type(text).__name__} at position {number}, expected a text"
            )
        check_characters(name, number, text)
    return found


def check_characters(name: str, number: int, text: str) -> None:
    """Raise a TextError for a text that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(number, "has half a character (a lone surrogate)", name) from None


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities from unnormalised scores, along the last dimension."""
    import numpy as np

    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities


def _cut(
    first: list[int], second: list[int] | None, room: int
) -> tuple[list[int], list[int] | None]:
    """Both texts, cut so that they have ``room`` tokens together."""
    if second is None:
        return first[:room], None
    # The shorter one stays whole where it takes no more than half.
    shorter, longer = sorted((len(first), len(second)))
    keep = min(shorter, room // 2)
    longer = min(longer, room - keep)
    kept = (keep, longer) if len(first) <= len(second) else (longer, keep)
    return first[: kept[0]], second[: kept[1]]


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command says that runs a :class:`TextModel` on lines."""
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        help="UTF-8 text, plain, gzip or xz, one text a line; none or - reads standard input",
    )
    parser.add_argument(
        "--truncation",
        action="store_true",
        help="cut texts longer than the model's positions, which are an error otherwise",
    )
    add_engine_arguments(parser, ensemble=False)


def results_of_lines(
    files: Sequence[str], work: Callable[[list[str]], _Result]
) -> Iterator[_Result]:
    """What a command makes of its input, block by block.

    Args:
        files: of the text; none or ``-`` is standard input.
        work: the result of some lines.

    Raises:
        ValueError: a line that the model cannot take; the message has its number.
        CorpusError: a file cannot be read.
    """
    text = TextLines()
    number = 1
    try:
        for lines in input_blocks(text, files, _LINES):
            try:
                found = work(lines)
            except TextError as error:
                if error.name != "texts":
                    raise
                raise ValueError(f"line {number + error.number} {error.reason}") from None
            yield found
            number += len(lines)
    finally:
        text.warn()
