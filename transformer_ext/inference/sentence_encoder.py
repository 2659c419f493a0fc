"""Vectors of texts: one for each token, or one for the whole text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, overload

from transformer_ext.inference.text_model import TextModel
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from transformer_ext.files import ModelDir


class SentenceEncoder(TextModel):
    """Texts to vectors.

    ::

        encoder = SentenceEncoder("all-MiniLM-L6-v2")
        vectors = encoder.encode(["A cat sits.", "A cat is sitting.", "Stocks fell."])
        print(vectors @ vectors[0])  # cosines, where the model normalises

    Args:
        folder, threads, compute_type, device: see :class:`TextModel`.
        pooling: how the states of the tokens become one vector, without BERT's pooler: ``mean`` is
            their mean, ``first`` that of the start token; None: as the model says.
        normalize: whether a vector gets length 1; None: as the model says.

    Attributes:
        max_length: most tokens of a text for :meth:`encode`, start and end included: as the folder
            of sentence-transformers says, else as the positions; None: any number.

    Raises:
        FileError, ValueError: see :class:`TextModel`; an unknown pooling.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        compute_type: str = "float32",
        device: str | int | torch.device = "cpu",
        pooling: str | None = None,
        normalize: bool | None = None,
    ) -> None:
        self.max_length: int | None = None
        self._pooling = pooling
        self._normalize = normalize
        super().__init__(folder, threads=threads, compute_type=compute_type, device=device)

    def _configure(self, saved: ModelDir[TextEncoderConfig]) -> TextEncoderConfig:
        config = saved.config
        self.max_length = saved.training.get("max_seq_length", config.longest)
        if self._pooling is not None:
            config = dataclasses.replace(config, pooling=self._pooling, pooler=False)
        if self._normalize is not None:
            config = dataclasses.replace(config, normalize=self._normalize)
        return config

    @overload
    def encode(self, texts: str, *, truncation: bool = False) -> NDArray[np.float32]: ...

    @overload
    def encode(self, texts: Iterable[str], *, truncation: bool = False) -> NDArray[np.float32]: ...

    def encode(
        self, texts: str | Iterable[str], *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """A vector for each text.

        Args:
            texts: one text, or a sequence of them.
            truncation: cut texts longer than :attr:`max_length`, which are an error otherwise.

        Returns:
            float32 ``[d_model]`` for one text, ``[texts, d_model]`` for a sequence.

        Raises:
            TypeError, ValueError: see :meth:`TextModel.sequences`.
        """
        if isinstance(texts, str):
            vector: NDArray[np.float32] = self.encode([texts], truncation=truncation)[0]
            return vector
        found = self.sequences(texts, truncation=truncation, longest=self.max_length)
        return self.numbers(self.encoder.pooled(*found))

    def states(
        self, texts: Iterable[str], *, truncation: bool = False
    ) -> list[NDArray[np.float32]]:
        """A vector for each token of each text, start and end included: ``[tokens, d_model]``.

        Arguments and errors as of :meth:`encode`; the positions are the limit.
        """
        return self.numbers(self.encoder.states(*self.sequences(texts, truncation=truncation)))
