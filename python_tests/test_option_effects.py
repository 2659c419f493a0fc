"""Options of ``python -m transformer_ext.train`` reach what they are there to change."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from training_helpers import SMALL_MODEL, write_text

from transformer_ext import train
from transformer_ext.average import average_weights
from transformer_ext.config import TrainConfig, parse_arguments
from transformer_ext.data.text import TextBatch
from transformer_ext.files import load_model_dir
from transformer_ext.ops import set_backend
from transformer_ext.training import text_run
from transformer_ext.training.batches import BatchStream, Position
from transformer_ext.training.classification import macro_f1
from transformer_ext.training.distributed import World
from transformer_ext.training.machine import Machine
from transformer_ext.training.report import Console, JsonLog, read_log
from transformer_ext.training.run import Run
from transformer_ext.training.tasks import task_of
from transformer_ext.training.trainer import LossModule, Trainer, Validation, evaluate_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


def pairs(folder: Path) -> list[str]:
    return [
        *("--src-train", str(folder / "text.en"), "--tgt-train", str(folder / "text.de")),
        *("--held-out", "0.05", "--cache", str(folder / "cache"), *SMALL_MODEL),
    ]


def prepared(*options: str) -> Any:
    """The run that the command would begin."""
    config = parse_arguments(TrainConfig, options, prog="train", description="")
    task = task_of(config)
    config = task.preferences(config)
    return task.prepare(config, Machine.join(config), Console(silent=True))


def an_epoch(stream: BatchStream, number: int) -> list[Any]:
    """The batches of one epoch, the stream being at its begin; then it is at that of the next."""
    batches = []
    while (step := next(stream)).after.epoch == number:
        batches += step.batches
    stream.seek(Position(number + 1))
    stream.close()
    return batches


def sentences(batches: list[Any], side: str) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        ids, lengths = getattr(batch, f"{side}_ids"), getattr(batch, f"{side}_lengths")
        found += [tuple(s.tolist()) for s in np.split(ids, np.cumsum(lengths)[:-1])]
    return found


@pytest.mark.parametrize(
    ("weights", "temperature", "many", "few"),
    [
        ((1.0, 1.0), None, 100, 20),
        ((0.5, 3.0), None, 50, 60),
        # In proportion to the square roots of 100 and 20, 120 in all.
        ((None, None), 2.0, 83, 37),
    ],
)
def test_weights_and_temperature_of_corpora_decide_what_an_epoch_holds(
    tmp_path: Path,
    weights: tuple[float | None, float | None],
    temperature: float | None,
    many: int,
    few: int,
) -> None:
    corpora = []
    for name, count, weight in (("many", 100, weights[0]), ("few", 20, weights[1])):
        (tmp_path / name).mkdir()
        source, target = write_text(tmp_path / name, count, seed=count)
        if name == "few":
            # Told by a word of its own.
            source.write_text("".join(f"zebra {x}\n" for x in source.read_text().splitlines()))
        corpora.append({"name": name, "src": [str(source)], "tgt": [str(target)], "weight": weight})
    file = tmp_path / "config.yaml"
    data = {"corpora": corpora, "temperature": temperature, "held_out": 0.0}
    file.write_text(yaml.safe_dump({"data": data}))
    run = prepared("--config", str(file), "--cache", str(tmp_path / "cache"), *SMALL_MODEL)
    tokenizer = run.prepared.source_tokenizer
    read = sentences(an_epoch(run.make_stream(None), 0), "src")
    found = sum("zebra" in tokenizer.decode(list(ids)) for ids in read)
    assert (len(read) - found, found) == (many, few)


@pytest.mark.parametrize("sides", ["both", "source", "target"])
def test_subword_dropout_cuts_each_epoch_into_other_pieces(folder: Path, sides: str) -> None:
    options = [*pairs(folder), "--joint-vocab"]
    plain = prepared(*options)
    dropped = prepared(*options, "--subword-dropout", "0.5", "--subword-dropout-sides", sides)
    tokenizer = plain.prepared.source_tokenizer
    read: dict[str, dict[str, list[list[tuple[int, ...]]]]] = {}
    for name, run in (("plain", plain), ("dropped", dropped)):
        stream = run.make_stream(None)
        epochs = [an_epoch(stream, number) for number in (0, 1)]
        read[name] = {
            side: [sorted(sentences(epoch, side)) for epoch in epochs] for side in ("src", "tgt")
        }
    for side, acts in (("src", sides != "target"), ("tgt", sides != "source")):
        first, second = read["dropped"][side]
        texts = [sorted(tokenizer.decode(list(s)) for s in epoch) for epoch in (first, second)]
        assert texts[0] == texts[1]
        whole = read["plain"][side]
        assert whole[0] == whole[1]
        assert (first != second) == acts and (first != whole[0]) == acts


def test_why_the_steps_on_a_gpu_are_no_graphs(folder: Path) -> None:
    plain, recorded = prepared(*pairs(folder), "--no-cuda-graphs"), prepared(*pairs(folder))
    assert "--no-cuda-graphs" in plain._why_no_graphs() and recorded._why_no_graphs() is None
    for run in (plain, recorded):
        assert run.make_trainer(JsonLog(None), None).plan.cuda_graphs == (run is recorded)
    with set_backend("reference"):
        assert "plain PyTorch" in recorded._why_no_graphs()
    two = World(0, 2, recorded.machine.device)
    recorded.machine = dataclasses.replace(recorded.machine, world=two)
    assert recorded._why_no_graphs() is None


@pytest.mark.parametrize("task", ["translate", "copy", "language-model", "classify"])
def test_data_workers_reach_the_stream(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    make = BatchStream.__init__

    def recorded(self: BatchStream, *arguments: Any, workers: int = 0, **more: Any) -> None:
        found.append(workers)
        make(self, *arguments, workers=workers, **more)

    monkeypatch.setattr(BatchStream, "__init__", recorded)
    labelled = tmp_path / "labelled.tsv"
    lines = (folder / "text.en").read_text().splitlines()
    labelled.write_text("".join(f"{'ab'[i % 2]}\t{line}\n" for i, line in enumerate(lines)))
    small = ["--preset", "tiny", "--d-model", "32", "--nhead", "2", "--device", "cpu"]
    text = ["--vocab-size", "330", "--held-out", "0.05", "--cache", str(tmp_path / "cache"), *small]
    options = {
        "translate": pairs(folder),
        "copy": [
            "--task",
            "copy",
            "--sequences",
            "100",
            "--cache",
            str(tmp_path / "cache"),
            *small,
        ],
        "language-model": ["--task", task, "--text-train", str(folder / "text.en"), *text],
        "classify": ["--task", task, "--labelled-train", str(labelled), *text],
    }[task]
    run = prepared(*options, "--threads", "1", "--data-workers", "3")
    run.make_stream(None)
    assert found == [3]


def test_the_average_of_the_best_checkpoints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Trainer.validate
    # Of six validations the best are the second, the third and the first; then that of the average.
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 0.5])

    def judged(self: Trainer, *arguments: Any, **keywords: Any) -> Validation:
        found = validate(self, *arguments, **keywords)
        return dataclasses.replace(found, nll=next(values))

    monkeypatch.setattr(Trainer, "validate", judged)
    monkeypatch.setattr(Run, "test", lambda self, model: {})
    run = tmp_path / "run"
    options = "--max-steps 12 --validate-every 2 --average-best 3 --keep-best 3".split()
    options += ["--learning-rate", "0.01", "--validation-sentences", "0", "--output", str(run)]
    assert train.main([*pairs(folder), *options]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["weights"] == "average of the best 3 checkpoints"
    found = [e["nll"] for e in read_log(run / "log.jsonl") if e["event"] == "validation"]
    assert found == [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    mean = average_weights([run / "checkpoints" / f"step-{step}" for step in (2, 4, 6)])
    weights = load_model_dir(run / "model").weights
    assert weights.keys() == mean.keys()
    for name, value in mean.items():
        assert np.array_equal(weights[name], value), name


def test_the_last_checkpoints_are_averaged_as_far_as_they_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "test", lambda self, model: {})
    run = tmp_path / "run"
    options = "--max-steps 8 --validate-every 2 --keep-checkpoints 3 --held-out 0".split()
    assert train.main([*pairs(folder), *options, "--output", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["weights"] == "average of the last 3 checkpoints"
    mean = average_weights([run / "checkpoints" / f"step-{step}" for step in (4, 6, 8)])
    for name, value in load_model_dir(run / "model").weights.items():
        assert np.array_equal(value, mean[name]), name


def test_macro_f1_at_validation_is_of_what_the_loss_is_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = tmp_path / "labelled.tsv"
    lines = (folder / "text.en").read_text().splitlines()
    labelled.write_text("".join(f"{'ab'[i % 2]}\t{line}\n" for i, line in enumerate(lines)))
    run = prepared(
        *("--task", "classify", "--labelled-train", str(labelled), "--held-out", "0.2"),
        *("--preset", "tiny", "--d-model", "32", "--nhead", "2", "--device", "cpu"),
        *("--vocab-size", "330", "--max-tokens", "40", "--threads", "1"),
        *("--cache", str(tmp_path / "cache")),
    )
    assert len(run.prepared.dev) > 30
    monkeypatch.setattr(text_run, "_VALIDATION_EXAMPLES", 30)
    batches = run.validation_batches()
    read: list[TextBatch] = []

    def recorded(make: Any) -> Any:
        read.append(make())
        return read[-1]

    makes = [functools.partial(recorded, make) for make in batches]
    monkeypatch.setattr(run, "validation_batches", lambda: makes)
    judge = run.make_scorer()
    run.model.train()
    found = judge(tmp_path)["macro_f1"]
    assert len(read) == len(batches) > 1 and sum(batch.sentences for batch in read) == 30
    assert run.model.training
    losses = LossModule(run.model, 0.0)
    accuracy = evaluate_loss(losses, batches, run.machine.world)[2]
    table = run._validation_table()
    assert np.trace(table) == pytest.approx(30 * accuracy) and table.sum() == 30
    assert found == pytest.approx(100 * macro_f1(table))
