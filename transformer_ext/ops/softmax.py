"""Softmax and log-softmax over the last dimension with masked slots.

Attention Is All You Need, section 3.2.1, equation 1, with the masking of section 3.2.3. A row
without any slot to attend to gives exactly 0, forward and backward, where ``torch.softmax`` of
minus infinities gives NaN; what stands in a masked slot (NaN too, in the input or in the incoming
gradient) has no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_ext._native import load_ops
from transformer_ext.ops._backend import check_floating, check_tensors, use_compiled
from transformer_ext.ops.masks import check_lengths

__all__ = [
    "masked_log_softmax",
    "masked_log_softmax_reference",
    "masked_softmax",
    "masked_softmax_reference",
]


def masked_softmax(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax over the slots that all of the given masks keep; 0 elsewhere.

    Args:
        x: scores ``[..., n]``; float32 or bfloat16 (computed in float32) for the compiled kernel.
            A slot of -inf counts as masked.
        mask: keep-mask, bool (True = keep), broadcastable to the shape of ``x``.
        key_lengths: integer tensor ``[x.shape[0]]``: slots at or after it are masked.
        causal: slot j of row i (dimension -2) is kept only where j <= i.

    Returns:
        Tensor of the shape and dtype of ``x``. A fully masked row is exactly 0, as is its gradient.

    Raises:
        TypeError, ValueError: a mask that is not bool or does not broadcast, key_lengths of another
            shape, ``causal`` on a tensor without two dimensions.
        IndexError: on a CPU, a length outside ``[0, n]``.
    """
    _check(x, mask, key_lengths, causal)
    if use_compiled("masked_softmax", x):
        return _MaskedSoftmax.apply(x, mask, key_lengths, causal, False)
    return masked_softmax_reference(x, mask, key_lengths=key_lengths, causal=causal)


def masked_log_softmax(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Logarithm of `masked_softmax`: -inf in masked slots, but 0 in a row without any kept slot.

    Arguments, dtypes and errors as in `masked_softmax`. A fully masked row is 0 (not -inf), so that
    a sum over rows stays finite; its gradient is exactly 0.
    """
    _check(x, mask, key_lengths, causal)
    if use_compiled("masked_softmax", x):
        return _MaskedSoftmax.apply(x, mask, key_lengths, causal, True)
    return masked_log_softmax_reference(x, mask, key_lengths=key_lengths, causal=causal)


def masked_softmax_reference(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`masked_softmax` in plain PyTorch, on any device and in any floating-point type."""
    keep, scores = _masked_scores(x, mask, key_lengths, causal)
    # The outer where also stops the gradient of masked slots before softmax's backward sums it.
    return torch.where(keep, torch.softmax(scores, -1), 0.0).to(x.dtype)


def masked_log_softmax_reference(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`masked_log_softmax` in plain PyTorch, on any device and in any floating-point type."""
    keep, scores = _masked_scores(x, mask, key_lengths, causal)
    fill = torch.where(keep.any(-1, keepdim=True), -torch.inf, 0.0).to(scores.dtype)
    return torch.where(keep, torch.log_softmax(scores, -1), fill).to(x.dtype)


def _masked_scores(
    x: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    keep = x != -torch.inf
    if mask is not None:
        keep = keep & mask
    columns = torch.arange(x.shape[-1], device=x.device)
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, x.shape[-1])
        keep = keep & (columns < key_lengths.reshape(-1, *[1] * (x.dim() - 1)))
    if causal:
        keep = keep & (columns <= torch.arange(x.shape[-2], device=x.device)[:, None])
    scores = x if x.dtype == torch.float64 else x.float()
    # The smallest finite number, not -inf: a fully masked row then holds no NaN at any step.
    return keep, torch.where(keep, scores, torch.finfo(scores.dtype).min)


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        causal: bool,
        log: bool,
    ) -> Tensor:
        if mask is not None:
            if mask.dim() > 0 and mask.shape[-1] > 1 and mask.stride(-1) != 1:
                mask = mask.contiguous()
            mask = mask.expand(x.shape)
        if key_lengths is not None:
            key_lengths = key_lengths.to(torch.int64).contiguous()
        output = torch.ops.transformer_ext.masked_softmax(
            x.contiguous(), mask, key_lengths, causal, log
        )
        ctx.save_for_backward(output)
        ctx.log = log
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        grad_x = torch.ops.transformer_ext.masked_softmax_backward(
            grad.contiguous(), output, ctx.log
        )
        return grad_x, None, None, None, None


if load_ops():

    @torch.library.register_fake("transformer_ext::masked_softmax")
    def _masked_softmax_fake(
        x: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool, log: bool
    ) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("transformer_ext::masked_softmax_backward")
    def _masked_softmax_backward_fake(grad: Tensor, output: Tensor, log: bool) -> Tensor:
        return torch.empty_like(output, memory_format=torch.contiguous_format)


def _check(x: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool) -> None:
    check_floating("x", x)
    check_tensors(mask=mask, key_lengths=key_lengths)
    if x.dim() < (2 if causal or key_lengths is not None else 1):
        raise ValueError(
            f"x: expected at least {2 if causal or key_lengths is not None else 1} dimensions, "
            f"got {list(x.shape)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected bool (True = keep), got {mask.dtype}; see from_zero_mask and "
                "from_torch_mask in transformer_ext.ops.masks"
            )
        shape = list(x.shape)
        tail = shape[len(shape) - mask.dim() :]
        if mask.dim() > x.dim() or any(
            m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)
        ):
            raise ValueError(
                f"mask: shape {list(mask.shape)} does not broadcast to x of shape {shape}"
            )
    if key_lengths is not None and (
        key_lengths.is_floating_point() or list(key_lengths.shape) != [x.shape[0]]
    ):
        raise ValueError(
            f"key_lengths: expected an integer tensor [{x.shape[0]}], got {key_lengths.dtype} "
            f"{list(key_lengths.shape)}"
        )
