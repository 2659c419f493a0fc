"""The layers and the two stacks that models are made of (paper section 3.1, figure 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_ext import ops
from transformer_ext.model.attention import Attend, CrossAttention, SelfAttention, trace_state
from transformer_ext.model.config import ModelConfig, TransformerConfig
from transformer_ext.model.layers import Embedding, FeedForward, Norm, Positions, Sites, dropout_p


class _Layer(nn.Module):
    """What encoder and decoder layers share: a sublayer inside its residual connection.

    Post-norm (the paper): ``norm(x + dropout(sublayer(x)))``; pre-norm:
    ``x + dropout(sublayer(norm(x)))``.
    """

    def __init__(self, config: ModelConfig, sites: Sites, name: str):
        super().__init__()
        self.name = name
        self.norm_first = config.norm_first
        self.dropout = config.dropout
        self.feed_forward = FeedForward(
            config.d_model,
            config.dim_feedforward,
            config.activation,
            config.gated,
            config.activation_dropout,
            config.bias,
            sites,
        )

    def _connect(
        self,
        x: Tensor,
        sublayer: Callable[[Tensor], Tensor],
        norm: Norm,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        p = dropout_p(self.dropout, self, rng)
        if self.norm_first:
            return ops.residual_dropout(sublayer(norm(x)), x, dropout_p=p, rng=rng, site=site)
        return norm.after_residual(sublayer(x), x, p, rng, site)[1]


class EncoderLayer(_Layer):
    """Self-attention, then the position-wise network (paper section 3.1, figure 1 left)."""

    def __init__(self, config: ModelConfig, sites: Sites, name: str):
        super().__init__(config, sites, name)
        self.self_attention = SelfAttention(
            config.d_model,
            config.nhead,
            config.num_kv_heads,
            config.head_dim,
            config.attention_dropout,
            config.bias,
            sites,
            f"{name}.self_attention",
            rotary=config.positions == "rope",
        )
        self.self_attention_norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.feed_forward_norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.sites = (sites.next(), sites.next())

    def forward(self, x: Tensor, attend: Attend, rng: Tensor | None = None) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``."""
        x = self._connect(
            x,
            lambda y: self.self_attention(y, attend, rng),
            self.self_attention_norm,
            rng,
            self.sites[0],
        )
        trace_state(attend, f"{self.name}.self_attention", x)
        x = self._connect(
            x, lambda y: self.feed_forward(y, rng), self.feed_forward_norm, rng, self.sites[1]
        )
        trace_state(attend, f"{self.name}.feed_forward", x)
        return x


class DecoderLayer(_Layer):
    """Masked self-attention, attention to the memory, the position-wise network (figure 1 right)."""

    def __init__(self, config: ModelConfig, sites: Sites, name: str):
        super().__init__(config, sites, name)
        heads = (config.d_model, config.nhead, config.num_kv_heads, config.head_dim)
        self.self_attention = SelfAttention(
            *heads,
            config.attention_dropout,
            config.bias,
            sites,
            f"{name}.self_attention",
            rotary=config.positions == "rope",
        )
        self.cross_attention = CrossAttention(
            *heads, config.attention_dropout, config.bias, sites, f"{name}.cross_attention"
        )
        self.self_attention_norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.cross_attention_norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.feed_forward_norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.sites = (sites.next(), sites.next(), sites.next())

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        attend_self: Attend,
        attend_memory: Attend,
        rng: Tensor | None = None,
    ) -> Tensor:
        """``x`` ``[..., d_model]`` and the encoder's output -> ``[..., d_model]``."""
        x = self._connect(
            x,
            lambda y: self.self_attention(y, attend_self, rng),
            self.self_attention_norm,
            rng,
            self.sites[0],
        )
        trace_state(attend_self, f"{self.name}.self_attention", x)
        x = self._connect(
            x,
            lambda y: self.cross_attention(y, memory, attend_memory, rng),
            self.cross_attention_norm,
            rng,
            self.sites[1],
        )
        trace_state(attend_self, f"{self.name}.cross_attention", x)
        x = self._connect(
            x, lambda y: self.feed_forward(y, rng), self.feed_forward_norm, rng, self.sites[2]
        )
        trace_state(attend_self, f"{self.name}.feed_forward", x)
        return x


class Stack(nn.Module):
    """What the stacks share: embedding of the input, final norm.

    Args:
        config: of the model.
        sites: numbers for the dropout masks.
        name: of the stack, under which a trace has what it computes.
        token_types: rows of a second embedding, of what kind each token is; 0: none.
    """

    def __init__(self, config: ModelConfig, sites: Sites, name: str, token_types: int = 0):
        super().__init__()
        self.name = name
        self.dropout = config.dropout
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.positions = Positions(config.positions, config.d_model, config.max_positions)
        self.embedding_norm = (
            Norm(config.d_model, config.norm, config.layer_norm_eps)
            if config.embedding_norm
            else None
        )
        self.norm = (
            Norm(config.d_model, config.norm, config.layer_norm_eps) if config.final_norm else None
        )
        self.token_types = Embedding(token_types, config.d_model) if token_types else None
        self.embedding_site = sites.next()

    def embed(
        self,
        ids: Tensor,
        weight: Tensor,
        positions: Tensor,
        max_length: int,
        rng: Tensor | None,
        dtype: torch.dtype,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """``ids`` of any shape -> ``[..., d_model]``: scaled embedding + positions, dropout.

        ``token_types`` of the same shape are read by a stack that has them; None: all are 0.
        """
        p = dropout_p(self.dropout, self, rng)
        alone = self.embedding_norm is None and self.token_types is None
        table = self.positions.up_to(max_length)
        x = ops.embedding(
            ids,
            weight,
            scale=self.scale,
            positions=positions if table is not None else None,
            position_table=table,
            dropout_p=p if alone else 0.0,
            rng=rng,
            site=self.embedding_site,
            dtype=dtype,
        )
        if self.token_types is not None:
            types = torch.zeros_like(ids) if token_types is None else token_types
            x = x + ops.embedding(types, self.token_types.weight, dtype=dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x if alone else ops.dropout(x, p, rng, self.embedding_site)

    def trace_embedding(
        self, ids: Tensor, weight: Tensor, dtype: torch.dtype, token_types: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The summands of :meth:`embed` for padded ids, by the names of a trace."""
        found = {"tokens": ops.embedding(ids, weight, scale=self.scale, dtype=dtype)}
        length = ids.shape[1]
        table = self.positions.up_to(length)
        if table is not None:
            found["positions"] = table[:length].to(dtype)
        if self.token_types is not None:
            types = torch.zeros_like(ids) if token_types is None else token_types
            found["token_types"] = ops.embedding(types, self.token_types.weight, dtype=dtype)
        return {f"{self.name}.{part}": state for part, state in found.items()}


class SelfAttentionStack(Stack):
    """Layers of self-attention: under a causal mask a decoder without cross-attention.

    Args:
        config: of the model.
        sites: numbers for the dropout masks.
        depth: number of layers.
        name, token_types: see :class:`Stack`.
    """

    def __init__(
        self, config: ModelConfig, sites: Sites, depth: int, name: str, token_types: int = 0
    ):
        super().__init__(config, sites, name, token_types)
        self.layers = nn.ModuleList(
            EncoderLayer(config, sites, f"{name}.layers.{i}") for i in range(depth)
        )

    def forward(self, x: Tensor, attend: Attend, rng: Tensor | None = None) -> Tensor:
        """Embedded tokens ``[..., d_model]`` -> their states ``[..., d_model]``."""
        trace_state(attend, f"{self.name}.input", x)
        for layer in self.layers:
            x = layer(x, attend, rng)
        x = x if self.norm is None else self.norm(x)
        trace_state(attend, f"{self.name}.output", x)
        return x


class Encoder(SelfAttentionStack):
    """The encoder of an encoder-decoder."""

    def __init__(self, config: TransformerConfig, sites: Sites):
        super().__init__(config, sites, config.num_encoder_layers, "encoder")


class Decoder(Stack):
    """The stack of decoder layers."""

    def __init__(self, config: TransformerConfig, sites: Sites):
        super().__init__(config, sites, "decoder")
        self.layers = nn.ModuleList(
            DecoderLayer(config, sites, f"decoder.layers.{i}")
            for i in range(config.num_decoder_layers)
        )

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        attend_self: Attend,
        attend_memory: Attend,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Embedded target and memory, ``[..., d_model]`` each -> decoder states."""
        trace_state(attend_self, f"{self.name}.input", x)
        for layer in self.layers:
            x = layer(x, memory, attend_self, attend_memory, rng)
        x = x if self.norm is None else self.norm(x)
        trace_state(attend_self, f"{self.name}.output", x)
        return x
