"""New tokens a second of a language model: the engine beside transformers' GPT2LMHeadModel.generate.

    python benchmarks/generation.py                              # GPT-2 small, random weights
    python benchmarks/generation.py --batch 1 --prompt 32 --beam 1 --only ours-int8 transformers-float32
    python benchmarks/generation.py --quick                      # a minute: does it run?

The architecture is that of GPT-2 small (124 million parameters, Radford et al. 2019) with random
weights, equal for all. A turn continues ``--batch`` prompts of ``--prompt`` tokens, together, by
``--new`` tokens each.

Every competitor lives in a process of its own, has the same number of threads, is warmed up (transformers
by 4 tokens), and all take turns; after a turn there is a pause, in which the threads of the
one before go to sleep. Ratios are medians over the rounds of the ratio in one round.

- of transformers: times ``generate`` in float32, and in the same type, with its usual cache.
- of the bound: the least time that the arithmetic takes in its type, or the reading of weights, keys
  and values from memory where that is longer, as a share of the time measured. See
  ``language_work`` in ``ceilings.py``.
- memory: greatest resident size of the process, and what it had before the model was loaded.
- same output: share of the new tokens that are those of transformers in float32, up to the first
  that is not. (Of random weights many tokens are nearly as probable as the best.)
- start-up: from the start of a fresh process to the first line printed, the files in the page cache;
  one text and 16 tokens. Medians of ``--start-ups`` runs, in turns; memory is that process's peak.

transformers, which also writes the model, comes with ``pip install ".[test]"``.

``--save FILE`` adds what was measured to a file, ``--show FILE`` prints the tables of such a file, so
that long comparisons can be made in several short runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ceilings
from generation_peers import COMPETITORS, ON_A_DEVICE, Task, generator
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

LINE = "Adds gridlines to the X axis of the chart."
VERSIONS = ("transformers", "torch")
#: Tokens of an output at start-up.
FEW = 16


def random_gpt2(folder: Path, sizes: dict[str, int]) -> None:
    """A directory of transformers with a model of random weights and a vocabulary of its size."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    pieces = sorted(ByteLevel.alphabet())
    size = sizes.get("vocab_size", GPT2Config().vocab_size)
    pieces += [f"word{number}" for number in range(len(pieces), size - 1)]
    pieces.append("<|endoftext|>")
    ends = {"bos_token_id": size - 1, "eos_token_id": size - 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends))
    model.save_pretrained(folder)
    ids = {piece: id for id, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def prepare(options: argparse.Namespace) -> Path:
    """The folder of the model, which is made where it is not there yet."""
    sizes = {}
    if options.quick:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000}
    folder: Path = options.folder / f"gpt2-{'quick' if options.quick else 'small'}"
    if not folder.exists():
        require("torch", "transformers", "tokenizers", what="writing the model")
        say(f"... writing {folder}")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        random_gpt2(part, sizes)
        part.rename(folder)
    return folder


def make_task(
    folder: Path, config: Any, case: tuple[int, int, int], options: argparse.Namespace
) -> Task:
    """A case: batch, tokens of a prompt, beam."""
    import numpy as np

    batch, prompt, beam = case
    shape = (batch, prompt)
    prompts = np.random.default_rng(2).integers(0, config.vocab_size - 1, size=shape).tolist()
    return Task(folder, prompts, beam, options.new, options.threads, options.device)


def measure_case(
    config: Any, task: Task, keys: Sequence[str], rounds: int, ceiling: Path | None
) -> dict[str, Any]:
    """All competitors in turns; their figures by key."""
    machines: list[ceilings.Machine] = []
    makers = {key: functools.partial(Worker, generator, key, task) for key in keys}
    loaded, turns = in_turns(
        makers,
        False,
        [True] * rounds,
        (lambda: machines.append(ceilings.measure(ceiling, task.threads))) if ceiling else None,
    )
    work = ceilings.language_work(
        config, len(task.prompts[0]), task.new, task.beam, len(task.prompts)
    )
    exact = turns.get("transformers-float32")
    facts = {}
    for key, mine in turns.items():
        type = COMPETITORS[key].type
        facts[key] = {
            "before": loaded[key].before,
            "seconds": [turn.seconds for turn in mine],
            "peak": mine[-1].peak,
            "tokens": sum(map(len, mine[0].outputs)),
        }
        if exact is not None:
            pairs = list(zip(mine[0].outputs, exact[0].outputs, strict=True))
            equal = sum(
                next((i for i in range(task.new) if a[i] != b[i]), task.new) for a, b in pairs
            )
            facts[key]["same"] = equal / (task.new * len(pairs))
        if machines:
            peak = statistics.median(each.operations[type] for each in machines)
            typical = ceilings.Machine(
                {type: peak}, statistics.median(each.read for each in machines)
            )
            facts[key]["machine"] = [peak, typical.read]
            facts[key]["bound"] = work.seconds(type, typical)
    return facts


# ---- Tables -----------------------------------------------------------------------------------


def ratio(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times as fast: the median over the rounds."""
    pairs = zip(mine["seconds"], other["seconds"], strict=False)
    return f"{statistics.median(theirs / ours for ours, theirs in pairs):.2f}x"


def figures(results: dict[str, dict[str, Any]], key: str) -> dict[str, str]:
    """The cells of a competitor in one case."""
    facts = results[key]
    seconds = statistics.median(facts["seconds"])
    cells = {"tokens/s": f"{facts['tokens'] / seconds:,.1f}"}
    peers = {
        "of transformers, float32": "transformers-float32",
        "in the same type": f"transformers-{COMPETITORS[key].type}",
    }
    for name, peer in peers.items():
        if peer in results:
            cells[name] = ratio(facts, results[peer])
    if "bound" in facts:
        cells["of the bound"] = f"{facts['bound'] / seconds:.0%}"
    cells["memory, MiB"] = f"{facts['peak'] / 2**20:,.0f} ({facts['before'] / 2**20:,.0f})"
    if "same" in facts:
        cells["same output"] = f"{facts['same']:.0%}"
    return cells


def show(runs: Sequence[dict[str, Any]], markdown: bool) -> None:
    """The tables of each setting: one for each case, and start-up."""
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
            found = {key: figures(latest[key], key) for key in COMPETITORS if key in latest}
            columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
            rows = [
                [COMPETITORS[key].title, *(cells.get(name, "") for name in columns)]
                for key, cells in found.items()
            ]
            batch, prompt, beam = case
            head = [f"batch {batch}, prompt {prompt}, beam {beam}", *columns]
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
            head = [f"start-up, one text, {FEW} tokens", "to the first line", "memory, MiB"]
            print("", *table(head, rows, markdown), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts")
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 256], help="its tokens")
    parser.add_argument("--beam", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new", type=int, default=64, help="tokens of each output")
    parser.add_argument("--only", nargs="+", choices=list(COMPETITORS), help="these alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-ups", type=int, default=5, help="runs of each; 0: none")
    parser.add_argument("--no-speed", action="store_true", help="start-up alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu, or one of PyTorch's, such as cuda, for those that run there; no bounds then",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one case, few runs")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "generation", help="where the model is"
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
        options.batch, options.prompt, options.beam, options.new = [2], [8], [2], 6
        options.rounds, options.start_ups = 1, 1
    folder = prepare(options)
    on_cpu = options.device == "cpu"
    ceiling = ceilings.program(options.folder) if on_cpu else None
    if on_cpu and ceiling is None:
        say("no C++ compiler found: no bounds")
    if options.prepare:
        return
    keys = []
    usual = [key for key, each in COMPETITORS.items() if each.usual]
    if not on_cpu:
        usual = [
            *(key for key in usual if key in ON_A_DEVICE),
            "ours-float16",
            "transformers-float16",
        ]
    for key in options.only or usual:
        if not on_cpu and key not in ON_A_DEVICE:
            parser.error(f"--only: got {key}, expected of {', '.join(ON_A_DEVICE)} on a device")
        if COMPETITORS[key].missing:
            say(f"{COMPETITORS[key].title}: left out: {COMPETITORS[key].missing} is not installed")
            continue
        keys.append(key)

    from transformer_ext.files import load_model_dir
    from transformer_ext.model.config import LanguageModelConfig

    config = load_model_dir(folder, LanguageModelConfig).config
    name = "a tiny GPT-2" if options.quick else "GPT-2 small"
    title = f"{name}, random weights, {options.new} new tokens"
    runs = []

    def note(case: Any, results: dict[str, Any]) -> None:
        setting = setting_title(title, options.threads, VERSIONS, options.device)
        runs.append({"setting": setting, "case": case, "results": results})
        append_json(options.save, runs[-1])

    if not options.no_speed:
        for batch in options.batch:
            for prompt in options.prompt:
                for beam in options.beam:
                    case = batch, prompt, beam
                    say(f"batch {batch}, prompt {prompt}, beam {beam}")
                    task = make_task(folder, config, case, options)
                    note(list(case), measure_case(config, task, keys, options.rounds, ceiling))
    if options.start_ups and on_cpu:
        few = argparse.Namespace(**{**vars(options), "new": FEW})
        task = make_task(folder, config, (1, 1, 1), few)
        commands = {key: COMPETITORS[key].command(task) for key in keys if COMPETITORS[key].starts}
        note("start-up", starts_in_turns(commands, LINE, options.start_ups))
    show(runs, options.markdown)


if __name__ == "__main__":
    main()
