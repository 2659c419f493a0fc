"""Tokens a second of encoding: the engine beside transformers' BertModel and sentence-transformers.

    python benchmarks/encoding.py                              # BERT base, random weights
    python benchmarks/encoding.py --batch 32 --length 64 --only ours-float32 transformers-float32
    python benchmarks/encoding.py --model all-MiniLM-L6-v2     # vectors of the shipped test text
    python benchmarks/encoding.py --quick                      # a minute: does it run?

Without ``--model`` the architecture is that of BERT base (Devlin et al. 2019, section 3) with random
weights, equal for all; a call has ``--batch`` texts of ``--length`` tokens and gives the state of
each token. With ``--model``, a directory of sentence-transformers, a call has all lines of the test
text, in batches of ``--batch`` at most, which each program forms by length, and gives a vector for
each: tokenizer, pooling and all; with a batch of 1 it has one line, and only the first ``--lines``
are encoded.

Every competitor lives in a process of its own, has the same number of threads, is warmed up by
calls, and all take turns; after a turn there is a pause, in which the threads of the one before go
to sleep. Ratios are medians over the rounds of the ratio in one round.

- of the peer in float32, in the same type: times transformers or sentence-transformers, uncompiled.
- of the bound: the least time that the arithmetic of the layers takes in its type, or the reading of
  their weights from memory where that is longer, as a share of the time measured. See
  ``ceilings.py``. Padding, of those that pad, is no work.
- memory: greatest resident size of the process, and what it had before the model was loaded.
- difference: the largest from the peer in float32, of the results of one call, as a share of the
  largest of these.
- start-up: from the start of a fresh process to the first line printed, the files in the page cache;
  one text. Medians of ``--start-ups`` runs, in turns; memory is that process's peak.

transformers, which also writes the model of random weights, comes with ``pip install ".[test]"``,
sentence-transformers with ``pip install sentence-transformers``; who is not installed is left out.

``--save FILE`` adds what was measured to a file, ``--show FILE`` prints the tables of such a file, so
that long comparisons can be made in several short runs.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ceilings
from encoding_peers import COMPETITORS, Task, encoder
from processes import (
    ROOT,
    Worker,
    append_json,
    in_turns,
    read_json_lines,
    require,
    say,
    setting_title,
    starts_in_turns,
    table,
)

#: Tokens of a turn with random weights, where one call has fewer.
TURN = 1024
LINE = "Adds gridlines to the X axis of the chart."
VERSIONS = ("transformers", "sentence-transformers", "torch")
#: Whom the others are compared with.
PEERS = ("transformers", "sentence-transformers")


@dataclass(frozen=True)
class Subject:
    """The model that all encode with, and what it encodes.

    Attributes:
        title: of the tables.
        folder: of the model.
        config: of the model.
        lines: of text; none: random ids.
        lengths: tokens of each line.
    """

    title: str
    folder: Path
    config: Any
    lines: list[str]
    lengths: list[int]


def random_bert(folder: Path, sizes: dict[str, int]) -> None:
    """A directory of transformers with a model of random weights and a vocabulary of its size."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    model = BertModel(BertConfig(**sizes))
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(len(words), model.config.vocab_size)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")


def prepare(options: argparse.Namespace) -> Subject:
    """Makes the folder that is not there yet."""
    from transformer_ext.data.corpus import read_lines, shipped_corpus
    from transformer_ext.files import load_model_dir
    from transformer_ext.model.config import TextEncoderConfig

    if options.model:
        saved = load_model_dir(options.model, TextEncoderConfig)
        lines = [line.decode() for line in read_lines(shipped_corpus().test.src[0])]
        lengths = [len(ids) + 2 for ids in saved.source_tokenizer.encode_batch(lines)]
        title = (
            f"{options.model.name}, {saved.config.num_layers} layers of {saved.config.d_model}, the "
            f"{len(lines):,} lines of the shipped test text, {sum(lengths):,} tokens"
        )
        return Subject(title, options.model, saved.config, lines, lengths)
    sizes = {}
    if options.quick:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 256, "vocab_size": 1000}
    folder = options.folder / f"bert-{'quick' if options.quick else 'base'}"
    if not folder.exists():
        require("torch", "transformers", what="writing the model")
        say(f"... writing {folder}")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        random_bert(part, sizes)
        part.rename(folder)
    config = load_model_dir(folder, TextEncoderConfig).config
    name = "a tiny BERT" if options.quick else "BERT base"
    return Subject(f"{name}, random weights", folder, config, [], [])


def make_task(subject: Subject, batch: int, length: int, options: argparse.Namespace) -> Task:
    """The calls of a case."""
    import numpy as np

    calls: list[list[Any]]
    if subject.lines:
        calls = [subject.lines]
        if batch == 1:
            calls = [[line] for line in subject.lines[: options.lines]]
    else:
        generator = np.random.default_rng(2)
        shape = (math.ceil(TURN / (batch * length)), batch, length)
        calls = generator.integers(5, subject.config.vocab_size, size=shape).tolist()
    return Task(subject.folder, batch, options.threads, calls)


def work_of(subject: Subject, task: Task) -> tuple[int, int, list[ceilings.Work]]:
    """Texts and tokens of a turn, and the work of each batch."""
    if not subject.lines:
        lengths = [len(ids) for call in task.calls for ids in call]
    elif task.batch == 1:
        lengths = subject.lengths[: len(task.calls)]
    else:
        lengths = sorted(subject.lengths, reverse=True)
    works = [
        ceilings.encoder_work(subject.config, lengths[i : i + task.batch])
        for i in range(0, len(lengths), task.batch)
    ]
    return len(lengths), sum(lengths), works


def measure_case(
    subject: Subject,
    task: Task,
    keys: Sequence[str],
    rounds: int,
    ceiling: Path | None,
) -> dict[str, Any]:
    """All competitors in turns; their figures by key."""
    import numpy as np

    machines: list[ceilings.Machine] = []
    texts, tokens, works = work_of(subject, task)
    makers = {key: functools.partial(Worker, encoder, key, task) for key in keys}
    loaded, turns = in_turns(
        makers,
        False,
        [True] * rounds,
        (lambda: machines.append(ceilings.measure(ceiling, task.threads))) if ceiling else None,
    )
    results = {key: each.results for key, each in loaded.items()}
    facts: dict[str, dict[str, Any]] = {
        key: {
            "before": loaded[key].before,
            "seconds": [turn.seconds for turn in mine],
            "peak": mine[-1].peak,
            "texts": texts,
            "tokens": tokens,
            "calls": len(task.calls),
        }
        for key, mine in turns.items()
    }
    exact = next(
        (results[f"{name}-float32"] for name in PEERS if f"{name}-float32" in results), None
    )
    for key, mine in results.items():
        if exact is not None:
            facts[key]["difference"] = float(np.abs(mine - exact).max() / np.abs(exact).max())
        if machines:
            operations = statistics.median(
                each.operations[COMPETITORS[key].type] for each in machines
            )
            typical = ceilings.Machine(
                {COMPETITORS[key].type: operations},
                statistics.median(each.read for each in machines),
            )
            facts[key]["machine"] = [operations, typical.read]
            facts[key]["bound"] = sum(
                each.seconds(COMPETITORS[key].type, typical) for each in works
            )
    return facts


def measure_start_up(
    subject: Subject, keys: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """All competitors in turns; their figures by key."""
    task = make_task(subject, 1, 16, options)
    commands = {key: COMPETITORS[key].command(task) for key in keys}
    return starts_in_turns(commands, LINE, options.start_ups)


# ---- Tables -----------------------------------------------------------------------------------


def ratio(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times as fast: the median over the rounds."""
    pairs = zip(mine["seconds"], other["seconds"], strict=True)
    return f"{statistics.median(theirs / ours for ours, theirs in pairs):.2f}x"


def figures(results: dict[str, dict[str, Any]], key: str, text: bool) -> dict[str, str]:
    """The cells of a competitor in one run."""
    facts = results[key]
    seconds = statistics.median(facts["seconds"])
    cells = {"ms a call": f"{1000 * seconds / facts['calls']:,.1f}"}
    if text:
        cells["texts/s"] = f"{facts['texts'] / seconds:,.0f}"
    cells["tokens/s"] = f"{facts['tokens'] / seconds:,.0f}"
    for name in PEERS:
        if f"{name}-float32" in results:
            cells["of the peer in float32"] = ratio(facts, results[f"{name}-float32"])
        same = f"{name}-{COMPETITORS[key].type}"
        if same in results:
            cells["in the same type"] = ratio(facts, results[same])
    if "bound" in facts:
        cells["of the bound"] = f"{facts['bound'] / seconds:.0%}"
    cells["memory, MiB"] = f"{facts['peak'] / 2**20:,.0f} ({facts['before'] / 2**20:,.0f})"
    if "difference" in facts:
        cells["difference"] = f"{facts['difference']:.0e}"
    return cells


def show(runs: Sequence[dict[str, Any]], markdown: bool) -> None:
    """The tables of each model: one for each case, and start-up."""
    for title in dict.fromkeys(run["setting"] for run in runs):
        print(f"\n{title}", flush=True)
        mine = [run for run in runs if run["setting"] == title]
        for case in sorted({tuple(run["case"]) for run in mine if run["case"] != "start-up"}):
            latest = {
                key: run["results"]
                for run in mine
                if run["case"] == list(case)
                for key in run["results"]
            }
            batch, length = case
            found = {
                key: figures(latest[key], key, text=not length)
                for key in COMPETITORS
                if key in latest
            }
            columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
            rows = [
                [COMPETITORS[key].title, *(cells.get(name, "") for name in columns)]
                for key, cells in found.items()
            ]
            head = [f"batch {batch}" + (f", length {length}" if length else ""), *columns]
            print("", *table(head, rows, markdown), sep="\n")
            machines = [
                (COMPETITORS[key].type, *results[key]["machine"])
                for key, results in latest.items()
                if "machine" in results[key]
            ]
            if machines:
                peaks = {type: f"{type} {peak / 1e9:,.0f} GFLOP/s" for type, peak, _ in machines}
                memory = f"memory {machines[-1][2] / 1e9:.0f} GB/s"
                print(f"\nthe machine: {', '.join([*peaks.values(), memory])}", flush=True)
        starts = {
            key: facts
            for run in mine
            if run["case"] == "start-up"
            for key, facts in run["results"].items()
        }
        if starts:
            rows = [
                [
                    COMPETITORS[key].title,
                    f"{statistics.median(facts['seconds']):.3f} s",
                    f"{facts['peak'] / 2**20:,.0f}",
                ]
                for key, facts in starts.items()
            ]
            head = ["start-up, one text", "to the first line", "memory, MiB"]
            print("", *table(head, rows, markdown), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a directory of sentence-transformers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="texts")
    parser.add_argument("--length", type=int, nargs="+", default=[16, 64, 256], help="of the texts")
    parser.add_argument("--lines", type=int, default=200, help="of the text, where the batch is 1")
    parser.add_argument("--only", nargs="+", choices=list(COMPETITORS), help="these alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start-ups", type=int, default=5, help="runs of each; 0: none")
    parser.add_argument("--no-speed", action="store_true", help="start-up alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one case, few runs")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "encoding", help="where models are written"
    )
    parser.add_argument("--save", type=Path, help="add what was measured to this file")
    parser.add_argument("--show", type=Path, help="print the tables of this file and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--prepare", action="store_true", help="write the model and run nothing")
    options = parser.parse_args()
    if options.show:
        show(read_json_lines(options.show), options.markdown)
        return
    if options.quick:
        options.batch, options.length, options.rounds, options.start_ups = [4], [16], 1, 1
    options.folder.mkdir(parents=True, exist_ok=True)
    subject = prepare(options)
    keys = []
    for key in options.only or [key for key, each in COMPETITORS.items() if each.usual]:
        competitor = COMPETITORS[key]
        if competitor.text not in (None, bool(subject.lines)):
            continue
        if competitor.missing:
            say(f"{competitor.title}: left out: {competitor.missing} is not installed")
            continue
        keys.append(key)
    ceiling = ceilings.program(options.folder)
    if ceiling is None:
        say("no C++ compiler found: no bounds")
    if options.prepare:
        return
    runs = []

    def note(case: Any, results: dict[str, Any]) -> None:
        runs.append(
            {
                "setting": setting_title(subject.title, options.threads, VERSIONS),
                "case": case,
                "results": results,
            }
        )
        append_json(options.save, runs[-1])

    if not options.no_speed:
        for batch in options.batch:
            for length in [0] if subject.lines else options.length:
                say(f"batch {batch}" + (f", length {length}" if length else ""))
                task = make_task(subject, batch, length, options)
                note([batch, length], measure_case(subject, task, keys, options.rounds, ceiling))
    if options.start_ups:
        note("start-up", measure_start_up(subject, keys, options))
    show(runs, options.markdown)


if __name__ == "__main__":
    main()
