"""A text encoder: the encoder alone, a state for each token, a vector for each text, and heads on
them for labels and for masked tokens (as BERT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer_ext import ops
from transformer_ext.model.attention import PackedAttention
from transformer_ext.model.base import Model, check_ids, check_read, check_tensor, pack_ids
from transformer_ext.model.config import TextEncoderConfig
from transformer_ext.model.layers import Embedding, Generator, Linear, Norm, Sites, dropout_p
from transformer_ext.model.stacks import SelfAttentionStack
from transformer_ext.model.trace import Trace
from transformer_ext.packed import Packed


class TextEncoder(Model):
    """Encoder-only Transformer over token ids.

    Take it from a :class:`TextEncoderConfig`, or by its fields::

        TextEncoder(vocab_size=8000, labels=["no", "yes"], d_model=256, nhead=4, num_layers=3)

    Attributes:
        config: what it was built from.
        generator: output projection for the labels; None where there are none.
        masked_lm_head: scores for masked tokens; None where the model has none.
    """

    def __init__(self, config: TextEncoderConfig | None = None, **fields: object):
        super().__init__()
        if config is None:
            config = TextEncoderConfig.from_dict(fields)
        elif not isinstance(config, TextEncoderConfig):
            raise TypeError(f"config: expected a TextEncoderConfig, got {config!r}")
        elif fields:
            raise TypeError(f"TextEncoder: give a config or its fields, not both: {list(fields)}")
        self.config = config
        sites = Sites()
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.encoder = SelfAttentionStack(
            config, sites, config.num_layers, "encoder", config.num_token_types
        )
        self.pooler = Linear(config.d_model, config.d_model) if config.pooler else None
        self.generator = (
            Generator(len(config.labels), config.d_model, config.output_bias)
            if config.labels
            else None
        )
        self.masked_lm_head = MaskedLMHead(config) if config.masked_lm_head else None
        self.pooled_site = sites.next()
        self._begin_dropout()

    def encode_packed(
        self,
        ids: Tensor,
        sequences: Packed,
        token_types: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[capacity]`` -> a state for each token, ``[capacity, d_model]``.

        ``rng`` is the state of dropout; without it there is none, in training mode too.
        """
        x = self._embed(
            self.encoder,
            self.embedding,
            ids,
            sequences.positions,
            sequences.max_length,
            rng,
            token_types,
        )
        return self.encoder(x, PackedAttention(sequences, sequences), rng)

    def forward_packed(
        self, ids: Tensor, sequences: Packed, token_types: Tensor | None = None
    ) -> Tensor:
        """A vector for each of the packed texts.

        Args:
            ids: ``[sequences.capacity]`` int64, each text from its start to its end token.
            sequences: where they lie; none may be empty.
            token_types: ``[sequences.capacity]`` int64, for a model that has them; None: all 0.

        Returns:
            ``[batch, d_model]`` in the type of the activations, to be given to :attr:`generator`.
        """
        rng = self._dropout_state()
        hidden = self.encode_packed(ids, sequences, token_types, rng)
        pooled = self._pool(hidden, sequences)
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        if self.config.normalize:
            pooled = functional.normalize(pooled, dim=-1)
        p = dropout_p(self.config.dropout, self, rng)
        return ops.dropout(pooled, p, rng, self.pooled_site)

    def _pool(self, hidden: Tensor, sequences: Packed) -> Tensor:
        starts = sequences.cu_seqlens[:-1]
        if self.config.pooling == "first":
            return hidden[starts]
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        # On a GPU index_add would add in any order. unsafe: the host does not wait to look at the
        # offsets.
        sums = torch.segment_reduce(wide, "sum", offsets=sequences.cu_seqlens, axis=0, unsafe=True)
        return (sums / sequences.lengths[:, None]).to(hidden.dtype)

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """A vector for each text of ids padded on the right, to be given to :attr:`generator`.

        Args:
            ids: ``[batch, length]`` int64, each text from its start to its end token.
            lengths: ``[batch]`` tokens of each; None: everything that is not ``pad_id``.
            token_types: ``[batch, length]`` int64, for a model that has them; None: all 0.

        Returns:
            ``[batch, d_model]``.

        Raises:
            ValueError: shapes that do not fit, padding in the middle of a text, or token types
                for a model without them.
        """
        self._check_token_types(ids, token_types)
        self._advance()
        sequences = pack_ids("ids", ids, lengths, self.config.pad_id)
        types = None if token_types is None else sequences.pack(token_types)
        return self.forward_packed(sequences.pack(ids), sequences, types)

    def trace(
        self, ids: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None
    ) -> Trace:
        """Every attention and every state of one pass in evaluation mode, without gradients.

        Args:
            ids, lengths, token_types: as of :meth:`forward`.

        Raises:
            TypeError: something that is no tensor.
            ValueError: as of :meth:`forward`, a text without any token, or ids that are not in the
                vocabulary.
        """
        check_ids("ids", ids)
        self._check_token_types(ids, token_types)
        if token_types is not None:
            # Of padding too: the padded pass embeds them.
            ones = torch.ones(len(token_types))
            check_read("token_types", token_types, ones, self.config.num_token_types)
        return self._trace_stack(
            self.encoder,
            self.embedding,
            ids,
            lengths,
            self.config.pad_id,
            token_types=token_types,
        )

    def _check_token_types(self, ids: Tensor, token_types: Tensor | None) -> None:
        if token_types is None:
            return
        if self.encoder.token_types is None:
            raise ValueError("token_types: expected none, the model has no embedding of them")
        check_tensor("token_types", token_types, f"int64 {list(ids.shape)}")
        if token_types.shape != ids.shape or token_types.dtype != torch.int64:
            raise ValueError(
                f"token_types: expected int64 {list(ids.shape)}, got {token_types.dtype} "
                f"{list(token_types.shape)}"
            )

    def logits(
        self, ids: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Unnormalised scores ``[batch, labels]`` for ids padded on the right.

        Raises:
            ValueError: as of :meth:`forward`, or the model has no labels.
        """
        if self.generator is None:
            raise ValueError("labels: the model has none")
        return self.generator.logits(self(ids, lengths, token_types))

    def masked_logits(self, states: Tensor) -> Tensor:
        """Unnormalised scores of the tokens that belong where the states are of.

        Args:
            states: ``[..., d_model]`` of any tokens, as :meth:`encode_packed` gives them.

        Returns:
            ``[..., vocab_size]``.

        Raises:
            ValueError: the model has no ``masked_lm_head``.
        """
        if self.masked_lm_head is None:
            raise ValueError("masked_lm_head: the model has none")
        return self.masked_lm_head(states, self.embedding.weight)


class MaskedLMHead(nn.Module):
    """From the states of tokens to scores of the vocabulary (Devlin et al. 2019, section 3.1)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.activation = config.activation
        self.projection = Linear(config.d_model, config.d_model)
        self.norm = Norm(config.d_model, config.norm, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """States ``[..., d_model]`` and the embedding's weights -> ``[..., vocab_size]``."""
        inner = ops.linear(states, self.projection.weight, None)
        inner = ops.activation(inner, self.projection.bias, kind=self.activation)
        return ops.linear(self.norm(inner), embedding, self.bias)
