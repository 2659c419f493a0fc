"""An encoder-only model in PyTorch with the methods of the compiled engine: on any device, and while
the model is still being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from transformer_ext.inference.compiled import batches_by_length
from transformer_ext.inference.options import MOST_AT_ONCE
from transformer_ext.packed import Packed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from transformer_ext.model.text_encoder import TextEncoder

#: Tokens that are encoded at once.
_BATCH_TOKENS = 8192


class TorchEncoder:
    """A :class:`~transformer_ext.model.text_encoder.TextEncoder` on lists of ids.

    Arguments and results are those of
    :class:`~transformer_ext.inference.encoder_engine.EncoderEngine`.

    Args:
        model: the model; put it in evaluation mode before.
    """

    def __init__(self, model: TextEncoder) -> None:
        self.model = model
        self.config = model.config

    def states(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The state of each token: for each text ``[tokens, d_model]``."""
        found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(texts)
        for rows, ids, packed, types in self._batches(texts, token_types):
            hidden = _array(self.model.encode_packed(ids, packed, types))
            ends = np.cumsum([len(texts[row]) for row in rows])
            for row, states in zip(rows, np.split(hidden, ends[:-1]), strict=True):
                found[row] = states
        return found

    def pooled(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> NDArray[np.float32]:
        """A vector for each text, ``[texts, d_model]``."""
        return self._vectors(texts, token_types, self.config.d_model, lambda pooled: pooled)

    def label_scores(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> NDArray[np.float32]:
        """Unnormalised scores of the labels, ``[texts, labels]``."""
        generator = self.model.generator
        assert generator is not None
        return self._vectors(texts, token_types, len(self.config.labels), generator.logits)

    def token_scores(
        self,
        texts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Unnormalised scores of all tokens at some positions, ``[positions, vocab_size]`` each."""
        found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(texts)
        for rows, ids, packed, types in self._batches(texts, token_types):
            hidden = self.model.encode_packed(ids, packed, types)
            starts = packed.cu_seqlens.tolist()
            wanted = [starts[i] + at for i, row in enumerate(rows) for at in positions[row]]
            scores = _array(self.model.masked_logits(hidden[wanted]))
            ends = np.cumsum([len(positions[row]) for row in rows])
            for row, part in zip(rows, np.split(scores, ends[:-1]), strict=True):
                found[row] = part
        return found

    def _vectors(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        width: int,
        head: Callable[[Tensor], Tensor],
    ) -> NDArray[np.float32]:
        found = np.empty((len(texts), width), np.float32)
        for rows, ids, packed, types in self._batches(texts, token_types):
            found[rows] = _array(head(self.model.forward_packed(ids, packed, types)))
        return found

    def _batches(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
    ) -> Iterator[tuple[list[int], Tensor, Packed, Tensor | None]]:
        device = next(self.model.parameters()).device

        def flat(values: Sequence[Sequence[int]], rows: list[int]) -> Tensor:
            return torch.tensor([value for row in rows for value in values[row]], device=device)

        with torch.inference_mode():
            for rows in batches_by_length(texts, MOST_AT_ONCE["batch_size"], _BATCH_TOKENS):
                packed = Packed.from_lengths([len(texts[row]) for row in rows], device=device)
                types = None if token_types is None else flat(token_types, rows)
                yield rows, flat(texts, rows), packed, types


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
