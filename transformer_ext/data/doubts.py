"""What can be read but looks wrong: text that is not what it is given as, told by its statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.dataset import ParallelDataset
from transformer_ext.data.tokenizer import Tokenizer

__all__ = ["look_misaligned", "look_swapped"]

#: Sentence pairs that are looked at.
_SAMPLE = 5000


def look_misaligned(data: ParallelDataset) -> float | None:
    """The correlation of the lengths of both sides, where it is too small for translations.

    Lines that are translations of each other are long together and short together; the correlation
    is far above one half. None: it is so here, or the text is too short or too regular to tell.
    """
    rows = pick_evenly(len(data), _SAMPLE)
    source, target = data.source_lengths[rows], data.target_lengths[rows]
    if len(rows) < 500 or source.std() < 1 or target.std() < 1:
        return None
    found = float(np.corrcoef(source, target)[0, 1])
    return found if found < 0.15 else None


def look_swapped(
    pairs: Sequence[tuple[str, str]], train: ParallelDataset, source: Tokenizer, target: Tokenizer
) -> bool:
    """Whether pairs are in the other direction: their sources look like the targets of ``train``.

    Judged by how frequent their tokens are on each side; languages that share a script differ by
    several times the margin, sides of one language not at all.
    """
    if not pairs:
        return False
    rows = pick_evenly(len(train), _SAMPLE)
    sides = []
    for tokenizer, gather in ((source, train.gather_source), (target, train.gather_target)):
        counts = np.bincount(gather(rows)[0], minlength=tokenizer.vocab_size) + 0.5
        sides.append((tokenizer, np.log(counts / counts.sum())))
    chosen = [pairs[row] for row in pick_evenly(len(pairs), 500)]
    gain, characters = 0.0, 1
    for column in (0, 1):
        texts = [pair[column] for pair in chosen]
        own, other = (
            sum(float(logs[ids].sum()) for ids in tokenizer.encode_batch(texts) if ids)
            for tokenizer, logs in (sides[column], sides[1 - column])
        )
        gain += other - own
        characters += sum(map(len, texts))
    return gain / characters > 0.05
