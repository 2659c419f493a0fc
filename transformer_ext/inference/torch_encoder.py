"""An encoder-only model in PyTorch with the methods of the compiled engine: on any device, and while
the model is still being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from transformer_ext.inference.encoder_input import (
    Batch,
    check_labels,
    check_masked_head,
    checked_batches,
)
from transformer_ext.inference.options import MOST_AT_ONCE
from transformer_ext.inference.shared import Closing
from transformer_ext.packed import Packed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from transformer_ext.model.text_encoder import TextEncoder

#: Tokens that are encoded at once.
_BATCH_TOKENS = 8192


class TorchEncoder(Closing):
    """A :class:`~transformer_ext.model.text_encoder.TextEncoder` on lists of ids.

    Arguments, results and errors are those of
    :class:`~transformer_ext.inference.encoder_engine.EncoderEngine`, but how much is computed
    together is not chosen.

    Args:
        model: the model; put it in evaluation mode before.
    """

    def __init__(self, model: TextEncoder) -> None:
        self._model: TextEncoder | None = model
        self.config = model.config

    @property
    def model(self) -> TextEncoder:
        """The model."""
        model = self._model
        self._check_open()
        assert model is not None
        return model

    def _forget(self) -> None:
        self._model = None

    def states(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The state of each token: for each text ``[tokens, d_model]``."""
        found: dict[int, NDArray[np.float32]] = {}
        for batch, ids, packed, types in self._batches(texts, token_types):
            hidden = _array(self.model.encode_packed(ids, packed, types))
            found.update(_split(hidden, batch.rows, batch.ids))
        return [found[row] for row in range(len(texts))]

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
        check_labels(self.config)
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
        check_masked_head(self.config)
        found: dict[int, NDArray[np.float32]] = {}
        for batch, ids, packed, types in self._batches(texts, token_types, positions):
            hidden = self.model.encode_packed(ids, packed, types)
            starts = packed.cu_seqlens.tolist()
            wanted = [starts[i] + at for i, asked in enumerate(batch.positions) for at in asked]
            scores = _array(self.model.masked_logits(hidden[wanted]))
            found.update(_split(scores, batch.rows, batch.positions))
        return [found[row] for row in range(len(texts))]

    def _vectors(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        width: int,
        head: Callable[[Tensor], Tensor],
    ) -> NDArray[np.float32]:
        found: dict[int, NDArray[np.float32]] = {}
        for batch, ids, packed, types in self._batches(texts, token_types):
            vectors = _array(head(self.model.forward_packed(ids, packed, types)))
            found.update(zip(batch.rows, vectors, strict=True))
        rows = [found[row] for row in range(len(texts))]
        return np.array(rows, np.float32).reshape(-1, width)

    def _batches(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[Batch, Tensor, Packed, Tensor | None]]:
        device = next(self.model.parameters()).device

        def flat(values: list[list[int]]) -> Tensor:
            return torch.tensor([value for row in values for value in row], device=device)

        most = MOST_AT_ONCE["batch_size"]
        with torch.inference_mode():
            for batch in checked_batches(
                self.config, texts, token_types, positions, most, _BATCH_TOKENS
            ):
                packed = Packed.from_lengths([len(ids) for ids in batch.ids], device=device)
                types = None if batch.token_types is None else flat(batch.token_types)
                yield batch, flat(batch.ids), packed, types


def _split(
    values: NDArray[np.float32], rows: list[int], parts: list[list[int]]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """What belongs to each text, by its number."""
    ends = np.cumsum([len(part) for part in parts])
    return zip(rows, np.split(values, ends[:-1]), strict=True)


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
