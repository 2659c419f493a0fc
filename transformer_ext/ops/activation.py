"""The non-linearity of the position-wise feed-forward network, with its bias and dropout in one pass.

The paper's section 3.3, equation 2, has ReLU. The gated kinds (N. Shazeer, "GLU variants improve
Transformer", 2020, equation 6) take twice as many columns: the gate's first, then those that it
multiplies. GELU: D. Hendrycks, K. Gimpel, "Gaussian error linear units", 2016; SiLU is x * sigmoid(x)
from the same paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformer_ext.ops._backend import check_floating, has_kernel, no_tensor, use_compiled
from transformer_ext.ops.dropout import check_dropout, dropout_reference

__all__ = ["KINDS", "activation", "activation_reference", "is_gated"]

# The index is the kernels' number of the kind.
KINDS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu")
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_FIRST_GATED = KINDS.index("swiglu")
_RELU = _NUMBER["relu"]


def is_gated(kind: str) -> bool:
    """Whether ``kind`` takes twice as many columns as it gives: swiglu, geglu, reglu."""
    return kind in KINDS[_FIRST_GATED:]


def _check(x: Tensor, bias: Tensor | None, kind: str) -> None:
    if kind not in _NUMBER:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_floating("x", x)
    if bias is not None and not isinstance(bias, Tensor):
        raise no_tensor("bias", bias)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if is_gated(kind) and x.shape[-1] % 2:
        raise ValueError(f"x: {kind} needs an even number of columns, got {x.shape[-1]}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias: expected shape {list(x.shape[-1:])} for x of shape {list(x.shape)}, "
            f"got {list(bias.shape)}"
        )


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "reglu": functional.relu,
}


def activation_reference(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "relu",
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`activation` in plain PyTorch: any device, any floating dtype."""
    _check(x, bias, kind)
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    if bias is not None:
        x = x + bias
    if is_gated(kind):
        gate, up = x.chunk(2, dim=-1)
        y = _FUNCTIONS[kind](gate) * up
    else:
        y = _FUNCTIONS[kind](x)
    return dropout_reference(y, dropout_p, rng, site).to(dtype)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kind: int,
        p: float,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        y = _forward(x, bias, kind, p, rng, site)
        # The next layer keeps ReLU's output anyway; x is free again as soon as it was read.
        ctx.save_for_backward(y if kind == _RELU else x, bias, rng)
        ctx.settings = (kind, p, site)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, bias, rng = ctx.saved_tensors
        kind, p, site = ctx.settings
        grad_x, grad_bias = _backward(grad.contiguous(), saved, bias, kind, p, rng, site)
        return grad_x, grad_bias if ctx.needs_input_grad[1] else None, None, None, None, None


def activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "relu",
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """``dropout(act(x + bias))``; gated kinds: ``dropout(act(gate) * up)`` with
    ``gate, up = (x + bias).chunk(2, dim=-1)``.

    Args:
        x: ``[..., columns]``, float32 or bfloat16; for gated kinds columns = 2 f.
        bias: float32 ``[columns]``, or None.
        kind: ``relu``, ``gelu`` (by the error function), ``gelu_tanh``, ``silu``, ``swiglu`` (SiLU),
            ``geglu`` (GELU by the error function), ``reglu`` (ReLU).
        dropout_p, rng, site: see :mod:`transformer_ext.ops.dropout`; the row is the index of the
            flattened leading dimensions, the column that of the output's last dimension.

    Returns:
        ``[..., columns]``, or ``[..., f]`` for gated kinds, in the dtype of ``x``. Arithmetic is
        float32, and so is the gradient of ``bias``. The backward pass recomputes from ``x``, that of
        ``relu`` from the result, which must not be changed in place before.

    Raises:
        ValueError: unknown ``kind``, shapes that do not fit, or see
            :func:`transformer_ext.ops.dropout.check_dropout`.
    """
    if not use_compiled("activation_forward", x):
        return activation_reference(x, bias, kind=kind, dropout_p=dropout_p, rng=rng, site=site)
    _check(x, bias, kind)
    if not check_dropout(dropout_p, rng, site):
        dropout_p, rng, site = 0.0, None, 0
    return _Activation.apply(x.contiguous(), bias, _NUMBER[kind], dropout_p, rng, site)


if has_kernel("activation_forward", "cpu"):
    _forward = torch.ops.transformer_ext.activation_forward.default
    _backward = torch.ops.transformer_ext.activation_backward.default

    @torch.library.register_fake("transformer_ext::activation_forward")
    def _(x, bias, kind, dropout_p, rng, site):
        columns = x.shape[-1] // 2 if kind >= _FIRST_GATED else x.shape[-1]
        return x.new_empty((*x.shape[:-1], columns))

    @torch.library.register_fake("transformer_ext::activation_backward")
    def _(grad, saved, bias, kind, dropout_p, rng, site):
        return (
            torch.empty_like(saved),
            saved.new_empty(0 if bias is None else saved.shape[-1], dtype=torch.float32),
        )
