"""A training that is killed at any moment goes on as if it had never stopped, bit for bit.

``TRANSFORMER_EXT_KILLS=50`` kills that many times at random (6 by default).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import Operations, end_of, forked, killed_before
from matplotlib.figure import Figure
from training_helpers import SMALL_MODEL, write_text

from transformer_ext import train
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.translation import TranslationRun

KILLS = int(os.environ.get("TRANSFORMER_EXT_KILLS", "6"))
#: Of a life that does not end on its own.
SECONDS = 120

#: Validations, checkpoints between them, and lines of the log fall on different steps, an epoch ends
#: between two of them.
SCHEDULE = (
    "--max-steps 24 --validate-every 10 --checkpoint-every 4 --log-every 3 --keep-checkpoints 2 "
    "--accum-steps 2 --dropout 0.3 --validation-sentences 3 --beam-size 1 --ema-decay 0.9"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    source, target = write_text(folder)
    return [
        *("--src-train", str(source), "--tgt-train", str(target), "--held-out", "0.05"),
        *("--cache", str(folder / "cache"), *SMALL_MODEL),
    ]


def live(*arguments: str) -> Callable[[], int]:
    """One life of the command, in a process of its own."""

    def body() -> int:
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        # Pictures take as long as all the rest.
        Figure.savefig = lambda self, path, **keywords: Path(path).write_bytes(b"picture")
        TranslationRun._draw_attention = lambda self, source, output, path: None  # type: ignore
        return train.main([str(argument) for argument in arguments])

    return body


def once(*arguments: str) -> int:
    """Exit status of the command."""
    return end_of(forked(live(*arguments)))


@pytest.fixture(scope="module")
def unbroken(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert once(*text, *SCHEDULE, "--output", str(folder)) == 0
    return folder


_TIMES = {"seconds", "tokens_per_second", "training_seconds", "data_seconds", "decoding_seconds"}
_OWN = {"model", "peak_memory_bytes", "path", "data_wait"}


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in event.items() if key not in _TIMES | _OWN}
        for event in map(json.loads, lines)
        if event["event"] in kinds
    ]


def results(run: Path) -> dict[str, Any]:
    values = json.loads((run / "results.json").read_text())
    values["config"]["output"]["output"] = None
    return {key: value for key, value in values.items() if key not in _TIMES | _OWN}


def assert_same_run(run: Path, other: Path) -> None:
    for kind in ("train", "validation"):
        assert events(run, kind) == events(other, kind)
    assert events(run, "train") and events(run, "validation")
    assert results(run) == results(other)
    steps = Checkpoints(run / "checkpoints").steps()
    assert steps == Checkpoints(other / "checkpoints").steps()
    for name in ("last", "best"):
        assert (run / "checkpoints" / name).read_text() == (
            other / "checkpoints" / name
        ).read_text()
    names = [f"checkpoints/step-{s}/training.safetensors" for s in steps]
    names += [f"checkpoints/step-{s}/model.safetensors" for s in steps]
    for name in [*names, "model/model.safetensors", "validation.output.txt"]:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for folder in (run, run / "checkpoints"):
        left = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
        assert not left, left


def resume(run: Path) -> list[str]:
    """The options of the next life: a run that died before it was one begins again."""
    return ["--output", str(run), *(["--resume"] if (run / "config.yaml").exists() else [])]


def test_killed_at_random_until_done(text: list[str], unbroken: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("TRANSFORMER_EXT_SEED", "1"))
    chance = random.Random(seed)
    began = time.monotonic()
    assert once(*text, *SCHEDULE, "--output", str(tmp_path / "timed")) == 0
    whole_run = time.monotonic() - began
    kills = runs = 0
    while kills < KILLS:
        run = tmp_path / f"run-{runs}"
        lives: list[str] = []
        while True:
            arguments = resume(run)
            options = [] if "--resume" in arguments else [*text, *SCHEDULE]
            # Lives are long enough that, sooner or later, one comes to the next checkpoint.
            pid = forked(live(*options, *arguments))
            delay = chance.uniform(0, 0.9 * whole_run)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            status = end_of(pid)
            lives.append(f"{delay:.2f}: {status}")
            if status == 0:
                break
            assert status == -signal.SIGKILL, (seed, lives)
            kills += 1
        assert_same_run(run, unbroken)
        shutil.rmtree(run)
        runs += 1
    print(f"{kills} kills in {runs} runs, {time.monotonic() - began:.0f} s")


def test_killed_between_operations_on_files(
    text: list[str], unbroken: Path, tmp_path: Path
) -> None:
    """Of the whole command: in the log, a checkpoint, the pruning, the final model, the results."""
    counted = tmp_path / "counted"

    def count() -> int:
        operations = Operations(lambda number: None, counted)
        status = live(*text, *SCHEDULE, "--output", str(counted))()
        (tmp_path / "count").write_text(str(operations.count))
        return status

    assert end_of(forked(count)) == 0
    total = int((tmp_path / "count").read_text())
    print(total, "operations")
    assert total > 100
    cuts = sorted(random.Random(KILLS).sample(range(total), min(total, KILLS)))
    for cut in cuts:
        run = tmp_path / f"cut-{cut}"
        status = killed_before(cut, run, live(*text, *SCHEDULE, "--output", str(run)))
        assert status == -signal.SIGKILL, (cut, status)
        arguments = resume(run)
        options = [] if "--resume" in arguments else [*text, *SCHEDULE]
        assert once(*options, *arguments) == 0, cut
        assert_same_run(run, unbroken)
        shutil.rmtree(run)
