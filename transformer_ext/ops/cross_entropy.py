"""Label-smoothed cross-entropy, alone and fused with the output projection.

Attention Is All You Need, section 5.4 (label smoothing 0.1; Szegedy et al. 2016, section 7): the
target distribution is ``1 - label_smoothing`` on the target plus ``label_smoothing / V`` on every
entry of the vocabulary. That is ``torch.nn.CrossEntropyLoss(label_smoothing=..., ignore_index=...,
reduction="sum")``, and so are value and gradients here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "LossOutput",
    "label_smoothing_loss",
    "label_smoothing_loss_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
]


class LossOutput(NamedTuple):
    """What the loss functions return; all are 0-dim tensors, only ``loss`` is differentiable.

    Attributes:
        loss: float32, sum over the counted targets of the smoothed loss in nats, divided by the
            normalizer.
        nll_sum: float32, sum of the negative log-likelihoods of the targets in nats, without
            smoothing and not divided: perplexity is ``exp(nll_sum / tokens)``.
        correct: int64, count of the targets that are the arg max of their row (of equal maxima the
            first).
        tokens: int64, count of the targets other than ``ignore_index``.
    """

    loss: Tensor
    nll_sum: Tensor
    correct: Tensor
    tokens: Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Loss of the logits ``x @ weight.T + bias``.

    Args:
        x: ``[tokens, d_model]``, float32 or bfloat16.
        weight: ``[vocabulary, d_model]``, float32.
        targets: ``[tokens]``, int64, each in ``[0, vocabulary)`` or ``ignore_index``.
        bias: ``[vocabulary]``, float32, or None.
        label_smoothing: in [0, 1].
        ignore_index: rows with this target count for nothing, neither value nor gradient.
        normalizer: the sum is divided by it (target tokens over all accumulation steps and ranks):
            a number or a 0-dim tensor. None: not divided.

    Returns:
        `LossOutput`. Gradients reach ``x`` (in its dtype), ``weight`` and ``bias`` (float32).

    Raises:
        ValueError, TypeError: shapes or dtypes other than these.
        IndexError: a target outside ``[0, vocabulary)`` that is not ``ignore_index``.
    """
    _check_linear(x, weight, targets, bias, label_smoothing)
    return linear_cross_entropy_reference(
        x,
        weight,
        targets,
        bias=bias,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
    )


def label_smoothing_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Loss of given logits.

    Args:
        logits: ``[..., vocabulary]``, floating point; statistics are float32.
        targets: ``[...]``, int64; the rest as in `linear_cross_entropy`.

    Returns:
        `LossOutput`. The gradient of ``logits`` has their dtype.

    Raises:
        As `linear_cross_entropy`.
    """
    _check_targets(logits.shape[:-1], "logits", targets, label_smoothing)
    return label_smoothing_loss_reference(
        logits,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
    )


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """`linear_cross_entropy` in plain PyTorch; all logits are in memory at once."""
    # A row without target must not reach the gradient of weight as 0 * NaN.
    x = torch.where((targets != ignore_index)[:, None], x, 0.0)
    logits = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return label_smoothing_loss_reference(
        logits,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
    )


def label_smoothing_loss_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """`label_smoothing_loss` in plain PyTorch, on any device and in any floating-point type."""
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.reshape(-1)
    counted = targets != ignore_index
    logits = torch.where(counted[:, None], logits, 0.0)
    loss = functional.cross_entropy(
        logits,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="sum",
    )
    with torch.no_grad():
        nll_sum = functional.cross_entropy(
            logits, targets, ignore_index=ignore_index, reduction="sum"
        )
        correct = ((logits.argmax(-1) == targets) & counted).sum()
    if normalizer is not None:
        loss = loss / normalizer
    return LossOutput(loss, nll_sum, correct, counted.sum())


def _check_linear(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, label_smoothing: float
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected [tokens, d_model], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected [vocabulary, {x.shape[1]}] for x of shape {list(x.shape)}, got "
            f"{list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    _check_targets(x.shape[:1], "x", targets, label_smoothing)


def _check_targets(shape: torch.Size, of: str, targets: Tensor, label_smoothing: float) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(
            f"targets: expected shape {list(shape)} (the rows of {of}), got {list(targets.shape)}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
