"""``python -m transformer_ext.train`` from text to model: what it says, writes, refuses, resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_helpers import SMALL_MODEL, interrupted_after, undocumented_files, write_text

from transformer_ext import train
from transformer_ext.files import load_model_dir
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.report import read_log
from transformer_ext.training.trainer import Trainer
from transformer_ext.training.translation import TranslationRun

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    source, target = write_text(folder)
    return [
        *("--src-train", str(source), "--tgt-train", str(target), "--held-out", "0.05"),
        *("--cache", str(folder / "cache"), *SMALL_MODEL),
    ]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_model_dir(folder).weights)


def assert_same(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def test_from_text_to_model(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    steps = ["--max-steps", "20", "--validate-every", "10", "--log-every", "5"]
    assert train.main([*text, *steps, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    for word in ("data ", "model ", "device ", "kernels ", "time ", "output ", "translate "):
        assert word in said
    assert len(re.findall(r"^step \d+/20 ", said, re.MULTILINE)) == 4
    assert len(re.findall(r"^validation at step (?:10|20): .*BLEU", said, re.MULTILINE)) == 2
    assert f"python -m transformer_ext.translate {output / 'model'}" in said
    # 15 of 300 pairs are held out.
    assert re.search(r"^warning: scores of 1\d sentences say little", said, re.MULTILINE)

    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 20 and results["seed"] == 1 and results["target_tokens"] > 0
    assert results["validation_bleu"] >= 0 and "tok:13a" in results["bleu_signature"]
    assert results["test_bleu"] is None
    assert results["versions"]["torch"] and results["config"]["training"]["max_steps"] == 20
    for picture in ("loss.png", "attention.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    events = read_log(output / "log.jsonl")
    assert [e["step"] for e in events if e["event"] == "train"] == [5, 10, 15, 20]
    model = load_model_dir(output / "model")
    assert model.training["max_train_length"] > 5
    assert model.training["seed"] == 1 and model.training["versions"] == results["versions"]
    assert model.training["config"]["training"]["max_steps"] == 20
    source = text[text.index("--src-train") + 1]
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert model.training["text_sha256"][source] == digest
    assert model.training["pairs"] == results["pairs"] < 300
    assert {p.name for p in (output / "checkpoints").iterdir()} == {
        "step-10",
        "step-20",
        "last",
        "best",
    }
    assert not undocumented_files(output)
    assert not undocumented_files(Path(text[text.index("--cache") + 1]))

    # The run's own file gives the same run again, and nothing is overwritten unasked.
    assert train.main(["--config", str(output / "config.yaml")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    other = tmp_path / "again"
    assert train.main(["--config", str(output / "config.yaml"), "--output", str(other)]) == 0
    assert_same(output / "model", other / "model")
    assert train.main(["--config", str(output / "config.yaml"), "--overwrite"]) == 0
    assert_same(output / "model", other / "model")


def test_tensorboard_has_the_figures_of_the_log(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    steps = ["--max-steps", "6", "--validate-every", "3", "--log-every", "2"]
    assert train.main([*text, *steps, "--tensorboard", "--output", str(output)]) == 0
    board = EventAccumulator(str(output / "tensorboard")).Reload()
    events = read_log(output / "log.jsonl")
    for event, name in (("train", "nll"), ("train", "gradient_norm"), ("validation", "chrf")):
        logged = [(e["step"], e[name]) for e in events if e["event"] == event]
        found = [(s.step, s.value) for s in board.Scalars(f"{event}/{name}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    assert len(logged) == 2


def test_tensorboard_that_is_not_there_is_said_at_once(
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = tmp_path / "run"
    assert train.main([*text, "--tensorboard", "--output", str(output)]) == 2
    assert "--tensorboard: needs the package tensorboard" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    options = [
        *(*text, "--precision", precision, "--max-steps", "12", "--validate-every", "5"),
        *("--accum-steps", "2", "--dropout", "0.3", "--validation-sentences", "3"),
        *("--subword-dropout", "0.1", "--keep-checkpoints", "2", "--average-last", "2"),
    ]
    if precision == "float32":
        # Nothing says that one is the best: the final model is the average.
        options += ["--held-out", "0"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*options, "--data-workers", "0", "--output", str(straight)]) == 0

    with interrupted_after(7, 8):
        assert train.main([*options, "--output", str(stopped)]) == 130
        said = capsys.readouterr().out
        command = f"To go on: python -m transformer_ext.train --output {stopped} --resume"
        assert command in said, said[-500:]
        assert (stopped / "checkpoints" / "step-7" / "training.json").is_file()
        assert not (stopped / "model").exists()
        assert train.main(["--output", str(stopped), "--resume"]) == 130
        # What an interruption saved takes no place of what the plan did.
        assert Checkpoints(stopped / "checkpoints").steps() == [5, 8]

    assert train.main(["--output", str(stopped), "--resume"]) == 0
    assert "going on from step 8" in capsys.readouterr().out
    assert Checkpoints(stopped / "checkpoints").steps() == [10, 12]
    chosen = json.loads((stopped / "results.json").read_text())["weights"]
    if precision == "float32":
        assert chosen == "average of the last 2 checkpoints"
    assert_same(straight / "checkpoints" / "step-12", stopped / "checkpoints" / "step-12")
    assert_same(straight / "model", stopped / "model")


def test_checkpoints_damaged_before_the_end_are_not_used(
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    final_model, trained = TranslationRun.final_model, {}

    def damaged(self: TranslationRun, trainer: Trainer) -> tuple[Path, str]:
        for path in (output / "checkpoints").glob("step-*/model.safetensors"):
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)
        trained.update({name: p.detach().clone() for name, p in self.parameters.items()})
        return final_model(self, trainer)

    monkeypatch.setattr(TranslationRun, "final_model", damaged)
    options = ["--max-steps", "4", "--validate-every", "2", "--validation-sentences", "0"]
    assert train.main([*text, *options, "--output", str(output)]) == 0
    assert capsys.readouterr().out.count("has changed since it was written; not used") == 3
    results = json.loads((output / "results.json").read_text())
    assert results["weights"] == "weights after step 4"
    for name, value in weights(output / "model").items():
        assert np.array_equal(value, trained[name].numpy()), name


def test_two_processes_train_as_one_with_twice_the_accumulation(
    text: list[str], tmp_path: Path
) -> None:
    options = [
        *(*text, "--max-steps", "4", "--validate-every", "4", "--dropout", "0.2"),
        # Each rank then knows the number of its own labels alone.
        *("--subword-dropout", "0.3"),
        # Adam divides by the size of a gradient: with its tiny eps the rounding errors of gradients
        # that are 0 in theory, as those of the biases of keys, would count in full.
        *("--validation-sentences", "0", "--average-last", "1", "--eps", "1e-3"),
    ]
    single = tmp_path / "single"
    assert train.main([*options, "--accum-steps", "4", "--output", str(single)]) == 0
    double = tmp_path / "double"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "transformer_ext.train", *options, "--accum-steps", "2", "--output", str(double)),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # OpenMP then tells what it has read.
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "GOMP_SPINCOUNT" in done.stderr:  # That of GNU.
        assert "GOMP_SPINCOUNT = '2000'" in done.stderr
    assert done.stdout.count("validation at step 4") == 1
    assert "2 processes" in done.stdout
    a, b = weights(single / "model"), weights(double / "model")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_dry_run_writes_nothing(
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*text, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"dry run +20 steps: \d+\.\d ms a step", said) and "GiB" in said
    assert list(tmp_path.iterdir()) == []


def test_runs_are_numbered_and_the_newest_is_resumed(
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*text, "--max-steps", "2", "--validate-every", "2", "--validation-sentences", "2"]
    assert train.main(options) == 0 and train.main(options) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["001", "002"]
    capsys.readouterr()
    assert train.main(["--resume", "--max-steps", "4"]) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert json.loads(Path("runs/002/results.json").read_text())["steps"] == 4
    assert json.loads(Path("runs/001/results.json").read_text())["steps"] == 2


def test_passes_over_the_text_are_kept_and_can_be_made_more(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "run")]
    assert train.main([*text, *output, "--max-epochs", "1", "--warmup-steps", "3"]) == 0
    first = json.loads((tmp_path / "run/results.json").read_text())
    assert "max_epochs: 1" in (tmp_path / "run/config.yaml").read_text()
    assert train.main([*output, "--resume", "--max-epochs", "2"]) == 0
    second = json.loads((tmp_path / "run/results.json").read_text())
    assert abs(second["steps"] - 2 * first["steps"]) <= 1
    assert "warm-up 3 steps;" in capsys.readouterr().out


def test_a_shorter_training_has_a_shorter_warmup(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*text, "--dry-run", "--max-steps", "50"]) == 0
    assert re.search(r"warm-up 5 steps \(a tenth of the training, for the \d+ of the recipe\)", (
        capsys.readouterr().out
    ))  # fmt: skip
    assert train.main([*text, "--dry-run", "--max-steps", "50", "--warmup-steps", "40"]) == 0
    said = capsys.readouterr().out
    assert "warm-up 40 steps;" in said and "warning" not in said
    # A recipe can be tried for some steps.
    assert train.main([*text, "--dry-run", "--max-steps", "30", "--warmup-steps", "4000"]) == 0
    assert (
        "warning: --warmup-steps: 4,000 is more than the 30 steps of the whole training "
        "(--max-steps)"
    ) in capsys.readouterr().out


def test_time_limit_finishes_the_run(text: list[str], tmp_path: Path) -> None:
    options = [*text, "--max-minutes", "0.01", "--validation-sentences", "2"]
    assert train.main([*options, "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["ended"] == "time"


def test_print_config_reads_back(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train.main([*text, "--print-config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        train.main(["--config", str(tmp_path / "config.yaml"), "--print-config"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--src-train", "/no/such.en", "--tgt-train", "/no/such.de"], "/no/such.en"),
        (["--resume", "--output", "/no/such/run"], "no run to go on with"),
        (["--device", "abacus"], "device"),
        (["--precision", "float16", "--device", "cpu"], "float16"),
        (["--nhead", "5", "--dry-run"], "nhead"),
        (["--max-tokens", "3", "--dry-run"], "--max-tokens: got 3"),
    ],
)
def test_wrong_input_is_one_clear_error(
    text: list[str],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRANSFORMER_EXT_TRACEBACK", raising=False)
    own = [] if "--src-train" in options or "--resume" in options else text
    assert train.main([*own, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("runs").exists(), "nothing may be left behind by a refused run"


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--learnig-rate", "1"])
    assert end.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err
