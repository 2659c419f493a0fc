"""Builds, tests, checks and measures the package on one NVIDIA GPU, in ten minutes a call; one table.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only build tests memcheck racecheck
    python benchmarks/gpu_check.py --only "compile base" "compile big" ncu --rounds 10
    python benchmarks/gpu_check.py --only build "one GPU" "all GPUs" "all GPUs op by op"
    python benchmarks/gpu_check.py --dry                     # without a GPU: do the commands run?

It needs torch with CUDA, nvcc, CMake, Ninja, pybind11 and the package's dependencies, and no
network. The package is built into build/cuda, where Python started in this repository finds it, for
this GPU's architecture and as PTX. Each stage is a process of its own with a limit of its own: what
fails or hangs hides nothing else. Stages are in the order of what is most wanted: first training
beside the peers, compiled ones too, then the kernels and the tests. All of them may take longer
than --budget: what was left is named at the end, with the command that runs it (what was built
stays).

Into --output ($OUT, or build/gpu_check) go `results.jsonl`, a line for each row of each benchmark,
`log.txt`, all that the stages printed, `table.txt`, and `ncu.csv` where ncu runs. The exit status is
0 if every stage that began ended well, 1 if not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from processes import ROOT, append_json, graphs_said, read_json_lines, table

#: Seconds left to end, to print and to write.
RESERVE = 6.0
#: Shown of what a stage printed that did not end well.
LAST_LINES = 12
PYTHON = sys.executable
#: A missing kernel is an error: else plain PyTorch would be measured as ours.
COMPILED = {"TRANSFORMER_EXT_BACKEND": "compiled"}
#: Without tensor cores in attention, and with them even where they would fail their trial.
SIMPLE = {"TRANSFORMER_EXT_CUDA_ATTENTION": "simple"}
TENSOR = {"TRANSFORMER_EXT_CUDA_ATTENTION": "tensor"}
#: Exits with 1 where the CUDA kernels do not load, and says why.
LOAD = "from transformer_ext._native import loaded_ops as l; o = l(); print(o); exit(not o.cuda)"
#: What fails in these leaves nothing to be run.
BUILDING = ("build", "load")
#: Bytes above which a row says how fast memory is, four times the cache of an H200: a replay finds
#: there what the one before has left.
BEYOND_CACHES = 240e6
#: Kernels bound by bytes: which share of a copy's bandwidth is wanted.
WANTED_SHARES = {
    "softmax": 0.85,
    "residual_norm": 0.85,
    "activation": 0.85,
    "embedding": 0.85,
    "dropout": 0.85,
}
#: Target tokens a second that are wanted, on an H200.
WANTED_RATES = {"base, 25,000": 850_000, "big, 25,000": 260_000}
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


@dataclass
class Stage:
    """What is run, and what came of it.

    Attributes:
        name: for --only and --skip.
        commands: run one after the other until one fails; a program "" is one that is not there.
        limit: seconds for all of them.
        environment: variables beside those of this process.
        status: "ok", "failed", "timeout", "not found", "no time left", "not built", or "" before.
        seconds: that it took.
        said: the last line that it printed, and more of them if it did not end well.
        rows: what its benchmarks saved.
    """

    name: str
    commands: list[list[str]]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    status: str = ""
    seconds: float = 0.0
    said: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, also where PATH does not name it."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [str(path.parent) for path in Path("/opt/nvidia").glob(f"*/*/{name}")]
    return shutil.which(name, path=os.pathsep.join(folders))


def benchmark(name: str, *options: str) -> list[str]:
    """The command of a benchmark of this folder; ``{saved}`` is where its rows go."""
    return [PYTHON, f"benchmarks/{name}.py", *options, "--save", "{saved}"]


def gpu_tests() -> list[str]:
    """The files that have tests for a GPU: only to look through all of them takes 20 seconds."""
    files = sorted((ROOT / "python_tests").glob("test_*.py"))
    marks = ("needs_gpu", "no CUDA GPU")
    return [
        str(path.relative_to(ROOT))
        for path in files
        if any(mark in path.read_text() for mark in marks)
    ]


def gpus() -> int:
    """How many this machine has."""
    import torch

    return torch.cuda.device_count()


def stages(options: argparse.Namespace, scratch: Path) -> list[Stage]:
    """All of them, the most wanted first."""
    dry = options.dry
    device = ["--device", "cpu" if dry else "cuda"]
    kernels = [*device, "--dtypes", "bfloat16", "--seconds", "0.05", *(["--quick"] if dry else [])]
    build = ["cmake", "-S", ".", "-B", "build/cuda", "-G", "Ninja"]
    build += ["-DCMAKE_BUILD_TYPE=Release", "-DTRANSFORMER_EXT_CUDA=ON"]
    # Empty: of the GPUs that are there.
    build += ["-DTRANSFORMER_EXT_CUDA_ARCHITECTURES=", f"-DPython_EXECUTABLE={PYTHON}"]
    tests = [PYTHON, "-m", "pytest", "-q", "-k", "cuda or gpu", "-p", "no:cacheprovider"]
    tests += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and not dry:
        tests += ["-n", "8"]
    tests += gpu_tests() if not dry else ["python_tests/test_cross_entropy.py"]
    sanitizer = [tool("compute-sanitizer") or "", "--error-exitcode", "9", "--print-limit", "20"]
    # torch asks CUDA what may fail; and all of its kernels would take too long.
    sanitizer += ["--report-api-errors", "no", "--kernel-name", "kns=transformer_ext"]
    every = [PYTHON, "benchmarks/every_kernel.py", *device, "--dtypes", "bfloat16"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ncu = [tool("ncu") or "", "--clock-control", "none", "--kernel-name-base", "demangled"]
    ncu += ["-k", "regex:.*transformer_ext.*", "--metrics", ",".join(METRICS), "--csv"]
    ncu += ["--log-file", str(options.output / "ncu.csv")]

    def training(preset: str, tokens: int, batches: int, *only: str) -> list[list[str]]:
        if dry:
            preset, tokens, batches = "tiny", 128, 1
        return [
            benchmark(
                "training",
                *("--preset", preset, "--max-tokens", str(tokens), "--batches", str(batches)),
                *("--rounds", str(options.rounds), *device, "--only", *only),
            )
        ]

    peers = ["nn-autocast-fused", "marian-autocast", "gemm-bfloat16"]
    compiled = "compile-autocast-dynamic"
    attention = [benchmark("attention", *kernels, *(["--backends"] if dry else []))]
    compiled_only = {} if dry else COMPILED
    run, text = scratch / "run", scratch / "test.en"
    train = [PYTHON, "-m", "transformer_ext.train", "--output", str(run), *device]
    translate = [PYTHON, "-m", "transformer_ext.translate", str(run / "model"), str(text), *device]
    if dry:
        train += ["--preset", "tiny", "--max-steps", "3", "--max-tokens", "256"]
        train += ["--log-every", "1", "--validate-every", "3", "--beam-size", "1"]
        train += ["--validation-sentences", "10"]
        translate += ["--beam-size", "1", "--max-length", "4"]
        cases = ["--only", "ours-float32", "--batch", "1", "--beam", "1", "--sentences", "3"]
    else:
        train += ["--max-minutes", "0.6"]
        translate += ["--beam-size", "4"]
        cases = ["--only", "ours-bfloat16", "--batch", "512", "--beam", "4"]
    decoding = benchmark("decoding", "--model", str(run / "model"), *device, *cases)
    decoding += ["--start-ups", "0", "--folder", str(scratch / "decoding")]
    trained_alone = [PYTHON, "-m", "transformer_ext.train", "--dry-run", *device]
    if dry:
        trained_alone += ["--preset", "tiny", "--max-tokens", "256"]
    else:
        trained_alone += ["--preset", "base", "--max-tokens", "4096"]
    # A process finds the GPU of its own.
    together = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
    together += ["--nproc-per-node", "2" if dry else "gpu", *trained_alone[1:]]
    stages_of_several = [
        Stage("one GPU", [trained_alone], 60),
        Stage("all GPUs", [together], 60),
        Stage("all GPUs op by op", [[*together, "--no-cuda-graphs"]], 60),
    ]
    return [
        Stage("build", [build, ["cmake", "--build", "build/cuda"]], 240),
        Stage("load", [[PYTHON, "-c", LOAD]], 40),
        Stage("check", [[PYTHON, "-m", "transformer_ext.info", "--check", *device]], 40),
        Stage("training base", training("base", 25_000, 6, *peers), 90, compiled_only),
        Stage("training base 4k", training("base", 4_096, 24, *peers[:1]), 60, compiled_only),
        Stage("compile base", training("base", 25_000, 6, compiled), 120, compiled_only),
        Stage("training big", training("big", 25_000, 6, *peers), 80, compiled_only),
        Stage("attention", attention, 60, compiled_only | TENSOR),
        Stage("kernels", [benchmark(name, *kernels) for name in WANTED_SHARES], 100, compiled_only),
        Stage("tests", [tests], 120, {"OMP_NUM_THREADS": "1"}),
        Stage("loss", [benchmark("cross_entropy", *kernels)], 40, compiled_only),
        Stage("end to end", [train], 75),
        Stage("translate", [translate], 60),
        Stage("decoding", [decoding], 60, compiled_only),
        Stage(
            "memcheck",
            [[*sanitizer, "--tool", "memcheck", *every, "float32"]],
            90,
            uncached | TENSOR,
        ),
        Stage("compile big", training("big", 25_000, 6, compiled), 140, compiled_only),
        Stage("training big 4k", training("big", 4_096, 24, *peers[:1]), 60, compiled_only),
        Stage("racecheck", [[*sanitizer, "--tool", "racecheck", *every]], 90, TENSOR),
        Stage("products", [benchmark("linear", *kernels)], 40, compiled_only),
        Stage("attention simple", attention, 60, compiled_only | SIMPLE),
        Stage("ncu", [[*ncu, *every, "--large"]], 90, TENSOR),
        *(stages_of_several[1:2] if dry else stages_of_several if gpus() > 1 else []),
    ]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def run(stage: Stage, limit: float, log: Path, saved: Path) -> None:
    """Runs a stage for so many seconds at most, and fills in what came of it."""
    began = time.monotonic()
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environment.get("PYTHONPATH")])
    )
    saved.unlink(missing_ok=True)
    stage.status = "ok"
    with open(log, "ab") as file:
        for command in stage.commands:
            command = [part.replace("{saved}", str(saved)) for part in command]
            file.write(f"\n=== {stage.name}: {' '.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                stage.status, stage.said = "failed", f"{command[0]}: {error.strerror}"
                break
            try:
                code = process.wait(max(limit - (time.monotonic() - began), 0.1))
                stage.status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                stage.status = "timeout"
            finally:
                end(process)
            with open(log, "rb") as printed:
                printed.seek(start)
                lines = printed.read().decode(errors="replace").strip().splitlines()
            stage.said = lines[-1].strip() if lines else ""
            if stage.status != "ok":
                stage.said = "\n".join(lines[-LAST_LINES:])
                break
    stage.seconds = time.monotonic() - began
    stage.rows = read_json_lines(saved) if saved.exists() else []


# ---- What is made of it -----------------------------------------------------------------------


def met(reached: bool) -> str:
    return "met" if reached else "NOT MET"


def kernel_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each benchmark and direction the median and the lowest share of a copy.

    Of the rows beyond the caches, where there are any; the others have no verdict.
    """
    groups: dict[tuple[str, str], list[tuple[float, float, str, bool]]] = {}
    for row in rows:
        name, seconds = row["benchmark"], row["seconds"]
        if name not in WANTED_SHARES or row["case"].startswith("overhead"):
            continue
        kind = row["case"].split()[0] if row["case"].split()[0].isalpha() else ""
        share, ratio = seconds["copy"] / seconds["ours"], seconds["torch"] / seconds["ours"]
        large = row["bytes"] > BEYOND_CACHES
        groups.setdefault((name, kind), []).append((share, ratio, row["case"], large))
    lines = []
    for (name, kind), group in groups.items():
        large = any(entry[3] for entry in group)
        found = [entry for entry in group if entry[3] == large]
        share, wanted = median(entry[0] for entry in found), WANTED_SHARES[name]
        lowest = min(found)
        lines.append(
            [
                f"{name} {kind}".strip(),
                f"{share:.0%} of copy (median), {lowest[0]:.0%} ({lowest[2]}), "
                f"{median(entry[1] for entry in found):.1f}x torch",
                f"{wanted:.0%}",
                met(share >= wanted) if large else "within caches",
            ]
        )
    return lines


def attention_lines(rows: Sequence[dict[str, Any]], variant: str) -> list[list[str]]:
    """A line for each shape: share of a copy, and times the best backend."""
    lines = []
    for row in rows:
        seconds = row["seconds"]
        if "ours" not in seconds:
            failed = f"FAILED: {row.get('failed', '')}"
            lines.append([f"attention{variant} {row['case']}", failed, "", met(False)])
            continue
        if "copy" not in seconds:
            continue
        share = seconds["copy"] / seconds["ours"]
        peers = {n: s for n, s in seconds.items() if n not in ("ours", "copy")}
        kind, length = row["case"].split()[:2]
        long = length.isdigit() and int(length) >= 512
        wanted_share = 0.0 if long else {"forward": 0.7, "backward": 0.6}[kind]
        wanted_ratio = 0.5 if long else 1.5
        best = min(peers, key=peers.__getitem__, default="")
        ratio = peers[best] / seconds["ours"] if best else float("nan")
        marks = {n: " (op by op)" if n in row.get("op_by_op", ()) else "" for n in seconds}
        verdict = met(share >= wanted_share and ratio >= wanted_ratio)
        lines.append(
            [
                f"attention{variant} {row['case']}",
                f"{seconds['ours'] * 1e6:.0f} us{marks['ours']}, {share:.0%} of copy, "
                f"{ratio:.2f}x {best}{marks.get(best, '')}",
                f"{wanted_share:.0%}, {wanted_ratio}x",
                verdict if row["bytes"] > BEYOND_CACHES else "within caches",
            ]
        )
    return lines


def product_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for row in rows:
        seconds = row["seconds"]
        if "copy" in seconds:
            figure = f"{row['bytes'] / seconds['copy'] / 1e12:.2f} TB/s"
            lines.append([row["case"], figure, "", ""])
        else:
            speed = {name: row["operations"] / s / 1e12 for name, s in seconds.items()}
            figure = f"{speed['ours']:.0f} TFLOP/s, torch.mm {speed['torch']:.0f}"
            lines.append([f"product {row['case']}", figure, "", ""])
    return lines


def loss_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for row in rows:
        s, memory = row["seconds"], row["memory"]
        figure = f"{s['ours'] * 1e3:.2f} ms, {s['torch'] / s['ours']:.2f}x torch, "
        figure += f"{s['products'] / s['ours']:.0%} of the products, "
        figure += f"{memory['ours']:.0f} MiB, torch {memory['torch']:.0f}"
        lines.append([f"loss {row['case']}", figure, "", ""])
    return lines


def training_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Target tokens a second of each competitor, in each setting."""
    lines = []
    rates: dict[str, float] = {}
    for row in rows:
        setting = row["setting"].split(" target")[0]
        ours = 0.0
        for key, facts in row["results"].items():
            rate = median(
                row["target_tokens"][int(unit)] / median(times)
                for unit, times in facts["seconds"].items()
            )
            wanted, verdict = "", ""
            if key == "ours-bfloat16":
                ours = rates[setting] = rate
                goal = WANTED_RATES.get(setting)
                longer = rates.get(setting.replace(" 4,096", " 25,000"), 0.0)
                if goal is None and setting.endswith(" 4,096"):
                    goal = 0.75 * longer
                if goal:
                    wanted, verdict = f"{goal:,.0f}", met(rate >= goal)
            times = f", ours is {ours / rate:.2f}x" if ours and key != "ours-bfloat16" else ""
            figure = f"{rate:,.0f} tokens/s{times}, {facts['memory'] / 2**30:.1f} GiB"
            figure += graphs_said(facts)
            lines.append([f"training {setting}, {key}", figure, wanted, verdict])
    return lines


def end_to_end_lines(log: Path) -> list[list[str]]:
    """Speed, share of validation and BLEU of the training on the shipped text.

    It ends long before its recipe would: a validation is compared with the steps between two.
    """
    if not log.exists():
        return []
    rows = read_json_lines(log)
    kinds = {kind: [r for r in rows if r.get("event") == kind] for kind in ("train", "validation")}
    if not kinds["train"]:
        return []
    speed = median(r["tokens_per_second"] for r in kinds["train"])
    lines = [["train, shipped text", f"{speed:,.0f} tokens/s (median of the log)", "", ""]]
    settled = log.with_name("results.json")
    if kinds["validation"] and settled.exists():
        last = kinds["validation"][-1]
        each = median(r["seconds"] for r in kinds["validation"])
        every = json.loads(settled.read_text())["config"]["training"]["validate_every"]
        # The first steps set up; they are left out where there are more.
        first, newest = kinds["train"][0], kinds["train"][-1]
        steps, seconds = newest["step"], newest["seconds"]
        between = rows[: rows.index(newest)]
        if first is not newest:
            steps, seconds = steps - first["step"], seconds - first["seconds"]
            between = between[rows.index(first) :]
        seconds -= sum(r["seconds"] for r in between if r.get("event") == "validation")
        step = seconds / steps
        share = each / max(each + every * step, 1e-9)
        lines.append(
            [
                "validation",
                f"{each:.1f} s each, {share:.1%} of the time with {every} steps between two, "
                f"BLEU {last.get('bleu', float('nan')):.1f}",
                "under 5%",
                met(share < 0.05),
            ]
        )
    return lines


def decoding_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The time of the whole test text, of which each round has a part."""
    lines = []
    for row in rows:
        for key, facts in row["results"].items():
            seconds, tokens = sum(facts["seconds"]), sum(facts["tokens"])
            figure = f"{seconds:.2f} s for the test text, {tokens / seconds:,.0f} tokens/s"
            lines.append([f"decoding, beam {row['case'][1]}, {key}", figure, "", ""])
    return lines


def results(done: Sequence[Stage], scratch: Path) -> list[list[str]]:
    """What was measured, a line each: what, how much, how much is wanted, whether it is met."""
    lines: list[list[str]] = []
    makers: dict[str, Callable[[Sequence[dict[str, Any]]], list[list[str]]]] = {
        "products": product_lines,
        "kernels": kernel_lines,
        "loss": loss_lines,
        "decoding": decoding_lines,
        "attention": lambda rows: attention_lines(rows, ""),
        "attention simple": lambda rows: attention_lines(rows, " simple"),
    }
    trained: list[dict[str, Any]] = []
    for stage in done:
        if stage.name in makers:
            lines += makers[stage.name](stage.rows)
        elif stage.name.startswith(("training", "compile")):
            trained += stage.rows
        elif stage.name == "check" and stage.status:
            # What fails is printed behind the count.
            said = (
                stage.said
                if stage.status == "ok"
                else f"FAILED: {stage.said.rpartition(chr(10))[2]}"
            )
            lines.append(["compiled ops", said, "all", met(stage.status == "ok")])
        elif stage.name == "end to end":
            lines += end_to_end_lines(scratch / "run" / "log.jsonl")
        elif "GPU" in stage.name and stage.status == "ok":
            found = re.search(r"([\d.]+) ms a step", stage.said)
            figure = f"{found[1]} ms a step of 4,096 tokens a GPU" if found else stage.said
            lines.append([f"train base, {stage.name}", figure, "", ""])
        elif stage.name == "translate" and stage.status == "ok":
            figure = f"{stage.seconds:.1f} s for the test text, start and loading included"
            lines.append(["translate, beam 4", figure, "", ""])
    return lines + training_lines(trained)


def report(
    done: Sequence[Stage], facts: dict[str, str], scratch: Path, *, dry: bool = False
) -> str:
    """All tables."""
    parts = [f"{name}: {value}" for name, value in facts.items()]
    if dry:
        parts.append("tried on a CPU with tiny sizes: the figures mean nothing")
    parts.append("")
    rows = [[s.name, s.status, f"{s.seconds:.0f} s"] for s in done if s.status]
    parts += table(["stage", "", ""], rows, False)
    for stage in done:
        if stage.status in ("failed", "timeout"):
            parts += ["", f"--- {stage.name}: {stage.status}", stage.said]
    try:
        lines = results(done, scratch)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        # What was measured is in the file of results all the same.
        lines = [[f"a row that was not understood: {error!r}", "", "", ""]]
    if lines:
        parts += ["", *table(["", "figure", "wanted", ""], lines, False)]
    return "\n".join(parts) + "\n"


def facts_of_machine() -> dict[str, str]:
    """What the figures belong to."""
    import torch

    def first_line(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return type(error).__name__
        lines = done.stdout.strip().splitlines()
        return lines[-1] if lines else "unknown"

    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return {
        "GPU": first_line("nvidia-smi", query, "--format=csv,noheader"),
        "torch": f"{torch.__version__}, Python {sys.version.split()[0]}"
        + ("" if header.exists() else ", without Python.h"),
        "nvcc": first_line(tool("nvcc") or "nvcc", "--version"),
        "commit": first_line("git", "log", "-1", "--format=%h %s"),
        "cores": str(os.cpu_count()),
    }


def test_text(path: Path) -> None:
    """The 1,500 sentences of the shipped test text."""
    sys.path.insert(0, str(ROOT))
    from transformer_ext.data.corpus import read_lines, shipped_corpus

    (file,) = shipped_corpus().test.src
    path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in read_lines(file)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of results and logs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--skip", nargs="+", metavar="STAGE", default=[], help="not these")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of a training")
    parser.add_argument("--list", action="store_true", help="list the stages and run nothing")
    parser.add_argument(
        "--dry", action="store_true", help="on a CPU with tiny sizes, and without building"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    options.output = options.output or Path(os.environ.get("OUT") or ROOT / "build" / "gpu_check")
    options.output = options.output.resolve()
    scratch = ROOT / "build" / "gpu_check_scratch"
    everything = stages(options, scratch)
    names = [stage.name for stage in everything]
    for name in [*(options.only or []), *options.skip]:
        if name not in names:
            parser.error(f"no stage {name!r}; there are: {', '.join(names)}")
    if options.list:
        for stage in everything:
            print(f"{stage.name:18s} at most {stage.limit:.0f} s")
        return 0
    chosen = [
        stage
        for stage in everything
        if stage.name in (options.only or names) and stage.name not in options.skip
    ]
    if options.dry:
        chosen = [stage for stage in chosen if stage.name not in BUILDING]
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                f"gpu_check: torch {torch.__version__} finds no GPU, and nothing was run; --dry "
                "tries the commands on the CPU",
                file=sys.stderr,
            )
            return 2
    if any(stage.name == "end to end" for stage in chosen):
        shutil.rmtree(scratch, ignore_errors=True)
    elif not (scratch / "run").exists():
        for name in ("translate", "decoding"):
            if any(stage.name == name for stage in chosen):
                parser.error(f"{name} needs the model of a run of 'end to end'")
    scratch.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    log, saved = options.output / "log.txt", options.output / "results.jsonl"
    log.write_bytes(b"")
    saved.write_bytes(b"")
    facts = facts_of_machine()
    append_json(saved, facts)
    test_text(scratch / "test.en")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    broken = False
    try:
        for number, stage in enumerate(chosen, 1):
            left = options.budget - (time.monotonic() - began) - RESERVE
            if broken:
                stage.status = "not built"
            elif not stage.commands[0][0]:
                stage.status = "not found"
            elif left < min(stage.limit, 10.0):
                stage.status = "no time left"
            else:
                print(f"[{number}/{len(chosen)}] {stage.name} ...", flush=True)
                run(stage, min(stage.limit, left), log, scratch / "rows.jsonl")
                if stage.status == "timeout" and left < stage.limit:
                    stage.status = "no time left"
            last = stage.said.splitlines()[-1] if stage.said else ""
            print(
                f"    {stage.name}: {stage.status}, {stage.seconds:.0f} s  {last[:120]}", flush=True
            )
            for row in stage.rows:
                append_json(saved, {"stage": stage.name, **row})
            if stage.name in BUILDING and stage.status != "ok":
                broken = True
            state = dataclasses.asdict(stage)
            append_json(saved, {k: state[k] for k in ("name", "status", "seconds", "said")})
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    text = report(chosen, facts, scratch, dry=options.dry)
    (options.output / "table.txt").write_text(text)
    print(f"\n{text}\n{time.monotonic() - began:.0f} s; files in {options.output}", flush=True)
    left = [stage.name for stage in chosen if stage.status in ("", "no time left")]
    if left:
        again = [PYTHON, "benchmarks/gpu_check.py", *(["--dry"] if options.dry else [])]
        again += ["--output", str(options.output / "rest"), "--only", *left]
        print(f"what was left: {shlex.join(again)}", flush=True)
    return int(any(stage.status in ("failed", "timeout") for stage in chosen))


if __name__ == "__main__":
    sys.exit(main())
