"""The order of batches and how they are read ahead: what a resumed training depends on."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transformer_ext.data import BatchSampler
from transformer_ext.training.batches import BatchStream, Position, Step


def some_lengths(pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    source = np.minimum(60, generator.geometric(1 / 15, pairs) + 1).astype(np.int32)
    target = np.clip(source * generator.uniform(0.6, 1.6, pairs), 1, 60).astype(np.int32)
    return source, target


# Sampler ------------------------------------------------------------------------------------------


def test_the_order_is_what_earlier_versions_made() -> None:
    # A training begun before goes on with the same batches; the lengths do not come from numpy's
    # generators, which may change.
    source = np.arange(5000) * 7919 % 50 + 2
    target = np.arange(5000) * 104729 % 40 + 2
    digest = hashlib.sha256()
    for max_tokens, pool_batches in ((300, 32), (300, 1), (1000, 0), (100_000, 32)):
        for batch in BatchSampler(source, target, max_tokens, 3, pool_batches=pool_batches).epoch(
            2
        ):
            digest.update(batch.astype("<i8").tobytes() + b"|")
    assert digest.hexdigest()[:16] == "b7e5ebc02f6c2190"


def test_an_epoch_is_a_list_of_arrays() -> None:
    batches = BatchSampler(*some_lengths(1000), 100).epoch(0)
    as_list = list(batches)
    assert len(as_list) == len(batches) > 100
    assert [b.tolist() for b in batches[3:9:2]] == [b.tolist() for b in as_list[3:9:2]]
    assert batches[-1].tolist() == as_list[-1].tolist()
    assert batches[0].dtype == np.int64
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("pool_batches", [0, 4])
def test_a_batch_takes_as_many_pairs_as_fit(pool_batches: int) -> None:
    source, target = some_lengths(3000)
    sampler = BatchSampler(source, target, 200, max_source_tokens=190, pool_batches=pool_batches)
    batches = sampler.epoch(0)
    assert all(source[b].sum() <= 190 and target[b].sum() <= 200 for b in batches)
    filled = target.sum() / (200 * len(batches))
    assert sampler.efficiency() == pytest.approx(filled)
    # One more pair of at most 60 tokens would not have fitted, but in the last batch.
    tight = [source[b].sum() > 130 or target[b].sum() > 140 for b in batches]
    assert sum(tight) >= len(batches) - 1


def counts(sampler: BatchSampler, epoch: int) -> Counter[int]:
    return Counter(np.concatenate(list(sampler.epoch(epoch))).tolist())


def test_a_corpus_of_weight_two_is_read_twice_and_of_one_half_in_halves() -> None:
    source, target = some_lengths(500)
    sampler = BatchSampler(
        source, target, 300, corpora=[(0, 100, 2.0), (100, 400, 0.5), (400, 500, 1.0)]
    )
    first, second, third = (counts(sampler, epoch) for epoch in range(3))
    for epoch in (first, second, third):
        assert all(epoch[row] == 2 for row in range(100))
        assert all(epoch[row] == 1 for row in range(400, 500))
        assert sum(epoch[row] for row in range(100, 400)) == 150
    both = first + second
    assert all(both[row] == 1 for row in range(100, 400))
    # The next pass halves the corpus in another way.
    assert {r for r in first if 100 <= r < 400} != {r for r in third if 100 <= r < 400}


def test_fractions_of_a_corpus_add_up_to_whole_passes() -> None:
    source, target = some_lengths(1000)
    sampler = BatchSampler(source, target, 300, corpora=[(0, 300, 1 / 3), (300, 1000, 1.7)])
    total: Counter[int] = Counter()
    for epoch in range(30):
        total += counts(sampler, epoch)
    assert all(total[row] == 10 for row in range(300))
    assert all(total[row] == 51 for row in range(300, 1000))


def test_weights_of_one_leave_the_order_as_it_is() -> None:
    source, target = some_lengths(800)
    plain = BatchSampler(source, target, 300, 5).epoch(1)
    parts = BatchSampler(source, target, 300, 5, corpora=[(0, 200, 1.0), (200, 800, 1.0)]).epoch(1)
    assert [b.tolist() for b in parts] == [b.tolist() for b in plain]


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ([(0, 10, 1.0)], "parts of 0 to 100"),
        ([(0, 60, 1.0), (50, 100, 1.0)], "parts of 0 to 100"),
        ([(0, 100, 0.0)], "repetition"),
        ([(0, 100, float("nan"))], "repetition"),
        ([(0, 100, float("inf"))], "repetition"),
    ],
)
def test_wrong_corpora_are_refused(corpora: list[tuple[int, int, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSampler(*some_lengths(100), 300, corpora=corpora)


def test_a_share_of_less_than_a_pair_takes_one_now_and_then() -> None:
    sampler = BatchSampler(*some_lengths(3), 300, corpora=[(0, 3, 0.1)])
    taken = [batch.tolist() for epoch in range(10) for batch in sampler.epoch(epoch)]
    assert sorted(taken) == [[0], [1], [2]]


# Reading ahead ------------------------------------------------------------------------------------


class Examples:
    """Sampler and collate function in one; can fail at an example, and tells who has read what."""

    def __init__(self, batches: int = 7, fails_at: int | None = None) -> None:
        self.batches, self.fails_at = batches, fails_at
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.asked: list[int] = []

    def epoch(self, epoch: int) -> Sequence[np.ndarray]:
        self.asked.append(epoch)
        first = 3 * epoch * self.batches
        return [np.arange(first + 3 * i, first + 3 * i + 3) for i in range(self.batches)]

    def collate(self, examples: np.ndarray) -> Any:
        if self.fails_at in examples:
            raise OSError(f"cannot read example {self.fails_at}")
        self.read.append(int(examples[0]) // 3)
        self.threads.add(threading.current_thread().name)
        # So that two workers finish in another order than they began.
        time.sleep(0.002 * (int(examples[0]) % 2))
        return examples.tolist()

    def stream(self, **arguments: Any) -> BatchStream:
        return BatchStream(self.collate, self, np.arange(3, 1000), **arguments)


def take(stream: BatchStream, steps: int) -> list[Step]:
    return [next(stream) for _ in range(steps)]


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("transformer_ext")]


@pytest.mark.parametrize("arguments", [{}, {"accum_steps": 3}, {"rank": 1, "world_size": 3}])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_reads_the_same_steps(workers: int, arguments: Any) -> None:
    alone, examples = Examples().stream(**arguments), Examples()
    ahead = examples.stream(workers=workers, **arguments)
    for _ in range(20):
        step = next(ahead)
        assert step == next(alone)
        assert ahead.position == alone.position == step.after
        assert ahead.steps_per_epoch == alone.steps_per_epoch
    assert threading.current_thread().name not in examples.threads
    ahead.close()
    assert our_threads() == []


def test_read_ahead_batches_are_not_lost_on_resuming() -> None:
    expected = take(Examples().stream(accum_steps=2), 12)
    examples = Examples()
    stream = examples.stream(accum_steps=2, workers=3)
    assert take(stream, 4) == expected[:4]
    stream.close()
    assert len(examples.read) > 8  # It was ahead of what it had handed out.
    resumed = Examples().stream(accum_steps=2, workers=2, start=stream.position)
    assert take(resumed, 8) == expected[4:]
    resumed.close()
    # A closed stream itself goes on, too, and from any position.
    assert take(stream, 8) == expected[4:]
    stream.seek(expected[1].after)
    assert take(stream, 10) == expected[2:]
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_at_the_step_where_it_belongs(workers: int) -> None:
    stream = Examples(fails_at=13).stream(workers=workers)
    assert [step.batches for step in take(stream, 4)] == [
        [[3 * i, 3 * i + 1, 3 * i + 2]] for i in range(4)
    ]
    for _ in range(2):
        with pytest.raises(OSError, match="cannot read example 13"):
            next(stream)
    assert stream.position == Position(0, 4)
    stream.close()
    assert our_threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_without_batches_is_an_error_when_it_is_reached(workers: int) -> None:
    class Ending(Examples):
        def epoch(self, epoch: int) -> Sequence[np.ndarray]:
            return [] if epoch == 1 else super().epoch(epoch)

    stream = Ending(batches=3).stream(workers=workers)
    take(stream, 3)
    with pytest.raises(ValueError, match="no sentence pair is left"):
        next(stream)
    stream.close()


def test_a_dropped_stream_leaves_no_thread() -> None:
    stream = Examples().stream(workers=2)
    take(stream, 5)
    assert our_threads()
    threads = [t for t in threading.enumerate() if t.name in our_threads()]
    del stream
    for thread in threads:
        thread.join(10)
    assert our_threads() == []


def test_the_next_epoch_is_ordered_before_it_is_needed_and_once() -> None:
    examples = Examples(batches=10)
    stream = examples.stream(workers=1)
    assert examples.asked == [0]
    take(stream, 9)
    stream._epochs[1]  # Waits for the thread that makes it.
    assert examples.asked == [0, 1]
    take(stream, 30)
    stream.close()
    assert examples.asked == sorted(set(examples.asked))


def test_each_rank_reads_only_its_own_and_all_are_read_once() -> None:
    world = 3
    readers = [Examples(batches=8) for _ in range(world)]
    streams = [
        reader.stream(rank=rank, world_size=world, workers=rank)
        for rank, reader in enumerate(readers)
    ]
    # 8 batches a 3 ranks: the third step takes two batches of the first epoch and one of the next.
    steps = [take(stream, 8) for stream in streams]
    for stream in streams:
        stream.close()
    assert {step.after for rank in steps for step in rank[2:3]} == {Position(1, 1)}
    handed_out = [[batch[0] // 3 for step in rank for batch in step.batches] for rank in steps]
    assert handed_out == [list(range(rank, 24, world)) for rank in range(world)]
    for rank, reader in enumerate(readers):
        assert {number % world for number in reader.read} == {rank}
    # All know the size of the whole step.
    assert len({tuple(step.target_tokens for step in rank) for rank in steps}) == 1


def test_more_ranks_than_batches() -> None:
    steps = [take(Examples(batches=2).stream(rank=rank, world_size=5), 4) for rank in range(5)]
    order = [rank[step].batches[0][0] // 3 for step in range(4) for rank in steps]
    assert order == list(range(20))
    assert steps[4][3].after == Position(9, 2)


def test_resampled_batches_are_counted_as_they_are() -> None:
    def resample(batch: list[int], examples: np.ndarray, epoch: int) -> Any:
        assert batch == examples.tolist()
        return SimpleNamespace(rows=batch, epoch=epoch, target_tokens=100 * epoch + batch[0])

    alone = take(Examples(batches=2).stream(resample=resample, accum_steps=3), 2)
    assert [step.target_tokens for step in alone] == [0 + 3 + 106, 109 + 212 + 215]
    assert not alone[0].partial
    assert [batch.epoch for batch in alone[0].batches] == [0, 0, 1]
    ahead = Examples(batches=2).stream(resample=resample, accum_steps=3, workers=2)
    assert take(ahead, 2) == alone
    ahead.close()
    ranks = [
        next(Examples(batches=2).stream(resample=resample, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert [(step.target_tokens, step.partial) for step in ranks] == [
        (0, True),
        (3, True),
        (106, True),
    ]


def test_wrong_numbers_of_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers: got -1"):
        Examples().stream(workers=-1)
