"""Label-smoothed cross-entropy, alone and fused with the output projection.

Attention Is All You Need, section 5.4 (label smoothing 0.1; Szegedy et al. 2016, section 7): the
target distribution is ``1 - label_smoothing`` on the target plus ``label_smoothing / V`` on every
entry of the vocabulary. That is ``torch.nn.CrossEntropyLoss(label_smoothing=..., ignore_index=...,
reduction="sum")``, and so are value and gradients here.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transformer_ext._native import load_ops
from transformer_ext.ops._backend import check_tensors, use_compiled
from transformer_ext.ops.linear import product, product_input, product_weight, weight_for

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
        x: ``[tokens, d_model]``, float32 or bfloat16, on a GPU float16 too.
        weight: ``[vocabulary, d_model]``, float32.
        targets: ``[tokens]``, int64, each in ``[0, vocabulary)`` or ``ignore_index``.
        bias: ``[vocabulary]``, float32, or None.
        label_smoothing: in [0, 1].
        ignore_index: rows with this target count for nothing, neither value nor gradient.
        normalizer: the sum is divided by it (target tokens over all accumulation steps and ranks):
            a number greater than 0 or a 0-dim tensor. None: not divided.

    Returns:
        `LossOutput`. Gradients reach ``x`` (in its dtype), ``weight`` and ``bias`` (float32).

    Raises:
        ValueError, TypeError: shapes or dtypes other than these.
        IndexError: a target outside ``[0, vocabulary)`` that is not ``ignore_index``. On a GPU,
            where the host would have to wait for the answer, the loss is NaN instead.
    """
    _check_linear(x, weight, targets, bias, label_smoothing)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if (
        use_compiled("cross_entropy_", x)
        and weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
    ):
        divisor = _divisor(normalizer, x)
        return LossOutput(
            *_LinearCrossEntropy.apply(
                x, weight, bias, targets, divisor, label_smoothing, ignore_index
            )
        )
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
    check_tensors(logits=logits)
    _check_targets(logits.shape[:-1], "logits", targets, label_smoothing)
    if use_compiled("cross_entropy", logits):
        divisor = _divisor(normalizer, logits)
        return LossOutput(
            *_LabelSmoothingLoss.apply(logits, targets, divisor, label_smoothing, ignore_index)
        )
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
    divisor = _divisor(normalizer, loss)
    if divisor is not None:
        loss = loss / divisor
    return LossOutput(loss, nll_sum, correct, counted.sum())


# The logits of one chunk of rows are the only large temporary. A larger chunk reads and writes the
# float32 gradient of the weight less often (8 bytes a weight and chunk: on a CPU under a tenth of
# the time of the products from 320 rows on, on a GPU from 2,600); a smaller one stays closer to the
# caches. On a GPU 25,000 rows of 37,000 columns in bfloat16 become three chunks of 8,336: their
# product of 512 columns is 132 tiles of 128 x 256, one for each processor of an H200.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 640 << 20}
_MIN_CHUNK_ROWS = 64

_memory = threading.local()


def _workspace(name: str, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. On a CPU that of this thread, reused: fresh pages cost more than the
    arithmetic. On a GPU torch keeps what is freed, and a CUDA graph must own what it writes to."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    key = (name, dtype)
    buffers = _memory.__dict__.setdefault("buffers", {})
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < elements:
        buffers[key] = buffer = torch.empty(elements, dtype=dtype, device=device)
    return buffer[:elements]


def _chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    most = max(_MIN_CHUNK_ROWS, chunk_bytes // max(row_bytes, 1))
    chunks = -(-rows // most)
    # Chunks of equal size, in multiples of 16 rows for the matrix products.
    return max(min(most, -(-rows // (16 * max(chunks, 1))) * 16), 1)


def _divisor(normalizer: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The normalizer as a tensor without dimensions: float32, or float64 as ``like`` is."""
    if normalizer is None:
        return None
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected one element, got shape {list(normalizer.shape)}"
            )
        return normalizer.detach().to(device=like.device, dtype=dtype).reshape(())
    if not 0.0 < normalizer < math.inf:
        raise ValueError(f"normalizer: expected a number greater than 0, got {normalizer}")
    # A fill, not a copy from the host, for which a GPU would be waited for.
    return torch.full((), float(normalizer), dtype=dtype, device=like.device)


def _check_range(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"targets: got {low if low < 0 else high}, expected [0, {vocabulary}) or ignore_index"
        )


def _host_may_wait(x: Tensor) -> bool:
    """Whether a decision may depend on what a tensor holds: not on a GPU, nor in a CUDA graph."""
    return x.device.type == "cpu"


@torch.no_grad()
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums (float64: loss, nll, correct) and the gradients asked for (others have no elements).

    Chunk by chunk of rows: logits into the workspace, the loss kernel (which leaves the gradient in
    their place), then the gradients of ``x``, ``weight`` and ``bias`` from it. Those of ``weight``
    and ``bias`` add up in float32: bfloat16 would lose a bit with each doubling of the chunks.
    """
    ops = torch.ops.transformer_ext
    vocabulary, features = weight.shape
    want_grad = want_x or want_weight or want_bias
    sums = x.new_zeros(3, dtype=torch.float64)
    grad_x = x.new_empty(x.shape if want_x else 0)
    grad_weight = weight.new_empty(weight.shape if want_weight else 0)
    grad_bias = weight.new_empty(vocabulary if want_bias else 0)

    # A NaN in a row without target must not reach the gradient of the weight as 0 * NaN.
    kept = None
    counted = targets != ignore_index
    rows_x, rows_targets, rows_grad = x, targets, grad_x
    if not _host_may_wait(x):
        rows_x = torch.where(counted[:, None], x, 0.0)
        weight = weight_for(weight, x.dtype)
    else:
        if not bool(counted.all()):
            # Without part in the products, these rows cost nothing.
            kept = counted.nonzero().squeeze(1)
            rows_x, rows_targets = x.index_select(0, kept), targets.index_select(0, kept)
            rows_grad = x.new_empty(rows_x.shape if want_x else 0)
        _check_range(rows_targets, vocabulary)
    rows = rows_x.shape[0]
    rows_targets = rows_targets.contiguous()
    if bias is not None:
        bias = bias.contiguous()

    scale = None if divisor is None else divisor.reciprocal()
    # Rows begin at multiples of 16 bytes: vectors in the kernels, and tensor cores in the products.
    stride = -(-vocabulary // 8) * 8
    chunk = _chunk_rows(rows, stride * x.element_size(), _CHUNK_BYTES[x.device.type])
    workspace = _workspace("logits", chunk * stride, x.dtype, x.device).view(chunk, stride)
    for begin in range(0, rows, chunk):
        end = min(begin + chunk, rows)
        part = rows_x[begin:end]
        logits = workspace[: end - begin, :vocabulary]
        product(part, weight, out=logits)
        sums += ops.cross_entropy_(
            logits,
            bias,
            rows_targets[begin:end],
            scale,
            label_smoothing,
            ignore_index,
            want_grad,
        )
        if want_weight:
            product_weight(logits, part, out=grad_weight, accumulate=begin > 0)
        if want_x:
            product_input(logits, weight, out=rows_grad[begin:end])
        if want_bias:
            ops.column_sum_(grad_bias, logits, begin > 0)

    if rows == 0:
        grad_weight.zero_()
        grad_bias.zero_()
    if kept is not None and want_x:
        grad_x.zero_().index_copy_(0, kept, rows_grad)
    return sums, grad_x, grad_weight, grad_bias


def _outputs(
    sums: Tensor, divisor: Tensor | None, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = sums[0] if divisor is None else sums[0] / divisor
    tokens = (targets != ignore_index).sum()
    return loss.to(torch.float32), sums[1].to(torch.float32), sums[2].to(torch.int64), tokens


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor; for the usual factor of 1, where it can be read, grad itself without a pass."""
    if not torch.compiler.is_compiling() and _host_may_wait(factor) and float(factor) == 1.0:
        return grad
    # With a dimension: of one without, torch would take no more digits than those of grad's type.
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


def _split_divisor(divisor: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the gradients are divided by at once, and what in the backward pass.

    Divided by tens of thousands of tokens most gradients of logits are below what float16 can hold.
    In the backward pass the scale of the loss is known, which brings them back into its range.
    """
    return (None, divisor) if x.dtype == torch.float16 else (divisor, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.wanted = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
        now, later = _split_divisor(divisor, x)
        sums, *grads = torch.ops.transformer_ext.linear_cross_entropy(
            x, weight, bias, targets, now, label_smoothing, ignore_index, *ctx.wanted
        )
        ctx.save_for_backward(*grads, later)
        outputs = _outputs(sums, divisor, targets, ignore_index)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *grads, later = ctx.saved_tensors
        factor = grad if later is None else grad / later
        results = (
            _times(saved, factor) if wanted else None
            for saved, wanted in zip(grads, ctx.wanted, strict=True)
        )
        return (*results, None, None, None, None)


class _LabelSmoothingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        divisor: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = logits.reshape(-1, logits.shape[-1])
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            rows = rows.contiguous()
        targets = targets.reshape(-1).contiguous()
        if not torch.compiler.is_compiling() and _host_may_wait(targets):
            _check_range(targets[targets != ignore_index], rows.shape[1])
        now, later = _split_divisor(divisor, logits)
        sums, grad = torch.ops.transformer_ext.cross_entropy(
            rows,
            targets,
            None if now is None else now.reciprocal(),
            label_smoothing,
            ignore_index,
            bool(ctx.needs_input_grad[0]),
        )
        ctx.shape = logits.shape
        ctx.save_for_backward(grad, later)
        outputs = _outputs(sums, divisor, targets, ignore_index)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, later = ctx.saved_tensors
        factor = grad if later is None else grad / later
        return _times(saved, factor).view(ctx.shape), None, None, None, None


if load_ops():
    # Opaque to torch.compile: what is inside reuses memory and depends on the targets' values.
    _library = torch.library.Library("transformer_ext", "FRAGMENT")
    _library.define(
        "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, "
        "Tensor? divisor, float label_smoothing, int ignore_index, bool want_x, bool want_weight, "
        "bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    for _key in ("CPU", "CUDA"):
        _library.impl("linear_cross_entropy", _linear_cross_entropy, _key)

    @torch.library.register_fake("transformer_ext::linear_cross_entropy")
    def _linear_cross_entropy_fake(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        want_x: bool,
        want_weight: bool,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            x.new_empty(3, dtype=torch.float64),
            x.new_empty(x.shape if want_x else 0),
            weight.new_empty(weight.shape if want_weight else 0),
            weight.new_empty(weight.shape[0] if want_bias else 0),
        )

    @torch.library.register_fake("transformer_ext::cross_entropy_")
    def _cross_entropy_inplace_fake(
        logits: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        write_grad: bool,
    ) -> Tensor:
        return logits.new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("transformer_ext::cross_entropy")
    def _cross_entropy_fake(
        logits: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        write_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, columns = logits.shape
        return (
            logits.new_empty(3, dtype=torch.float64),
            logits.new_empty(rows if write_grad else 0, columns),
        )

    @torch.library.register_fake("transformer_ext::column_sum_")
    def _column_sum_fake(out: Tensor, x: Tensor, accumulate: bool) -> None:
        return None


def _check_linear(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, label_smoothing: float
) -> None:
    check_tensors(x=x, weight=weight, bias=bias)
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
    check_tensors(targets=targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(
            f"targets: expected shape {list(shape)} (the rows of {of}), got {list(targets.shape)}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
