"""Multi-head attention (paper section 3.2.2) in the two forms that the model uses.

Both work on packed rows ``[tokens, d_model]``, on padded ``[batch, length, d_model]`` and on the
newest tokens of hypotheses ``[rows, d_model]``; which, and what may attend to what, is said by the
value passed as ``attend``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_ext import ops
from transformer_ext.model.cache import DecoderCache
from transformer_ext.model.layers import Linear, Sites, dropout_p, xavier_per_projection
from transformer_ext.model.trace import AttentionTrace, Trace
from transformer_ext.packed import Packed


@dataclass(frozen=True)
class PackedAttention:
    """Attention within packed sequences: queries of sequence b see keys of sequence b.

    Attributes:
        query: layout of the query rows.
        key: layout of the key rows.
        causal: position i sees positions up to i only.
        cache: where given, self-attentions leave their keys and values there, of prompts.
    """

    query: Packed
    key: Packed
    causal: bool = False
    cache: DecoderCache | None = None


@dataclass(frozen=True)
class DenseAttention:
    """Attention on padded tensors under any mask.

    Attributes:
        mask: keep-mask, True = may attend, broadcastable to ``[batch, heads, queries, keys]``.
        causal: position i sees positions up to i only.
        trace: where given, attentions and layers put here what they compute, by name.
    """

    mask: Tensor | None = None
    causal: bool = False
    trace: Trace | None = None


@dataclass(frozen=True)
class CachedAttention:
    """Attention of the newest token of each hypothesis, one a row, to what a cache holds.

    Attributes:
        cache: takes its key and value, and has those before it and those of the memory.
    """

    cache: DecoderCache


Attend = PackedAttention | DenseAttention | CachedAttention


def trace_state(attend: Attend, name: str, state: Tensor) -> None:
    """Keep a state under its name, where that is asked for."""
    if isinstance(attend, DenseAttention) and attend.trace is not None:
        attend.trace.states[name] = state


class _Attention(nn.Module):
    """What self- and cross-attention share: head sizes, the output projection, dropout."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_kv_heads: int,
        head_dim: int,
        dropout: float,
        bias: bool,
        sites: Sites,
        name: str,
    ):
        super().__init__()
        self.nhead = nhead
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.site = sites.next()
        self.name = name
        self.out_projection = Linear(nhead * head_dim, d_model, bias)

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, attend: DenseAttention, rng: Tensor | None
    ) -> Tensor:
        """Padded attention on ``[batch, length, heads, head_dim]`` -> ``[batch, length, d_model]``."""
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        result = ops.attention(
            query,
            key,
            value,
            mask=attend.mask,
            causal=attend.causal,
            dropout_p=dropout_p(self.dropout, self, rng),
            rng=rng,
            site=self.site,
            return_scores=attend.trace is not None,
        )
        if attend.trace is None:
            assert isinstance(result, Tensor)
            return self._merge(result)
        context, weights, scores = result
        output = self._merge(context)
        attend.trace.attentions[self.name] = AttentionTrace(
            query, key, value, scores, weights, context, output
        )
        return output

    def _merge(self, context: Tensor) -> Tensor:
        """``[batch, heads, length, head_dim]`` -> ``[batch, length, d_model]``."""
        return self.out_projection(context.transpose(1, 2).flatten(2))


class SelfAttention(_Attention):
    """Attention of a sequence to itself; query, key and value come from one projection."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_kv_heads: int,
        head_dim: int,
        dropout: float,
        bias: bool,
        sites: Sites,
        name: str,
        rotary: bool = False,
    ):
        super().__init__(d_model, nhead, num_kv_heads, head_dim, dropout, bias, sites, name)
        self.rotary = rotary
        self.in_projection = Linear(d_model, (nhead + 2 * num_kv_heads) * head_dim, bias)
        xavier_per_projection(self.in_projection, [nhead, num_kv_heads, num_kv_heads], head_dim)

    def forward(self, x: Tensor, attend: Attend, rng: Tensor | None = None) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``, before the residual connection."""
        projected = self.in_projection(x)
        if self.rotary:
            projected = self._rotate(projected, attend)
        if isinstance(attend, CachedAttention):
            return self._step(projected, attend.cache)
        if isinstance(attend, PackedAttention):
            if attend.cache is not None:
                attend.cache.fill(self.name, projected[..., self.nhead * self.head_dim :])
            attended = ops.self_attention_packed(
                projected,
                self.nhead,
                self.num_kv_heads,
                attend.query,
                causal=attend.causal,
                dropout_p=dropout_p(self.dropout, self, rng),
                rng=rng,
                site=self.site,
            )
            return self.out_projection(attended)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.nhead, self.num_kv_heads, self.num_kv_heads], dim=-2)
        return self._dense(query, key, value, attend, rng)

    def _step(self, projected: Tensor, cache: DecoderCache) -> Tensor:
        width = self.nhead * self.head_dim
        past = cache.extend(self.name, projected[..., width:]).unflatten(-1, (-1, self.head_dim))
        key, value = past.split([self.num_kv_heads, self.num_kv_heads], dim=-2)
        query = projected[:, :width].view(len(past), -1, self.nhead, self.head_dim)
        attend = DenseAttention(cache.slots.mask)
        return self._dense(query, key, value, attend, None).flatten(0, 1)

    def _rotate(self, projected: Tensor, attend: Attend) -> Tensor:
        if isinstance(attend, PackedAttention):
            positions = attend.query.positions
        elif isinstance(attend, CachedAttention):
            positions = attend.cache.slots.position
        else:
            positions = torch.arange(projected.shape[-2], device=projected.device)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        turned = self.nhead + self.num_kv_heads
        rotated = rotate(heads[..., :turned, :], positions)
        return torch.cat([rotated, heads[..., turned:, :]], dim=-2).flatten(-2)


class CrossAttention(_Attention):
    """Attention of the decoder to the encoder's output (the memory)."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_kv_heads: int,
        head_dim: int,
        dropout: float,
        bias: bool,
        sites: Sites,
        name: str,
    ):
        super().__init__(d_model, nhead, num_kv_heads, head_dim, dropout, bias, sites, name)
        self.query_projection = Linear(d_model, nhead * head_dim, bias)
        self.key_value_projection = Linear(d_model, 2 * num_kv_heads * head_dim, bias)
        xavier_per_projection(self.key_value_projection, [num_kv_heads, num_kv_heads], head_dim)

    def forward(
        self, x: Tensor, memory: Tensor, attend: Attend, rng: Tensor | None = None
    ) -> Tensor:
        """``x`` attends to ``memory``; ``[..., d_model]`` each, before the residual connection."""
        query = self.query_projection(x)
        if isinstance(attend, CachedAttention):
            return self._step(query, memory, attend.cache)
        key_value = self.key_value_projection(memory)
        if isinstance(attend, PackedAttention):
            attended = ops.cross_attention_packed(
                query,
                key_value,
                self.nhead,
                self.num_kv_heads,
                attend.query,
                attend.key,
                dropout_p=dropout_p(self.dropout, self, rng),
                rng=rng,
                site=self.site,
            )
            return self.out_projection(attended)
        return self._attend(query, key_value, attend, rng)

    def _attend(
        self, query: Tensor, key_value: Tensor, attend: DenseAttention, rng: Tensor | None
    ) -> Tensor:
        heads = key_value.unflatten(-1, (-1, self.head_dim))
        key, value = heads.split([self.num_kv_heads, self.num_kv_heads], dim=-2)
        return self._dense(query.unflatten(-1, (-1, self.head_dim)), key, value, attend, rng)

    def _step(self, query: Tensor, memory: Tensor, cache: DecoderCache) -> Tensor:
        key_value = cache.of_memory(self.name)
        if key_value is None:
            key_value = cache.set_memory(self.name, self.key_value_projection(memory))
        # The hypotheses of a sentence are its queries: its keys and values are read once for all.
        sentences = query.unflatten(0, (-1, cache.slots.width))
        trace = cache.trace if cache.traced == self.name else None
        attend = DenseAttention(cache.memory_mask, trace=trace)
        return self._attend(sentences, key_value, attend, None).flatten(0, 1)


def rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, "RoFormer", equation 34).

    Dimension i of a head and dimension i + head_dim / 2 are one complex number, turned by
    position * 10000^(-2i / head_dim).

    Args:
        heads: ``[..., length, heads, head_dim]``, head_dim even.
        positions: ``[length]`` integers.

    Returns:
        the same shape and dtype.
    """
    half = heads.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32, device=heads.device) / half
    angles = positions.to(torch.float32)[:, None] * 10000.0**-exponents
    cosine = angles.cos()[:, None, :]
    sine = angles.sin()[:, None, :]
    wide = heads if heads.dtype == torch.float64 else heads.float()
    real, imaginary = wide[..., :half], wide[..., half:]
    turned = torch.cat([real * cosine - imaginary * sine, imaginary * cosine + real * sine], dim=-1)
    return turned.to(heads.dtype)
