"""A language model: the decoder alone, whose tokens see the ones before them (paper section 3.1,
without attention to an encoder, as in GPT)."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_ext.model.attention import CachedAttention, PackedAttention
from transformer_ext.model.base import Model, pack_ids
from transformer_ext.model.cache import DecoderCache
from transformer_ext.model.config import LanguageModelConfig
from transformer_ext.model.layers import Embedding, Generator, Sites
from transformer_ext.model.stacks import SelfAttentionStack
from transformer_ext.model.trace import Trace
from transformer_ext.packed import Packed


class LanguageModel(Model):
    """Decoder-only Transformer over token ids.

    Take it from a :class:`LanguageModelConfig`, or by its fields::

        LanguageModel(vocab_size=8000, d_model=256, nhead=4, num_layers=3, dim_feedforward=1024)

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: LanguageModelConfig | None = None, **fields: object):
        super().__init__()
        if config is None:
            config = LanguageModelConfig.from_dict(fields)
        elif not isinstance(config, LanguageModelConfig):
            raise TypeError(f"config: expected a LanguageModelConfig, got {config!r}")
        elif fields:
            raise TypeError(f"LanguageModel: give a config or its fields, not both: {list(fields)}")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.decoder = SelfAttentionStack(config, Sites(), config.num_layers, "decoder")
        self.generator = Generator(config.vocab_size, config.d_model, config.output_bias)
        if config.tie:
            self.generator.weight = self.embedding.weight
        self._begin_dropout()

    def forward_packed(self, ids: Tensor, sequences: Packed) -> Tensor:
        """States for packed ids.

        Args:
            ids: ``[sequences.capacity]`` int64, each sequence beginning with the start token.
            sequences: where they lie.

        Returns:
            ``[sequences.capacity, d_model]`` in the type of the activations; state i of a sequence
            is what predicts its token i + 1.
        """
        rng = self._dropout_state()
        x = self._embed(
            self.decoder, self.embedding, ids, sequences.positions, sequences.max_length, rng
        )
        return self.decoder(x, PackedAttention(sequences, sequences, causal=True), rng)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """States for ids padded on the right, to be given to :attr:`generator`.

        Args:
            ids: ``[batch, length]`` int64, each sequence beginning with the start token.
            lengths: ``[batch]`` tokens of each; None: everything that is not ``pad_id``.

        Returns:
            ``[batch, length, d_model]``; 0 in padding.

        Raises:
            ValueError: shapes that do not fit, or padding in the middle of a sequence.
        """
        self._advance()
        sequences = pack_ids("ids", ids, lengths, self.config.pad_id)
        hidden = self.forward_packed(sequences.pack(ids), sequences)
        return sequences.unpack(hidden, ids.shape[1])

    def logits(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Unnormalised scores ``[batch, length, vocab_size]`` of the token after each."""
        return self.generator.logits(self(ids, lengths))

    def trace(self, ids: Tensor, lengths: Tensor | None = None) -> Trace:
        """Every attention and every state of one pass in evaluation mode, without gradients.

        Args:
            ids, lengths: as of :meth:`forward`.

        Raises:
            TypeError: something that is no tensor.
            ValueError: as of :meth:`forward`, a text without any token, or ids that are not in the
                vocabulary.
        """
        return self._trace_stack(
            self.decoder, self.embedding, ids, lengths, self.config.pad_id, causal=True
        )

    def read_prompts(self, ids: Tensor, sequences: Packed, cache: DecoderCache) -> None:
        """Take in what comes before the last token of each prompt.

        Args:
            ids: ``[sequences.capacity]`` int64, packed, all but the last tokens of the prompts.
            sequences: where they lie.
            cache: takes their keys and values.
        """
        x = self._embed(
            self.decoder, self.embedding, ids, sequences.positions, sequences.max_length, None
        )
        self.decoder(x, PackedAttention(sequences, sequences, causal=True, cache=cache))

    def decode_step(self, ids: Tensor, cache: DecoderCache) -> Tensor:
        """States ``[rows, d_model]`` of one more token of each hypothesis.

        Args:
            ids: int64 ``[rows]``, the tokens at the positions of the cache's slots.
            cache: holds the hypotheses so far; takes these tokens in.
        """
        slots = cache.slots
        x = self._embed(self.decoder, self.embedding, ids, slots.position, slots.capacity, None)
        return self.decoder(x, CachedAttention(cache))

    def next_log_probs(self, prefix: Tensor, *, normalize: bool = True) -> Tensor:
        """Log-probabilities of the token after each prefix, for a search.

        Args:
            prefix: ``[batch, length]`` int64, all of one length.
            normalize: False gives the scores before their softmax.

        Returns:
            ``[batch, vocab_size]`` float32.
        """
        batch, length = prefix.shape
        lengths = torch.full((batch,), length, dtype=torch.int32, device=prefix.device)
        sequences = Packed.from_lengths(lengths, batch * length, max_length=length)
        hidden = self.forward_packed(prefix.flatten(), sequences)
        last = hidden.view(batch, length, -1)[:, -1].contiguous()
        scores = self.generator.logits(last).float()
        return torch.log_softmax(scores, dim=-1) if normalize else scores
