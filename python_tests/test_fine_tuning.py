"""``--init-from``: a training that begins with the weights of a model directory."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding_helpers import save_random_model
from marian_helpers import write_marian_dir
from training_helpers import write_text

from transformer_ext import train
from transformer_ext.config import ConfigError, TrainConfig, from_dict
from transformer_ext.data.corpus import file_digest
from transformer_ext.files import load_model_dir
from transformer_ext.huggingface import from_huggingface, to_huggingface
from transformer_ext.model import TransformerConfig
from transformer_ext.training.parent import Parent
from transformer_ext.training.sizing import fine_tuning_recipe, recipe_for
from transformer_ext.training.trainer import Trainer

SENTENCES = ["the old cat sees the red dog", "die alte Katze sieht den roten Hund und das Haus"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    source, target = write_text(folder, pairs=120)
    lines = source.read_text(encoding="utf-8") + target.read_text(encoding="utf-8")
    SENTENCES[2:] = lines.splitlines()[::9]
    return [
        *("--src-train", str(source), "--tgt-train", str(target), "--held-out", "0.1"),
        *("--cache", str(folder / "cache"), "--max-tokens", "200"),
        *("--precision", "float32", "--threads", "1", "--device", "cpu"),
        *("--validation-sentences", "2"),
    ]


@pytest.fixture
def parent(text: list[str], tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "old" / "model", sentences=SENTENCES, tie="all")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_model_dir(folder).weights)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_begins_with_weights_and_tokenizer_of_the_model(
    text: list[str], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    options = ["--max-steps", "2", "--validate-every", "1", "--schedule", "constant"]
    # Adam moves each weight by the learning rate at most.
    command = [*text, *options, "--learning-rate", "1e-7", "--warmup-steps", "0"]
    assert train.main([*command, "--init-from", str(parent), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"weights and tokenizer (330 pieces) of {parent}" in said
    before = re.search(r"before fine-tuning: .* ppl ([\d.]+)  accuracy .* BLEU", said)
    after = re.search(r"validation at step 1: .* ppl ([\d.]+) ", said)
    assert before and after and float(before[1]) == pytest.approx(float(after[1]), rel=1e-3)

    old, new = load_model_dir(parent), load_model_dir(output / "model")
    assert new.config == old.config
    assert new.source_tokenizer.sha256 == old.source_tokenizer.sha256
    for name, value in new.weights.items():
        assert 0 < np.abs(value - old.weights[name]).max() < 1e-6, name
    assert new.training["init_from"] == {
        "path": str(parent),
        "weights_sha256": file_digest(str(parent / "model.safetensors")),
        "training": old.training,
    }
    assert new.training["corpus"] == "text.en"
    results = json.loads((output / "results.json").read_text())
    assert results["validation_bleu_before"] >= 0 and results["init_from"]["path"] == str(parent)
    assert f"init_from: {parent}" in (output / "config.yaml").read_text()
    # No tokenizer was trained for it.
    cache = Path(text[text.index("--cache") + 1])
    assert not list(cache.glob("tokenizer-*"))


def test_goes_on_without_the_model_that_it_began_with(
    text: list[str],
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*text, "--init-from", str(parent), "--max-steps", "6", "--validate-every", "4"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*options, "--output", str(straight)]) == 0
    step = Trainer.train_step

    def stop_after_two(self: Trainer) -> None:
        # The model directory may go as soon as the training has begun.
        shutil.rmtree(parent, ignore_errors=True)
        step(self)
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", stop_after_two)
    assert train.main([*options, "--output", str(stopped)]) == 130
    monkeypatch.undo()
    assert not parent.exists()
    assert "leave --init-from out" in refusal(
        ["--resume", "--output", str(stopped), "--init-from", "x"], capsys
    )
    moved = stopped.rename(tmp_path / "moved")
    assert train.main(["--resume", "--output", str(moved)]) == 0
    said = capsys.readouterr().out
    assert "going on from step 2" in said and "before fine-tuning: loss" not in said
    first, second = weights(straight / "model"), weights(moved / "model")
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    assert load_model_dir(moved / "init").config == load_model_dir(straight / "init").config


def test_a_model_of_marian_keeps_its_vocabulary(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = save_random_model(tmp_path / "ours" / "model", sentences=SENTENCES, tie="all")
    to_huggingface(ours, tmp_path / "marian")
    parent = tmp_path / "imported"
    from_huggingface(tmp_path / "marian", parent)
    options = ["--max-steps", "2", "--validate-every", "2", "--output", str(tmp_path / "run")]
    assert train.main([*text, *options, "--init-from", str(parent)]) == 0
    old, new = load_model_dir(parent), load_model_dir(tmp_path / "run" / "model")
    assert new.config == old.config and new.config.eos_id == 0
    for side in ("source_tokenizer", "target_tokenizer"):
        assert getattr(new, side).sha256 == getattr(old, side).sha256
        vocabulary = getattr(old, side).vocabulary
        assert (new.path / vocabulary.name).read_bytes() == vocabulary.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--d-model 64", "--d-model: got 64, but the model of --init-from MODEL has 32"),
        ("--norm-first", "--norm-first: got yes, but the model of --init-from MODEL has no"),
        ("--preset tiny", "--preset: got tiny (d_model 128), but the model of --init-from MODEL"),
        ("--vocab-size 400", "--vocab-size: got 400, but the model of --init-from MODEL has a tok"),
        ("--tokenizer x.model", "--tokenizer: got x.model, but the model of --init-from MODEL has"),
        ("--tokenizer-type unigram", "--tokenizer-type: got unigram, but the model of --init-from"),
        ("--no-joint-vocab", "--joint-vocab: got no, but the model of --init-from MODEL has one"),
        ("--dropout 1.5", "--dropout: expected a probability in [0, 1), got 1.5"),
        ("--init-from no/model", "no/model: no such model directory"),
        ("--init-from MODEL/..", "the folder of a training; its model is"),
        ("--output MODEL/.. --overwrite", "--overwrite: would remove MODEL, which --init-from"),
    ],
)
def test_options_that_contradict_the_model(
    text: list[str],
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--overwrite" in options:
        (parent.parent / "config.yaml").write_text("")
    before = sorted(tmp_path.rglob("*"))
    arguments = options.replace("MODEL", str(parent)).split()
    error = refusal([*text, "--init-from", str(parent), *arguments], capsys)
    assert message.replace("MODEL", str(parent)) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_other_tasks_begin_with_random_weights() -> None:
    with pytest.raises(ConfigError, match="--init-from: --task copy begins with random weights"):
        from_dict(TrainConfig, {"task": "copy", "init_from": "x"})


def test_options_that_say_what_the_model_has(text: list[str], parent: Path) -> None:
    values: dict[str, Any] = {
        "init_from": str(parent),
        "data": {"vocab_size": 330},
        "model": {"d_model": 32, "norm_first": False, "dropout": 0.25},
    }
    found = Parent.open(from_dict(TrainConfig, values), TransformerConfig)
    architecture = found.architecture(values["model"])
    assert architecture.dropout == architecture.attention_dropout == 0.25
    assert architecture.activation_dropout == 0.25
    model = load_model_dir(parent).config
    changed = {"attention_dropout": 0.0}
    assert found.architecture(changed) == type(model)(**{**model.to_dict(), **changed})


def test_text_that_the_tokenizer_does_not_know(
    text: list[str], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bytes for what is unknown it can be learnt; where nothing is known it cannot."""
    lines = [f"кошка видит собаку {number % 7} и дом" for number in range(60)]
    (tmp_path / "ru").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (tmp_path / "en").write_text("the cat sees\nthe dog finds\nold house\n" * 20)
    files = ["--src-train", str(tmp_path / "ru"), "--tgt-train", str(tmp_path / "en")]
    command = [*text, *files, "--dry-run", "--init-from"]
    assert train.main([*command, str(parent)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"warning: [89]\d\.\d % of the tokens of the source text are single bytes", said
    )
    assert "of the target text" not in said

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert transformers
    write_marian_dir(tmp_path / "marian")
    from_huggingface(tmp_path / "marian", tmp_path / "imported")
    error = refusal([*command, str(tmp_path / "imported")], capsys)
    assert "does not fit the source text: " in error and "unknown to it" in error


def test_learning_rate_and_batch_follow_from_the_width() -> None:
    for width, preset in (
        (128, "tiny"),
        (256, "small"),
        (300, "small"),
        (512, "base"),
        (900, "big"),
    ):
        scratch = recipe_for(30_000, 15.0, "cpu", preset)
        recipe = fine_tuning_recipe(30_000, 15.0, "cpu", width)
        assert recipe.preset is None and recipe.model == {}
        assert recipe.learning_rate == scratch.learning_rate
        assert recipe.max_tokens == scratch.max_tokens
