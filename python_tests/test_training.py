"""The training loop: what a step computes, what it is divided by, when it ends, how it goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from transformer_ext.config import TrainConfig, from_dict
from transformer_ext.data.batches import pick_evenly
from transformer_ext.model import Transformer, TransformerConfig
from transformer_ext.training import trainer as trainer_module
from transformer_ext.training.batches import (
    BatchStream,
    Position,
    recurring_rows,
    to_device,
)
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.moving_average import MovingAverage
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, JsonLog, duration, read_log
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.scoring import pick_samples, score
from transformer_ext.training.sizing import fill, recipe_for, shipped_recipe
from transformer_ext.training.trainer import LossModule, Plan, Progress, Trainer, evaluate_loss

VOCAB = 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Numbers:
    """Sampler and collate function over random sentences; example i is always the same."""

    def __init__(self, examples: int = 24, per_batch: int = 4) -> None:
        self.examples, self.per_batch = examples, per_batch
        generator = np.random.default_rng(0)
        lengths = generator.integers(1, 9, (examples, 2))
        self.sentences = [
            (generator.integers(4, VOCAB, s), generator.integers(4, VOCAB, t)) for s, t in lengths
        ]
        self.label_counts = np.array([len(t) + 1 for _, t in self.sentences])

    def epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng(epoch).permutation(self.examples)
        return np.split(order, range(self.per_batch, self.examples, self.per_batch))

    def collate(self, examples: np.ndarray) -> Any:
        sources = [np.append(self.sentences[i][0], 3) for i in examples]
        targets = [self.sentences[i][1] for i in examples]
        return SimpleNamespace(
            src_ids=np.concatenate(sources),
            src_lengths=np.array([len(s) for s in sources]),
            tgt_ids=np.concatenate([np.append(2, t) for t in targets]),
            labels=np.concatenate([np.append(t, 3) for t in targets]),
            tgt_lengths=np.array([len(t) + 1 for t in targets]),
            target_tokens=int(self.label_counts[examples].sum()),
            sentences=len(examples),
        )

    def stream(self, **arguments: Any) -> BatchStream:
        return BatchStream(self.collate, self, self.label_counts, **arguments)


def small_model(dropout: float = 0.0, seed: int = 0, head_dim: int = 8) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(
        TransformerConfig(
            src_vocab_size=VOCAB,
            tgt_vocab_size=VOCAB,
            d_model=2 * head_dim,
            nhead=2,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dim_feedforward=32,
            dropout=dropout,
        )
    )


def trainer_for(
    model: Transformer, stream: BatchStream, plan: Plan, rate: float = 1e-2, **arguments: Any
) -> Trainer:
    optimizer = Optimizer(parameters_by_name(model).items(), clip_norm=1.0)
    schedule = Schedule("constant", rate, 2, plan.max_steps)
    return Trainer(model, stream, optimizer, schedule, plan, **arguments)


# The order of the data --------------------------------------------------------------------------


def test_ranks_share_the_batches_of_one_rank_with_accumulation() -> None:
    data = Numbers()
    single = data.stream(accum_steps=4)
    ranks = [data.stream(accum_steps=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(5):
        whole = next(single)
        parts = [next(stream) for stream in ranks]
        assert whole.microsteps == [0, 1, 2, 3]
        assert [part.microsteps for part in parts] == [[0, 2], [1, 3]]
        for rank, part in enumerate(parts):
            assert part.target_tokens == whole.target_tokens
            assert part.after == whole.after
            for mine, theirs in zip(part.batches, whole.batches[rank::2], strict=True):
                assert np.array_equal(mine.labels, theirs.labels)
        assert whole.target_tokens == sum(b.target_tokens for b in whole.batches)


def test_a_stream_goes_on_from_any_position() -> None:
    data = Numbers()
    straight = data.stream(accum_steps=4)
    steps = [next(straight) for _ in range(6)]
    resumed = data.stream(accum_steps=4, start=steps[2].after)
    for expected in steps[3:]:
        step = next(resumed)
        assert step.after == expected.after
        for a, b in zip(step.batches, expected.batches, strict=True):
            assert np.array_equal(a.src_ids, b.src_ids)


def test_an_epoch_is_read_once() -> None:
    data = Numbers()
    stream = data.stream()
    seen = [next(stream) for _ in range(data.examples // data.per_batch)]
    assert sum(step.batches[0].sentences for step in seen) == data.examples
    assert seen[-1].after == Position(0, len(seen))
    assert next(stream).after == Position(1, 1)


def test_wrong_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="accum_steps"):
        Numbers().stream(accum_steps=0)
    with pytest.raises(ValueError, match="position"):
        Numbers().stream(start=Position(0, 99))
    with pytest.raises(ValueError, match="training data"):
        BatchStream(lambda e: e, SimpleNamespace(epoch=lambda e: []), np.zeros(0))


# A step -----------------------------------------------------------------------------------------


def test_a_step_has_the_gradient_of_the_mean_over_all_its_tokens() -> None:
    data = Numbers()
    model, twin = small_model(), small_model()
    stream = data.stream(accum_steps=3)
    trainer = trainer_for(model, stream, Plan(max_steps=1, label_smoothing=0.1))
    captured: dict[str, torch.Tensor] = {}

    def capture(rate: float) -> None:
        captured.update({n: p.grad.clone() for n, p in trainer.optimizer.parameters.items()})

    trainer.optimizer.step = capture  # type: ignore[method-assign]
    trainer.train_step()

    step = next(data.stream(accum_steps=3))
    total = torch.zeros(())
    for batch in step.batches:
        b = to_device(batch, torch.device("cpu"))
        logits = twin.generator.logits(twin.forward_packed(*b.inputs))
        total = total + torch.nn.functional.cross_entropy(
            logits, b.labels, label_smoothing=0.1, reduction="sum"
        )
    (total / step.target_tokens).backward()
    for name, parameter in parameters_by_name(twin).items():
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_recurring_rows_are_few_and_near() -> None:
    counts = np.arange(1, 1 << 14)
    rounded = np.array([recurring_rows(int(count)) for count in counts])
    assert (rounded >= counts).all() and (np.diff(rounded) >= 0).all()
    assert (rounded[511:] - counts[511:] <= counts[511:] / 16).all()
    assert all(len(set(rounded[first : 2 * first])) <= 34 for first in (512, 1024, 4096))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_added_so_that_shapes_recur_have_no_effect(precision: str) -> None:
    data, model = Numbers(), small_model(dropout=0.3).set_precision(precision)
    trainer = trainer_for(model, data.stream(), Plan(max_steps=1, label_smoothing=0.1))
    batch, cpu = data.collate(np.arange(5)), torch.device("cpu")
    results = []
    for recurring in (False, True):
        loaded = to_device(batch, cpu, recurring=recurring)
        assert len(loaded.labels) % 16 == 0 or not recurring
        loss, nll, correct = trainer.losses(loaded, 7.0)
        model.zero_grad()
        loss.backward()
        results.append((loss, nll, correct, [p.grad for p in model.parameters()]))
    exact, padded = results
    assert len(batch.labels) % 16 and len(batch.src_ids) % 16
    # Other shapes may be added up in another order.
    tolerance = 1e-5 if precision == "float32" else 2e-2
    torch.testing.assert_close(padded[:2], exact[:2], rtol=tolerance / 10, atol=0)
    assert padded[2] == exact[2]
    for mine, other in zip(padded[3], exact[3], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * other.abs().max())


def test_evaluation_equals_the_loss_by_hand_and_leaves_dropout_off() -> None:
    data, model = Numbers(), small_model(dropout=0.5)
    trainer = trainer_for(model, data.stream(), Plan(max_steps=1, label_smoothing=0.0))
    batches = [lambda e=e: data.collate(e) for e in data.epoch(0)]
    loss, nll, accuracy = evaluate_loss(trainer.losses, batches, trainer.world)
    assert loss == pytest.approx(nll)
    assert (loss, nll, accuracy) == evaluate_loss(trainer.losses, batches, trainer.world)
    model.eval()
    sums = 0.0
    for make in batches:
        b = to_device(make(), torch.device("cpu"))
        hidden = model.forward_packed(*b.inputs)
        logits = model.generator.logits(hidden)
        sums += torch.nn.functional.cross_entropy(logits, b.labels, reduction="sum").item()
    assert nll == pytest.approx(sums / data.label_counts.sum(), rel=1e-5)
    assert 0.0 <= accuracy <= 1.0


@pytest.mark.parametrize("fails", [False, True])
def test_fit_ends_the_workers_and_counts_the_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    class Failing(Numbers):
        def collate(self, examples: np.ndarray) -> Any:
            if fails and 6 in examples:
                raise OSError("cannot read example 6")
            return super().collate(examples)

    # A clock on which a step takes 5 seconds and waiting for its data 2 of them.
    now = 0.0

    class Slow(BatchStream):
        def __next__(self) -> Any:
            nonlocal now
            now += 2.0
            return super().__next__()

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: now))
    # Those of others may still be ending.
    before = set(threading.enumerate())
    data = Failing()
    order = [batch.tolist() for epoch in range(3) for batch in data.epoch(epoch)]
    place = next(i for i, batch in enumerate(order) if 6 in batch)
    log = tmp_path / "log.jsonl"
    trainer = trainer_for(
        small_model(),
        Slow(data.collate, data, data.label_counts, workers=2),
        Plan(max_steps=place + 2, log_every=1),
        log=JsonLog(log),
    )
    step = trainer.optimizer.step

    def computed(rate: float) -> None:
        nonlocal now
        now += 3.0
        step(rate)

    trainer.optimizer.step = computed  # type: ignore[method-assign]
    if fails:
        with pytest.raises(OSError, match="cannot read example 6"):
            trainer.fit()
    else:
        assert trainer.fit() == "finished"
    assert trainer.progress.step == (place if fails else place + 2)
    after = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in after if name.startswith("transformer_ext")]
    events = [e for e in read_log(log) if e["event"] == "train"]
    assert len(events) == trainer.progress.step > 0
    assert [e["data_seconds"] for e in events] == [2.0] * len(events)
    assert [e["seconds"] for e in events] == [5.0 * (i + 1) for i in range(len(events))]


def test_it_learns() -> None:
    data, model = Numbers(8, 8), small_model()
    trainer = trainer_for(model, data.stream(), Plan(max_steps=150, label_smoothing=0.0))
    assert trainer.fit() == "finished"
    batches = [lambda: data.collate(np.arange(8))]
    assert evaluate_loss(trainer.losses, batches, trainer.world)[2] > 0.95


# The end ----------------------------------------------------------------------------------------


def _logged(tmp_path: Path) -> tuple[JsonLog, Path]:
    return JsonLog(tmp_path / "log.jsonl"), tmp_path / "log.jsonl"


def test_log_has_a_line_each_interval_and_reads_back(tmp_path: Path) -> None:
    log, path = _logged(tmp_path)
    data, output = Numbers(), io.StringIO()
    trainer = trainer_for(
        small_model(),
        data.stream(),
        Plan(max_steps=10, log_every=4, validate_every=5),
        validation_batches=[lambda: data.collate(np.arange(4))],
        console=Console(output),
        log=log,
    )
    assert trainer.fit() == "finished"
    log.close()
    events = read_log(path)
    assert [(e["event"], e["step"]) for e in events] == [
        ("train", 4),
        ("validation", 5),
        ("train", 8),
        ("train", 10),
        ("validation", 10),
    ]
    assert events[0]["loss"] > 0 and events[0]["tokens_per_second"] > 0
    assert events[3]["target_tokens"] == trainer.progress.target_tokens
    lines = output.getvalue().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 3
    assert sum(line.startswith("validation at step ") for line in lines) == 2
    assert all(
        0.0 < event["validation_share"] < 1.0
        for event in events
        if "loss" in event and event["event"] == "validation"
    )
    assert sum("% of the time so far]" in line for line in lines) == 2


def test_a_score_of_the_model_in_memory_is_given_no_folder() -> None:
    data = Numbers()
    trainer = trainer_for(
        small_model(),
        data.stream(),
        Plan(max_steps=1),
        validation_batches=[lambda: data.collate(np.arange(4))],
        score=lambda folder: {"bleu": 7.0 if folder is None else 0.0},
        score_in_memory=lambda: True,
    )
    assert trainer.validate().scores == {"bleu": 7.0}


def test_a_resumed_log_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    steps = [("train", 5), ("train", 10), ("resume", 5), ("train", 10)]
    lines = [json.dumps({"event": e, "step": s, "n": i}) for i, (e, s) in enumerate(steps)]
    path.write_text("\n".join([*lines, '{"event": "tra']))
    assert [e["n"] for e in read_log(path)] == [0, 2, 3]


def test_early_stopping_ends_after_the_given_number_of_validations() -> None:
    data = Numbers()
    trainer = trainer_for(
        small_model(),
        data.stream(),
        Plan(max_steps=100, validate_every=2, early_stop_patience=3),
        # With so high a rate nothing is learnt.
        rate=5.0,
        validation_batches=[lambda: data.collate(np.arange(4))],
    )
    assert trainer.fit() == "early stop"
    ended = trainer.progress.step
    assert trainer.fit() == "early stop" and trainer.progress.step == ended  # as on resuming
    assert trainer.progress.worse == 3
    assert trainer.progress.step == trainer.progress.best_step + 6


def test_best_checkpoints_are_those_of_the_metric(tmp_path: Path) -> None:
    """BLEU here rises and falls while the loss falls: 1, 5, 3, 5, 4."""
    model, data = small_model(), Numbers()
    bleu = iter([1.0, 5.0, 3.0, 5.0, 4.0, 2.0, 2.0])
    folders = []

    def judge(folder: Path) -> dict[str, float]:
        assert (folder / "weights").is_file()
        folders.append(folder)
        return {"bleu": next(bleu)}

    trainer = trainer_for(
        model,
        data.stream(),
        Plan(max_steps=20, validate_every=2, metric="bleu", keep_best=3, early_stop_patience=4),
        validation_batches=[lambda: data.collate(np.arange(6))],
        score=judge,
        checkpoints=Checkpoints(tmp_path, keep=1),
        write_model=lambda folder: torch.save(model.state_dict(), folder / "weights"),
        log=JsonLog(tmp_path / "log.jsonl"),
    )
    assert trainer.fit() == "early stop"
    # The first of two equal ones is the best.
    assert trainer.progress.best == [(5.0, 4), (5.0, 8), (4.0, 10)]
    assert trainer.progress.worse == 4 and trainer.progress.step == 12
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        *("step-10", "step-12", "step-4", "step-8")
    ]
    assert trainer.checkpoints is not None and trainer.checkpoints.pointed("best") == 4
    assert not any(folder.exists() for folder in folders)
    found = [e["bleu"] for e in read_log(tmp_path / "log.jsonl") if e["event"] == "validation"]
    assert found == [1.0, 5.0, 3.0, 5.0, 4.0, 2.0]

    # By another metric, what was the best so far is not known any more.
    trainer.plan = dataclasses.replace(trainer.plan, metric="nll")
    trainer.restore(12)
    assert trainer.progress.best == [] and trainer.progress.worse == 0


def test_time_ends_it() -> None:
    trainer = trainer_for(small_model(), Numbers().stream(), Plan(max_steps=10**6, max_seconds=0.2))
    assert trainer.fit() == "time"
    assert trainer.progress.seconds < 5


class BreaksAt(Transformer):
    """Its loss is NaN in the training steps named, or infinite with gradients that are not."""

    def __init__(self, steps: set[int], infinite: bool = False) -> None:
        config = dataclasses.replace(small_model().config, output_bias=infinite)
        super().__init__(config)
        self.load_state_dict(small_model().state_dict(), strict=not infinite)
        self.steps = steps
        self.infinite = infinite

    def forward_packed(self, *arguments: Any) -> torch.Tensor:
        hidden = super().forward_packed(*arguments)
        broken = self.training and int(self.rng[1]) in self.steps
        if self.infinite:
            self.generator.bias.data.fill_(-math.inf if broken else 0.0)
            self.generator.bias.data[5:] = 0.0
            return hidden
        return hidden * math.nan if broken else hidden


def test_a_broken_step_is_skipped_counted_and_its_batches_saved(tmp_path: Path) -> None:
    model, data = BreaksAt({3, 5}), Numbers()
    log = JsonLog(tmp_path / "log.jsonl")
    trainer = trainer_for(
        model,
        data.stream(accum_steps=2),
        Plan(max_steps=6, log_every=2),
        log=log,
        skipped_folder=tmp_path / "skipped",
    )
    for _ in range(2):
        trainer.train_step()
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train_step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert trainer.fit() == "finished"
    log.close()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(before[0], next(model.parameters()))
    assert float(trainer.optimizer.skipped) == 2
    events = read_log(tmp_path / "log.jsonl")
    assert [e["step"] for e in events if e["event"] == "skipped"] == [3, 5]
    reports = [e for e in events if e["event"] == "train"]
    assert all(math.isfinite(e["nll"]) for e in reports) and reports[-1]["skipped_steps"] == 2
    saved = json.loads((tmp_path / "skipped" / "step-3.rank-0.json").read_text())
    again = data.stream(accum_steps=2)
    third = [next(again) for _ in range(3)][2]
    assert [b["labels"] for b in saved["batches"]] == [b.labels.tolist() for b in third.batches]


def test_an_infinite_loss_is_skipped_though_its_gradients_are_finite() -> None:
    model, data = BreaksAt({2}, infinite=True), Numbers()
    losses = LossModule(model, 0.0)
    model.rng.copy_(torch.tensor([1, 2, 0]))
    batch = losses.load(next(data.stream()).batches[0], torch.device("cpu"))
    loss = losses(batch, 1.0)[0]
    loss.backward()
    assert loss.isinf() and all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    trainer = trainer_for(model, data.stream(), Plan(max_steps=3, label_smoothing=0.0))
    trainer.train_step()
    before = model.decoder.layers[0].feed_forward.in_projection.weight.detach().clone()
    trainer.train_step()
    assert torch.equal(before, model.decoder.layers[0].feed_forward.in_projection.weight)
    assert float(trainer.optimizer.skipped) == 1
    trainer.train_step()
    assert not torch.equal(before, model.decoder.layers[0].feed_forward.in_projection.weight)
    assert float(trainer.optimizer.skipped) == 1


def test_too_many_broken_steps_are_one_clear_error() -> None:
    plan = Plan(max_steps=10, log_every=2, max_skipped=2)
    assert trainer_for(BreaksAt({1, 4}), Numbers().stream(), plan).fit() == "finished"
    trainer = trainer_for(BreaksAt({1, 4, 7}), Numbers().stream(), plan)
    with pytest.raises(FloatingPointError, match="max_skipped_steps: 3 .* learning_rate"):
        trainer.fit()
    assert trainer.progress.step == 7


def test_broken_steps_are_counted_from_the_last_validation() -> None:
    data = Numbers()
    trainer = trainer_for(
        BreaksAt({1, 2, 4, 5}),
        data.stream(),
        Plan(max_steps=6, validate_every=3, max_skipped=2),
        validation_batches=[lambda: data.collate(np.arange(4))],
    )
    assert trainer.fit() == "finished"
    assert float(trainer.optimizer.skipped) == 4 and trainer.progress.skipped == 0


def test_a_validation_that_is_nan_is_never_the_best() -> None:
    progress = Progress()
    for step, (value, best) in enumerate(
        [(math.nan, False), (2.0, True), (math.nan, False), (3.0, False), (1.0, True)], 1
    ):
        progress.step = step
        assert progress.rank(value, "nll", keep=5) == best, step
    assert progress.best == [(1.0, 5), (2.0, 2), (3.0, 4)]
    assert progress.worse == 0
    progress.rank(math.nan, "nll", keep=5)
    assert progress.worse == 1 and progress.best_step == 5


def test_moving_average_is_validated_and_saved_in_place_of_the_weights(tmp_path: Path) -> None:
    model, data = small_model(), Numbers()
    weight = model.generator.weight
    checkpoints, saved = Checkpoints(tmp_path), {}
    judged = []

    def batch() -> Any:
        judged.append(weight.detach().clone())
        return data.collate(np.arange(4))

    trainer = trainer_for(
        model,
        data.stream(),
        Plan(max_steps=3, validate_every=3),
        validation_batches=[batch],
        checkpoints=checkpoints,
        write_model=lambda folder: saved.update(weight=weight.detach().clone()),
        moving_average=MovingAverage(parameters_by_name(model), 0.5),
    )
    average = weight.detach().double()
    raw = []
    step = trainer.optimizer.step

    def recorded(rate: float) -> None:
        step(rate)
        raw.append(weight.detach().clone())

    trainer.optimizer.step = recorded  # type: ignore[method-assign]
    trainer.fit()
    for number, value in enumerate(raw, 1):
        decay = min(0.5, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * value.double()
    assert torch.allclose(judged[0].double(), average, atol=1e-6)
    assert torch.equal(judged[0], saved["weight"])
    assert torch.equal(weight, raw[-1]) and not torch.equal(weight, judged[0])
    name = next(n for n, p in parameters_by_name(model).items() if p is weight)
    assert torch.equal(checkpoints.load(3)[0][f"weights.{name}"], raw[-1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_resuming_in_mid_epoch_gives_the_same_bits(
    tmp_path: Path, precision: str, decay: float | None
) -> None:
    data = Numbers()

    def make(model: Transformer, stream: BatchStream, directory: Path) -> Trainer:
        model.set_precision(precision)
        return trainer_for(
            model,
            stream,
            Plan(max_steps=11, validate_every=4, seed=7),
            validation_batches=[lambda: data.collate(np.arange(6))],
            checkpoints=Checkpoints(directory, keep=10),
            write_model=lambda folder: torch.save(model.state_dict(), folder / "weights"),
            moving_average=MovingAverage(parameters_by_name(model), decay) if decay else None,
            run_facts={"threads": torch.get_num_threads()},
        )

    straight = small_model(dropout=0.3)
    first = make(straight, data.stream(accum_steps=2), tmp_path)
    first.fit()
    assert first.progress.position.batch != 0

    for step in (4, 8):
        resumed = small_model(dropout=0.3, seed=5)
        checkpoints = Checkpoints(tmp_path, keep=10)
        resumed.load_state_dict(torch.load(checkpoints.path(step) / "weights", weights_only=True))
        progress = Progress.from_dict(checkpoints.load(step)[1]["progress"])
        stream = data.stream(accum_steps=2, start=progress.position)
        second = make(resumed, stream, tmp_path)
        assert second.restore(step) == []
        second.checkpoints = None
        assert second.fit() == "finished"
        if decay:
            assert first.moving_average is not None and second.moving_average is not None
            with first.moving_average.applied(), second.moving_average.applied():
                assert torch.equal(straight.generator.weight, resumed.generator.weight)
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert second.progress.target_tokens == first.progress.target_tokens
        assert second.progress.best == first.progress.best


def test_a_run_goes_on_with_or_without_the_moving_average(tmp_path: Path) -> None:
    model = small_model()
    arguments: dict[str, Any] = {
        "checkpoints": Checkpoints(tmp_path),
        "write_model": lambda folder: torch.save(model.state_dict(), folder / "weights"),
    }

    def make(plan: Plan, decay: float | None) -> Trainer:
        average = MovingAverage(parameters_by_name(model), decay) if decay else None
        return trainer_for(model, Numbers().stream(), plan, moving_average=average, **arguments)

    with_average = make(Plan(max_steps=3), 0.9)
    with_average.fit()
    trained = model.generator.weight.detach().clone()
    with_average.save()
    saved = torch.load(tmp_path / "step-3" / "weights", weights_only=True)
    assert not torch.equal(saved["generator.weight"], trained)

    # What the caller does on resuming; then the trainer puts the weights themselves back.
    model.load_state_dict(saved)
    without = make(Plan(max_steps=3), None)
    without.stream.seek(with_average.progress.position)
    without.restore(3)
    assert torch.equal(model.generator.weight, trained)
    without.save()

    anew = make(Plan(max_steps=3), 0.9)
    anew.stream.seek(with_average.progress.position)
    anew.restore(3)
    assert anew.moving_average is not None
    with anew.moving_average.applied():
        assert torch.equal(model.generator.weight, trained)


def test_other_facts_are_warned_of(tmp_path: Path) -> None:
    model = small_model()
    arguments: dict[str, Any] = {
        "checkpoints": Checkpoints(tmp_path),
        "write_model": lambda folder: None,
    }
    trainer_for(
        model, Numbers().stream(), Plan(max_steps=2), run_facts={"threads": 2}, **arguments
    ).save()
    other = trainer_for(
        model, Numbers().stream(), Plan(max_steps=2), run_facts={"threads": 1}, **arguments
    )
    assert "threads was 2 and is 1 now" in other.restore(0)[0]


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    model = small_model()

    def make(data: Numbers) -> Trainer:
        return trainer_for(
            model,
            data.stream(),
            Plan(max_steps=2),
            checkpoints=Checkpoints(tmp_path),
            write_model=lambda folder: None,
        )

    make(Numbers()).save()
    # As many batches of as many sentences, one of which is longer now.
    other = Numbers()
    other.label_counts[3] += 1
    with pytest.raises(ValueError, match="training data: got 24 examples .* its text or what cuts"):
        make(other).restore(0)
    assert make(Numbers()).restore(0) == []


# Small things -----------------------------------------------------------------------------------


def test_console_live_and_plain() -> None:
    plain, live, silent = io.StringIO(), io.StringIO(), io.StringIO()
    for console in (Console(plain), Console(live, live=True), Console(silent, silent=True)):
        console.update("step 1")
        console.print("done")
    assert plain.getvalue() == "done\n"
    assert live.getvalue() == "step 1\r\x1b[Kdone\n"
    assert silent.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m"), (2.8e5, "3d 05h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_picking() -> None:
    assert pick_evenly(10, 3).tolist() == [0, 3, 6]
    assert pick_evenly(2, 300).tolist() == [0, 1]
    pairs = [("one two three four five six", "x")] * 5 + [("short", "x")] * 5
    assert all(number < 5 for number in pick_samples(pairs, 2))
    assert len(set(pick_samples(pairs, 2))) == 2
    assert pick_samples([("short", "x")], 5) == [0]


def test_scores_carry_their_signatures() -> None:
    same = score(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same.bleu == pytest.approx(100.0) and same.chrf == pytest.approx(100.0)
    assert "tok:13a" in same.bleu_signature and "nrefs:1" in same.chrf_signature


def test_size_follows_pairs_and_device() -> None:
    few, many = recipe_for(1000, 20, "cpu"), recipe_for(5_000_000, 30, "cuda")
    assert few.preset == "tiny" and many.preset == "base"
    assert few.model["dropout"] > many.model["dropout"]
    assert recipe_for(1000, 20, "cpu", "base").preset == "base"
    for recipe in (few, many):
        assert recipe.early_stop_patience and recipe.warmup_steps < recipe.max_steps


def test_a_preset_keeps_the_norm_order_and_gets_its_own_learning_rate() -> None:
    small, base = shipped_recipe("cpu"), shipped_recipe("cpu", "base")
    assert (small.preset, base.preset) == ("small", "base")
    assert base.learning_rate < small.learning_rate
    config = fill(from_dict(TrainConfig, {"preset": "base"}), base)
    assert config.model["norm_first"] and config.optimizer.learning_rate == base.learning_rate
    given = {"preset": "base", "model": {"norm_first": False}}
    assert not fill(from_dict(TrainConfig, given), base).model["norm_first"]


def test_passes_asked_for_are_not_cut_short_by_the_recipe() -> None:
    recipe = shipped_recipe("cpu")
    for given, expected in (
        ({}, recipe.max_steps),
        ({"max_epochs": 100}, None),
        ({"max_epochs": 100, "max_steps": 7}, 7),
    ):
        training = fill(from_dict(TrainConfig, {"training": given}), recipe).training
        assert training.max_steps == expected and training.max_tokens == recipe.max_tokens
