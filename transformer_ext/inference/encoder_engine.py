"""The compiled encoder, on token ids: states, vectors of texts, scores of labels and of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformer_ext.inference.compiled import CompiledModel
from transformer_ext.inference.encoder_input import (
    check_labels,
    check_masked_head,
    checked_batches,
)
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EncoderEngine"]

#: Most texts, and most tokens (counted as the longest of them times their number), that are computed
#: together where a call does not say otherwise. The second bounds memory.
BATCH_SIZE = 64
BATCH_TOKENS = 4096


class EncoderEngine(CompiledModel[TextEncoderConfig]):
    """A text encoder ready to compute on the CPU, without torch.

    A text's result is the same, bit for bit, in any batch and for any number of threads.
    :class:`transformer_ext.model.TextEncoder` is the same in torch.

    The methods take texts as token ids with their special tokens (BERT's [CLS] and [SEP]), none of
    them empty, and, for a model that has them, the token types of each; without, all are 0. Results
    are float32 arrays in the order of the texts.

    :class:`CompiledModel` has the arguments, and what all engines have in common.

    All methods raise a TypeError for what is no sequences of integers, and a ValueError for a text
    without a token, an id that is not in the vocabulary, a token type that the model does not have,
    and a text longer than the model's positions.
    """

    _KIND = TextEncoderConfig
    # Heads that the configuration does not ask for are not read.
    _IGNORED = ("pooler.", "generator.", "masked_lm_head.")

    def __init__(
        self,
        config: TextEncoderConfig,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int | None = None,
        compute_type: str = "float32",
    ) -> None:
        super().__init__(config, weights, threads=threads, compute_type=compute_type)

    def states(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[NDArray[np.float32]]:
        """A state for each token.

        Args:
            texts: token ids of each.
            token_types: of each token, for a model that has them; None: all 0.
            batch_size: most texts computed together, those of similar length.
            batch_tokens: most tokens computed together; a longer text is alone.

        Returns:
            for each text ``[tokens, d_model]``.
        """
        engine = self._open()
        results: dict[int, Any] = {}
        for batch, asked in self._batches(texts, token_types, batch_size, batch_tokens):
            for i, array in zip(batch, engine.states(**asked), strict=True):
                results[i] = array
        return [results[i] for i in range(len(texts))]

    def pooled(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> NDArray[np.float32]:
        """A vector for each text: the state of its first token or the mean of all, pooler and
        division by its length included where the model has them.

        Args:
            texts: see :meth:`states`.
            token_types: see there.
            batch_size: see there.
            batch_tokens: see there.

        Returns:
            ``[texts, d_model]``.
        """
        import numpy as np

        engine = self._open()
        results: dict[int, Any] = {}
        for batch, asked in self._batches(texts, token_types, batch_size, batch_tokens):
            results.update(zip(batch, engine.pooled(**asked), strict=True))
        rows = [results[i] for i in range(len(texts))]
        return np.array(rows, np.float32).reshape(-1, self.config.d_model)

    def label_scores(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> NDArray[np.float32]:
        """Scores of the labels, before any softmax.

        Args:
            texts: see :meth:`states`.
            token_types: see there.
            batch_size: see there.
            batch_tokens: see there.

        Returns:
            ``[texts, labels]``.

        Raises:
            ValueError: see the class; or the model has no labels.
        """
        import numpy as np

        check_labels(self.config)
        engine = self._open()
        results: dict[int, Any] = {}
        for batch, asked in self._batches(texts, token_types, batch_size, batch_tokens):
            results.update(zip(batch, engine.label_scores(**asked), strict=True))
        rows = [results[i] for i in range(len(texts))]
        return np.array(rows, np.float32).reshape(-1, len(self.config.labels))

    def token_scores(
        self,
        texts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[NDArray[np.float32]]:
        """What the masked language model says at some tokens, before any softmax.

        Args:
            texts: see :meth:`states`.
            positions: for each text, which of its tokens, from 0; none, any order, any number of
                times.
            token_types: see there.
            batch_size: see there.
            batch_tokens: see there.

        Returns:
            for each text ``[positions, vocab_size]``.

        Raises:
            ValueError: see the class; a position outside of its text; or the model has no
                masked_lm_head.
        """
        check_masked_head(self.config)
        engine = self._open()
        results: dict[int, Any] = {}
        for batch, asked in self._batches(texts, token_types, batch_size, batch_tokens, positions):
            for i, array in zip(batch, engine.token_scores(**asked), strict=True):
                results[i] = array
        return [results[i] for i in range(len(texts))]

    def _batches(
        self,
        texts: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None,
        batch_size: int,
        batch_tokens: int,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Numbers of the texts of each batch, and what the compiled engine is told of them."""
        for batch in checked_batches(
            self.config, texts, token_types, positions, batch_size, batch_tokens
        ):
            asked = {"ids": batch.ids, "token_types": batch.token_types or []}
            yield (
                batch.rows,
                asked if positions is None else {**asked, "positions": batch.positions},
            )
