"""Affine maps: the one op behind every matrix product of the model.

``linear(x, weight, bias) = x @ weight.T + bias`` (the projections of "Attention Is All You Need",
sections 3.2.2, 3.3 and 3.4). Parameters stay float32; the products run on packed copies of the
weight in the type of the activations (where torch multiplies bfloat16: on a plain copy), made once
after each change of the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from transformer_ext._native import load_ops, native
from transformer_ext.ops._backend import check_floating, has_kernel, no_tensor, use_compiled

__all__ = [
    "convert_weights",
    "converted_weights",
    "forget_copies",
    "gemm_choices",
    "linear",
    "linear_reference",
    "product",
    "product_input",
    "product_weight",
    "weight_for",
]


@dataclass(frozen=True)
class _Choice:
    product: str  # forward: x W^T; input: dy W; weight: dy^T x
    dtype: torch.dtype  # of the activations
    isas: tuple[str, ...]
    unless: str  # a feature of the CPU (info names them) with which torch is faster, or ""
    packing: str
    reason: str


# Where csrc/gemm multiplies on a CPU. Everything else, and every other device, is torch's, which
# takes whatever its dispatcher takes. Measured by benchmarks/linear.py; the figures are of 2 cores
# of a Zen 5. Rows and columns are cut over torch's threads, never the inputs.
_VECTORS = ("avx2", "avx512", "avx512_bf16")
_DOTS = ("avx512_bf16",)
_ONCE = "weight packed once after each change"
_EACH = "both factors packed in each call, in slabs of 8 MiB"
_NEVER, _AMX = "", "amx_bf16"
_CHOICES = (
    _Choice(
        "forward",
        torch.float32,
        _VECTORS,
        _NEVER,
        _ONCE,
        "1.9 to 4.0 times MKL; the same bits for a row in any batch",
    ),
    _Choice(
        "input",
        torch.float32,
        _VECTORS,
        _NEVER,
        _ONCE,
        "2.0 to 2.4 times MKL; the same bits for any number of threads",
    ),
    _Choice(
        "weight",
        torch.float32,
        _VECTORS,
        _NEVER,
        _EACH,
        "1.8 to 2.1 times MKL; the same bits for any number of threads",
    ),
    _Choice(
        "forward",
        torch.bfloat16,
        _DOTS,
        _AMX,
        _ONCE,
        "1.0 to 3.1 times oneDNN; bias added in float32",
    ),
    _Choice(
        "input",
        torch.bfloat16,
        _DOTS,
        _AMX,
        _ONCE,
        "1.0 to 1.1 times oneDNN; the same bits for any number of threads",
    ),
    _Choice(
        "weight",
        torch.bfloat16,
        _DOTS,
        _AMX,
        _EACH,
        "1.0 to 1.4 times oneDNN, whose result is rounded to bfloat16",
    ),
)


def gemm_choices() -> list[dict[str, str]]:
    """Which library does each matrix product on this machine's CPU, and why.

    One row for each product (``forward``: x W^T, ``input``: dy W, ``weight``: dy^T x) and dtype of
    the activations: keys ``product``, ``dtype``, ``library``, ``packing``, ``reason``.
    """
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("forward", "input", "weight"):
            choice = _choice(name, dtype)
            rows.append(
                {
                    "product": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "library": "torch" if choice is None else "transformer_ext",
                    "packing": "none" if choice is None else choice.packing,
                    "reason": "the choice of torch's dispatcher"
                    if choice is None
                    else choice.reason,
                }
            )
    return rows


_chosen: dict[tuple[str, torch.dtype], _Choice | None] = {}


def _choice(name: str, dtype: torch.dtype) -> _Choice | None:
    key = (name, dtype)
    if key not in _chosen:
        isa = torch.ops.transformer_ext.isa() if has_kernel("gemm_matmul_", "cpu") else ""
        features = native().cpu_features() if isa else {}
        fits = (
            c
            for c in _CHOICES
            if (c.product, c.dtype) == key and isa in c.isas and not features.get(c.unless)
        )
        _chosen[key] = next(fits, None)
    return _chosen[key]


def _recording(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _ours(name: str, op: str, x: Tensor, *others: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and _choice(name, x.dtype) is not None
        and not _recording(x, *others)
        and use_compiled(op, x)
    )


def _packable(weight: Tensor, bias: Tensor | None = None) -> bool:
    # The version of an inference tensor, by which copies are kept, is not counted.
    return (
        weight.dtype == torch.float32
        and not weight.is_inference()
        and (bias is None or bias.dtype == torch.float32)
    )


class _Copies:
    """What was derived from a tensor (a bfloat16 copy, a packed one), by tensor and version."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], dict[Any, tuple[Any, Any]]]] = {}
        self._optimizer_steps = 0
        self._hooked = False

    def _count_step(self, *_: Any) -> None:
        self._optimizer_steps += 1

    def get(self, tensor: Tensor, kind: Any, make: Callable[[Tensor], Any]) -> Any:
        """The copy of that kind; ``make(tensor)`` makes it."""
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
        known = entry[1].get(kind)
        if known is not None and known[0] == stamp:
            return known[1]
        # A new one each time: a graph may still hold the old one for its backward pass, and another
        # thread may be multiplying by it.
        copy = make(tensor)
        entry[1][kind] = (stamp, copy)
        return copy

    def of_types(self) -> list[tuple[Tensor, torch.dtype]]:
        """Tensors with a plain copy in another type, up to date or not, and that type."""
        return [
            (tensor, kind)
            for reference, copies in self._entries.values()
            for kind in copies
            if isinstance(kind, torch.dtype) and (tensor := reference()) is not None
        ]

    def clear(self) -> None:
        self._entries.clear()


_copies = _Copies()


def forget_copies() -> None:
    """Drop all cached copies of weights.

    Needed only after a weight was written through ``weight.data`` or another alias that bypasses
    its version counter, outside an optimizer's ``step`` (which is noticed).
    """
    _copies.clear()


def weight_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``, of the same shape.

    Without autograd recording, the copy is cached by the tensor and its version, so it is made once
    after each change; do not write to it. While recording (and under ``torch.compile``) it is a
    plain differentiable conversion.
    """
    if weight.dtype == dtype:
        return weight
    if torch.compiler.is_compiling() or weight.is_inference() or _recording(weight):
        return weight.to(dtype)
    return _copies.get(weight, dtype, lambda w: w.detach().to(dtype))


def converted_weights() -> list[tuple[Tensor, torch.dtype]]:
    """The weights of which :func:`weight_for` keeps a copy, and its type."""
    return _copies.of_types()


@torch.no_grad()
def convert_weights(weights: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    """Makes the copies of :func:`weight_for` in advance, together.

    On a GPU each of them alone takes longer to begin than to make.
    """
    if not weights:
        return
    copies = [torch.empty_like(weight, dtype=dtype) for weight, dtype in weights]
    torch._foreach_copy_(copies, [weight.detach() for weight, _ in weights])
    for (weight, dtype), copy in zip(weights, copies, strict=True):
        _copies.get(weight, dtype, lambda _, copy=copy: copy)  # type: ignore[misc]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` in plain PyTorch, on any device, in any floating dtype."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _packed(weight: Tensor, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """``weight`` as csrc/gemm reads it, for activations in ``dtype``; cached."""

    def pack(weight: Tensor) -> Tensor:
        n, k = reversed(weight.shape) if transposed else weight.shape
        size = torch.ops.transformer_ext.gemm_packed_elements(n, k, dtype == torch.bfloat16)
        packed = weight.new_empty(size, dtype=dtype)
        torch.ops.transformer_ext.gemm_pack_(packed, weight, transposed)
        return packed

    return _copies.get(weight, (dtype, transposed), pack)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias`` by the library that :func:`gemm_choices` names.

    Args:
        x: ``[rows, in]``. weight: ``[out, in]``, float32. bias: ``[out]``, float32.
        out: ``[rows, out]`` in ``x.dtype``, overwritten.

    Differentiable only while autograd records (then torch multiplies, and ``out`` is not allowed).
    """
    if _packable(weight, bias) and _ours("forward", "gemm_linear_", x, weight, bias):
        if out is None:
            out = x.new_empty(x.shape[0], weight.shape[0])
        if bias is not None:
            bias = bias.contiguous()
        packed = _packed(weight, x.dtype, transposed=False)
        torch.ops.transformer_ext.gemm_linear_(out, x, packed, bias, False)
        return out
    columns = weight_for(weight, x.dtype).t()
    if bias is None:
        return torch.mm(x, columns, out=out)
    return torch.addmm(weight_for(bias, x.dtype), x, columns, out=out)


def product_input(grad: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of :func:`product` with respect to ``x``: ``grad @ weight``.

    Args:
        grad: ``[rows, out]``. weight: ``[out, in]``, float32.
        out: ``[rows, in]`` in ``grad.dtype``, overwritten.
    """
    if _packable(weight) and _ours("input", "gemm_linear_", grad, weight):
        if out is None:
            out = grad.new_empty(grad.shape[0], weight.shape[1])
        packed = _packed(weight, grad.dtype, transposed=True)
        torch.ops.transformer_ext.gemm_linear_(out, grad, packed, None, False)
        return out
    return torch.mm(grad, weight_for(weight, grad.dtype), out=out)


def product_weight(
    grad: Tensor,
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The gradient of :func:`product` with respect to ``weight``: ``grad.T @ x``.

    Args:
        grad: ``[rows, out]``. x: ``[rows, in]``, of the same dtype.
        dtype: of the result.
        out: ``[out, in]`` in ``dtype``; overwritten, or added to with ``accumulate``.
    """
    same = grad.dtype == x.dtype
    if dtype == torch.float32 and same and _ours("weight", "gemm_matmul_", x, grad):
        if out is None:
            out = x.new_empty(grad.shape[1], x.shape[1], dtype=dtype)
        torch.ops.transformer_ext.gemm_matmul_(out, grad.t(), _rows(x), accumulate)
        return out
    if out is not None and x.dtype == dtype:
        return torch.addmm(out, grad.t(), x, beta=int(accumulate), out=out)
    if x.is_cuda and x.dtype.itemsize == 2 and not _recording(x, grad):
        # The sums are made in float32: no need to round them.
        if out is not None and not accumulate:
            return torch.mm(grad.t(), x, out_dtype=dtype, out=out)
        result = torch.mm(grad.t(), x, out_dtype=dtype)
    else:
        result = torch.mm(grad.t(), x)
    if out is None:
        return result.to(dtype)
    return out.add_(result) if accumulate else out.copy_(result)


def _rows(x: Tensor) -> Tensor:
    """``x``, copied unless its columns lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _apply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = product_input(grad_rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            grad_weight = product_weight(grad_rows, rows, dtype=weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _column_sum(grad_rows, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def _column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    # torch sums columns at 1 to 2 GB/s here (bfloat16 [4096, 2048]: 73 ms).
    if dtype == torch.float32 and not _recording(x) and use_compiled("column_sum_", x):
        out = x.new_empty(x.shape[1], dtype=dtype)
        torch.ops.transformer_ext.column_sum_(out, _rows(x), False)
        return out
    return x.sum(0, dtype=dtype)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    if not isinstance(weight, Tensor):
        raise no_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [out, in], got {list(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected [..., {weight.shape[1]}] for a weight {list(weight.shape)}, "
            f"got {list(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")


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
    if _recording(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return _apply(x, weight, bias)


if load_ops():

    @torch.library.register_fake("transformer_ext::gemm_pack_")
    def _pack_fake(out: Tensor, weight: Tensor, transposed: bool) -> None:
        return None

    @torch.library.register_fake("transformer_ext::gemm_linear_")
    def _linear_fake(
        out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, accumulate: bool
    ) -> None:
        return None

    @torch.library.register_fake("transformer_ext::gemm_matmul_")
    def _matmul_fake(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        return None
