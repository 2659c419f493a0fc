"""What a model computed on the way to its result, for study and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AttentionTrace:
    """One attention (paper section 3.2), of all heads.

    Attributes:
        query: ``[batch, nhead, queries, head_dim]``, rotated where positions are rotary.
        key: ``[batch, num_kv_heads, keys, head_dim]``, rotated alike.
        value: ``[batch, num_kv_heads, keys, head_dim]``.
        scores: ``[batch, nhead, queries, keys]``: ``query key^T / sqrt(head_dim)``, -inf where the
            query may not attend to the key.
        weights: softmax of the scores; all 0 for a query that may attend to nothing.
        context: ``[batch, nhead, queries, head_dim]``: ``weights value``.
        output: ``[batch, queries, d_model]``: the contexts of all heads side by side, times W^O.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    weights: Tensor
    context: Tensor
    output: Tensor


@dataclass(frozen=True)
class Trace:
    """The attentions and the states of one pass.

    Attributes:
        attentions: by the name of the module: ``encoder.layers.0.self_attention``,
            ``decoder.layers.0.self_attention``, ``decoder.layers.0.cross_attention``, ...
        states: ``[batch, length, d_model]`` in the order in which they came to be. For each stack
            ``<stack>.tokens`` (the embeddings of the tokens, scaled), ``<stack>.positions``
            (``[length, d_model]``, what is added; not where positions are rotary or none) and
            ``<stack>.token_types`` (where the model has them); ``<stack>.input`` (what the first
            layer reads); after each sublayer, residual and norm included,
            ``<stack>.layers.0.self_attention``, ``....cross_attention``, ``....feed_forward``; and
            ``<stack>.output``, after the last norm.
    """

    attentions: dict[str, AttentionTrace] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
