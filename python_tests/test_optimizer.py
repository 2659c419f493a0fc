"""The optimizer against torch's Adam with clipping, skipping of broken steps, loss scaling."""

import pytest
import torch
from torch import nn

from transformer_ext.training.optimizer import Optimizer, parameters_by_name


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))


def _gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1000.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch(clip_norm: float, weight_decay: float) -> None:
    ours, theirs = _model(), _model()
    optimizer = Optimizer(
        parameters_by_name(ours).items(), clip_norm=clip_norm, weight_decay=weight_decay
    )
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}],
        lr=1e-2,
        betas=(0.9, 0.98),
        eps=1e-9,
        weight_decay=0.0,
    )
    for step in range(5):
        _gradients(ours, step)
        _gradients(theirs, step)
        if clip_norm:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
            optimizer.step(1e-2)
            torch.testing.assert_close(optimizer.gradient_norm, norm)
        else:
            optimizer.step(1e-2)
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_step_changes_nothing_and_counts(value: float) -> None:
    model = _model()
    optimizer = Optimizer(parameters_by_name(model).items(), clip_norm=1.0)
    _gradients(model, 0)
    optimizer.step(1e-2)
    before = {n: t.clone() for n, t in optimizer.state_dict().items() if n != "skipped"}
    weights = [p.detach().clone() for p in model.parameters()]
    _gradients(model, 1)
    next(model.parameters()).grad[0, 0] = value
    optimizer.step(1e-2)
    assert float(optimizer.skipped) == 1
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    after = optimizer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gradients_of_zero_do_not_divide_by_zero() -> None:
    model = _model()
    optimizer = Optimizer(parameters_by_name(model).items(), clip_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_loss_scale_leaves_the_step_as_it_is_and_halves_after_an_overflow() -> None:
    plain, scaled = _model(), _model()
    first = Optimizer(parameters_by_name(plain).items(), clip_norm=0.5)
    second = Optimizer(parameters_by_name(scaled).items(), clip_norm=0.5, loss_scale=1024.0)
    for step in range(3):
        _gradients(plain, step)
        _gradients(scaled, step, 1024.0)
        first.step(1e-2)
        second.step(1e-2)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    _gradients(scaled, 4, float("inf"))
    second.step(1e-2)
    assert float(second.scale) == 512.0


def test_state_goes_on_bit_for_bit() -> None:
    straight, resumed = _model(), _model()
    first = Optimizer(parameters_by_name(straight).items(), clip_norm=1.0)
    for step in range(3):
        _gradients(straight, step)
        first.step(1e-2)
    resumed.load_state_dict(straight.state_dict())
    second = Optimizer(parameters_by_name(resumed).items(), clip_norm=1.0)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    for model, optimizer in ((straight, first), (resumed, second)):
        _gradients(model, 9)
        optimizer.step(1e-2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused() -> None:
    model = _model()
    optimizer = Optimizer(parameters_by_name(model).items())
    _gradients(model, 0)
    optimizer.step(1e-2)
    state = optimizer.state_dict()
    other = Optimizer(parameters_by_name(nn.Linear(2, 2)).items())
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(state)
    broken = {**state, "first_moment.0.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict(broken)


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="parameters"):
        Optimizer([])
    with pytest.raises(ValueError, match="clip_norm"):
        Optimizer(parameters_by_name(_model()).items(), clip_norm=-1.0)
