"""What the compiled encoder and its twin in PyTorch are given: checked, and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformer_ext.inference.compiled import batches_by_length, integers
from transformer_ext.inference.shared import is_many
from transformer_ext.model.config import TextEncoderConfig


class Batch(NamedTuple):
    """Some texts that are computed together."""

    #: Their numbers among all texts.
    rows: list[int]
    ids: list[list[int]]
    #: None: all 0.
    token_types: list[list[int]] | None
    #: Those asked for, from 0 in each text; none where none are asked for.
    positions: list[list[int]]


def check_labels(config: TextEncoderConfig) -> None:
    """Raise a ValueError for a model without a classifier."""
    if not config.labels:
        raise ValueError("label_scores: the model has no labels, so no classifier")


def check_masked_head(config: TextEncoderConfig) -> None:
    """Raise a ValueError for a model without a head for masked tokens."""
    if not config.masked_lm_head:
        raise ValueError("token_scores: the model has no masked_lm_head")


def checked_batches(
    config: TextEncoderConfig,
    texts: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int]] | None,
    positions: Sequence[Sequence[int]] | None,
    batch_size: int,
    batch_tokens: int,
) -> Iterator[Batch]:
    """All texts in batches, longest first.

    Args:
        config: of the model.
        texts: token ids of each.
        token_types: of each token; None: all 0.
        positions: those asked for, for each text; None: none.
        batch_size: see :func:`~transformer_ext.inference.compiled.batches_by_length`.
        batch_tokens: see there.

    Raises:
        TypeError, ValueError: what :class:`~transformer_ext.inference.encoder_engine.EncoderEngine` says.
    """
    _check_rows("texts", texts)
    for name, values in (("token_types", token_types), ("positions", positions)):
        if values is None:
            continue
        _check_rows(name, values)
        if len(values) != len(texts):
            raise ValueError(
                f"{name}: got {len(values)}, expected one for each of the {len(texts)} texts"
            )
    if token_types is not None and len(texts) and not config.num_token_types:
        raise ValueError(
            "token_types: expected none, the model has no embedding of them (num_token_types is 0)"
        )
    for number, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"texts: number {number} (from 0) has no token")
        if config.longest is not None and len(text) > config.longest:
            raise ValueError(
                f"texts: number {number} (from 0) has {len(text)} tokens, but the model has learned "
                f"positions for {config.longest} (max_positions)"
            )
    for rows in batches_by_length(texts, batch_size, batch_tokens):
        ids = [integers("texts", texts[row], config.vocab_size - 1) for row in rows]
        types = None
        if token_types is not None:
            most = config.num_token_types - 1
            types = [integers("token_types", token_types[row], most) for row in rows]
            for given, text in zip(types, ids, strict=True):
                if len(given) != len(text):
                    raise ValueError(
                        f"token_types: got {len(given)}, expected one for each of the {len(text)} "
                        "tokens of a text"
                    )
        places: list[list[int]] = []
        if positions is not None:
            places = [integers("positions", positions[row]) for row in rows]
            for asked, text in zip(places, ids, strict=True):
                if max(asked, default=0) >= len(text):
                    raise ValueError(
                        f"positions: got {max(asked)}, expected 0 to {len(text) - 1} in a text of "
                        f"{len(text)} tokens"
                    )
        yield Batch(rows, ids, types, places)


def _check_rows(name: str, values: Any) -> None:
    expected = "expected a sequence of integers for each text"
    if not _is_sequence(values):
        raise TypeError(f"{name}: got {values!r:.60}, {expected}")
    for row in values:
        if not _is_sequence(row):
            raise TypeError(f"{name}: got {row!r:.60}, {expected}")


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__") and is_many(value)
