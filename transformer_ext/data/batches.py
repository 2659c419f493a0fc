"""Batches of a budget of tokens, in an order that depends on (seed, epoch) alone.

A batch holds as many sentence pairs as its budget of target tokens takes, laid out one after the
other without padding. Nothing of the order is ever stored: the batches of an epoch can be had again
at any time, by any process, and training goes on in the middle of one. All processes of a
distributed training see the same batches and share them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transformer_ext.data.dataset import ParallelDataset

_GOLDEN = 0x9E3779B97F4A7C15


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits all depend on all input bits (splitmix64's)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_order(count: int, *keys: int) -> np.ndarray:
    """A permutation of ``count`` indices that depends on the keys alone.

    Not numpy's generators: their streams may change from one version to the next.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state ^ _mix(np.array([(key + _GOLDEN) % 2**64], np.uint64)))
    counters = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(_GOLDEN)
    return np.argsort(_mix(state + counters), kind="stable")


class BatchSampler:
    """Divides a data set into batches, each epoch anew.

    All pairs are shuffled, then cut into pools of some batches; within a pool they are sorted by
    length and cut into batches, so that sentences of like length meet; then the batches are
    shuffled.

    Args:
        source_lengths: int [pairs], tokens of each source, the end included.
        target_lengths: int [pairs], tokens of each target, the end included.
        max_tokens: most target tokens of a batch.
        seed: of the shuffle.
        max_source_tokens: most source tokens of a batch; None is ``2 * max_tokens``.
        pool_batches: batches in a pool; 0 leaves the pairs unsorted.

    Raises:
        ValueError: a single pair is larger than a batch may be, or the lengths do not belong
            together.
    """

    def __init__(
        self,
        source_lengths: np.ndarray,
        target_lengths: np.ndarray,
        max_tokens: int,
        seed: int = 1,
        *,
        max_source_tokens: int | None = None,
        pool_batches: int = 32,
    ) -> None:
        if len(source_lengths) != len(target_lengths):
            raise ValueError(
                f"target_lengths: got {len(target_lengths)}, expected {len(source_lengths)} as of "
                "the source"
            )
        self._source = np.asarray(source_lengths)
        self._target = np.asarray(target_lengths)
        self.max_tokens = max_tokens
        self.max_source_tokens = 2 * max_tokens if max_source_tokens is None else max_source_tokens
        self.seed = seed
        for name, lengths, limit in (
            ("max_tokens", self._target, self.max_tokens),
            ("max_source_tokens", self._source, self.max_source_tokens),
        ):
            longest = int(lengths.max(initial=1))
            if longest > limit:
                raise ValueError(
                    f"{name}: got {limit}, but the longest sentence has {longest} tokens; expected "
                    f"at least {longest}, or a lower max_length that leaves such pairs out"
                )
        self._pool = 0
        if pool_batches and len(self._target):
            share = max(
                float(self._target.mean()) / self.max_tokens,
                float(self._source.mean()) / self.max_source_tokens,
            )
            self._pool = max(1, round(pool_batches / share))

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch (counted from 0): int64 indices of the pairs in each."""
        order = random_order(len(self._target), self.seed, epoch)
        pools = [order]
        if self._pool:
            pools = [
                pool[np.lexsort((self._source[pool], self._target[pool]))]
                for pool in np.split(order, range(self._pool, len(order), self._pool))
            ]
            # Up and down in turn: the batch across two pools then has like lengths, too.
            pools[1::2] = [pool[::-1] for pool in pools[1::2]]
        # One cut over all pools, so that no pool leaves a remainder batch.
        batches = self._cut(np.concatenate(pools))
        # The order of batches must not repeat that of the pairs: another key.
        return [batches[index] for index in random_order(len(batches), self.seed, epoch, 1)]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        source_ends = np.cumsum(self._source[order], dtype=np.int64)
        target_ends = np.cumsum(self._target[order], dtype=np.int64)
        batches = []
        start = 0
        while start < len(order):
            source_before = int(source_ends[start - 1]) if start else 0
            target_before = int(target_ends[start - 1]) if start else 0
            end = min(
                np.searchsorted(target_ends, target_before + self.max_tokens, "right"),
                np.searchsorted(source_ends, source_before + self.max_source_tokens, "right"),
            )
            batches.append(order[start : int(end)])
            start = int(end)
        return batches

    def efficiency(self, epoch: int = 0) -> float:
        """Part of the token budget that the batches of an epoch fill."""
        batches = self.epoch(epoch)
        return float(self._target.sum()) / (len(batches) * self.max_tokens) if batches else 0.0


@dataclass
class Batch:
    """Sentence pairs one after the other, without padding.

    Attributes:
        src_ids: int64 [source tokens], each sentence with its end id.
        src_lengths: int64 [sentences].
        tgt_ids: int64 [target tokens], what the decoder reads: each sentence after the start id.
        labels: int64 [target tokens], what it has to predict: each sentence, then the end id.
        tgt_lengths: int64 [sentences], of ``tgt_ids`` and of ``labels``.
        target_tokens: number of labels.
        sentences: number of pairs.
    """

    src_ids: np.ndarray
    src_lengths: np.ndarray
    tgt_ids: np.ndarray
    labels: np.ndarray
    tgt_lengths: np.ndarray
    target_tokens: int
    sentences: int


def collate(dataset: ParallelDataset, indices: np.ndarray, start_id: int | None = None) -> Batch:
    """Read sentence pairs as a batch of numpy arrays.

    Args:
        dataset: the pairs.
        indices: which, in which order.
        start_id: first id that the decoder reads; None is the tokenizer's start id.
    """
    src_ids, src_lengths = dataset.gather_source(indices)
    tokens, token_lengths = dataset.gather_target(indices)
    tgt_lengths = token_lengths + 1
    ends = np.cumsum(tgt_lengths)
    labels = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
    is_end = np.zeros(len(labels), bool)
    is_end[ends - 1] = True
    labels[is_end] = dataset.eos_id
    labels[~is_end] = tokens
    tgt_ids = np.roll(labels, 1)
    tgt_ids[ends - tgt_lengths] = dataset.bos_id if start_id is None else start_id
    return Batch(src_ids, src_lengths, tgt_ids, labels, tgt_lengths, len(labels), len(indices))
