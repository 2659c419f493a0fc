"""What training and decoding keep of their speed beside busy processes on the same cores.

    python benchmarks/contention.py                                    # training, beside 0 to 6
    python benchmarks/contention.py --nice 8 --beside 0 6 --seconds 20
    python benchmarks/contention.py --decoding --beside 0 1 4          # ours and CTranslate2
    python benchmarks/contention.py --only ours-bfloat16 ours-bfloat16,OMP_WAIT_POLICY=PASSIVE

Every competitor lives in a process of its own and takes turns of ``--seconds``: alone, then beside
each number of ``--beside`` busy processes (a loop in Python, or with ``--memory`` copies of more than
the caches hold). A turn is whole steps of training, or whole calls. What is printed is the mean time
of one, and in brackets how many times that without busy processes it is. ``fair`` is what a
scheduler leaves that gives every thread the same, by its weight: threads that wait for each other get
less, because one of them is always out.

A competitor is a key of ``training.py --list`` or ``decoding.py --list``, its threads behind a colon
if they are others than ``--threads``, and variables of its environment behind commas. What
the train command sets for its own process, and the malloc variables of CTranslate2's best settings,
are set here only if they are named so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from processes import PAUSE, Worker, machine, say, table

from transformer_ext._command import SPIN_COUNT

LOOP = "while True: pass"
COPY = """
import numpy
a, b = numpy.zeros((2, 1 << 24))
while True: a[:] = b
"""
#: More processes or threads than this are a slip of the keyboard.
MOST_BESIDE = 1000
#: The scheduler's weight of a process at nice 0, and how much less each step of nice has.
STEP_OF_NICE = 1.25


@dataclass(frozen=True)
class Contender:
    """A competitor as it is asked for.

    Attributes:
        name: for people.
        key: of the competitor.
        threads: that it may use.
        environment: variables of its process.
    """

    name: str
    key: str
    threads: int
    environment: dict[str, str]

    @staticmethod
    def parse(text: str, threads: int) -> Contender:
        head, *variables = text.split(",")
        key, _, count = head.partition(":")
        pairs = dict(variable.split("=", 1) for variable in variables)
        return Contender(text, key, int(count or threads), pairs)


@contextmanager
def busy(count: int, memory: bool) -> Iterator[None]:
    """So many processes that never wait."""
    code = COPY if memory else LOOP
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        time.sleep(PAUSE)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def repeated(work: Callable[[int], Any], seconds: float) -> float:
    """Mean seconds of one, over so many that the time is over."""
    start = time.perf_counter()
    for number in itertools.count(1):
        work(number)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / number
    raise AssertionError


def training(contender: Contender, task: Any, nice: int) -> Callable[[float], float]:
    """In the process of a competitor: trains for so many seconds, gives those of a step."""
    from training import trainer
    from training_peers import COMPETITORS

    os.nice(nice)
    keep = COMPETITORS[contender.key].group == "ours"
    train = trainer(contender.key, task, contender.threads, keep)
    count = len(task.batches)
    train(list(range(count)))
    return functools.partial(repeated, lambda number: train([number % count]))


def decoding(contender: Contender, task: Any, nice: int) -> Callable[[float], float]:
    """In the process of a competitor: decodes for so many seconds, gives those of a call."""
    from decoding_peers import COMPETITORS

    os.nice(nice)
    competitor = COMPETITORS[contender.key]
    competitor.load()
    program = competitor.make(task, competitor.setting(task))
    calls = [program.inputs(call) for call in task.blocks[0]]
    program.translate(calls[0])
    return functools.partial(repeated, lambda number: program.translate(calls[number % len(calls)]))


def fair(threads: int, beside: int, nice: int) -> float:
    """How many times as long it takes with an equal share of the cores for each thread."""
    cores = len(os.sched_getaffinity(0))
    alone = min(cores, threads)
    weight = threads * STEP_OF_NICE**-nice
    # The busy processes have one thread each; what they cannot use is left.
    share = max(cores * weight / (weight + beside), cores - beside)
    return alone / min(alone, share)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoding", action="store_true", help="decode instead of training")
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2, 4, 6])
    parser.add_argument("--nice", type=int, default=0, help="of the competitors")
    parser.add_argument("--memory", action="store_true", help="the busy processes copy memory")
    parser.add_argument("--only", nargs="+", help="the competitors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, at least")
    parser.add_argument("--preset", help="default: small for training, base for decoding")
    parser.add_argument("--max-tokens", type=int, default=1024, help="target tokens a batch")
    parser.add_argument("--batches", type=int, default=4, help="different ones")
    parser.add_argument("--batch", type=int, default=16, help="sentences of a call")
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    options = parser.parse_args()
    for name, given, least, most in (
        ("--beside", options.beside, 0, MOST_BESIDE),
        ("--nice", [options.nice], 0, 19),
        ("--threads", [options.threads], 1, MOST_BESIDE),
    ):
        for value in given:
            if not least <= value <= most:
                parser.error(f"argument {name}: got {value}, expected {least} to {most}")
    prepare: Callable[..., Any]
    if options.decoding:
        import decoding as benchmark

        usual = ["ours-int8", "ctranslate2-int8"]
        options.preset = options.preset or "base"
        command = benchmark.parse(["--preset", options.preset, "--threads", str(options.threads)])
        task = benchmark.make_task(benchmark.prepare(command), options.batch, options.beam, command)
        what = f"a call of {options.batch} sentences, beam {options.beam}"
        prepare = decoding
    else:
        import training as benchmark

        usual = [
            f"ours-bfloat16,GOMP_SPINCOUNT={SPIN_COUNT}",
            "ours-bfloat16",
            "nn-autocast-fused",
        ]
        options.preset, options.norm_first, options.device = options.preset or "small", True, "cpu"
        task = benchmark.make_task(options)
        what = f"a step of {options.max_tokens:,} target tokens"
        prepare = training
    contenders = [Contender.parse(text, options.threads) for text in options.only or usual]
    workers = []
    try:
        for contender in contenders:
            say(f"... {contender.name}")
            environment = contender.environment
            workers.append(Worker(prepare, contender, task, options.nice, environment=environment))
            workers[-1].ask(0.0)
        found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for count in options.beside:
            say(f"... beside {count}")
            with busy(count, options.memory):
                for contender, worker in zip(contenders, workers, strict=True):
                    time.sleep(PAUSE)
                    found[contender.name].append(worker.ask(options.seconds))
                    say(f"{contender.name}: {1e3 * found[contender.name][-1]:.1f} ms")
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for contender in contenders:
        times = found[contender.name]
        rows.append(
            [
                contender.name,
                *(f"{1e3 * seconds:.0f} ms ({seconds / times[0]:.1f}x)" for seconds in times),
            ]
        )
    share = [fair(options.threads, count, options.nice) for count in options.beside]
    rows.append(["fair", *(f"{times / share[0]:.1f}x" for times in share)])
    load = "copies of memory" if options.memory else "loops"
    print(
        f"\n{options.preset}, {what}; {options.threads} threads at nice {options.nice} beside "
        f"{load}; {machine()}\n"
    )
    head = ["busy processes", *(str(count) for count in options.beside)]
    print("\n".join(table(head, rows, options.markdown)))


if __name__ == "__main__":
    main()
