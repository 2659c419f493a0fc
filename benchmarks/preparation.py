"""Measures `python -m transformer_ext.prepare` on a corpus of any size: time, memory, second start.

    python benchmarks/preparation.py --pairs 10000000 --folder /tmp/corpus

makes the corpus (`benchmarks/corpus.py`) if it is not there, then

- runs the command with each number of processes of ``--workers``, each time from nothing (0 is
  without processes), and once more to find all done. Memory is the largest sum, over the process and
  its children, of what they have for themselves (private pages: not the mapped files) and of all
  that is mapped (proportional set size);
- starts what a training starts with: the data set, the batches of the first epoch, the first batch;
- encodes some of the same text with SentencePiece alone, with one thread and with all, and divides:
  what the whole preparation would take if it were only that, at the same speed.

``--only`` leaves out the rest. A line of JSON for each result goes to ``--save``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from corpus import make
from processes import machine

_START = """
import json, sys, time
begin = time.perf_counter()
from transformer_ext.config import DataConfig
from transformer_ext.data import BatchSampler, collate
from transformer_ext.data.preparation import prepare_data
imported = time.perf_counter()
src, tgt, cache = sys.argv[1:]
train = prepare_data(DataConfig([src], [tgt], cache=cache)).train
opened = time.perf_counter()
sampler = BatchSampler(train.source_lengths, train.target_lengths, 25_000)
batches = sampler.epoch(0)
collate(train, batches[0])
print(json.dumps({"imports": imported - begin, "data set": opened - imported,
                  "first batch": time.perf_counter() - opened, "batches": len(batches)}))
"""


def _tree(process: int) -> list[int]:
    """The process and all that it started."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found = [process]
    for each in found:
        found += parents.get(each, [])
    return found


def _memory(process: int) -> tuple[int, int, int]:
    """(private, proportional) bytes of a process and its children, and their number."""
    private = proportional = count = 0
    for each in _tree(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        count += 1
        for line in lines:
            name, value = line.split(":")
            if name == "Pss":
                proportional += 1024 * int(value.split()[0])
            if name == "Anonymous":
                private += 1024 * int(value.split()[0])
    return private, proportional, count


def run(command: list[str]) -> tuple[float, dict[str, Any], str]:
    """Seconds, memory and output of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"private": 0, "proportional": 0, "processes": 0}
    while True:
        try:
            output, _ = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            for name, value in zip(peak, _memory(process.pid), strict=False):
                peak[name] = max(peak[name], value)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return seconds, peak, output


def _encode_alone(
    paths: tuple[Path, Path], tokenizer: str, pairs: int, block: int = 20_000
) -> dict[str, float]:
    """Seconds of SentencePiece's own encode for some pairs, by number of threads."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    result = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        seconds = 0.0
        for path in paths:
            with open(path, encoding="utf-8") as file:
                lines = (line[:-1] for line in itertools.islice(file, pairs))
                while texts := list(itertools.islice(lines, block)):
                    begin = time.perf_counter()
                    processor.encode(texts, num_threads=threads)
                    seconds += time.perf_counter() - begin
        result[str(threads)] = seconds
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="of the corpus and the caches")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, len(os.sched_getaffinity(0))], metavar="N"
    )
    parser.add_argument("--alone-pairs", type=int, default=200_000, help="for SentencePiece alone")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("prepare", "start", "alone"),
        default=["prepare", "start", "alone"],
    )
    parser.add_argument("--keep", action="store_true", help="leave the caches")
    parser.add_argument("--save", type=Path, help="append results to this file")
    arguments = parser.parse_args()
    paths = arguments.folder / "train.en", arguments.folder / "train.de"
    if not all(path.exists() for path in paths):
        begin = time.perf_counter()
        make(arguments.folder, arguments.pairs)
        print(f"corpus made in {time.perf_counter() - begin:.0f} s")
    size = sum(path.stat().st_size for path in paths)
    print(f"{machine()}, {len(os.sched_getaffinity(0))} CPUs; {size:,} bytes of text")

    def report(what: str, **values: Any) -> None:
        shown = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
        )
        print(f"{what}: {shown}", flush=True)
        if arguments.save:
            with open(arguments.save, "a") as file:
                file.write(json.dumps({"what": what, **values}) + "\n")

    cache = arguments.folder / "cache"
    for workers in arguments.workers:
        command = [
            *(sys.executable, "-m", "transformer_ext.prepare", "--cache", str(cache)),
            *("--src-train", str(paths[0]), "--tgt-train", str(paths[1])),
            *("--prepare-workers", str(workers)),
        ]
        if "prepare" in arguments.only:
            shutil.rmtree(cache, ignore_errors=True)
            seconds, peak, output = run(command)
            print(output)
            tokens = next(line for line in output.splitlines() if line.startswith("tokens: "))
            counts = [
                int(text.strip().split()[0].replace(",", ""))
                for text in (tokens.split(":")[1].split("(")[0], tokens.split("), ")[1])
            ]
            report(
                f"prepare, {workers} processes",
                seconds=seconds,
                pairs_per_second=arguments.pairs / seconds,
                tokens_per_second=sum(counts) / seconds,
                private_GB=peak["private"] / 1e9,
                proportional_GB=peak["proportional"] / 1e9,
                processes=peak["processes"],
            )
            seconds, peak, _ = run(command)
            report("again", seconds=seconds, private_GB=peak["private"] / 1e9)
    if "start" in arguments.only:
        seconds, peak, output = run(
            [sys.executable, "-c", _START, *map(str, paths), str(cache)],
        )
        report(
            "start of a training",
            seconds=seconds,
            **json.loads(output),
            private_GB=peak["private"] / 1e9,
            proportional_GB=peak["proportional"] / 1e9,
        )
    if "alone" in arguments.only:
        (model,) = cache.glob("tokenizer-*/tokenizer.model")
        pairs = min(arguments.pairs, arguments.alone_pairs)
        for threads, seconds in _encode_alone(paths, str(model), pairs).items():
            report(
                f"SentencePiece alone, {threads} threads",
                seconds=seconds,
                pairs_per_second=pairs / seconds,
                seconds_for_all=seconds * arguments.pairs / pairs,
            )
    if not arguments.keep:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
