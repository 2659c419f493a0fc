"""A training step as a GPU runs it: fixed shapes, nothing that waits, CUDA graphs, float16."""

from __future__ import annotations

import importlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import needs_compiled, needs_gpu
from test_training import VOCAB, Numbers, small_model, trainer_for
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_ext.model import LanguageModel, TextEncoder, Transformer
from transformer_ext.ops import _backend, cross_entropy, set_backend
from transformer_ext.training import distributed
from transformer_ext.training import optimizer as optimizer_module
from transformer_ext.training.batches import Layout, to_device
from transformer_ext.training.device_step import DeviceStep
from transformer_ext.training.device_step import Numbers as StepNumbers
from transformer_ext.training.environment import choose_precision
from transformer_ext.training.moving_average import MovingAverage
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, JsonLog, read_log
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.trainer import LossModule, Plan, Trainer, evaluate_loss

CPU = torch.device("cpu")


class OpByOp:
    """In place of CUDA graphs: the same fixed shapes and memory, but each step is computed."""

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Any:
        return SimpleNamespace(replay=work)


class Emulated(OpByOp):
    """CUDA graphs on a CPU: the ops of a step in their order, on the same memory each time.

    What was a number on the host when it was recorded stays what it was.
    """

    #: Calls of each op with the type of what it reads first, in what was recorded last.
    counts: Counter[tuple[str, torch.dtype]] = Counter()

    def record(self, work: Callable[[], None]) -> Any:
        calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        made: set[int] = set()

        class Recording(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                for tensor in tensors((args, kwargs)):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in made | before.keys():
                        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                        before[storage.data_ptr()] = whole, whole.clone()
                results = func(*args, **(kwargs or {}))
                calls.append((func, args, kwargs or {}, tensors(results)))
                made.update({t.untyped_storage().data_ptr() for t in calls[-1][3]} - before.keys())
                return results

        def replay() -> None:
            for func, args, kwargs, results in calls:
                with torch.no_grad():
                    for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                        if old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        with Recording():
            work()
        self.counts = Counter(
            (f.name(), t.dtype) for f, args, *_ in calls for t in tensors(args)[:1]
        )
        # Recording computes nothing.
        for whole, content in before.values():
            whole.copy_(content)
        return SimpleNamespace(replay=replay)


def tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def fixed(trainer: Trainer, graphs: Any = None) -> Trainer:
    """The trainer, its steps in fixed shapes as on a GPU."""
    trainer._device_step._graphs = graphs or OpByOp()
    return trainer


class Texts(Numbers):
    """Each text has one label."""

    def __init__(self, examples: int = 24) -> None:
        super().__init__(examples)
        self.label_counts = np.ones(examples, np.int64)

    def collate(self, examples: np.ndarray) -> Any:
        pairs = super().collate(examples)
        count = len(examples)
        return SimpleNamespace(
            ids=pairs.tgt_ids,
            lengths=pairs.tgt_lengths,
            labels=examples % 2,
            target_tokens=count,
            sentences=count,
        )


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# Fixed shapes -----------------------------------------------------------------------------------


def test_a_layout_holds_the_batch_and_nothing_that_counts() -> None:
    data = Numbers()
    batches = [data.collate(np.arange(first, first + 5)) for first in (0, 7)]
    layout = Layout.of(batches)
    assert layout.rows == tuple(
        max(Layout.of([batch]).rows[side] for batch in batches) for side in (0, 1)
    )
    for batch in batches:
        exact = to_device(batch, CPU)
        block = layout.block("cpu")
        block.fill_(0x7F)
        held = layout.views(layout.fill(batch, block))
        for side in (0, 2):
            ids, packed = exact.inputs[side : side + 2]
            wide, place = held.inputs[side : side + 2]
            assert len(wide) == place.capacity == layout.rows[side // 2] >= len(ids)
            assert torch.equal(wide[: len(ids)], ids) and not wide[len(ids) :].any()
            assert torch.equal(place.positions[: len(ids)], packed.positions)
            assert not place.positions[len(ids) :].any()
            assert torch.equal(place.cu_seqlens[:6], packed.cu_seqlens)
            assert (place.cu_seqlens[6:] == len(ids)).all() and place.batch_size == 16
            assert place.max_length >= packed.max_length
        assert torch.equal(held.labels[: len(exact.labels)], exact.labels)
        assert (held.labels[len(exact.labels) :] == -100).all()
        for tensor in (held.labels, held.inputs[0], held.inputs[2], held.inputs[1].positions):
            assert tensor.storage_offset() * tensor.element_size() % 256 == 0
    # A text without a token would have no vector.
    texts = [Texts().collate(np.arange(first, first + 5)) for first in (0, 7)]
    layout = Layout.of(texts)
    assert layout.sequences == layout.labels == 16
    for batch in texts:
        held = layout.views(layout.fill(batch, layout.block("cpu")))
        lengths = held.inputs[1].lengths.tolist()
        assert lengths == [*batch.lengths, *[1] * 11] and sum(lengths) <= len(held.inputs[0])
        assert held.labels.tolist() == [*batch.labels, *[-100] * 11]
    # Learned positions end before the bound that would be taken.
    longest = max(int(b.src_lengths.max()) for b in batches)
    assert Layout.of(batches, longest + 1).longest[0] == longest + 1


@pytest.mark.parametrize("kind", ["transformer", "learned positions", "first", "mean"])
def test_steps_in_fixed_shapes_compute_the_same(kind: str) -> None:
    data = Texts(examples=25) if kind in ("first", "mean") else Numbers(examples=25)
    results = []
    for adapt in (lambda trainer: trainer, fixed):
        model = small_model(dropout=0.3)
        if kind == "learned positions":
            torch.manual_seed(0)
            sizes = {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "d_model": 16, "nhead": 2}
            depth = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
            model = Transformer(positions="learned", max_positions=10, **sizes, **depth)
        elif kind != "transformer":
            torch.manual_seed(0)
            sizes = {"vocab_size": VOCAB, "d_model": 16, "nhead": 2, "dim_feedforward": 32}
            model = TextEncoder(num_layers=1, labels=["a", "b"], pooling=kind, dropout=0.3, **sizes)
        trainer = adapt(trainer_for(model, data.stream(accum_steps=2), Plan(max_steps=9)))
        for _ in range(4):
            trainer.train_step()
        results.append((trainer, weights(model)))
    (plain, expected), (other, got) = results
    assert plain.progress == other.progress
    torch.testing.assert_close(other._sums, plain._sums, rtol=1e-5, atol=0)
    # Sums over more rows may be added up in another order.
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert 1 <= len(other._device_step._entries) <= 3 and other._device_step.graphs


@needs_compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "bfloat16, torch's mm"])
def test_nothing_of_a_recorded_step_is_frozen(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision, _, products = precision.partition(", ")
    if products:
        linear = importlib.import_module("transformer_ext.ops.linear")
        monkeypatch.setattr(linear, "_choice", lambda product, dtype: None)
    results = []
    for graphs in (OpByOp(), Emulated()):
        model = small_model(dropout=0.3).set_precision(precision)
        stream = Numbers(examples=26).stream(accum_steps=2)
        scale = 2.0**20 if precision == "float16" else None
        optimizer = Optimizer(parameters_by_name(model).items(), clip_norm=0.5, loss_scale=scale)
        schedule = Schedule("linear", 1e-2, 3, 20)
        average = MovingAverage(parameters_by_name(model), 0.9)
        trainer = Trainer(
            model, stream, optimizer, schedule, Plan(max_steps=20), moving_average=average
        )
        fixed(trainer, graphs)
        for _ in range(6 if precision == "float16" else 10):
            # It leaves copies of the weights behind.
            evaluate_loss(trainer.losses, [lambda: Numbers().collate(np.arange(2))], trainer.world)
            trainer.train_step()
        loss, _, _ = trainer.losses(trainer.losses.load(next(stream).batches[0], CPU), 1.0)
        state = optimizer.state_dict()
        rest = [loss.detach(), trainer._sums, optimizer.gradient_norm, *average._averages]
        results.append([*weights(model), *state.values(), *rest])
        assert trainer._device_step.graphs >= 1
        copied = {id(weight) for weight, _ in trainer._device_step._converted}
        assert (id(model.encoder.layers[0].self_attention.in_projection.weight) in copied) == (
            precision == "float16" or bool(products)
        )
    if products:
        # All weights at once.
        assert isinstance(graphs, Emulated)
        assert graphs.counts["aten::_foreach_copy_", torch.bfloat16] == 1
        assert graphs.counts["aten::_to_copy", torch.float32] < 10
        assert (int(optimizer.skipped) > 0) == (precision == "float16")
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_step_that_cannot_be_recorded_runs_op_by_op(tmp_path: Path) -> None:
    class Refusing(OpByOp):
        released = 0

        def record(self, work: Callable[[], None]) -> Any:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")
            finally:
                raise RuntimeError("the end of the capture fails for it")

        def release(self, forget: Callable[[], None]) -> None:
            self.released += 1
            forget()

    data, said, graphs = Numbers(examples=25), io.StringIO(), Refusing()
    log = {name: tmp_path / f"{name}.jsonl" for name in ("refused", "recorded")}
    trainer, plain = (
        trainer_for(
            small_model(),
            data.stream(),
            Plan(max_steps=9, log_every=9),
            console=Console(said),
            log=JsonLog(log[name]),
        )
        for name in log
    )
    fixed(trainer, graphs)
    fixed(plain)
    trainer.fit()
    reason = "the step cannot be a CUDA graph (operation not permitted when stream is capturing)"
    assert said.getvalue().count(f"warning: {reason}; it runs op by op\n") == 1
    plain.fit()
    assert said.getvalue().count("op by op") == 1
    refused, recorded = (
        {row["event"]: row for row in read_log(path) if row["event"] != "checkpoint"}
        for path in log.values()
    )
    assert refused["no_cuda_graphs"]["reason"] == reason and "cuda_graphs" not in refused["train"]
    assert recorded["train"]["cuda_graphs"] >= 1 and "no_cuda_graphs" not in recorded
    assert graphs.released == 1 and not trainer._device_step.graphs
    for a, b in zip(weights(trainer.model), weights(plain.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_layouts_beyond_the_most_run_in_the_loaders_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformer_ext.training.device_step._MOST_GRAPHS", 0)
    trainer = fixed(trainer_for(small_model(), Numbers().stream(), Plan(max_steps=9)))
    trainer.train_step()
    assert not trainer._device_step._entries and trainer.progress.step == 1


def test_a_layout_that_came_once_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformer_ext.training.device_step")
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    monkeypatch.setattr(Layout, "of", lambda batches, longest: batches[0])
    monkeypatch.setattr(
        module._LayoutEntry, "make", lambda *_: SimpleNamespace(part=module._Part())
    )
    step = fixed(trainer_for(small_model(), Numbers().stream(), Plan(max_steps=1)))._device_step
    for name, held in (("a", "a"), ("b", "ab"), ("b", "ab"), ("c", "bc"), ("c", "bc"), ("d", "bc")):
        entry = step._entry([name])
        if entry is not None:
            step._queue(entry.part, lambda: None)
        assert "".join(layout for layout, _ in step._entries) == held
    assert entry is None and step.graphs == 2


# Nothing waits ----------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Fails where a GPU would be waited for: values read back, sizes that depend on values, tensors
    of other devices."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        assert name.removeprefix("aten::").lstrip("_") not in self.WAITS, f"{func} waits"
        assert func.name() not in ("aten::_local_scalar_dense", "aten::lift_fresh"), f"{func} waits"
        self.ops.add(name)
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.device.type == self.device, f"{func} reads from {value.device}"
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} waits"
        if name == "transformer_ext::linear_cross_entropy":
            # An op in Python, the same for all devices: what a GPU is given lies within.
            with self:
                return cross_entropy._linear_cross_entropy(*args)
        return func(*args, **(kwargs or {}))


def _registered_for_cuda() -> set[str]:
    """Raw ops with a CUDA kernel, as the sources say it."""
    sources = Path(__file__).parent.parent.glob("csrc/**/*_op_cuda.cpp")
    return {name for s in sources for name in re.findall(r'm\.impl\("(\w+)"', s.read_text())}


_SMALL = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.1}
_PAIR = {"src_vocab_size": 20, "tgt_vocab_size": 20, "num_encoder_layers": 1} | _SMALL
_MODELS: dict[str, Any] = {
    "paper": lambda: Transformer(num_decoder_layers=1, tie="all", **_PAIR),
    "modern": lambda: Transformer(
        num_decoder_layers=1,
        norm_first=True,
        norm="rms",
        activation="swiglu",
        positions="rope",
        num_kv_heads=1,
        output_bias=True,
        tie="none",
        **_PAIR,
    ),
    "language model": lambda: LanguageModel(
        vocab_size=20, num_layers=1, positions="learned", embedding_norm=True, **_SMALL
    ),
    "classifier": lambda: TextEncoder(
        vocab_size=20, labels=["a", "b"], num_layers=1, pooling="mean", pooler=True, **_SMALL
    ),
}


@needs_compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", _MODELS)
def test_a_step_calls_only_cuda_ops_and_never_waits(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without data stand for those of a GPU: what needs their values fails.
    registered = _registered_for_cuda()
    assert {"attention_forward", "cross_entropy_", "residual_dropout"} <= registered
    monkeypatch.setitem(_backend._DTYPES, "meta", _backend._DTYPES["cuda"])
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "meta", 300)
    monkeypatch.setattr(_backend, "has_kernel", lambda op, device: op in registered)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = _MODELS[kind]().set_precision(precision).to("meta").train()
    if kind == "paper":
        # The move made one tensor of each that was tied.
        model.generator.weight = model.target_embedding.weight = model.source_embedding.weight
    optimizer = Optimizer(
        parameters_by_name(torch.nn.Linear(1, 1)).items(),
        loss_scale=8.0 if precision == "float16" else None,
    )
    optimizer.scale = None if optimizer.scale is None else optimizer.scale.to("meta")
    optimizer.broken = torch.zeros((), device="meta")
    found = {}

    def take(rate: torch.Tensor) -> None:
        found.update({name: p.grad for name, p in model.named_parameters()})

    monkeypatch.setattr(optimizer, "step", take)
    losses = LossModule(model, 0.1)
    meta = torch.device("meta")
    gradients = None
    if kind == "paper":
        # As with several GPUs, in two parts.
        monkeypatch.setattr(distributed.dist, "broadcast", lambda tensor, source: None)
        world = distributed.World(0, 1, meta)
        gradients = distributed.GradientSum(losses, parameters_by_name(model), world)
    step = DeviceStep(losses, losses, optimizer, meta, gradients=gradients)
    data = Numbers()
    batch = data.collate(np.arange(5))
    if kind in ("language model", "classifier"):
        labels = batch.labels if kind == "language model" else np.zeros(5, np.int64)
        batch = SimpleNamespace(ids=batch.tgt_ids, lengths=batch.tgt_lengths, labels=labels)
    layout = Layout.of([batch, batch], losses.longest)
    blocks = [layout.views(layout.block("meta")) for _ in range(2)]
    numbers = StepNumbers.zeros(2, "meta")
    with set_backend("compiled"), Watched("meta") as watched:
        if gradients is None:
            step._compute(blocks, numbers)
        else:
            step._contribute(blocks, numbers)
            assert not any(p.grad is not None for p in model.parameters())
            step._apply()
    for name, gradient in found.items():
        assert gradient is not None and gradient.dtype == torch.float32, name
    ours = {op.partition("::")[2] for op in watched.ops if op.startswith("transformer_ext")}
    assert {"attention_backward", "embedding_backward", "cross_entropy_"} <= ours
    unknown = {
        op
        for op in ours - registered
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"transformer_ext::{op}", "CUDA")
    }
    assert not unknown


@pytest.mark.parametrize("loss_scale", [None, 4.0])
def test_the_optimizer_never_waits(loss_scale: float | None) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(
        parameters_by_name(model).items(), clip_norm=1.0, weight_decay=0.1, loss_scale=loss_scale
    )
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rate = torch.tensor(0.1, dtype=torch.float64)
        kept = {name: t.data_ptr() for name, t in optimizer.state_dict().items()}
        with Watched("cpu"):
            optimizer.step(rate)
    # A graph writes where it was recorded to.
    state = optimizer.state_dict()
    assert len(kept) > 6 and kept == {name: t.data_ptr() for name, t in state.items()}


# float16 ----------------------------------------------------------------------------------------


def test_float16_finds_its_scale_and_learns() -> None:
    model = small_model().set_precision("float16")
    optimizer = Optimizer(parameters_by_name(model).items(), loss_scale=2.0**22)
    trainer = trainer_for(model, Numbers(examples=4).stream(), Plan(max_steps=60))
    step = DeviceStep(trainer.losses, trainer.losses, optimizer, CPU)
    trainer.optimizer = optimizer
    trainer._device_step, trainer._sums = step, step.sums
    losses, before = [], weights(model)
    for number in range(30):
        step.sums.zero_()
        trainer.train_step()
        if number == 0:
            assert float(optimizer.skipped) == 1 and float(step.sums.abs().sum()) == 0
            assert all(map(torch.equal, before, weights(model)))
            assert not any(float(t) for n, t in optimizer.state_dict().items() if "steps." in n)
        if step.sums[2]:
            losses.append(float(step.sums[0] / step.sums[2]))
    skipped = int(optimizer.skipped)
    assert 1 <= skipped < 15 and float(optimizer.scale) == 2.0 ** (22 - skipped)
    assert losses[-1] < losses[0] - 0.3
    assert (
        float(optimizer.state_dict()["steps.decoder.layers.0.self_attention_norm.weight"])
        == 30 - skipped
    )


def test_the_loss_scale_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "_GROWTH_INTERVAL", 3)

    def steps(optimizer: Optimizer, values: list[float]) -> list[float]:
        scales = []
        for value in values:
            for parameter in optimizer.parameters.values():
                parameter.grad = torch.full_like(parameter, value)
            optimizer.step(0.1)
            scales.append(float(optimizer.scale))
        return scales

    values = [1.0, 1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0]
    expected = [8.0, 8.0, 16.0, 16.0, 8.0, 8.0, 8.0, 16.0]
    for cut in (2, 5, 7):
        halves = []
        state: dict[str, torch.Tensor] = {}
        model = torch.nn.Linear(2, 2)
        for part in (values[:cut], values[cut:]):
            optimizer = Optimizer(parameters_by_name(model).items(), loss_scale=8.0)
            optimizer.load_state_dict(state) if state else None
            halves += steps(optimizer, part)
            state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
        assert halves == expected


@pytest.mark.parametrize(
    ("capability", "automatic"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_precision_follows_the_gpu(
    capability: tuple[int, int], automatic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert choose_precision("auto", gpu) == automatic
    assert choose_precision("float16", gpu) == "float16"
    if automatic == "float16":
        with pytest.raises(ValueError, match="^--precision: bfloat16 needs .* cuda:0 has 7.5; use"):
            choose_precision("bfloat16", gpu)
    else:
        assert choose_precision("bfloat16", gpu) == "bfloat16"


# On a GPU ---------------------------------------------------------------------------------------


def _gpu_trainer(data: Numbers, precision: str, told: list[str], **plan: Any) -> Trainer:
    # Heads that attention takes to the tensor cores.
    model = small_model(dropout=0.1, head_dim=32).set_precision(precision).to("cuda")
    optimizer = Optimizer(
        parameters_by_name(model).items(),
        clip_norm=1.0,
        loss_scale=2.0**16 if precision == "float16" else None,
    )
    found = trainer_for(model, data.stream(accum_steps=2), Plan(max_steps=99, **plan))
    trainer = Trainer(model, found.stream, optimizer, found.schedule, found.plan)
    trainer._device_step._tell = told.append
    return trainer


@pytest.fixture
def alone() -> Iterator[Callable[[Trainer], None]]:
    """Makes a trainer exchange gradients, as with several processes, in a group of this one alone."""
    dist = distributed.dist

    def join(trainer: Trainer) -> None:
        backend = "nccl" if trainer.world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        step, parameters = trainer._device_step, trainer.optimizer.parameters
        step._gradients = distributed.GradientSum(trainer.losses, parameters, trainer.world)

    yield join
    distributed.leave()


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gpu_graphs_give_the_same_bits(precision: str, alone: Callable[[Trainer], None]) -> None:
    results = []
    for kind in ("op by op", "one graph", "two graphs and NCCL"):
        told: list[str] = []
        trainer = _gpu_trainer(Numbers(), precision, told)
        if kind == "op by op":
            # In the same shapes, and so with the same order of sums.
            fixed(trainer, OpByOp())
        elif kind != "one graph":
            alone(trainer)
        for _ in range(12):
            trainer.train_step()
        # What reads weights after a replay must not find copies from before it.
        batch = trainer.losses.load(Numbers().collate(np.arange(5)), trainer.world.device)
        trainer.losses.eval()
        with torch.no_grad():
            loss = trainer.losses(batch, 1.0)[0]
        state = trainer.optimizer.state_dict()
        results.append(([loss, trainer._sums, *weights(trainer.model)], state))
        assert trainer._device_step.graphs and not told
    (plain, state), *rest = results
    for replayed, other in rest:
        for a, b in zip(plain, replayed, strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@needs_gpu
def test_a_gpu_step_that_waits_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    trainer = _gpu_trainer(Numbers(), "float32", told)
    forward = trainer.losses.model.forward_packed

    def waits(*inputs: Any) -> torch.Tensor:
        hidden = forward(*inputs)
        assert float(hidden.detach().sum()) is not None
        return hidden

    monkeypatch.setattr(trainer.losses.model, "forward_packed", waits)
    for _ in range(12):
        trainer.train_step()
    torch.cuda.synchronize()
    assert len(told) == 1 and "CUDA graph" in told[0] and not trainer._device_step.graphs
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert int(trainer.optimizer.skipped) == 0 and trainer.progress.step == 12
    # Neither torch's generator nor its allocator goes on recording.
    assert torch.rand(1, device="cuda").isfinite().all()
    torch.empty(1 << 26, device="cuda")
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - (1 << 28)
