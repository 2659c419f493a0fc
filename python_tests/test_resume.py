"""A training that is killed at any moment goes on as if it had never stopped, bit for bit.

``TRANSFORMER_EXT_KILLS=50`` kills that many times at random (4 by default).
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
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
from transformer_ext.config import ConfigError, OutputConfig, TrainConfig, from_dict
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.folder import RunFolder, check_changes
from transformer_ext.training.report import JsonLog, read_log, rewind_log
from transformer_ext.training.trainer import Trainer
from transformer_ext.training.translation import TranslationRun

KILLS = int(os.environ.get("TRANSFORMER_EXT_KILLS", "4"))
#: Of a life that does not end on its own.
SECONDS = 120

#: Validations, checkpoints between them, and lines of the log fall on different steps, an epoch ends
#: between two of them.
SCHEDULE = (
    "--max-steps 24 --validate-every 10 --checkpoint-every 4 --log-every 3 --keep-checkpoints 2 "
    "--average-last 2 --accum-steps 2 --dropout 0.3 --validation-sentences 3 --beam-size 1 "
    "--ema-decay 0.9"
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
        Figure.savefig = lambda self, file, **keywords: file.write(b"picture")
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


_TIMES = {
    "seconds",
    "tokens_per_second",
    "training_seconds",
    "data_seconds",
    "decoding_seconds",
    "validation_share",
}
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


# Damage ------------------------------------------------------------------------------------------

STOPPED = "--max-steps 12 --validate-every 12 --checkpoint-every 3 --validation-sentences 0".split()


@pytest.fixture(scope="module")
def stopped(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its checkpoints of steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    step = Trainer.train_step

    def body() -> int:
        def die(self: Trainer) -> None:
            if self.progress.step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self)

        Trainer.train_step = die  # type: ignore[method-assign]
        return live(*text, *STOPPED, "--log-every", "1", "--output", str(folder))()

    assert end_of(forked(body)) == -signal.SIGKILL
    assert Checkpoints(folder / "checkpoints").steps() == [3, 6, 9]
    return folder


@pytest.fixture(scope="module")
def whole(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert once(*text, *STOPPED, "--log-every", "1", "--output", str(folder)) == 0
    return folder


@pytest.fixture()
def run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage."""
    shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **keywords: None)
    monkeypatch.setattr(TranslationRun, "_draw_attention", lambda *arguments: None)
    monkeypatch.delenv("TRANSFORMER_EXT_TRACEBACK", raising=False)
    return tmp_path / "run"


def go_on(run: Path, *options: str) -> int:
    return train.main(["--output", str(run), "--resume", *options])


def assert_same_end(run: Path, whole: Path) -> None:
    assert events(run, "train") == events(whole, "train")
    for name in ("model.safetensors", "training.safetensors"):
        path = Path("checkpoints/step-12") / name
        assert (run / path).read_bytes() == (whole / path).read_bytes()


def test_the_last_good_checkpoint_is_used_and_named(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, altered = (
        run / "checkpoints/step-9/training.safetensors",
        run / "checkpoints/step-6/model.safetensors",
    )
    os.truncate(cut, 1000)
    content = bytearray(altered.read_bytes())
    content[-5] ^= 1
    altered.write_bytes(content)
    assert go_on(run) == 0
    said = capsys.readouterr().out
    assert re.search(rf"warning: {cut}: is 1,000 bytes long, [\d,]+ were written", said)
    assert f"warning: {altered}: its content has changed since it was written" in said
    assert "going on from step 3\n" in said and "step-9.damaged" in said
    assert_same_end(run, whole)


def test_without_a_good_checkpoint_nothing_is_trained_or_changed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6, 9):
        (run / f"checkpoints/step-{step}/training.json").write_text("{")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    assert go_on(run) == 2
    error = capsys.readouterr().err
    assert "no checkpoint is left to go on from" in error and "step-3/training.json" in error
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    shutil.rmtree(run / "checkpoints")
    assert go_on(run) == 2
    assert "tells of one at step 9" in capsys.readouterr().err


def test_a_damaged_log_is_repaired_and_told(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "log.jsonl"
    lines = log.read_bytes().split(b"\n")
    assert json.loads(lines[-2])["step"] == 10
    log.write_bytes(b"\n".join([*lines[:3], b'{"event": "tr', *lines[3:-1]]) + b"\n" + b'{"event"')
    assert go_on(run) == 0
    assert f"warning: {log}: line 4 is broken and was removed" in capsys.readouterr().out
    assert_same_end(run, whole)
    assert [e["step"] for e in read_log(log) if e["event"] == "train"] == list(range(1, 13))


def test_the_log_is_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    log.write("start", text="a\u2028b")
    for step in (1, 2, 3):
        log.write("train", step=step)
    log.write("end", steps=3)
    log.close()
    whole = path.read_bytes()
    assert rewind_log(path, 3, ended=True) == [] and path.read_bytes() == whole
    path.write_bytes(whole + b'{"event": "train", "st')
    assert rewind_log(path, 2) == []
    assert [e.get("step") for e in read_log(path)] == [None, 1, 2]
    path.write_bytes(whole + bytes(100))
    assert rewind_log(path, 3) == []
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])
    assert rewind_log(tmp_path / "none", 3) == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "not yaml", "unknown", "removed", "altered"])
def test_a_damaged_configuration_is_named(
    run: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    file.write_text(
        {
            "cut": text[: text.index("training:")],
            "empty": "",
            "not yaml": text.replace("training:", "training: ]"),
            "unknown": text.replace("max_tokens", "mex_tokens"),
            "removed": "",
            "altered": text.replace("seed: 1", "seed: 3"),
        }[damage]
    )
    if damage == "removed":
        file.unlink()
    before = (run / "log.jsonl").read_bytes()
    try:
        status = go_on(run)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert str(file) in error and "Traceback" not in error
    if damage == "altered":
        assert "training.seed was 1 and is 3 now" in error
    assert (run / "log.jsonl").read_bytes().startswith(before[: before.rindex(b"\n{")])
    assert damage == "removed" or "seed: 1" not in file.read_text() or damage != "altered"


# What may be changed ------------------------------------------------------------------------------


def test_what_does_not_change_a_step_may_be_changed(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--data-workers 3 --validation-sentences 2 --keep-checkpoints 5 --max-minutes 90"
    assert go_on(run, *options.split()) == 0
    assert not re.search(r"warning: \S+ was", capsys.readouterr().out)
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "options", ["--seed 2", "--max-tokens 200", "--d-model 64", "--max-length 20", "--preset base"]
)
def test_what_makes_another_run_is_refused(
    run: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes()
    assert go_on(run, *options.split()) == 2
    error = capsys.readouterr().err
    name = options.split()[0].removeprefix("--").replace("-", "_")
    assert re.search(rf"error: --resume: (\w+\.)?{name} was .* and is .* now", error), error
    assert before == ((run / "config.yaml").read_bytes(), (run / "log.jsonl").read_bytes())


def test_what_changes_the_learning_is_warned_of(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go_on(run, "--learning-rate", "1e-4", "--max-steps", "14", "--threads", "2") == 0
    said = capsys.readouterr().out
    assert "warning: optimizer.learning_rate was" in said and "warning: threads was 1" in said
    assert json.loads((run / "results.json").read_text())["steps"] == 14


def test_other_text_is_refused_and_moved_text_is_not(
    text: list[str], run: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("en", "de"):
        shutil.copy(Path(text[1]).with_suffix(f".{side}"), tmp_path / f"moved.{side}")
    moved = [str(tmp_path / f"moved.{side}") for side in ("en", "de")]
    other = write_text(tmp_path, seed=5)
    assert go_on(run, "--src-train", str(other[0]), "--tgt-train", str(other[1])) == 2
    assert "has changed" in capsys.readouterr().err
    assert go_on(run, "--src-train", moved[0], "--tgt-train", moved[1]) == 0
    assert_same_end(run, whole)


def test_other_text_of_the_same_lengths_is_refused(
    text: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A tokenizer of one's own does not change with the text, and with text for validation nothing is
    # held out: the targets and their lengths stay as they are.
    source, target = write_text(tmp_path, pairs=80)
    (tmp_path / "dev").mkdir()
    dev = write_text(tmp_path / "dev", pairs=4, seed=3)
    options = [
        *("--src-train", source, "--tgt-train", target, "--src-dev", dev[0], "--tgt-dev", dev[1]),
        *("--tokenizer", run / "model-of-checkpoint.model", "--cache", tmp_path / "cache"),
        *("--output", tmp_path / "own", "--max-steps", "2", "--checkpoint-every", "1"),
        *("--validation-sentences", "0", "--beam-size", "1"),
    ]
    shutil.copy(run / "checkpoints/step-9/tokenizer.model", run / "model-of-checkpoint.model")
    size = SMALL_MODEL.index("--vocab-size")
    small = SMALL_MODEL[:size] + SMALL_MODEL[size + 2 :]
    assert train.main([*small, *map(str, options)]) == 0
    lines = source.read_text(encoding="utf-8").splitlines()
    source.write_text("".join(f"{line}\n" for line in reversed(lines)), encoding="utf-8")
    assert go_on(tmp_path / "own", "--max-steps", "3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training data: got 80 examples") and error.count("\n") == 1
    assert "has changed" in error
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert go_on(tmp_path / "own", "--max-steps", "3") == 0


def test_other_texts_to_classify_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, dev = tmp_path / "text.tsv", tmp_path / "dev.tsv"
    lines = [f"{'ab'[n % 2]}\t{'one' if n % 2 else 'two'} {n}" for n in range(40)]
    text.write_text("".join(f"{line}\n" for line in lines))
    dev.write_text("a\tone\nb\ttwo\n")
    options = [
        *("--task", "classify", "--labelled-train", text, "--labelled-dev", dev),
        *("--preset", "tiny", "--d-model", "32", "--nhead", "2", "--max-tokens", "300"),
        *("--tokenizer", run / "checkpoints/step-9/tokenizer.model", "--device", "cpu"),
        *("--cache", tmp_path / "cache", "--output", tmp_path / "own", "--max-steps", "2"),
    ]
    assert train.main([*map(str, options)]) == 0
    text.write_text("".join(f"{line}\n" for line in [lines[2], lines[1], lines[0], *lines[3:]]))
    assert go_on(tmp_path / "own", "--max-steps", "3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training data: got 40 examples") and error.count("\n") == 1


def test_moved_files_and_workers_are_no_change() -> None:
    def of(folder: str, workers: int | None, weight: float = 2.0) -> list[TrainConfig]:
        common = {"prepare_workers": workers}
        corpora = [
            {"name": "a", "pairs": [f"{folder}/a.tsv"], "weight": weight},
            {"name": "b", "src": [f"{folder}/b.en"], "tgt": [f"{folder}/b.de"]},
        ]
        text = {"text_train": [f"{folder}/text.txt"], "text_dev": [f"{folder}/dev.txt"]}
        labelled = {"labelled_train": [f"{folder}/labelled.tsv"]}
        return [
            from_dict(TrainConfig, {"data": {**common, "pairs_train": [f"{folder}/text.tsv"]}}),
            from_dict(TrainConfig, {"data": {**common, "corpora": corpora}}),
            from_dict(TrainConfig, {"task": "language-model", "language_model": text}),
            from_dict(TrainConfig, {"task": "classify", "classification": labelled}),
        ]

    for before, after in zip(of("here", 0), of("there", 3), strict=True):
        assert before != after
        assert list(check_changes(before, after, "--resume")) == []
    with pytest.raises(ConfigError, match=r"--resume: data.corpora was .* and is .* now"):
        check_changes(of("here", 0)[1], of("here", 0, weight=3.0)[1], "--resume")


def test_another_metric_is_warned_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on(run, "--validation-metric", "accuracy") == 0
    said = capsys.readouterr().out
    assert said.count("warning: evaluation.validation_metric was 'nll' and is 'accuracy' now") == 1


def test_a_finished_run_says_so(run: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    results = (run / "results.json").read_bytes()
    ends = events(run, "end")
    assert go_on(run) == 0
    assert "this run is finished: 12 steps" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == results and events(run, "end") == ends
    # Killed while its results were being made.
    (run / "results.json").unlink()
    (run / "model/model.safetensors").write_bytes(b"half")
    assert go_on(run) == 0
    assert results_of(run) == results_of(whole) and len(events(run, "end")) == 1
    capsys.readouterr()
    assert go_on(run, "--max-steps", "11") == 2
    said = capsys.readouterr()
    assert "--max-steps: got 11, but the run has done 12 steps" in said.err
    assert not said.out
    assert go_on(run, "--max-epochs", "3") == 0
    assert json.loads((run / "results.json").read_text())["steps"] > 12


def results_of(run: Path) -> dict[str, Any]:
    return {**results(run), "config": None}


# Disks and folders --------------------------------------------------------------------------------


def test_a_full_disk_stops_the_training_and_says_how_to_go_on(
    run: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    size = (run / "checkpoints/step-9/training.safetensors").stat().st_size

    def body() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        return go_on(run)

    assert end_of(forked(body)) == 1
    error = capfd.readouterr().err
    assert f"{run / 'checkpoints/step-12'}" in error and f"it needs {size:,} bytes" in error
    assert f"the checkpoint of step 9 is whole ({run / 'checkpoints/step-9'})" in error
    assert f"--output {run} --resume" in error and "Traceback" not in error
    assert Checkpoints(run / "checkpoints").pointed("last") == 9
    assert go_on(run) == 0
    assert_same_end(run, whole)


def test_two_trainings_in_one_folder_are_refused(
    text: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()

    def hold() -> int:
        claimed = RunFolder.claim(run, TrainConfig(output=OutputConfig(str(run), resume=True)))
        os.write(writer, b"x")
        time.sleep(SECONDS)
        return int(claimed.path.exists())

    pid = forked(hold)
    os.read(reader, 1)
    before = {p.name for p in run.iterdir()}
    for options in (["--resume"], [*text, "--overwrite"]):
        assert train.main(["--output", str(run), *options]) == 2
        said = capsys.readouterr()
        assert f"another training (process {pid} on " in said.err and str(run) in said.err
        # It is looked at before the text is read, and by what no other training comes past.
        assert "data  " not in said.out
    config = TrainConfig(output=OutputConfig(str(run), overwrite=True))
    with pytest.raises(ConfigError, match=rf"another training \(process {pid} on "):
        RunFolder.claim(run, config)
    assert before == {p.name for p in run.iterdir()}
    os.kill(pid, signal.SIGKILL)
    assert end_of(pid) == -signal.SIGKILL
    # A lock does not outlive its process.
    assert go_on(run) == 0
    assert_same_end(run, whole)
    assert train.main([*text, *STOPPED, "--output", str(run), "--overwrite"]) == 0
    assert not any(e["event"] == "resume" for e in read_log(run / "log.jsonl"))


def test_folders_that_cannot_be_written_are_named(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train.main([*text, "--max-steps", "1", "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / "file") in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == ""
