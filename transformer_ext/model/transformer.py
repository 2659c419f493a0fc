"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from transformer_ext import ops
from transformer_ext.model.attention import CachedAttention, DenseAttention, PackedAttention
from transformer_ext.model.base import Model, check_ids, check_read, pack_padded
from transformer_ext.model.cache import DecoderCache
from transformer_ext.model.config import TransformerConfig
from transformer_ext.model.layers import Embedding, Generator, Sites
from transformer_ext.model.stacks import Decoder, Encoder, Stack
from transformer_ext.model.trace import Trace
from transformer_ext.packed import Packed


class Transformer(Model):
    """Encoder-decoder Transformer over token ids.

    Take it from a :class:`TransformerConfig` (``Transformer(preset("base", 32000, 32000))``), or in
    the words of ``torch.nn.Transformer``::

        Transformer(src_vocab_size=8000, tgt_vocab_size=8000, d_model=256, nhead=4,
                    num_encoder_layers=3, num_decoder_layers=3, dim_feedforward=1024)

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: TransformerConfig | None = None, **fields: object):
        super().__init__()
        if config is None:
            config = TransformerConfig.from_dict(fields)
        elif not isinstance(config, TransformerConfig):
            raise TypeError(
                f"config: expected a TransformerConfig, got {config!r}; sizes are given by name"
            )
        elif fields:
            raise TypeError(f"Transformer: give a config or its fields, not both: {list(fields)}")
        self.config = config
        sites = Sites()
        self.source_embedding = Embedding(config.src_vocab_size, config.d_model)
        self.target_embedding = Embedding(config.tgt_vocab_size, config.d_model)
        self.encoder = Encoder(config, sites)
        self.decoder = Decoder(config, sites)
        self.generator = Generator(config.tgt_vocab_size, config.d_model, config.output_bias)
        if config.tie == "all":
            self.target_embedding.weight = self.source_embedding.weight
        if config.tie != "none":
            self.generator.weight = self.target_embedding.weight
        self._begin_dropout()

    # --- packed: what the trainer calls ---------------------------------------------------------

    def encode_packed(self, src_ids: Tensor, src: Packed, rng: Tensor | None = None) -> Tensor:
        """Source ids ``[capacity]`` int64 -> memory ``[capacity, d_model]``.

        ``rng`` is the state of dropout; without it there is none, in training mode too.
        """
        x = self._embed(
            self.encoder, self.source_embedding, src_ids, src.positions, src.max_length, rng
        )
        return self.encoder(x, PackedAttention(src, src), rng)

    def decode_packed(
        self, tgt_ids: Tensor, tgt: Packed, memory: Tensor, src: Packed, rng: Tensor | None = None
    ) -> Tensor:
        """Target ids ``[capacity]`` int64 and the memory -> states ``[capacity, d_model]``.

        ``rng`` as of :meth:`encode_packed`.
        """
        x = self._embed(
            self.decoder, self.target_embedding, tgt_ids, tgt.positions, tgt.max_length, rng
        )
        return self.decoder(
            x, memory, PackedAttention(tgt, tgt, causal=True), PackedAttention(tgt, src), rng
        )

    def forward_packed(self, src_ids: Tensor, src: Packed, tgt_ids: Tensor, tgt: Packed) -> Tensor:
        """Decoder states for packed ids.

        Args:
            src_ids: ``[src.capacity]`` int64.
            src: where the source sentences lie.
            tgt_ids: ``[tgt.capacity]`` int64, each sentence beginning with the start token.
            tgt: where the target sentences lie.

        Returns:
            ``[tgt.capacity, d_model]`` in the type of the activations; state i of a sentence is
            what predicts its token i + 1.
        """
        rng = self._dropout_state()
        memory = self.encode_packed(src_ids, src, rng)
        return self.decode_packed(tgt_ids, tgt, memory, src, rng)

    # --- padded: everybody else -----------------------------------------------------------------

    def forward(
        self,
        src_ids: Tensor,
        tgt_ids: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Decoder states for padded ids, to be given to :attr:`generator`.

        Without masks the sentences must be padded on the right with ``pad_id``; they are packed on
        entry, so padding costs nothing. With masks the padded layout is kept; the one not given is
        then made: of the source everything that is not ``pad_id``, of the target causal.

        Args:
            src_ids: ``[batch, src_length]`` int64.
            tgt_ids: ``[batch, tgt_length]`` int64, each beginning with the start token.
            src_mask: keep-mask (True = may attend) ``[batch, 1, src_length]``.
            tgt_mask: keep-mask ``[batch, tgt_length, tgt_length]``, causal already.

        Returns:
            ``[batch, tgt_length, d_model]``; 0 in padding where no masks were given.

        Raises:
            ValueError: shapes that do not fit, padding in the middle of a sentence, or, on a CPU, ids
                that are not in the vocabulary.
        """
        _check_pairs(src_ids, tgt_ids)
        if src_mask is not None or tgt_mask is not None:
            if src_mask is None:
                src_mask = self._real(src_ids)[:, None, :]
            memory = self.encode(src_ids, src_mask)
            return self.decode(memory, src_mask, tgt_ids, tgt_mask)
        self._advance()
        src = self._packed("src_ids", src_ids)
        tgt = self._packed("tgt_ids", tgt_ids, target=True)
        hidden = self.forward_packed(src.pack(src_ids), src, tgt.pack(tgt_ids), tgt)
        return tgt.unpack(hidden, tgt_ids.shape[1])

    def logits(self, src_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        """Unnormalised scores ``[batch, tgt_length, tgt_vocab_size]`` for padded ids."""
        return self.generator.logits(self(src_ids, tgt_ids))

    def encode(self, src_ids: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """Memory ``[batch, src_length, d_model]`` of padded ids under a keep-mask.

        Args:
            src_ids: ``[batch, src_length]`` int64.
            src_mask: ``[batch, 1, src_length]``, True = may be attended to; None: everything that
                is not ``pad_id``.
        """
        check_ids("src_ids", src_ids)
        self._advance()
        return self._encode_dense(src_ids, DenseAttention(self._heads_mask(src_ids, src_mask)))

    def decode(
        self,
        memory: Tensor,
        src_mask: Tensor | None,
        tgt_ids: Tensor,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Decoder states ``[batch, tgt_length, d_model]`` of padded ids under keep-masks.

        Args:
            memory: ``[batch, src_length, d_model]`` from :meth:`encode`.
            src_mask: ``[batch, 1, src_length]`` or None (all of the memory).
            tgt_ids: ``[batch, tgt_length]`` int64.
            tgt_mask: ``[batch, tgt_length, tgt_length]`` or broadcastable, causal already; None:
                causal.
        """
        check_ids("tgt_ids", tgt_ids)
        attend_memory = DenseAttention(None if src_mask is None else _add_heads(src_mask))
        attend_self = DenseAttention(
            None if tgt_mask is None else _add_heads(tgt_mask), causal=tgt_mask is None
        )
        return self._decode_dense(tgt_ids, memory, attend_self, attend_memory)

    def trace(self, src_ids: Tensor, tgt_ids: Tensor) -> Trace:
        """Every attention and every state of one pass in evaluation mode, without gradients.

        Args:
            src_ids: ``[batch, src_length]`` int64, padded on the right.
            tgt_ids: ``[batch, tgt_length]`` int64, padded on the right, each beginning with the
                start token.

        Raises:
            TypeError: something that is no tensor.
            ValueError: shapes that do not fit, padding in the middle of a sentence, a sentence
                without any token, or ids that are not in the vocabulary.
        """
        _check_pairs(src_ids, tgt_ids)
        src = self._packed("src_ids", src_ids)
        tgt = self._packed("tgt_ids", tgt_ids, target=True)
        check_read("src_ids", src_ids, src.lengths, self.config.src_vocab_size)
        check_read("tgt_ids", tgt_ids, tgt.lengths, self.config.tgt_vocab_size)
        src_mask = ops.key_padding_mask(src.lengths, src_ids.shape[1])
        tgt_mask = ops.key_padding_mask(tgt.lengths, tgt_ids.shape[1])
        with self._studied() as trace:
            attend_memory = DenseAttention(src_mask, trace=trace)
            memory = self._encode_dense(src_ids, attend_memory)
            attend_self = DenseAttention(tgt_mask, causal=True, trace=trace)
            self._decode_dense(tgt_ids, memory, attend_self, attend_memory)
        return trace

    # --- step by step: what the plain Python search calls ---------------------------------------

    def encode_padded(self, src_ids: Tensor) -> Tensor:
        """Memory ``[batch, src_length, d_model]`` of ids padded on the right, without masks."""
        src = self._packed("src_ids", src_ids)
        memory = self.encode_packed(src.pack(src_ids), src)
        return src.unpack(memory, src_ids.shape[1])

    @overload
    def next_log_probs(
        self,
        tgt_prefix: Tensor,
        memory: Tensor,
        src_lengths: Tensor,
        attention_layer: None = None,
        *,
        normalize: bool = True,
    ) -> Tensor: ...

    @overload
    def next_log_probs(
        self,
        tgt_prefix: Tensor,
        memory: Tensor,
        src_lengths: Tensor,
        attention_layer: int,
        *,
        normalize: bool = True,
    ) -> tuple[Tensor, Tensor]: ...

    def next_log_probs(
        self,
        tgt_prefix: Tensor,
        memory: Tensor,
        src_lengths: Tensor,
        attention_layer: int | None = None,
        *,
        normalize: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of the token after each prefix.

        Args:
            tgt_prefix: ``[batch, length]`` int64, all of one length.
            memory: ``[batch, src_length, d_model]`` from :meth:`encode_padded`.
            src_lengths: ``[batch]`` source lengths.
            attention_layer: a decoder layer, from 0, whose attention to the memory is wanted too.
            normalize: False gives the scores before their softmax.

        Returns:
            ``[batch, tgt_vocab_size]`` float32; with ``attention_layer`` a pair of these and of
            the last token's attention ``[batch, src_length]``, averaged over the heads.
        """
        if attention_layer is not None:
            trace = Trace()
            columns = torch.arange(memory.shape[1], device=memory.device)
            mask = _add_heads((columns < src_lengths[:, None])[:, None, :])
            hidden = self._decode_dense(
                tgt_prefix,
                memory,
                DenseAttention(causal=True),
                DenseAttention(mask, trace=trace),
            )
            scores = self.generator.logits(hidden[:, -1]).float()
            log_probs = torch.log_softmax(scores, dim=-1) if normalize else scores
            layer = trace.attentions[f"decoder.layers.{attention_layer}.cross_attention"]
            return log_probs, layer.weights[:, :, -1].float().mean(1)
        src = Packed.from_lengths(src_lengths, device=memory.device)
        batch, length = tgt_prefix.shape
        lengths = torch.full((batch,), length, dtype=torch.int32, device=memory.device)
        tgt = Packed.from_lengths(lengths, batch * length, max_length=length)
        hidden = self.decode_packed(tgt_prefix.flatten(), tgt, src.pack(memory), src)
        last = hidden.view(batch, length, -1)[:, -1].contiguous()
        scores = self.generator.logits(last).float()
        return torch.log_softmax(scores, dim=-1) if normalize else scores

    def decode_step(self, ids: Tensor, cache: DecoderCache) -> Tensor:
        """States ``[rows, d_model]`` of one more token of each hypothesis.

        Args:
            ids: int64 ``[rows]``, the tokens at the positions of the cache's slots.
            cache: holds the hypotheses so far, and the memory; takes these tokens in.
        """
        assert cache.memory is not None
        slots = cache.slots
        x = self._embed(
            self.decoder, self.target_embedding, ids, slots.position, slots.capacity, None
        )
        attend = CachedAttention(cache)
        return self.decoder(x, cache.memory, attend, attend)

    # --------------------------------------------------------------------------------------------

    def _encode_dense(self, src_ids: Tensor, attend: DenseAttention) -> Tensor:
        rng = self._dropout_state()
        x = self._embed_dense(self.encoder, self.source_embedding, src_ids, rng, attend.trace)
        return self.encoder(x, attend, rng)

    def _decode_dense(
        self,
        tgt_ids: Tensor,
        memory: Tensor,
        attend_self: DenseAttention,
        attend_memory: DenseAttention,
    ) -> Tensor:
        rng = self._dropout_state()
        x = self._embed_dense(self.decoder, self.target_embedding, tgt_ids, rng, attend_self.trace)
        return self.decoder(x, memory, attend_self, attend_memory, rng)

    def _ids_name(self, stack: Stack) -> str:
        return "src_ids" if stack is self.encoder else "tgt_ids"

    def _heads_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return _add_heads(self._real(ids)[:, None, :] if mask is None else mask)

    def _real(self, ids: Tensor, target: bool = False) -> Tensor:
        """Which ids are not padding.

        The first of a target is its start token, which in Marian's models is the pad token too.
        """
        real = ids != self.config.pad_id
        if target and self.config.decoder_start_id == self.config.pad_id:
            real = real | (torch.arange(ids.shape[1], device=ids.device) == 0)
        return real

    def _packed(self, name: str, ids: Tensor, target: bool = False) -> Packed:
        real = self._real(ids, target)
        return pack_padded(name, ids, real, self.config.pad_id)


def make_model(
    src_vocab: int,
    tgt_vocab: int,
    N: int = 6,
    d_model: int = 512,
    d_ff: int = 2048,
    h: int = 8,
    dropout: float = 0.1,
) -> Transformer:
    """The model of the Annotated Transformer, in that notebook's words.

    Norm order: pre-norm (``x + sublayer(norm(x))``) with a norm after each stack, as the notebook's
    code has it; the paper's own is post-norm, which ``Transformer(preset("base", ...))`` gives.
    Embeddings are not shared, and the generator has a bias.

    Args:
        src_vocab: size of the source vocabulary.
        tgt_vocab: size of the target vocabulary.
        N: layers of encoder and of decoder.
        d_model: width of the model.
        d_ff: inner width of the position-wise network.
        h: attention heads.
        dropout: probability.
    """
    return Transformer(
        TransformerConfig(
            src_vocab_size=src_vocab,
            tgt_vocab_size=tgt_vocab,
            d_model=d_model,
            nhead=h,
            num_encoder_layers=N,
            num_decoder_layers=N,
            dim_feedforward=d_ff,
            dropout=dropout,
            norm_first=True,
            layer_norm_eps=1e-6,
            tie="none",
            output_bias=True,
        )
    )


def _check_pairs(src_ids: Tensor, tgt_ids: Tensor) -> None:
    check_ids("src_ids", src_ids)
    check_ids("tgt_ids", tgt_ids)
    if src_ids.shape[0] != tgt_ids.shape[0]:
        raise ValueError(
            f"tgt_ids: expected as many sentences as src_ids has ({src_ids.shape[0]}), "
            f"got {tgt_ids.shape[0]}"
        )


def _add_heads(mask: Tensor) -> Tensor:
    """``[batch, queries, keys]`` keep-mask -> ``[batch, 1, queries, keys]`` bool."""
    if mask.dim() != 3:
        raise ValueError(
            "mask: expected [batch, queries or 1, keys] (True = may attend), "
            f"got shape {list(mask.shape)}"
        )
    if mask.is_floating_point():
        # 0 and -inf, as torch.nn.Transformer has them, would mean the opposite here.
        raise TypeError(
            f"mask: expected bool (True = may attend), got {mask.dtype}; see from_torch_mask in "
            "transformer_ext.ops"
        )
    return mask.bool()[:, None]
