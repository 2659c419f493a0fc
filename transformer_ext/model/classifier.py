"""A classifier: the encoder alone, one vector for each text, and scores for its labels (as BERT)."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_ext import ops
from transformer_ext.model.attention import PackedAttention
from transformer_ext.model.base import Model, pack_ids
from transformer_ext.model.config import ClassifierConfig
from transformer_ext.model.layers import Embedding, Generator, Linear, Sites
from transformer_ext.model.stacks import SelfAttentionStack
from transformer_ext.packed import Packed


class Classifier(Model):
    """Encoder-only Transformer over token ids, with one output a text.

    Take it from a :class:`ClassifierConfig`, or by its fields::

        Classifier(vocab_size=8000, labels=["no", "yes"], d_model=256, nhead=4, num_layers=3)

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: ClassifierConfig | None = None, **fields: object):
        super().__init__()
        if config is None:
            config = ClassifierConfig.from_dict(fields)
        elif not isinstance(config, ClassifierConfig):
            raise TypeError(f"config: expected a ClassifierConfig, got {config!r}")
        elif fields:
            raise TypeError(f"Classifier: give a config or its fields, not both: {list(fields)}")
        self.config = config
        sites = Sites()
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.encoder = SelfAttentionStack(
            config, sites, config.num_layers, "encoder", config.num_token_types
        )
        self.pooler = Linear(config.d_model, config.d_model) if config.pooler else None
        self.generator = Generator(len(config.labels), config.d_model, config.output_bias)
        self.pooled_site = sites.next()
        self._begin_dropout()

    def encode_packed(
        self,
        ids: Tensor,
        sequences: Packed,
        token_types: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[capacity]`` -> a state for each token, ``[capacity, d_model]``."""
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
        p = self.config.dropout if self.training else 0.0
        return ops.dropout(pooled, p, rng, self.pooled_site)

    def _pool(self, hidden: Tensor, sequences: Packed) -> Tensor:
        starts = sequences.cu_seqlens[:-1]
        if self.config.pooling == "first":
            return hidden[starts]
        # The sum over a text is a difference of running sums, which float32 does not hold well
        # enough: each row is added to the text that it belongs to. Slack rows have a text of
        # their own.
        texts = sequences.batch_size
        rows = torch.arange(sequences.capacity, dtype=torch.int32, device=hidden.device)
        ends = sequences.cu_seqlens[1:].contiguous()
        owner = torch.bucketize(rows, ends, right=True)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        sums = wide.new_zeros(texts + 1, hidden.shape[1]).index_add(0, owner, wide)[:texts]
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
        if token_types is not None and (
            self.encoder.token_types is None or token_types.shape != ids.shape
        ):
            raise ValueError(
                "token_types: expected none, the model has no embedding of them"
                if self.encoder.token_types is None
                else f"token_types: expected {list(ids.shape)}, got {list(token_types.shape)}"
            )
        self._advance()
        sequences = pack_ids("ids", ids, lengths, self.config.pad_id)
        types = None if token_types is None else sequences.pack(token_types)
        return self.forward_packed(sequences.pack(ids), sequences, types)

    def logits(
        self, ids: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Unnormalised scores ``[batch, labels]`` for ids padded on the right."""
        return self.generator.logits(self(ids, lengths, token_types))
