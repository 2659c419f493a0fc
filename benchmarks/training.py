"""Target tokens a second of one training step, beside the other ways to train the same model.

Forward, backward and Adam, dropout 0.1 and label smoothing 0.1, on the first batches of the shipped
text: the same sentence pairs, initial weights and learning rate for all. The competitors are listed
by ``--list``; ``--peers`` chooses groups of them, ``--only`` single ones.

    python benchmarks/training.py --preset small --max-tokens 2048
    python benchmarks/training.py --preset base --max-tokens 4096 --keep-freed-memory
    python benchmarks/training.py --preset base --max-tokens 25000 --device cuda --peers eager marian compile

Every competitor lives in a process of its own, and on each batch all take turns; ratios are medians
over the batches of the ratio on one batch, so that a slow moment of the machine hits both sides.
``ours-bfloat16`` runs always. As many live side by side as fit into memory; the others follow. A
timed batch has been trained on once before: what libraries and compilers make for a shape is there.
Ours makes nothing for a shape; in a real training the peers' padded shapes are mostly new, so they
are a little better here than there.

On a GPU all take turns on passes over the batches, within which nobody waits for the device; three
passes warm up (ours records its CUDA graphs), and memory is what torch had allocated there at most.

- malloc: without ``--keep-freed-memory`` each runs as its users run it: ours with the malloc
  settings that our train command makes, the peers with those of the system. With it all have ours.
- peak memory: greatest resident size of the process, less what it had after the imports.
- warm-up: seconds from the start of the process to the first timed step, imports and compiling
  included; outside of the rate. A second run finds what torch.compile left in its cache.
- loss: mean over the first pass over the batches, smoothed, nats a token. It differs with dropout's
  noise only, except that Marian has no norm after each stack and other positions.

``--save FILE`` adds what was measured to a file, ``--show FILE`` prints the table of such a file, so
that long comparisons can be made in several short runs.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from processes import (
    Worker,
    WorkerError,
    append_json,
    free_memory,
    graphs_said,
    machine,
    memory_of_process,
    read_json_lines,
    say,
    table,
)
from training_peers import COMPETITORS, Task

from transformer_ext.config import DataConfig
from transformer_ext.data import BatchSampler
from transformer_ext.data.preparation import prepare_data
from transformer_ext.training.environment import choose_device, keep_freed_memory

VOCABULARIES = {"tiny": 8000, "small": 8000, "base": 32000, "big": 32000}
#: On a GPU: the vocabulary of the paper.
CUDA_VOCABULARIES = {**VOCABULARIES, "base": 37000, "big": 37000}
#: Passes over all batches on a GPU before they are timed.
WARM_UP_PASSES = 3
ANCHOR = "ours-bfloat16"
#: Bytes that must stay free for another competitor to be started beside those that run.
RESERVE = 1 << 30


def trainer(key: str, task: Task, threads: int, keep: bool) -> Callable[[list[int]], Any]:
    """In the competitor's process: trains on the batches of these numbers, gives the figures."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    competitor = COMPETITORS[key]
    competitor.load()
    before = memory_of_process("VmRSS")
    on_gpu = torch.device(task.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(task.device))
    step = competitor.make(task)

    def train(indices: list[int]) -> tuple[float, float | None, int, int | None]:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses = [step(index) for index in indices]
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        known = [loss.item() for loss in losses if loss is not None]
        memory = (
            torch.cuda.max_memory_allocated() if on_gpu else memory_of_process("VmHWM") - before
        )
        graphs = getattr(step, "graphs", None) if on_gpu else None
        return seconds, statistics.fmean(known) if known else None, memory, graphs

    return train


class Runner:
    """A competitor in its process, and what was measured of it."""

    def __init__(self, key: str, task: Task, options: argparse.Namespace):
        self.key = key
        keep = options.keep_freed_memory or COMPETITORS[key].group == "ours"
        self.seconds: dict[int, list[float]] = {}
        self.losses: dict[int, float] = {}
        self.memory = 0
        #: CUDA graphs that ours has recorded; None: of no concern.
        self.graphs: int | None = None
        self.warm_up = 0.0
        self._units = units(task)
        start = time.perf_counter()
        self._worker = Worker(trainer, key, task, options.threads, keep)
        for _ in range(1 if task.device == "cpu" else WARM_UP_PASSES):
            for index in range(len(self._units)):
                self.step(index, timed=False)
        self.warm_up = time.perf_counter() - start

    def step(self, index: int, timed: bool = True) -> None:
        """Trains on a unit, and keeps time, loss and memory."""
        seconds, loss, memory, self.graphs = self._worker.ask(self._units[index])
        if timed:
            self.seconds.setdefault(index, []).append(seconds)
        if loss is not None:
            self.losses.setdefault(index, loss)
        self.memory = max(self.memory, memory)

    def close(self) -> None:
        self._worker.close()

    def facts(self) -> dict[str, Any]:
        return {
            "seconds": {str(index): times for index, times in self.seconds.items()},
            "loss": statistics.fmean(self.losses.values()) if self.losses else None,
            "memory": self.memory,
            "warm_up": self.warm_up,
            **({} if self.graphs is None else {"graphs": self.graphs}),
        }


def units(task: Task) -> list[list[int]]:
    """Numbers of the batches that are timed together: one on a CPU, all on a GPU."""
    numbers = list(range(len(task.batches)))
    return [[number] for number in numbers] if task.device == "cpu" else [numbers]


def make_task(options: argparse.Namespace) -> Task:
    """The first batches of the shipped text, as the trainer would draw them."""
    sizes = VOCABULARIES if options.device == "cpu" else CUDA_VOCABULARIES
    vocabulary = sizes[options.preset]
    # The text is too small for 32,000 pieces. Ids of 8,000 pieces are valid ids of a larger
    # vocabulary, and the work does not depend on which ids they are.
    train = prepare_data(DataConfig(vocab_size=8000), print).train
    sampler = BatchSampler(train.source_lengths, train.target_lengths, options.max_tokens, seed=1)
    batches = sampler.epoch(0)[: options.batches]
    return Task(
        options.preset,
        vocabulary,
        options.norm_first,
        [[train.example(int(number)) for number in batch] for batch in batches],
        options.device,
    )


def room_for_another(runners: list[Runner], device: str) -> bool:
    """Whether the largest so far would fit once more."""
    largest = max(runner.memory for runner in runners)
    if device == "cpu":
        return free_memory() >= largest + RESERVE
    # torch holds more than what it has allocated.
    return torch.cuda.mem_get_info(device)[0] >= 1.3 * largest + RESERVE


def measure(
    keys: list[str], task: Task, options: argparse.Namespace
) -> Iterable[dict[str, dict[str, Any]]]:
    """Runs the competitors, as many at a time as memory takes; gives the figures of each group."""
    waiting = list(keys)
    began = time.perf_counter()
    while waiting:
        runners: list[Runner] = []
        stopped = False
        try:
            runners.append(Runner(ANCHOR, task, options))
            if waiting[0] == ANCHOR:
                waiting.pop(0)
            while waiting:
                if len(runners) > 1 and not room_for_another(runners, options.device):
                    break
                key = waiting.pop(0)
                say(f"... {COMPETITORS[key].title}")
                try:
                    runners.append(Runner(key, task, options))
                except WorkerError as error:
                    say(f"{COMPETITORS[key].title}: {error}")
            count = len(units(task))
            for turn in range(count if options.device == "cpu" else options.rounds):
                for runner in runners:
                    runner.step(turn % count)
                if options.max_seconds and time.perf_counter() - began > options.max_seconds:
                    stopped = True
                    break
        except (KeyboardInterrupt, WorkerError) as error:
            say(str(error))
            stopped = True
        finally:
            for runner in runners:
                runner.close()
        done = {runner.key: runner.facts() for runner in runners if runner.seconds}
        yield done
        if stopped:
            break


def times_against(run: dict[str, Any], key: str, other: str) -> float | None:
    """Median over batches of the seconds of ``key`` divided by those of ``other``."""
    if key not in run or other not in run:
        return None
    mine, theirs = run[key]["seconds"], run[other]["seconds"]
    common = [
        statistics.median(mine[i]) / statistics.median(theirs[i]) for i in mine if i in theirs
    ]
    return statistics.median(common) if common else None


def rows_of(runs: list[dict[str, Any]], markdown: bool) -> list[str]:
    """The rows of all runs of one setting; each is compared with ours of its own run."""
    rows = []
    latest: dict[str, dict[str, Any]] = {}
    for run in runs:
        for key in run["results"]:
            if key != ANCHOR or ANCHOR not in latest or len(run["results"]) > 2:
                latest[key] = run
    slower = {key: times_against(run["results"], key, ANCHOR) for key, run in latest.items()}
    eager = slower.get("nn-float32")
    for key, competitor in COMPETITORS.items():
        if key not in latest:
            continue
        run, facts = latest[key], latest[key]["results"][key]
        rate = statistics.median(
            run["target_tokens"][int(index)] / statistics.median(times)
            for index, times in facts["seconds"].items()
        )
        ratio = slower[key]
        rows.append(
            [
                competitor.title + graphs_said(facts),
                f"{rate:,.0f}",
                "" if eager is None or ratio is None else f"{eager / ratio:.2f}x",
                "" if ratio is None else f"{ratio:.2f}x",
                "" if competitor.group == "gemm" else f"{facts['memory'] / 2**30:.2f} GiB",
                f"{facts['warm_up']:.0f} s",
                "" if facts["loss"] is None else f"{facts['loss']:.3f}",
            ]
        )
    head = [
        "",
        "tokens/s",
        "of eager float32",
        "ours (bfloat16) is",
        "peak memory",
        "warm-up",
        "loss",
    ]
    lines = table(head, rows, markdown)
    for precision in ("bfloat16", "float32"):
        mine, bound = slower.get(f"ours-{precision}"), slower.get(f"gemm-{precision}")
        if mine and bound:
            lines += [
                "",
                f"ours, {precision}, is at {bound / mine:.0%} of the matrix products alone, by torch.mm",
            ]
    return lines


def show(runs: list[dict[str, Any]], markdown: bool) -> None:
    """One table for each setting."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault(run["setting"], []).append(run)
    for setting, its_runs in settings.items():
        print(f"\n{setting}\n", *rows_of(its_runs, markdown), sep="\n", flush=True)


def main() -> None:
    groups = list(dict.fromkeys(c.group for c in COMPETITORS.values()))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(VOCABULARIES), default="small")
    parser.add_argument("--max-tokens", type=int, default=2048, help="target tokens a batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes on a GPU")
    parser.add_argument(
        "--batches", type=int, default=5, help="batches; all warm up on them, then they are timed"
    )
    parser.add_argument(
        "--norm-first", action="store_true", help="pre-norm; Marian stays post-norm"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-freed-memory", action="store_true", help="set malloc, for all")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=groups,
        default=[group for group in groups if group != "compile"],
        help="groups of competitors; all but compile, which warms up for minutes, by default",
    )
    parser.add_argument("--only", nargs="+", choices=list(COMPETITORS), help="these alone")
    parser.add_argument("--max-seconds", type=float, help="end after the batch that goes on longer")
    parser.add_argument("--save", type=Path, help="add what was measured to this file")
    parser.add_argument("--show", type=Path, help="print the tables of this file and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    parser.add_argument("--list", action="store_true", help="list the competitors and run nothing")
    options = parser.parse_args()
    if options.list:
        for key, competitor in COMPETITORS.items():
            missing = "" if competitor.installed else f" ({competitor.needs} is not installed)"
            print(f"{key:26s} {competitor.group:8s} {competitor.title}{missing}")
        return
    if options.show:
        show(read_json_lines(options.show), options.markdown)
        return

    try:
        options.device = str(choose_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    keys = options.only or [k for k, c in COMPETITORS.items() if c.group in options.peers]
    for key in list(keys):
        if not COMPETITORS[key].installed:
            print(f"{COMPETITORS[key].title}: {COMPETITORS[key].needs} is not installed")
            keys.remove(key)
    keys = [ANCHOR, *(key for key in keys if key != ANCHOR)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    task = make_task(options)
    malloc = "freed memory kept by all" if options.keep_freed_memory else "malloc as users have it"
    where = f"{malloc}; {options.threads} threads, {machine()}"
    if options.device != "cpu":
        where = torch.cuda.get_device_name(options.device)
    setting = (
        f"{options.preset}, {options.max_tokens:,} target tokens a batch"
        f"{', pre-norm' if options.norm_first else ''}, {where}, torch {torch.__version__}"
    )
    runs = []
    for results in measure(keys, task, options):
        if not results:
            say("ended before a batch was timed")
            break
        runs.append(
            {
                "setting": setting,
                "target_tokens": [sum(map(task.target_tokens, unit)) for unit in units(task)],
                "results": results,
            }
        )
        append_json(options.save, runs[-1])
        show(runs, options.markdown)


if __name__ == "__main__":
    main()
