"""Residual connection, dropout and normalisation around each sublayer (the paper's sections 3.1, 5.4).

Post-norm, as in the paper, is ``norm(x + dropout(sublayer(x)))``; pre-norm is
``x + dropout(sublayer(norm(x)))``. Both are served by one op that returns the sum and the
normalised sum, in one pass over memory: a pre-norm block takes the sum as its residual stream and the
normalised sum as the next sublayer's input.

LayerNorm: J. L. Ba, J. R. Kiros, G. Hinton, "Layer normalization", 2016, equations 3 and 4.
RMSNorm: B. Zhang, R. Sennrich, "Root mean square layer normalization", 2019, equation 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transformer_ext.ops._backend import check_floating, has_kernel, no_tensor, use_compiled
from transformer_ext.ops.dropout import check_dropout, dropout_reference

__all__ = [
    "norm",
    "norm_reference",
    "residual_dropout",
    "residual_dropout_reference",
    "residual_norm",
    "residual_norm_reference",
]

KINDS = ("layer", "rms")


def _check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if eps is None or isinstance(eps, str) or not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number from 0, got {eps!r}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise no_tensor(name, parameter)
        if parameter.dtype == torch.float64 != x.dtype:
            raise TypeError(f"{name}: expected float32 for x of {x.dtype}, got {parameter.dtype}")
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: expected shape {list(x.shape[-1:])} for x of shape {list(x.shape)}, "
                f"got {list(parameter.shape)}"
            )


def _check_residual(x: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise no_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected the shape of x, {list(x.shape)}, got {list(residual.shape)}"
        )


def _same_dtype(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # Under autocast a sublayer's output is narrower than the residual stream.
    if residual is None or residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """:func:`norm` in plain PyTorch: any device, any floating dtype."""
    _check_norm(x, weight, bias, kind, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight
    if bias is not None:
        wide = wide + bias
    return wide.to(x.dtype)


def residual_dropout_reference(
    x: Tensor,
    residual: Tensor | None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`residual_dropout` in plain PyTorch: any device, any floating dtype."""
    check_floating("x", x)
    _check_residual(x, residual)
    dropped = dropout_reference(x, dropout_p, rng, site)
    return dropped if residual is None else residual + dropped


def residual_norm_reference(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`residual_norm` in plain PyTorch: any device, any floating dtype."""
    total = residual_dropout_reference(x, residual, dropout_p=dropout_p, rng=rng, site=site)
    return total, norm_reference(total, weight, bias, kind, eps)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rms: bool,
        eps: float,
        p: float,
        rng: Tensor | None,
        site: int,
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = _norm_forward(x, residual, weight, bias, rms, eps, p, rng, site)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, weight, rng)
        ctx.settings = (rms, p, site, bias is not None)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> Any:
        total, mean, rstd, weight, rng = ctx.saved_tensors
        rms, p, site, has_bias = ctx.settings
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        if grad_normed is not None:
            grad_x, grad_residual, grad_weight, grad_bias = _norm_backward(
                grad_normed.contiguous(),
                None if grad_total is None else grad_total.contiguous(),
                total,
                mean,
                rstd,
                weight,
                has_bias,
                rms,
                p,
                rng,
                site,
            )
            if rng is None:
                grad_x = grad_residual
        elif grad_total is not None:
            grad_residual = grad_total
            grad_x = (
                grad_total if rng is None else _dropout(grad_total.contiguous(), None, p, rng, site)
            )
        else:
            return (None,) * 9
        return (
            grad_x,
            grad_residual if ctx.needs_input_grad[1] else None,
            grad_weight if ctx.needs_input_grad[2] else None,
            grad_bias if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
            None,
            None,
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float
    ) -> Tensor:
        _, normed, mean, rstd = _norm_forward(x, None, weight, bias, rms, eps, 0.0, None, 0)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.settings = (rms, bias is not None)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        rms, has_bias = ctx.settings
        _, grad_x, grad_weight, grad_bias = _norm_backward(
            grad.contiguous(), None, x, mean, rstd, weight, has_bias, rms, 0.0, None, 0
        )
        return (
            grad_x,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class _ResidualDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, p: float, rng: Tensor, site: int
    ) -> Tensor:
        ctx.save_for_backward(rng)
        ctx.settings = (p, site)
        return _dropout(x, residual, p, rng, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rng,) = ctx.saved_tensors
        p, site = ctx.settings
        grad_residual = grad if ctx.needs_input_grad[1] else None
        return _dropout(grad.contiguous(), None, p, rng, site), grad_residual, None, None, None


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimension of ``x``, then scale and shift it.

    Args:
        x: ``[..., columns]``, float32 or bfloat16.
        weight: float32 ``[columns]``, or None for 1.
        bias: float32 ``[columns]``, or None for 0.
        kind: ``layer``: (x - mean) / sqrt(variance + eps); ``rms``: x / sqrt(mean(x^2) + eps).
        eps: added to the variance or the mean square.

    Returns:
        Like ``x``. Statistics and arithmetic are float32; the gradients of ``weight`` and ``bias``
        are float32.

    Raises:
        ValueError: unknown ``kind``, a negative ``eps``, or a parameter whose shape does not fit.
    """
    if not use_compiled("residual_norm_forward", x):
        return norm_reference(x, weight, bias, kind, eps)
    _check_norm(x, weight, bias, kind, eps)
    return _Norm.apply(x.contiguous(), weight, bias, kind == "rms", eps)


def residual_dropout(
    x: Tensor,
    residual: Tensor | None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """``residual + dropout(x)``, the end of a pre-norm block; ``dropout(x)`` without ``residual``.

    Args:
        x: ``[..., columns]``, float32 or bfloat16.
        residual: of the shape of ``x``, or None.
        dropout_p, rng, site: see :mod:`transformer_ext.ops.dropout`; the row is the index of the
            flattened leading dimensions, the column that of the last dimension.

    Returns:
        Of the shape of ``x``, in the wider of the two dtypes.

    Raises:
        ValueError: a shape that does not fit, or see
            :func:`transformer_ext.ops.dropout.check_dropout`.
    """
    if not check_dropout(dropout_p, rng, site):
        check_floating("x", x)
        _check_residual(x, residual)
        return x if residual is None else residual + x
    if not use_compiled("residual_dropout", x, residual):
        return residual_dropout_reference(x, residual, dropout_p=dropout_p, rng=rng, site=site)
    _check_residual(x, residual)
    x, residual = _same_dtype(x, residual)
    if residual is not None:
        residual = residual.contiguous()
    return _ResidualDropout.apply(x.contiguous(), residual, dropout_p, rng, site)


def residual_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """``sum = residual + dropout(x)`` and ``norm(sum) * weight + bias``.

    Args:
        x: output of a sublayer, ``[..., columns]``, float32 or bfloat16.
        residual: of the shape of ``x``, or None for 0.
        weight, bias, kind, eps: as in :func:`norm`.
        dropout_p, rng, site: as in :func:`residual_dropout`.

    Returns:
        ``(sum, normed)``, both of the shape of ``x``, in the wider dtype of ``x`` and ``residual``.
        The norm is that of the sum as returned, that is, after its rounding.

    Raises:
        ValueError: see :func:`norm` and :func:`residual_dropout`.
    """
    if not use_compiled("residual_norm_forward", x, residual):
        return residual_norm_reference(
            x,
            residual,
            weight,
            bias,
            kind=kind,
            eps=eps,
            dropout_p=dropout_p,
            rng=rng,
            site=site,
        )
    if not check_dropout(dropout_p, rng, site):
        if residual is None:
            return x, norm(x, weight, bias, kind, eps)
        dropout_p, rng, site = 0.0, None, 0
    _check_norm(x, weight, bias, kind, eps)
    _check_residual(x, residual)
    x, residual = _same_dtype(x, residual)
    if residual is not None:
        residual = residual.contiguous()
    return _ResidualNorm.apply(
        x.contiguous(), residual, weight, bias, kind == "rms", eps, dropout_p, rng, site
    )


if has_kernel("residual_norm_forward", "cpu"):
    _norm_forward = torch.ops.transformer_ext.residual_norm_forward.default
    _norm_backward = torch.ops.transformer_ext.residual_norm_backward.default
    _dropout = torch.ops.transformer_ext.residual_dropout.default

    @torch.library.register_fake("transformer_ext::residual_norm_forward")
    def _(x, residual, weight, bias, rms, eps, dropout_p, rng, site):
        # Without residual and dropout the sum is x itself, and not written again.
        is_x = residual is None and not check_dropout(dropout_p, rng, site)
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        return (
            x.new_empty(0) if is_x else torch.empty_like(x),
            torch.empty_like(x),
            x.new_empty(0 if rms else rows, dtype=torch.float32),
            x.new_empty(rows, dtype=torch.float32),
        )

    @torch.library.register_fake("transformer_ext::residual_norm_backward")
    def _(grad, grad_sum, total, mean, rstd, weight, has_bias, rms, dropout_p, rng, site):
        on = check_dropout(dropout_p, rng, site)
        columns = total.shape[-1]
        return (
            torch.empty_like(total) if on else total.new_empty(0),
            torch.empty_like(total),
            total.new_empty(0 if weight is None else columns, dtype=torch.float32),
            total.new_empty(columns if has_bias else 0, dtype=torch.float32),
        )

    @torch.library.register_fake("transformer_ext::residual_dropout")
    def _(x, residual, dropout_p, rng, site):
        return torch.empty_like(x)
