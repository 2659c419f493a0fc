"""Scaled dot-product attention ("Attention Is All You Need", section 3.2.1, equation 1)

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V

for padded batches (:func:`attention`) and for packed ones (:func:`attention_packed`, and its two
faces for the model, :func:`self_attention_packed` and :func:`cross_attention_packed`). Each has a
twin in plain PyTorch, ``<name>_reference``, for any device and floating type.

What all of them share:

- A boolean mask is a keep-mask: True = the query may attend to the key.
- ``causal`` lets query i of a sequence attend to its keys 0..i.
- Fewer key/value heads than query heads are shared by groups of consecutive query heads
  (grouped-query attention; with one head, multi-query attention).
- A query that may attend to nothing has output and gradients of exactly 0.
- What stands in a key that no query may attend to, in a query that may attend to nothing, or in
  the slack rows of a packed batch has no effect on any result or gradient, even if it is NaN.
- Dropout falls on the attention weights (section 5.4), drawn by
  :func:`transformer_ext.ops.dropout.keep_mask` with row = query token * heads + head, where query
  token is the row in the packed batch (padded: batch index * query length + position), and column
  = position of the key in its sequence. ``dropout_p=0`` turns it off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_ext._native import load_ops
from transformer_ext.ops import _tensor_cores
from transformer_ext.ops._backend import no_tensor, use_compiled
from transformer_ext.ops.dropout import check_dropout, dropout_scale, keep_mask
from transformer_ext.ops.masks import check_lengths, key_padding_mask
from transformer_ext.packed import Packed

__all__ = [
    "attention",
    "attention_packed",
    "attention_packed_reference",
    "attention_reference",
    "cross_attention_packed",
    "cross_attention_packed_reference",
    "self_attention_packed",
    "self_attention_packed_reference",
]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    return_weights: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of padded sequences, any strides.

    Args:
        query: ``[batch, heads, query_length, head_dim]``.
        key: ``[batch, kv_heads, key_length, head_dim]``; kv_heads divides heads.
        value: like ``key``.
        key_lengths: integers ``[batch]``: keys from there on are padding.
        causal: query i may attend to keys 0..i only.
        mask: boolean, broadcastable to ``[batch, heads, query_length, key_length]``, True = keep.
        bias: added to the scaled scores; broadcastable like ``mask``, differentiable. An entry of
            -inf masks.
        scale: of the scores, instead of ``1 / sqrt(head_dim)``.
        dropout_p, rng, site: see the module's text.
        return_weights: return ``(output, weights)``, the weights
            ``[batch, heads, query_length, key_length]`` as they are before dropout. This forms the
            whole matrix, so it takes the plain PyTorch path.
        return_scores: return ``(output, weights, scores)``, the scores as the softmax reads them,
            -inf where a query may not attend to a key.

    Returns:
        ``[batch, heads, query_length, head_dim]`` in the query's dtype.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
        IndexError: on a CPU, a length in ``key_lengths`` beyond the keys.
    """
    _check_padded(query, key, value, key_lengths, mask, bias)
    plain = return_weights or return_scores
    # The CUDA kernel makes no gradient of bias.
    plain = plain or (query.is_cuda and bias is not None and bias.requires_grad)
    if not plain and _use_kernel(query, query.shape[-1]):
        on = check_dropout(dropout_p, rng, site)
        return _PaddedAttention.apply(
            _unit_stride(query),
            _unit_stride(key),
            _unit_stride(value),
            None if bias is None else _four_dimensions(bias.float()),
            None if mask is None else _four_dimensions(mask),
            None if key_lengths is None else key_lengths.to(query.device, torch.int64).contiguous(),
            causal,
            _scale(scale, query),
            dropout_p if on else 0.0,
            rng if on else None,
            site,
            mask is None and bias is None and _tensor_cores.allowed(query, query.shape[-1]),
        )
    return attention_reference(
        query,
        key,
        value,
        key_lengths=key_lengths,
        causal=causal,
        mask=mask,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
        return_weights=return_weights,
        return_scores=return_scores,
    )


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    return_weights: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`attention` in plain PyTorch."""
    _check_padded(query, key, value, key_lengths, mask, bias)
    batch, heads, query_length, _ = query.shape
    allowed = _allowed(query, key, key_lengths, causal, mask, bias)
    token = torch.arange(batch * query_length, device=query.device).view(batch, 1, query_length)
    output, weights, scores = _attend(
        query, key, value, allowed, bias, scale, dropout_p, rng, site, token
    )
    if return_scores:
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return output, weights, scores.to(query.dtype)
    return (output, weights) if return_weights else output


def attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q: Packed,
    k: Packed,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Attention of packed sequences: sequence b of the queries attends to sequence b of the keys.

    Args:
        query: ``[q.capacity, heads, head_dim]``.
        key: ``[k.capacity, kv_heads, head_dim]``; kv_heads divides heads.
        value: like ``key``.
        q, k: where the sequences of the queries and of the keys lie.
        causal, scale, dropout_p, rng, site: as in :func:`attention`.

    Returns:
        ``[q.capacity, heads, head_dim]`` in the query's dtype, 0 in the slack rows.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check_packed(query, key, value, q, k)
    if _use_kernel(query, query.shape[-1]):
        heads = (query.shape[1], key.shape[1])
        return _packed(heads, q, k, causal, scale, dropout_p, rng, site, query, key, value)
    return attention_packed_reference(
        query,
        key,
        value,
        q=q,
        k=k,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )


def attention_packed_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q: Packed,
    k: Packed,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`attention_packed` in plain PyTorch: pads, attends, packs again."""
    _check_packed(query, key, value, q, k)
    if q.max_length == 0 or q.batch_size == 0:
        return query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0)
    padded_query = q.unpack(query).transpose(1, 2)
    padded_key = k.unpack(key).transpose(1, 2)
    padded_value = k.unpack(value).transpose(1, 2)
    allowed = _allowed(padded_query, padded_key, k.lengths, causal, None, None)
    position = torch.arange(padded_query.shape[2], device=query.device)
    token = q.cu_seqlens[:-1, None, None].long() + position
    output, _, _ = _attend(
        padded_query,
        padded_key,
        padded_value,
        allowed,
        None,
        scale,
        dropout_p,
        rng,
        site,
        token,
    )
    return q.pack(output.transpose(1, 2))


def self_attention_packed(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    packed: Packed,
    causal: bool = False,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`attention_packed` of sequences to themselves, from one projection.

    Args:
        qkv: ``[capacity, (heads + 2 * kv_heads) * head_dim]``, columns query | key | value. Its
            gradient is written as one tensor.
        heads, kv_heads: number of query heads, and of key/value heads.
        packed: where the sequences lie.
        causal, scale, dropout_p, rng, site: as in :func:`attention`.

    Returns:
        ``[capacity, heads * head_dim]``, 0 in the slack rows.

    Raises:
        ValueError: a width that is no multiple of ``heads + 2 * kv_heads``, or what
            :func:`attention_packed` raises.
    """
    if _use_kernel(qkv, qkv.shape[-1] // (heads + 2 * kv_heads)):
        query, key, value = _split(qkv, "qkv", (heads, kv_heads, kv_heads))
        _check_packed(query, key, value, packed, packed)
        return _packed(
            (heads, kv_heads),
            packed,
            packed,
            causal,
            scale,
            dropout_p,
            rng,
            site,
            qkv.unflatten(1, (heads + 2 * kv_heads, -1)),
        ).flatten(1)
    return self_attention_packed_reference(
        qkv,
        heads,
        kv_heads,
        packed,
        causal,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )


def self_attention_packed_reference(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    packed: Packed,
    causal: bool = False,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`self_attention_packed` in plain PyTorch."""
    query, key, value = _split(qkv, "qkv", (heads, kv_heads, kv_heads))
    output = attention_packed_reference(
        query,
        key,
        value,
        q=packed,
        k=packed,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )
    return output.flatten(1)


def cross_attention_packed(
    query: Tensor,
    kv: Tensor,
    heads: int,
    kv_heads: int,
    packed_q: Packed,
    packed_k: Packed,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`attention_packed` of target sequences to their source sequences.

    Args:
        query: ``[packed_q.capacity, heads * head_dim]``.
        kv: ``[packed_k.capacity, 2 * kv_heads * head_dim]``, columns key | value. Its gradient is
            written as one tensor.
        heads, kv_heads: number of query heads, and of key/value heads.
        packed_q, packed_k: where the sequences of ``query`` and of ``kv`` lie.
        scale, dropout_p, rng, site: as in :func:`attention`.

    Returns:
        ``[packed_q.capacity, heads * head_dim]``, 0 in the slack rows.

    Raises:
        ValueError: a width that is no multiple of the number of heads in it, or what
            :func:`attention_packed` raises.
    """
    if _use_kernel(query, query.shape[-1] // heads):
        (split_query,) = _split(query, "query", (heads,))
        key, value = _split(kv, "kv", (kv_heads, kv_heads))
        _check_packed(split_query, key, value, packed_q, packed_k)
        return _packed(
            (heads, kv_heads),
            packed_q,
            packed_k,
            False,
            scale,
            dropout_p,
            rng,
            site,
            split_query,
            kv.unflatten(1, (2 * kv_heads, -1)),
        ).flatten(1)
    return cross_attention_packed_reference(
        query,
        kv,
        heads,
        kv_heads,
        packed_q,
        packed_k,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )


def cross_attention_packed_reference(
    query: Tensor,
    kv: Tensor,
    heads: int,
    kv_heads: int,
    packed_q: Packed,
    packed_k: Packed,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """:func:`cross_attention_packed` in plain PyTorch."""
    (split_query,) = _split(query, "query", (heads,))
    key, value = _split(kv, "kv", (kv_heads, kv_heads))
    output = attention_packed_reference(
        split_query,
        key,
        value,
        q=packed_q,
        k=packed_k,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )
    return output.flatten(1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    token: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equation, for ``[batch, heads, length, head_dim]``.

    ``allowed``: None, or boolean with 4 dimensions broadcastable to the scores. ``token``:
    ``[batch, 1, query_length]``, the query's token in the numbering of dropout. Returns output,
    weights, and the scores, with a finite filling where they are masked.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    dead_query = None
    if allowed is not None:
        # Multiplying by a weight of 0 would let a NaN through, so what may not be seen is zeroed.
        group = allowed.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, heads // kv_heads))
        dead_key = ~group.any(dim=(2, 3)).unsqueeze(-1)
        dead_query = ~allowed.any(dim=3, keepdim=True)
        key = key.masked_fill(dead_key, 0)
        value = value.masked_fill(dead_key, 0)
        query = query.masked_fill(dead_query, 0)
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)

    wide = torch.promote_types(query.dtype, torch.float32)  # the softmax of 16-bit scores
    scores = (query @ key.transpose(2, 3)).to(wide) * _scale(scale, query)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        # A finite filling keeps a row without any key free of NaN, in the gradient too.
        scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    weights = scores.softmax(dim=-1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0)

    dropped = weights
    if check_dropout(dropout_p, rng, site):
        assert rng is not None
        head = torch.arange(heads, device=query.device).view(1, heads, 1)
        rows = token * heads + head
        keep = keep_mask(rng, site, rows.flatten(), key.shape[2], dropout_p)
        dropped = weights * keep.view(weights.shape) * dropout_scale(dropout_p)
    output = dropped.to(value.dtype) @ value
    if dead_query is not None:
        output = output.masked_fill(dead_query, 0)
    return output, weights.to(query.dtype), scores


def _allowed(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """The conjunction of all masks, with 4 dimensions; None if there is none."""
    masks = []
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, key.shape[2])
        masks.append(key_padding_mask(key_lengths.to(query.device), key.shape[2]))
    if causal:
        query_position = torch.arange(query.shape[2], device=query.device)
        key_position = torch.arange(key.shape[2], device=query.device)
        masks.append(key_position <= query_position.unsqueeze(1))
    if mask is not None:
        masks.append(mask)
    if bias is not None:
        masks.append(bias.detach() != -math.inf)
    if not masks:
        return None
    allowed = masks[0]
    for other in masks[1:]:
        allowed = allowed & other
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    return allowed.expand(torch.broadcast_shapes(allowed.shape, shape))


class _PaddedAttention(torch.autograd.Function):
    """Over the raw ops; mask and bias have four dimensions, bias is float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
        tensor_cores: bool,
    ) -> Tensor:
        lengths = (query.shape[2], key.shape[2])
        options = (*lengths, causal, scale, dropout_p, rng, site, tensor_cores)
        out, statistics = torch.ops.transformer_ext.attention_forward(
            query, key, value, None, None, key_lengths, mask, bias, *options
        )
        out = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, mask, key_lengths, out, statistics, rng)
        ctx.options = (causal, scale, dropout_p, site, tensor_cores)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, key_lengths, out, statistics, rng = ctx.saved_tensors
        causal, scale, dropout_p, site, tensor_cores = ctx.options
        grads = [torch.empty_like(x) for x in (query, key, value)]
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        torch.ops.transformer_ext.attention_backward(
            _unit_stride(grad),
            query,
            key,
            value,
            out,
            statistics,
            None,
            None,
            key_lengths,
            mask,
            bias,
            query.shape[2],
            key.shape[2],
            causal,
            scale,
            dropout_p,
            rng,
            site,
            *grads,
            grad_bias,
            tensor_cores,
        )
        return *grads, grad_bias, None, None, None, None, None, None, None, None


class _PackedAttention(torch.autograd.Function):
    """Over the raw ops. The buffers ``[rows, heads in it, head_dim]`` hold, along their second
    axis, query, key and value in this order: one, two or three buffers. cu_seqlens_k: None where
    it is cu_seqlens_q."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: tuple[int, int],
        max_lengths: tuple[int, int],
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
        tensor_cores: bool,
        *buffers: Tensor,
    ) -> Tensor:
        out, statistics = torch.ops.transformer_ext.attention_forward(
            *_parts(heads, buffers),
            cu_seqlens_q,
            cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
            None,
            None,
            None,
            *max_lengths,
            causal,
            scale,
            dropout_p,
            rng,
            site,
            tensor_cores,
        )
        ctx.save_for_backward(cu_seqlens_q, cu_seqlens_k, out, statistics, rng, *buffers)
        ctx.options = (heads, max_lengths, causal, scale, dropout_p, site, tensor_cores)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens_q, cu_seqlens_k, out, statistics, rng, *buffers = ctx.saved_tensors
        heads, max_lengths, causal, scale, dropout_p, site, tensor_cores = ctx.options
        grads = [torch.empty_like(buffer) for buffer in buffers]
        torch.ops.transformer_ext.attention_backward(
            _unit_stride(grad),
            *_parts(heads, buffers),
            out,
            statistics,
            cu_seqlens_q,
            cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
            None,
            None,
            None,
            *max_lengths,
            causal,
            scale,
            dropout_p,
            rng,
            site,
            *_parts(heads, grads),
            None,
            tensor_cores,
        )
        return None, None, None, None, None, None, None, None, None, None, *grads


#: Heads for whose tiles every GPU has enough shared memory, and the widest of the CUDA kernels.
_CUDA_HEAD_DIMS = 128, 256


@functools.cache
def _widest_on(device: torch.device) -> int:
    """The widest head for whose tiles the GPU has enough shared memory."""
    gpu: Any = torch.cuda.get_device_properties(device)
    shared: int = gpu.shared_memory_per_block_optin
    # The gradients of keys and values take the most: 96 rows of float32 and 5 KiB for the rest.
    return min(_CUDA_HEAD_DIMS[1], (shared - 5136) // (96 * 4 * 4) * 4)


def _use_kernel(query: Tensor, head_dim: int) -> bool:
    wide = query.is_cuda and head_dim > _CUDA_HEAD_DIMS[0]
    too_wide = wide and head_dim > _widest_on(query.device)
    return not too_wide and use_compiled("attention_forward", query)


def _parts(heads: tuple[int, int], buffers: Sequence[Tensor]) -> list[Tensor]:
    query_heads, kv_heads = heads
    sizes = {
        1: [[query_heads, kv_heads, kv_heads]],
        2: [[query_heads], [kv_heads, kv_heads]],
        3: [[query_heads], [kv_heads], [kv_heads]],
    }[len(buffers)]
    return [
        part
        for buffer, split in zip(buffers, sizes, strict=True)
        for part in (buffer.split(split, dim=1) if len(split) > 1 else [buffer])
    ]


def _packed(
    heads: tuple[int, int],
    q: Packed,
    k: Packed,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    *buffers: Tensor,
) -> Tensor:
    on = check_dropout(dropout_p, rng, site)
    return _PackedAttention.apply(
        heads,
        (q.max_length, k.max_length),
        q.cu_seqlens,
        None if k is q else k.cu_seqlens,  # torch.compile refuses the same tensor twice
        causal,
        _scale(scale, buffers[0]),
        dropout_p if on else 0.0,
        rng if on else None,
        site,
        _tensor_cores.allowed(buffers[0], buffers[0].shape[-1]),
        *(_unit_stride(buffer) for buffer in buffers),
    )


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernels take any strides but that of head_dim, which must be 1."""
    if torch.compiler.is_compiling():
        tensor = tensor.view_as(tensor)  # attention(x, x, x): see _packed
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _four_dimensions(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())].contiguous()


if load_ops():

    @torch.library.register_fake("transformer_ext::attention_forward")
    def _attention_forward_fake(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor | None,
        *_: object,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens_q is None:
            batch, heads, length, head_dim = query.shape
            out = query.new_empty(batch, length, heads, head_dim)
            return out, query.new_empty(2, batch, heads, length, dtype=torch.float32)
        rows, heads, head_dim = query.shape
        out = query.new_empty(rows, heads, head_dim)
        return out, query.new_empty(2, heads, rows, dtype=torch.float32)

    @torch.library.register_fake("transformer_ext::attention_backward")
    def _attention_backward_fake(*_: object) -> None:
        return None


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    if isinstance(scale, str) or not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    return scale


def _split(tensor: Tensor, name: str, heads: tuple[int, ...]) -> list[Tensor]:
    """``[tokens, sum(heads) * head_dim]`` as one ``[tokens, heads, head_dim]`` for each part."""
    if min(heads) < 1:
        raise ValueError(f"{name}: expected positive numbers of heads, got {heads}")
    if tensor.dim() != 2 or tensor.shape[1] % sum(heads):
        raise ValueError(
            f"{name}: expected [tokens, {sum(heads)} * head_dim] ({sum(heads)} heads in all), "
            f"got {list(tensor.shape)}"
        )
    whole = tensor.unflatten(1, (sum(heads), -1))
    # The gradient of a split is a copy, of one into one part too.
    return [whole] if len(heads) == 1 else list(whole.split(heads, dim=1))


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise no_tensor(name, tensor)
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{name}: expected {layout}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name}: expected the query's dtype and device ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key: expected the query's head_dim {query.shape[-1]}, got {list(key.shape)}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"value: expected the key's shape {list(key.shape)}, got {list(value.shape)}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key: expected heads that divide the query's {query.shape[1]}, got {list(key.shape)}"
        )


def _check_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check_qkv(query, key, value, "[batch, heads, length, head_dim]")
    for name, tensor in (("key_lengths", key_lengths), ("mask", mask), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise no_tensor(name, tensor)
    if key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key: expected the query's batch size {query.shape[0]}, got {list(key.shape)}"
        )
    if key_lengths is not None and (
        key_lengths.shape != query.shape[:1] or key_lengths.is_floating_point()
    ):
        raise ValueError(
            f"key_lengths: expected an integer tensor [{query.shape[0]}], "
            f"got {key_lengths.dtype} {list(key_lengths.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask: expected bool (True = may attend), got {mask.dtype}; see from_zero_mask and "
            "from_torch_mask in transformer_ext.ops.masks"
        )
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias: expected a floating-point tensor, got {bias.dtype}")
    shape = (*query.shape[:3], key.shape[2])
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        if len(sizes) != 4 or any(n not in (1, m) for n, m in zip(sizes, shape, strict=True)):
            raise ValueError(
                f"{name}: expected a shape that broadcasts to {list(shape)}, "
                f"got {list(tensor.shape)}"
            )


def _check_packed(query: Tensor, key: Tensor, value: Tensor, q: Packed, k: Packed) -> None:
    _check_qkv(query, key, value, "[tokens, heads, head_dim]")
    for name, tensor, packed in (("query", query, q), ("key", key, k)):
        if tensor.shape[0] != packed.capacity:
            raise ValueError(
                f"{name}: expected the packed batch's {packed.capacity} rows, "
                f"got {list(tensor.shape)}"
            )
    if q.batch_size != k.batch_size:
        raise ValueError(f"k: expected {q.batch_size} sequences as in q, got {k.batch_size}")
