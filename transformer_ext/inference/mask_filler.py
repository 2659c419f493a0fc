"""Guesses of masked tokens (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.files import FileError
from transformer_ext.inference.text_model import TextError, TextModel, check_texts, softmax
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from transformer_ext.files import ModelDir

#: Texts whose scores are held at once: each has those of the whole vocabulary.
_TEXTS = 64


@dataclass(frozen=True)
class Filling:
    """A token in the place of a mask.

    Attributes:
        score: its probability.
        token: its id.
        piece: its text, as in the vocabulary (``##ing``).
        text: the text with it; where it has other masks these, and start and end, are shown.
    """

    score: float
    token: int
    piece: str
    text: str

    def as_dict(self) -> dict[str, float | int | str]:
        """By the names that transformers has for them."""
        return {
            "score": self.score,
            "token": self.token,
            "token_str": self.piece,
            "sequence": self.text,
        }


class MaskFiller(TextModel):
    """Guesses the masked tokens of texts.

    ::

        filler = MaskFiller("./bert-base-uncased")
        for filling in filler(["Paris is the [MASK] of France."])[0][0]:
            print(filling.score, filling.text)

    Args:
        folder, threads, compute_type, device: see :class:`TextModel`.

    Raises:
        FileError, ValueError: see :class:`TextModel`.
    """

    tokenizer: JsonTokenizer

    @property
    def mask_token(self) -> str:
        """How a mask is written."""
        mask_id = self.tokenizer.mask_id
        assert mask_id is not None
        return self.tokenizer.piece(mask_id)

    def _configure(self, saved: ModelDir[TextEncoderConfig]) -> TextEncoderConfig:
        if not saved.config.masked_lm_head:
            raise FileError(f"{saved.path}: the model has no head for masked tokens")
        tokenizer = saved.source_tokenizer
        if not isinstance(tokenizer, JsonTokenizer) or tokenizer.mask_id is None:
            raise FileError(f"{saved.path}: the tokenizer has no mask token")
        return saved.config

    def __call__(
        self,
        texts: Iterable[str],
        *,
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        truncation: bool = False,
    ) -> list[list[list[Filling]]]:
        """The most probable tokens for each mask of each text, best first.

        Args:
            texts: texts, each with one mask at least.
            top_k: how many tokens for a mask.
            targets: only these, each a piece of the vocabulary; of another text the first piece
                counts, with a warning. Their probabilities are those among all tokens.
            truncation: cut texts longer than the model's positions, which are an error otherwise.

        Returns:
            for each text and each of its masks, ``top_k`` fillings or as many as there are targets.

        Raises:
            TypeError, ValueError: see :meth:`TextModel.sequences`; a text without a mask (a
                :class:`TextError`), a wrong ``top_k``, targets that are no texts, no target.
        """
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k: got {top_k!r}, expected an integer of at least 1")
        allowed = None if targets is None else self._target_ids(targets)
        texts = check_texts("texts", texts)
        sequences, _ = self.sequences(texts, truncation=truncation)
        mask = self.tokenizer.mask_id
        positions = [[place for place, id in enumerate(ids) if id == mask] for ids in sequences]
        for number, places in enumerate(positions):
            if not places:
                raise TextError(number, f"has no {self.mask_token}: {texts[number]!r:.60}")
        found: list[list[list[Filling]]] = []
        for begin in range(0, len(sequences), _TEXTS):
            part = slice(begin, begin + _TEXTS)
            scores = self.numbers(self.encoder.token_scores(sequences[part], positions[part]))
            found += [
                [
                    self._fillings(ids, place, row, top_k, allowed, alone=len(places) == 1)
                    for place, row in zip(places, rows, strict=True)
                ]
                for ids, places, rows in zip(sequences[part], positions[part], scores, strict=True)
            ]
        return found

    def _fillings(
        self,
        ids: list[int],
        place: int,
        scores: NDArray[np.float32],
        top_k: int,
        allowed: list[int] | None,
        alone: bool,
    ) -> list[Filling]:
        import numpy as np

        probabilities = softmax(scores)
        choice = np.arange(len(scores)) if allowed is None else np.array(allowed)
        of_choice = probabilities[choice]
        count = min(top_k, len(choice))
        best = np.argpartition(-of_choice, count - 1)[:count]
        best = best[np.argsort(-of_choice[best], kind="stable")]
        fillings = []
        for token in choice[best].tolist():
            filled = [*ids[:place], token, *ids[place + 1 :]]
            fillings.append(
                Filling(
                    float(probabilities[token]),
                    token,
                    self.tokenizer.decode([token], keep_special=True),
                    self.tokenizer.decode(filled, keep_special=not alone),
                )
            )
        return fillings

    def _target_ids(self, targets: Sequence[str]) -> list[int]:
        found = []
        for target in check_texts("targets", targets):
            id = self.tokenizer.find(target)
            if id is None:
                pieces = self.tokenizer.encode(target)
                if not pieces:
                    raise ValueError(f"targets: {target!r} has no token")
                id = pieces[0]
                warnings.warn(
                    f"targets: {target!r} is no piece of the vocabulary, "
                    f"{self.tokenizer.piece(id)!r} is taken",
                    stacklevel=3,
                )
            found.append(id)
        if not found:
            raise ValueError("targets: got none, expected at least one")
        return sorted(set(found))
