"""Labels of texts by a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformer_ext.files import FileError
from transformer_ext.inference.text_model import TextModel, softmax
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from transformer_ext.files import ModelDir


@dataclass(frozen=True)
class Prediction:
    """The label of a text.

    Attributes:
        label: the most probable one.
        probability: of it, in [0, 1].
        probabilities: of every label, in the order of the model's.
    """

    label: str
    probability: float
    probabilities: tuple[float, ...]


class TextClassifier(TextModel):
    """A classifier from its directory, on text.

    Args:
        folder: model directory of ``python -m transformer_ext.train --task classify``, or one of
            Hugging Face's.
        threads, compute_type, device: see :class:`TextModel`.

    Raises:
        FileError, ValueError: see :class:`TextModel`.
    """

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return self.config.labels

    def _configure(self, saved: ModelDir[TextEncoderConfig]) -> TextEncoderConfig:
        if not saved.config.labels:
            raise FileError(f"{saved.path}: the model has no labels, it is no classifier")
        return saved.config

    def __call__(
        self,
        texts: Iterable[str],
        pairs: Iterable[str | None] | None = None,
        *,
        truncation: bool = False,
    ) -> list[Prediction]:
        """The label of each text; arguments and errors as of :meth:`scores`."""
        rows = softmax(self.scores(texts, pairs, truncation=truncation))
        best = rows.argmax(1).tolist()
        return [
            Prediction(self.labels[number], float(row[number]), tuple(map(float, row)))
            for number, row in zip(best, rows, strict=True)
        ]

    def scores(
        self,
        texts: Iterable[str],
        pairs: Iterable[str | None] | None = None,
        *,
        truncation: bool = False,
    ) -> NDArray[np.float32]:
        """Unnormalised scores of the labels, ``[texts, labels]``.

        Args:
            texts: what to classify.
            pairs: for each a second text that belongs to it, or None.
            truncation: cut texts longer than the model's positions, which are an error otherwise.

        Raises:
            TypeError, ValueError: see :meth:`TextModel.sequences`.
        """
        sequences = self.sequences(texts, pairs, truncation=truncation)
        return self.numbers(self.encoder.label_scores(*sequences))
