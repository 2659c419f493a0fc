"""Output tokens a second of decoding: the engine, CTranslate2, Hugging Face's generate.

    python benchmarks/decoding.py                                  # base, random weights, all cases
    python benchmarks/decoding.py --model runs/001/model           # a trained model, the shipped test text
    python benchmarks/decoding.py --batch 64 --beam 4 --only ours-bfloat16 ctranslate2-int8
    python benchmarks/decoding.py --quick                          # a minute or two: does it run?

Without ``--model`` the weights are random, equal for all, and every output has ``--length`` tokens;
sources have half to one and a half times as many. One call has ``--batch`` sentences. With
``--model`` a call has a third of the test text, in batches of ``--batch`` at most, which each
program forms by length; all search by the rules of CTranslate2 (``SearchOptions.preset``), each
one's own output tokens count, and BLEU is that of the whole text. With a batch of 1 a call has one
sentence in both, and only the first ``--sentences`` of the text are translated.

Every competitor lives in a process of its own, has the same number of threads, is warmed up by a
turn, and all take turns; after a turn there is a pause, in which the threads of the one before go
to sleep. Ratios are medians over the rounds of the ratio in one round.

- of ctranslate2: times the fastest of CTranslate2 in the same run; behind it, in the same type.
- of the bound: the least time that the arithmetic in its type takes, or the reading of the weights
  from memory where that is longer, as a share of the time measured. See ``ceilings.py``.
- memory: greatest resident size of the process, and what it had before the model was loaded.
- same output: share of sentences whose output is that of ours in float32.
- start-up: from the start of a fresh process to the first line printed, the files in the page cache;
  one sentence, beam 4. Medians of ``--start-ups`` runs, in turns; memory is that process's peak.

CTranslate2's settings are those of ``ctranslate2_setting`` in ``decoding_peers.py``: where a case and
type was searched, the best found, else by rule; what is printed below a table says which. They are
searched by ``--search-ctranslate2``, which tries workers and threads, sizes of batches in sentences and in
tokens, and variables of the environment, for each case and type, and names the winner. What it has
tried stands in the file of ``--save``: it goes on from there.

``--save FILE`` adds what was measured to a file, ``--show FILE`` prints the tables of such a file, so
that long comparisons can be made in several short runs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ceilings
from decoding_peers import (
    COMPETITORS,
    CTRANSLATE2_TYPES,
    HUGE_PAGES,
    KEEP_MEMORY,
    ON_A_DEVICE,
    ONE_ARENA,
    Setting,
    Task,
    decoder,
    start_up_commands,
)
from processes import (
    PAUSE,
    ROOT,
    Worker,
    WorkerError,
    append_json,
    in_turns,
    read_json_lines,
    say,
    setting_title,
    starts_in_turns,
    table,
)

#: Sources of this many sentences make a turn with random weights, where a call has fewer.
TURN = 32
LINE = "Adds gridlines to the X axis of the chart."
VERSIONS = ("ctranslate2", "transformers", "torch")


@dataclass(frozen=True)
class Subject:
    """The model that all decode with, in the folder of each program, and what it translates.

    Attributes:
        title: of the tables.
        folder: see :class:`decoding_peers.Task`.
        config: of the model.
        length: of every output; None: as the model ends it.
        sources: ids of the sentences.
        references: their translations, where there are any.
        decode: text of ids.
    """

    title: str
    folder: Path
    config: Any
    length: int | None
    sources: list[list[int]]
    references: list[str]
    decode: Callable[[list[int]], str]


def prepare(options: argparse.Namespace) -> Subject:
    """Makes the folders that are not there yet."""
    import numpy as np
    from decoding_models import (
        ctranslate2_tokens,
        random_model,
        write_for_ctranslate2,
    )

    from transformer_ext.data.corpus import read_lines, shipped_corpus
    from transformer_ext.files import load_model_dir
    from transformer_ext.huggingface import to_huggingface
    from transformer_ext.model.config import preset

    if options.model:
        weights = (options.model / "model.safetensors").stat()
        key = f"{options.model.resolve()} {weights.st_size} {weights.st_mtime_ns}"
        folder = options.folder / hashlib.sha256(key.encode()).hexdigest()[:12]
    else:
        folder = options.folder / f"{options.preset}-{options.vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)

    def made(name: str, make: Callable[[Path], Any]) -> None:
        if not (folder / name).exists():
            say(f"... writing {folder / name}")
            shutil.rmtree(folder / f"{name}.part", ignore_errors=True)
            make(folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)

    if options.model:
        made("ours", lambda path: path.symlink_to(options.model.resolve()))
    else:
        config = preset(options.preset, options.vocab_size, options.vocab_size)
        made("ours", lambda path: random_model(config, path))
    model = load_model_dir(folder / "ours")
    tokenizer = model.source_tokenizer
    for competitor in COMPETITORS.values():
        if competitor.missing:
            continue
        if competitor.program == "ctranslate2":
            made(
                "tokens.txt",
                lambda path: path.write_text("\n".join(ctranslate2_tokens(model)), "utf-8"),
            )
            for stored in ("float32", "int8"):
                quantization = None if stored == "float32" else stored
                made(
                    f"ctranslate2-{stored}",
                    lambda path, q=quantization: write_for_ctranslate2(model, path, q),
                )
        if competitor.program == "huggingface" and not model.config.norm_first:
            made("marian", lambda path: to_huggingface(folder / "ours", path))

    if options.model:
        test = shipped_corpus().test
        lines = [line.decode() for line in read_lines(test.src[0])]
        references = [line.decode() for line in read_lines(test.tgt[0])]
        sources = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(lines)]
        return Subject(
            f"the model of the shipped text ({model.config.d_model} wide, its test text)",
            folder,
            model.config,
            None,
            sources,
            references,
            model.target_tokenizer.decode,
        )
    generator = np.random.default_rng(2)
    count = max(TURN, *options.batch)
    lengths = generator.integers(options.length // 2, options.length * 3 // 2 + 1, size=count)
    size = model.config.src_vocab_size
    sources = [[*generator.integers(4, size, size=n).tolist(), tokenizer.eos_id] for n in lengths]
    return Subject(
        f"{options.preset}, vocabulary {options.vocab_size:,}, random weights, outputs of "
        f"{options.length} tokens",
        folder,
        model.config,
        options.length,
        sources,
        [],
        tokenizer.decode,
    )


def make_task(subject: Subject, batch: int, beam: int, options: argparse.Namespace) -> Task:
    """The calls of a case."""
    sources = subject.sources
    if subject.length is not None:
        # One sentence takes long enough for a turn to have few of them.
        count = max(batch, TURN // (4 if batch == 1 else 1))
        blocks = [sources[:count]]
        size = batch
    else:
        sources = sources[: options.sentences if batch == 1 else None]
        each = -(-len(sources) // options.rounds)
        blocks = [sources[i : i + each] for i in range(0, len(sources), each)]
        size = 1 if batch == 1 else each
    calls = [[block[i : i + size] for i in range(0, len(block), size)] for block in blocks]
    return Task(subject.folder, batch, beam, subject.length, options.threads, calls, options.device)


# ---- Speed ------------------------------------------------------------------------------------


def measure_case(
    subject: Subject,
    task: Task,
    keys: Sequence[str],
    rounds: int,
    ceiling: Path | None,
    max_seconds: float | None,
) -> dict[str, Any]:
    """All competitors in turns; their figures by key."""
    began = time.perf_counter()
    machines: list[ceilings.Machine] = []
    settings = {key: COMPETITORS[key].setting(task) for key in keys}
    makers = {
        key: functools.partial(
            Worker,
            decoder,
            key,
            task,
            setting,
            environment=dict(setting.environment if setting else ()),
        )
        for key, setting in settings.items()
    }

    def blocks() -> Iterator[int]:
        for number in range(rounds):
            yield number % len(task.blocks)
            if max_seconds and time.perf_counter() - began > max_seconds:
                return

    loaded, turns = in_turns(
        makers,
        None,
        blocks(),
        (lambda: machines.append(ceilings.measure(ceiling, task.threads))) if ceiling else None,
    )
    facts: dict[str, dict[str, Any]] = {}
    outputs: dict[str, dict[int, list[list[int]]]] = {}
    for key, mine in turns.items():
        outputs[key] = {number % len(task.blocks): turn.outputs for number, turn in enumerate(mine)}
        lengths = {len(ids) for turn in mine for ids in turn.outputs}
        if task.length is not None and lengths != {task.length}:
            raise WorkerError(f"{key}: outputs of other lengths than {task.length}")
        facts[key] = {
            "type": loaded[key].type,
            "before": loaded[key].before,
            "setting": str(settings[key] or ""),
            "seconds": [turn.seconds for turn in mine],
            "tokens": [sum(map(len, turn.outputs)) for turn in mine],
            "peak": mine[-1].peak,
            "bound": [],
        }
    reference = outputs.get("ours-float32")
    for key, found in outputs.items():
        finish(subject, task, facts[key], found, reference, machines)
    return facts


def finish(
    subject: Subject,
    task: Task,
    facts: dict[str, Any],
    outputs: dict[int, list[list[int]]],
    reference: dict[int, list[list[int]]] | None,
    machines: Sequence[ceilings.Machine],
) -> None:
    """Adds what follows from the outputs: shares of the bound, equal ones, BLEU."""
    end = 0 if task.length is not None else 1
    works = {}
    for block, found in outputs.items():
        sources = [source for call in task.blocks[block] for source in call]
        # Calls that hold other sentences are batches of their own; batches of a call go by length.
        works[block] = ceilings.work(
            subject.config,
            list(map(len, sources)),
            [len(ids) + end for ids in found],
            task.beam,
            task.batch,
        )
    if machines:
        typical = ceilings.Machine(
            {
                name: statistics.median(each.operations[name] for each in machines)
                for name in machines[0].operations
            },
            statistics.median(each.read for each in machines),
        )
        facts["machine"] = {**typical.operations, "read": typical.read}
        facts["bound"] = [
            works[number % len(task.blocks)].seconds(facts["type"], typical)
            for number in range(len(facts["seconds"]))
        ]
    if reference is not None:
        pairs = [
            (mine, theirs)
            for block, found in outputs.items()
            for mine, theirs in zip(found, reference[block], strict=True)
        ]
        facts["same"] = sum(mine == theirs for mine, theirs in pairs) / len(pairs)
    translated = [ids for block in sorted(outputs) for ids in outputs[block]]
    if subject.references and len(translated) == len(subject.references):
        from transformer_ext.training.scoring import score

        texts = [subject.decode(ids) for ids in translated]
        facts["bleu"] = score(texts, subject.references).bleu


# ---- Start-up ---------------------------------------------------------------------------------


def measure_start_up(
    subject: Subject, keys: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """All competitors in turns; their figures by title."""
    task = make_task(subject, 1, 4, options)
    commands = {
        title: command for key in keys for title, command in start_up_commands(key, task).items()
    }
    return starts_in_turns(commands, LINE, options.start_ups)


# ---- CTranslate2's best settings --------------------------------------------------------------

ENVIRONMENTS: tuple[tuple[tuple[str, str], ...], ...] = (
    KEEP_MEMORY,
    KEEP_MEMORY + ONE_ARENA,
    HUGE_PAGES,
    (("CT2_USE_MKL", "0"),),
    (("CT2_USE_MKL", "1"),),
    (("CT2_FORCE_CPU_ISA", "AVX512"),),
    (("CT2_FORCE_CPU_ISA", "AVX2"),),
    (("CT2_FORCE_CPU_ISA", "GENERIC"),),
    (("CT2_PACKED_GEMM", "1"),),
    (("OMP_WAIT_POLICY", "ACTIVE"),),
    (("OMP_WAIT_POLICY", "PASSIVE"),),
    (("OMP_PROC_BIND", "true"),),
)


def schedules(task: Task) -> list[Setting]:
    """Ways to spread a batch over the threads."""
    threads = task.threads
    if task.batch == 1:
        return list(dict.fromkeys([Setting(1, 1), Setting(1, threads)]))
    found = [
        *(Setting(1, threads, divisor, tokens) for divisor in (1, 2) for tokens in (False, True)),
        *(
            Setting(threads, 1, divisor, tokens)
            for divisor in (1, threads, 2 * threads, 4 * threads)
            for tokens in (False, True)
        ),
        Setting(2 * threads, 1, 2 * threads),
    ]
    # With one call of one batch, undivided, all workers but one would have nothing to do.
    return [
        each
        for each in dict.fromkeys(found)
        if each.divisor <= task.batch
        and (each.workers == 1 or each.divisor > 1 or task.length is None)
    ]


def with_environment(setting: Setting, variables: Iterable[tuple[str, str]]) -> Setting:
    """The setting with these variables besides its own."""
    merged = {**dict(setting.environment), **dict(variables)}
    return Setting(
        setting.workers, setting.threads, setting.divisor, setting.tokens, tuple(merged.items())
    )


class Search:
    """Tries settings of CTranslate2 for one case and type; what was tried before is not tried again.

    Schedules first; then single variables with the best of them; then pairs of the variables that
    gained, and the better half of the schedules with the best of these; then the four best in turns.
    """

    def __init__(
        self,
        title: str,
        task: Task,
        type: str,
        variables: bool,
        save: Path | None,
        end: float | None,
    ) -> None:
        self._task, self._type, self._save, self._end = task, type, save, end
        self._variables = ENVIRONMENTS if variables else ()
        self._case = [title, task.batch, task.beam, type]
        self.rates: dict[str, float] = {}
        self._settings: dict[str, Setting] = {}
        if save and save.exists():
            for line in read_json_lines(save):
                if line.get("search") == self._case:
                    self.rates[line["tried"]] = line["rate"]

    def _worker(self, setting: Setting) -> Worker:
        worker = Worker(
            decoder,
            f"ctranslate2-{self._type}",
            self._task,
            setting,
            environment=dict(setting.environment),
        )
        worker.ask(None)
        return worker

    def rate(self, setting: Setting) -> float:
        """Tokens a second, the better of two turns (of one, if far behind); 0 if refused."""
        name = str(setting)
        self._settings[name] = setting
        if name not in self.rates:
            if self._end and time.perf_counter() > self._end:
                raise TimeoutError
            rate = 0.0
            try:
                worker = self._worker(setting)
                for _ in range(2):
                    turn = worker.ask(0)
                    rate = max(rate, sum(map(len, turn.outputs)) / turn.seconds)
                    if rate < 0.9 * max(self.rates.values(), default=0):
                        break
                worker.close()
            except WorkerError as error:
                say(f"{name}: {error}")
            say(f"{rate:8.0f}  {name}")
            self._note(name, rate)
        return self.rates[name]

    def _note(self, name: str, rate: float) -> None:
        self.rates[name] = rate
        append_json(self._save, {"search": self._case, "tried": name, "rate": rate})

    def best(self, settings: Iterable[Setting], count: int) -> list[Setting]:
        """The fastest of them."""
        return sorted(settings, key=self.rate, reverse=True)[:count]

    def run(self) -> Setting:
        """The winner."""
        plain = schedules(self._task)
        ordered = self.best(plain, len(plain))
        first = ordered[0]
        singles = [with_environment(first, variables) for variables in self._variables]
        gained = [
            each.environment
            for each in self.best(singles, 3)
            if self.rate(each) > 1.01 * self.rate(first)
        ]
        more = [
            with_environment(first, (*one, *other))
            for one, other in itertools.combinations(gained, 2)
        ]
        if gained:
            better = ordered[: -(-len(ordered) // 2)]
            more += [with_environment(each, gained[0]) for each in better]
        finalists = self.best(dict.fromkeys([*plain, *singles, *more]), 4)
        return self._in_turns(finalists)

    def _in_turns(self, finalists: Sequence[Setting], rounds: int = 3) -> Setting:
        names = [f"in turns: {each}" for each in finalists]
        if not all(name in self.rates for name in names):
            # These turns take longer than one trial.
            if self._end and time.perf_counter() > self._end - 15:
                raise TimeoutError
            workers = [self._worker(each) for each in finalists]
            rates: list[list[float]] = [[] for _ in finalists]
            for _ in range(rounds):
                for worker, mine in zip(workers, rates, strict=True):
                    time.sleep(PAUSE)
                    turn = worker.ask(0)
                    mine.append(sum(map(len, turn.outputs)) / turn.seconds)
            for worker, name, mine in zip(workers, names, rates, strict=True):
                worker.close()
                self._note(name, statistics.median(mine))
        return max(finalists, key=lambda each: self.rates[f"in turns: {each}"])


def search_ctranslate2(subject: Subject, options: argparse.Namespace) -> None:
    """Prints what was tried of each case, and the winner."""
    title = setting_title(subject.title, options.threads, VERSIONS)
    end = time.perf_counter() + options.max_seconds if options.max_seconds else None
    for batch in options.batch:
        for beam in options.beam:
            for type in options.types:
                task = make_task(subject, batch, beam, options)
                search = Search(title, task, type, not options.no_variables, options.save, end)
                winner = "not found yet: run again"
                try:
                    best = search.run()
                    winner = f"best: {best}, {search.rates[f'in turns: {best}']:,.0f} tokens/s"
                except TimeoutError:
                    pass
                tried = sorted(search.rates.items(), key=lambda item: -item[1])
                head = [f"batch {batch}, beam {beam}, {type}", "tokens/s"]
                rows = [[name, f"{rate:,.0f}"] for name, rate in tried]
                print("", *table(head, rows, options.markdown), winner, sep="\n", flush=True)
                if end and time.perf_counter() > end:
                    return


# ---- Tables -----------------------------------------------------------------------------------


def rates(facts: dict[str, Any]) -> list[float]:
    """Tokens a second of each round."""
    return [n / s for n, s in zip(facts["tokens"], facts["seconds"], strict=True)]


def times_as_fast(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """Median over the rounds of the ratio."""
    return statistics.median(a / b for a, b in zip(rates(mine), rates(other), strict=False))


def figures(results: dict[str, dict[str, Any]], key: str) -> dict[str, str]:
    """The cells of a competitor in one run."""
    facts = results[key]
    peers = {
        name: other for name, other in results.items() if COMPETITORS[name].program == "ctranslate2"
    }
    cells = {"tokens/s": f"{statistics.median(rates(facts)):,.0f}"}
    if peers:
        fastest = max(peers.values(), key=lambda other: statistics.median(rates(other)))
        cells["of ctranslate2"] = f"{times_as_fast(facts, fastest):.2f}x"
        same = [other for other in peers.values() if other["type"] == facts["type"]]
        if same:
            fastest = max(same, key=lambda other: statistics.median(rates(other)))
            cells["in the same type"] = f"{times_as_fast(facts, fastest):.2f}x"
    if facts["bound"]:
        share = statistics.median(
            bound / seconds for bound, seconds in zip(facts["bound"], facts["seconds"], strict=True)
        )
        cells["of the bound"] = f"{share:.0%}"
    cells["memory, MiB"] = f"{facts['peak'] / 2**20:,.0f} ({facts['before'] / 2**20:,.0f})"
    if "same" in facts:
        cells["same output"] = f"{facts['same']:.1%}"
    if "bleu" in facts:
        cells["BLEU"] = f"{facts['bleu']:.2f}"
    return cells


COLUMNS = (
    "tokens/s",
    "of ctranslate2",
    "in the same type",
    "of the bound",
    "memory, MiB",
    "same output",
    "BLEU",
)


def overview(cases: dict[tuple[int, int], dict[str, dict[str, str]]]) -> tuple[Any, Any]:
    """Head and rows of all cases side by side: tokens a second, and times CTranslate2."""
    keys = [key for key in COMPETITORS if any(key in found for found in cases.values())]
    rows = []
    for key in keys:
        row = [COMPETITORS[key].title]
        for found in cases.values():
            cells = found.get(key, {})
            ratio = cells.get("of ctranslate2")
            row.append(cells.get("tokens/s", "") + (f" ({ratio})" if ratio else ""))
        rows.append(row)
    return ["batch, beam", *(f"{batch}, {beam}" for batch, beam in cases)], rows


def notes(latest: dict[str, dict[str, Any]]) -> list[str]:
    """Lines below the table of a case: settings and the machine."""
    lines = [
        f"{COMPETITORS[key].title}: {results[key]['setting']}"
        for key, results in latest.items()
        if results[key]["setting"]
    ]
    machines = [results[key]["machine"] for key, results in latest.items() if results[key]["bound"]]
    if machines:
        peaks = [f"{n} {v / 1e9:,.0f} GFLOP/s" for n, v in machines[-1].items() if n != "read"]
        memory = f"memory {machines[-1]['read'] / 1e9:.0f} GB/s"
        lines.append(f"the machine: {', '.join([*peaks, memory])}")
    return lines


def show(runs: Sequence[dict[str, Any]], markdown: bool) -> None:
    """The tables of each model: one for each case, all side by side, and start-up."""
    runs = [run for run in runs if "setting" in run]
    for title in dict.fromkeys(run["setting"] for run in runs):
        print(f"\n{title}", flush=True)
        mine = [run for run in runs if run["setting"] == title]
        cases = sorted({tuple(run["case"]) for run in mine if run["case"] != "start-up"})
        all_found = {}
        for case in cases:
            latest = {
                key: run["results"]
                for run in mine
                if run["case"] == list(case)
                for key in run["results"]
            }
            found = {key: figures(latest[key], key) for key in COMPETITORS if key in latest}
            all_found[case] = found
            columns = [name for name in COLUMNS if any(name in cells for cells in found.values())]
            rows = [
                [COMPETITORS[key].title, *(cells.get(name, "") for name in columns)]
                for key, cells in found.items()
            ]
            head = [f"batch {case[0]}, beam {case[1]}", *columns]
            print("", *table(head, rows, markdown), "", *notes(latest), sep="\n")
        if len(cases) > 1:
            print("", *table(*overview(all_found), markdown), sep="\n")
        starts = {
            name: facts
            for run in mine
            if run["case"] == "start-up"
            for name, facts in run["results"].items()
        }
        if starts:
            rows = [
                [
                    name,
                    f"{statistics.median(facts['seconds']):.3f} s",
                    f"{facts['peak'] / 2**20:,.0f}",
                ]
                for name, facts in starts.items()
            ]
            head = ["start-up, one sentence, beam 4", "to the first line", "memory, MiB"]
            print("", *table(head, rows, markdown), sep="\n", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a trained model directory")
    parser.add_argument("--preset", default="base", help="size of the random model")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the random model")
    parser.add_argument("--length", type=int, default=27, help="tokens of its outputs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="sentences")
    parser.add_argument("--beam", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=list(COMPETITORS), help="these alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sentences", type=int, default=150, help="of the test text, where the batch is 1"
    )
    parser.add_argument("--start-ups", type=int, default=5, help="runs of each; 0: none")
    parser.add_argument("--no-speed", action="store_true", help="start-up alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu, or one of PyTorch's, such as cuda, for those that run there; no bounds then",
    )
    parser.add_argument("--max-seconds", type=float, help="of a case: no round begins after it")
    parser.add_argument("--search-ctranslate2", action="store_true", help="find its best settings")
    parser.add_argument(
        "--types",
        nargs="+",
        choices=CTRANSLATE2_TYPES,
        default=["int8", "float32"],
        help="to search CTranslate2's settings of",
    )
    parser.add_argument(
        "--no-variables", action="store_true", help="search without variables of the environment"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one case, few runs")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "decoding", help="where models are written"
    )
    parser.add_argument("--save", type=Path, help="add what was measured to this file")
    parser.add_argument("--show", type=Path, help="print the tables of this file and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--prepare", action="store_true", help="write the models and run nothing")
    parser.add_argument("--list", action="store_true", help="list the competitors and run nothing")
    options = parser.parse_args(argv)
    if options.device != "cpu":
        for key in options.only or ():
            if key not in ON_A_DEVICE:
                parser.error(f"--only: got {key}, expected of {', '.join(ON_A_DEVICE)} on a device")
    return options


def main() -> None:
    options = parse()
    if options.list:
        for key, competitor in COMPETITORS.items():
            missing = f" ({competitor.missing} is not installed)" if competitor.missing else ""
            print(f"{key:26s} {competitor.title}{missing}")
        return
    if options.show:
        show(read_json_lines(options.show), options.markdown)
        return
    if options.quick:
        options.preset, options.vocab_size, options.length = "tiny", 4000, 8
        options.batch, options.beam, options.rounds, options.start_ups = [4], [2], 1, 1
        say("a tiny model and one case, for a minute or two, most of it Hugging Face's start")

    subject = prepare(options)
    usual = [key for key, competitor in COMPETITORS.items() if competitor.usual]
    on_cpu = options.device == "cpu"
    keys = options.only or (usual if on_cpu else list(ON_A_DEVICE))
    for key in list(keys):
        competitor = COMPETITORS[key]
        reason = f"{competitor.missing} is not installed" if competitor.missing else None
        if competitor.program == "huggingface" and subject.config.norm_first:
            reason = "MarianMTModel has no pre-norm"
        if reason:
            say(f"{competitor.title}: left out: {reason}")
            keys = [each for each in keys if each != key]
    ceiling = ceilings.program(options.folder) if on_cpu else None
    if on_cpu and ceiling is None:
        say("no C++ compiler found: no bounds")
    if options.prepare:
        return
    if options.search_ctranslate2:
        search_ctranslate2(subject, options)
        return
    runs = []

    def note(case: Any, results: dict[str, Any]) -> None:
        runs.append(
            {
                "setting": setting_title(subject.title, options.threads, VERSIONS, options.device),
                "case": case,
                "results": results,
            }
        )
        append_json(options.save, runs[-1])

    for batch in options.batch if not options.no_speed else []:
        for beam in options.beam:
            say(f"batch {batch}, beam {beam}")
            task = make_task(subject, batch, beam, options)
            note(
                [batch, beam],
                measure_case(subject, task, keys, options.rounds, ceiling, options.max_seconds),
            )
    if options.start_ups and on_cpu:
        note("start-up", measure_start_up(subject, keys, options))
    show(runs, options.markdown)


if __name__ == "__main__":
    main()
