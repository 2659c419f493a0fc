"""Affine maps: the one op behind every matrix product of the model.

``linear(x, weight, bias) = x @ weight.T + bias`` (the projections of "Attention Is All You Need",
sections 3.2.2, 3.3 and 3.4). Parameters stay float32; with bfloat16 activations the products run
on a bfloat16 copy of the weight that is made once after each change of the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["forget_copies", "linear", "linear_reference", "weight_for"]


class _Copies:
    """What was derived from a tensor (a bfloat16 copy, a packed one), by tensor and version."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], dict[Any, tuple[Any, Any]]]] = {}
        self._optimizer_steps = 0
        self._hooked = False

    def _count_step(self, *_: Any) -> None:
        self._optimizer_steps += 1

    def get(self, tensor: Tensor, kind: Any, make: Callable[[Tensor, Any], Any]) -> Any:
        """The copy of that kind; ``make(tensor, stale copy or None)`` makes or refreshes it."""
        if not self._hooked:
            # Optimizers that write through `parameter.data` leave `_version` as it was.
            register_optimizer_step_post_hook(self._count_step)
            self._hooked = True
        key = id(tensor)
        stamp = (tensor._version, tensor.data_ptr(), self._optimizer_steps)
        entry = self._entries.get(key)
        if entry is None or entry[0]() is not tensor:
            entries = self._entries
            entry = (weakref.ref(tensor, lambda _: entries.pop(key, None)), {})
            self._entries[key] = entry
        stale = entry[1].get(kind)
        if stale is not None and stale[0] == stamp:
            return stale[1]
        copy = make(tensor, None if stale is None else stale[1])
        entry[1][kind] = (stamp, copy)
        return copy

    def clear(self) -> None:
        self._entries.clear()


_copies = _Copies()


def forget_copies() -> None:
    """Drop all cached copies of weights.

    Needed only after a weight was written through ``weight.data`` or another alias that bypasses
    its version counter, outside an optimizer's ``step`` (which is noticed).
    """
    _copies.clear()


def _convert(tensor: Tensor, stale: Tensor | None, dtype: torch.dtype) -> Tensor:
    # A new tensor each time: a graph may still hold the old one for its backward pass.
    return tensor.detach().to(dtype)


def weight_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``, of the same shape.

    Without autograd recording, the copy is cached by the tensor and its version, so it is made once
    after each change; do not write to it. While recording (and under ``torch.compile``) it is a
    plain differentiable conversion.
    """
    if weight.dtype == dtype:
        return weight
    if (
        torch.compiler.is_compiling()
        or weight.is_inference()
        or (torch.is_grad_enabled() and weight.requires_grad)
    ):
        return weight.to(dtype)
    return _copies.get(weight, dtype, lambda w, stale: _convert(w, stale, dtype))


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` in plain PyTorch, on any device, in any floating dtype."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = x.reshape(-1, x.shape[-1])
        columns = weight_for(weight, x.dtype).t()
        if bias is None:
            y = torch.mm(rows, columns)
        else:
            y = torch.addmm(weight_for(bias, x.dtype), rows, columns)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_rows, weight_for(weight, grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            grad_weight = torch.mm(grad_rows.t(), rows).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [out, in], got {list(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected [..., {weight.shape[1]}] for a weight {list(weight.shape)}, "
            f"got {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: activations ``[..., in]``, float32 or bfloat16 (any floating dtype with the reference).
        weight: ``[out, in]``, float32.
        bias: ``[out]``, float32, or None.

    Returns:
        ``[..., out]`` in ``x.dtype`` (under ``torch.autocast``: in its dtype).

    The gradient of ``x`` has ``x.dtype``; those of ``weight`` and ``bias`` have the parameters'.

    Raises:
        ValueError: shapes that do not fit. TypeError: ``x`` is not floating point.
    """
    _check(x, weight, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if torch.compiler.is_compiling():
        return linear_reference(x, weight, bias)
    return _Linear.apply(x, weight, bias)
