"""Target tokens a second that reach the training loop, beside a plain PyTorch DataLoader.

Ours: batches from the memory-mapped token ids, as tensors without padding, with 0, 1 and 2 threads
that read ahead. PyTorch: what its users write, a Dataset of lists of ids, batches of pairs of like
length within the same budget of target tokens, ``pad_sequence`` in the collate function, with 0, 1
and 2 worker processes. Neither goes to a GPU. All take turns of some hundred batches; the figures
are medians over the turns. A turn is longer than what workers read ahead, so that they have little
from the turns of others.

    python benchmarks/data.py                                   # the shipped text
    python benchmarks/data.py --max-tokens 25000
    python benchmarks/data.py --pairs 10000000 --ours           # generated ids, in a temporary folder

The ceiling is the copy of as many bytes as are read and written for a token: two ids of 2 bytes are
read, and three of 8 bytes written (source, decoder input, label). ``--subword-dropout`` adds the
reader with other pieces in each epoch (shipped text only).
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import machine, memory_of_process, say, table
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from transformer_ext.config import DataConfig
from transformer_ext.data import BatchSampler, ParallelDataset, collate
from transformer_ext.data.dataset import DATASET_VERSION, write_sealed
from transformer_ext.data.preparation import prepare_data
from transformer_ext.data.subwords import SampledBatches, SubwordSampler
from transformer_ext.training.batches import BatchStream, Position, to_device
from transformer_ext.training.environment import keep_freed_memory

CPU = torch.device("cpu")
#: Bytes for a target token, and as many source tokens.
BYTES = 2 * 2 + 3 * 8


def generate(folder: Path, pairs: int) -> None:
    """Writes a data set of random ids, with lengths like those of news text."""
    generator = np.random.default_rng(0)
    source = np.clip(generator.gamma(2.2, 12, pairs), 2, 250).astype(np.int64)
    target = np.clip(source * generator.normal(1.05, 0.15, pairs), 1, 250).astype(np.int64)
    sides: dict[str, Any] = {}
    for name, lengths in (("source", source), ("target", target)):
        offsets = np.append(0, np.cumsum(lengths))
        offsets.astype("<i8").tofile(folder / f"{name}.offsets")
        with open(folder / f"{name}.ids", "wb") as file:
            for begin in range(0, int(offsets[-1]), 1 << 24):
                count = min(1 << 24, int(offsets[-1]) - begin)
                file.write(generator.integers(4, 32000, count, dtype=np.uint16).tobytes())
        sides[name] = {"tokens": int(offsets[-1]), "dtype": "<u2"}
    np.zeros(pairs, "u1").tofile(folder / "flags")
    skipped = {"read": pairs, "used": pairs}
    corpora = [{"name": "generated", "begin": 0, "end": pairs, "skipped": skipped}]
    meta = {
        "version": DATASET_VERSION,
        "pairs": pairs,
        "bos_id": 2,
        "eos_id": 3,
        "skipped": skipped,
        "corpora": corpora,
        "sha256": {},
        **sides,
    }
    write_sealed(folder / "dataset.json", meta)


# PyTorch ------------------------------------------------------------------------------------------


class Pairs(Dataset[tuple[list[int], list[int]]]):
    """Lists of ids in memory."""

    def __init__(self, data: ParallelDataset) -> None:
        self.pairs = []
        for index in range(len(data)):
            source, target = data.example(index)
            self.pairs.append((source.tolist(), target.tolist()))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.pairs[index]


class Buckets(Sampler[list[int]]):
    """Batches of like length: pairs sorted by it with some noise, cut, the batches shuffled."""

    def __init__(self, lengths: list[int], max_tokens: int) -> None:
        self.lengths, self.max_tokens = lengths, max_tokens

    def __iter__(self) -> Iterator[list[int]]:
        noise = torch.rand(len(self.lengths)).tolist()
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] + noise[i])
        batches: list[list[int]] = [[]]
        tokens = 0
        for index in order:
            if tokens + self.lengths[index] > self.max_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(index)
            tokens += self.lengths[index]
        for index in torch.randperm(len(batches)).tolist():
            yield batches[index]


def padded(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """Source, decoder input and labels, padded with 0."""
    source = pad_sequence([torch.tensor(s) for s, _ in pairs], batch_first=True)
    read = pad_sequence([torch.tensor([2, *t]) for _, t in pairs], batch_first=True)
    labels = pad_sequence([torch.tensor([*t, 3]) for _, t in pairs], batch_first=True)
    return source, read, labels


def loader_batches(
    pairs: Pairs, lengths: list[int], max_tokens: int, workers: int
) -> Iterator[int]:
    """Endless batches of a DataLoader; gives the target tokens of each."""
    loader = DataLoader(
        pairs,
        batch_sampler=Buckets(lengths, max_tokens),
        collate_fn=padded,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for _, _, labels in loader:
            yield int((labels != 0).sum())


# Ours ---------------------------------------------------------------------------------------------


def our_batches(make: Callable[[], BatchStream]) -> Iterator[int]:
    """Endless batches as the trainer takes them; gives the target tokens of each."""
    for step in make():
        batch = to_device(step.batches[0], CPU)
        yield batch.target_tokens


def our_stream(data: ParallelDataset, max_tokens: int, workers: int, **more: Any) -> BatchStream:
    """As ``python -m transformer_ext.train`` makes it."""
    sampler = BatchSampler(data.source_lengths, data.target_lengths, max_tokens)
    return BatchStream(
        functools.partial(collate, data), sampler, data.target_lengths, workers=workers, **more
    )


def copy_rate() -> float:
    """Bytes a second of a copy between two arrays that no cache holds, read and written."""
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * len(source) / statistics.median(times)


def measure(
    makers: dict[str, Callable[[], Iterator[int]]], batches: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens a second in each turn, and seconds to the first batch."""
    readers, rates, first = {}, {name: [] for name in makers}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        readers[name] = make()
        next(readers[name])
        first[name] = time.perf_counter() - start
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(rates.values()))) < 3:
        for name, reader in readers.items():
            start = time.perf_counter()
            tokens = sum(next(reader) for _ in range(batches))
            rates[name].append(tokens / (time.perf_counter() - start))
    return rates, first


def huge(data: ParallelDataset, max_tokens: int) -> None:
    """What only a large data set shows: the order of an epoch, going on in the middle of one."""
    start = time.perf_counter()
    stream = our_stream(ParallelDataset(data.folder), max_tokens, 1)
    next(stream)
    say(f"opened, ordered, first batch read in {time.perf_counter() - start:.2f} s")
    middle = Position(0, int(stream.steps_per_epoch / 2))
    stream.close()
    start = time.perf_counter()
    stream = our_stream(ParallelDataset(data.folder), max_tokens, 1, start=middle)
    next(stream)
    say(f"the same in the middle of an epoch in {time.perf_counter() - start:.2f} s")
    stream.close()
    peak, own = memory_of_process("VmHWM"), memory_of_process("RssAnon")
    say(f"memory: {own / 1e9:.2f} GB now, {peak / 1e9:.2f} GB at most with the pages of the files")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, help="generate so many, instead of the shipped text")
    parser.add_argument("--ours", action="store_true", help="leave PyTorch's out")
    parser.add_argument("--subword-dropout", type=float, default=0.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batches", type=int, default=100, help="batches of a turn")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if options.pairs:
            start = time.perf_counter()
            # In a process of its own, whose memory does not count.
            writer = multiprocessing.get_context("spawn").Process(
                target=generate, args=(Path(folder), options.pairs)
            )
            writer.start()
            writer.join()
            data = ParallelDataset(folder)
            say(f"{options.pairs:,} pairs generated in {time.perf_counter() - start:.1f} s")
            huge(data, options.max_tokens)
        else:
            prepared = prepare_data(DataConfig(vocab_size=8000), say)
            data = prepared.train
        makers: dict[str, Callable[[], Iterator[int]]] = {}
        ways: dict[str, dict[str, Any]] = {"this package": {}}
        if options.subword_dropout:
            sampler = SubwordSampler(prepared.source_tokenizer, options.subword_dropout)
            ways["the same, other pieces"] = {"resample": SampledBatches(sampler, sampler)}
        for name, more in ways.items():
            for workers in options.workers:
                stream = functools.partial(our_stream, data, options.max_tokens, workers, **more)
                makers[f"{name}, {workers} threads"] = functools.partial(our_batches, stream)
        if not options.ours:
            pairs, lengths = Pairs(data), data.target_lengths.tolist()
            for workers in options.workers:
                makers[f"DataLoader, {workers} processes"] = functools.partial(
                    loader_batches, pairs, lengths, options.max_tokens, workers
                )
        rates, first = measure(makers, options.batches, options.seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = next(iter(medians.values()))
    ceiling = copy_rate() / BYTES
    rows = [
        [name, f"{rate / 1e6:.2f}", f"{best / rate:.2f}", f"{1e3 * first[name]:.0f}"]
        for name, rate in medians.items()
    ]
    rows.append(["copy of as many bytes", f"{ceiling / 1e6:.0f}", f"{best / ceiling:.2f}", ""])
    print(f"{machine()}; {len(data):,} pairs, batches of {options.max_tokens:,} target tokens")
    head = ["", "million target tokens/s", "ours, 0 threads, is", "first batch, ms"]
    print("\n".join(table(head, rows, options.markdown)))


if __name__ == "__main__":
    main()
