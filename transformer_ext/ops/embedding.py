"""Embeddings, scaled, with positions added and dropout on the sum (the paper's sections 3.4, 3.5, 5.4).

One pass: ``dropout(weight[ids] * scale + position_table[positions])``. The table of positions is the
paper's sinusoids, or learned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transformer_ext.ops._backend import check_tensors, has_kernel, use_compiled
from transformer_ext.ops.dropout import check_dropout, dropout_reference

__all__ = ["embedding", "embedding_reference", "sinusoidal_positions"]

# Of the result; the index is the kernels' number of the type. float16 on a GPU only.
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def sinusoidal_positions(
    length: int,
    d_model: int,
    halves: bool = False,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The table of the paper's section 3.5: PE(pos, i) = sin or cos of pos / 10000^(2 i / d_model).

    Args:
        length: number of positions, from 0.
        d_model: columns; with an odd number there is one sine more than cosines.
        halves: False, the paper's order: sine in the even columns, cosine in the odd ones. True:
            all sines, then all cosines, as in Sockeye, with the same frequencies.
        device: where the table is to be.

    Returns:
        float32 ``[length, d_model]``, computed in float64.

    Raises:
        ValueError: ``length`` is negative or ``d_model`` below 1.
    """
    if length < 0 or d_model < 1:
        raise ValueError(
            f"sinusoidal_positions: expected length >= 0 and d_model >= 1, got {length}, {d_model}"
        )
    position = torch.arange(length, dtype=torch.float64)[:, None]
    even = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = position * torch.exp(even * (-math.log(10000.0) / d_model))
    table = torch.empty(length, d_model, dtype=torch.float64)
    if halves:
        table[:, : angle.shape[1]] = angle.sin()
        table[:, angle.shape[1] :] = angle[:, : d_model // 2].cos()
    else:
        table[:, 0::2] = angle.sin()
        table[:, 1::2] = angle[:, : d_model // 2].cos()
    return table.to(device=device, dtype=torch.float32)


def _check(
    ids: Tensor, weight: Tensor, positions: Tensor | None, position_table: Tensor | None
) -> None:
    check_tensors(ids=ids, weight=weight, positions=positions, position_table=position_table)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [ids, columns], got {list(weight.shape)}")
    if position_table is None:
        if positions is not None:
            raise ValueError("positions: given without a position_table")
        return
    if position_table.dim() != 2 or position_table.shape[1] != weight.shape[1]:
        raise ValueError(
            f"position_table: expected [positions, {weight.shape[1]}], "
            f"got {list(position_table.shape)}"
        )
    if positions is not None:
        if positions.shape != ids.shape:
            raise ValueError(
                f"positions: expected the shape of ids, {list(ids.shape)}, "
                f"got {list(positions.shape)}"
            )
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")


def _running_positions(ids: Tensor) -> Tensor:
    length = ids.shape[-1] if ids.dim() else 1
    return torch.arange(length, dtype=torch.int32, device=ids.device).expand(ids.shape)


def embedding_reference(
    ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`embedding` in plain PyTorch: any device, any floating dtype."""
    _check(ids, weight, positions, position_table)
    y = torch.nn.functional.embedding(ids, weight) * scale
    if position_table is not None:
        if positions is None:
            positions = _running_positions(ids)
        y = y + torch.nn.functional.embedding(positions, position_table)
    return dropout_reference(y, dropout_p, rng, site).to(weight.dtype if dtype is None else dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        scale: float,
        positions: Tensor | None,
        position_table: Tensor | None,
        p: float,
        rng: Tensor | None,
        site: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(ids, positions, rng)
        ctx.settings = (
            weight.shape[0],
            0 if position_table is None else position_table.shape[0],
            scale,
            p,
            site,
        )
        return _forward(
            ids, weight, scale, positions, position_table, p, rng, site, _TYPES.index(dtype)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ids, positions, rng = ctx.saved_tensors
        words, places, scale, p, site = ctx.settings
        grad = grad.contiguous()
        grad_weight = grad_table = None
        if ctx.needs_input_grad[1]:
            grad_weight = _backward(grad, ids, words, scale, p, rng, site)
        if ctx.needs_input_grad[4]:
            grad_table = _backward(grad, positions, places, 1.0, p, rng, site)
        return None, grad_weight, None, None, grad_table, None, None, None, None


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dropout(weight[ids] * scale + position_table[positions])``.

    Args:
        ids: int64 or int32, any shape.
        weight: float32 ``[ids, columns]``.
        scale: sqrt(columns) in the paper.
        positions: int32 or int64, of the shape of ``ids``; None counts along the last dimension
            of ``ids``.
        position_table: float32 ``[positions, columns]``; it gets a gradient if it requires one.
        dropout_p, rng, site: see :mod:`transformer_ext.ops.dropout`; the row is the index in the
            flattened ``ids``.
        dtype: of the result, float32 or bfloat16, on a GPU float16 too; None: that of ``weight``.

    Returns:
        ``[*ids.shape, columns]``. The gradients are dense and float32, each row summed in an order
        that the ids alone decide: on a CPU that of the tokens.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; see also
            :func:`transformer_ext.ops.dropout.check_dropout`.
        IndexError: an id or a position outside its table. A GPU cannot tell without
            being waited for: there the token's row is NaN, and it has no gradient.
    """
    dtype = weight.dtype if dtype is None else dtype
    if (
        dtype not in (_TYPES if weight.is_cuda else _TYPES[:2])
        or not use_compiled("embedding_forward", weight, position_table)
        or weight.dtype != torch.float32
    ):
        return embedding_reference(
            ids,
            weight,
            scale=scale,
            positions=positions,
            position_table=position_table,
            dropout_p=dropout_p,
            rng=rng,
            site=site,
            dtype=dtype,
        )
    _check(ids, weight, positions, position_table)
    if position_table is not None:
        positions = (_running_positions(ids) if positions is None else positions).contiguous()
        position_table = position_table.contiguous()
    if not check_dropout(dropout_p, rng, site):
        dropout_p, rng, site = 0.0, None, 0
    return _Embedding.apply(
        ids.contiguous(),
        weight.contiguous(),
        scale,
        positions,
        position_table,
        dropout_p,
        rng,
        site,
        dtype,
    )


if has_kernel("embedding_forward", "cpu"):
    _forward = torch.ops.transformer_ext.embedding_forward.default
    _backward = torch.ops.transformer_ext.embedding_backward.default

    @torch.library.register_fake("transformer_ext::embedding_forward")
    def _(ids, weight, scale, positions, position_table, dropout_p, rng, site, type):
        return weight.new_empty((*ids.shape, weight.shape[1]), dtype=_TYPES[type])

    @torch.library.register_fake("transformer_ext::embedding_backward")
    def _(grad, ids, rows, scale, dropout_p, rng, site):
        return grad.new_empty((rows, grad.shape[-1]), dtype=torch.float32)
