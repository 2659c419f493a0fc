"""Labels of texts by a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import FileError, load_model_dir
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    from transformer_ext.model.text_encoder import TextEncoder

__all__ = ["Prediction", "TextClassifier", "label_probabilities", "predictions"]

#: Tokens that are classified at once.
_BATCH_TOKENS = 8192


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


def label_probabilities(
    model: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]
) -> np.ndarray:
    """float32 [texts, labels]: how probable each label is.

    Args:
        model: the classifier; put it in evaluation mode before.
        tokenizer: of its texts.
        texts: what to classify.

    Raises:
        ValueError: a text longer than the learned positions.
    """
    import torch

    from transformer_ext.packed import Packed

    assert model.generator is not None
    start, end = tokenizer.bos_id, tokenizer.eos_id
    sentences = [[start, *ids, end] for ids in tokenizer.encode_batch(list(texts))]
    device = next(model.parameters()).device
    found = np.empty((len(texts), len(model.config.labels)), np.float32)
    with torch.inference_mode():
        for rows in _batches([len(ids) for ids in sentences]):
            lengths = [len(sentences[row]) for row in rows]
            ids = torch.tensor([id for row in rows for id in sentences[row]], device=device)
            hidden = model.forward_packed(ids, Packed.from_lengths(lengths, device=device))
            found[rows] = model.generator.logits(hidden).float().softmax(-1).cpu().numpy()
    return found


def predictions(model: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Prediction]:
    """The label of each text; arguments and errors as of :func:`label_probabilities`."""
    rows = label_probabilities(model, tokenizer, texts)
    best = rows.argmax(1).tolist()
    return [
        Prediction(model.config.labels[number], float(row[number]), tuple(map(float, row)))
        for number, row in zip(best, rows, strict=True)
    ]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts of like length, as many as the budget of tokens takes, at least one."""
    rows: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if rows and tokens + lengths[row] > _BATCH_TOKENS:
            yield rows
            rows, tokens = [], 0
        rows.append(row)
        tokens += lengths[row]
    if rows:
        yield rows


class TextClassifier:
    """A classifier from its directory, on text.

    Args:
        folder: model directory of ``python -m transformer_ext.train --task classify``.
        device: where to compute.

    Attributes:
        labels: names of the classes.

    Raises:
        FileError: no such model, or one of another kind.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        from transformer_ext.model.text_encoder import TextEncoder

        saved = load_model_dir(folder, TextEncoderConfig)
        if not saved.config.labels:
            raise FileError(f"{folder}: the model has no labels, it is no classifier")
        self.tokenizer = saved.source_tokenizer
        self.labels = saved.config.labels
        self.model = TextEncoder(saved.config).load_weights(saved.weights).to(device).eval()

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """The label of each text."""
        return predictions(self.model, self.tokenizer, texts)
