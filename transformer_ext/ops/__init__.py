"""The operations of the model, each one Python function over two implementations.

Every op runs as a compiled kernel where this build has one for the device and dtype, and else as
its ``<op>_reference`` twin in plain PyTorch, which is also the shortest description of what it
computes. :func:`set_backend` chooses by hand.
"""

from transformer_ext.ops._backend import backend, has_kernel, set_backend, use_compiled
from transformer_ext.ops.activation import activation, activation_reference
from transformer_ext.ops.attention import (
    attention,
    attention_packed,
    attention_packed_reference,
    attention_reference,
    cross_attention_packed,
    self_attention_packed,
)
from transformer_ext.ops.cross_entropy import (
    LossOutput,
    label_smoothing_loss,
    label_smoothing_loss_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from transformer_ext.ops.dropout import dropout, keep_mask
from transformer_ext.ops.embedding import embedding, embedding_reference, sinusoidal_positions
from transformer_ext.ops.linear import linear, linear_reference
from transformer_ext.ops.masks import (
    causal_mask,
    from_torch_mask,
    from_zero_mask,
    key_padding_mask,
    subsequent_mask,
    to_torch_mask,
)
from transformer_ext.ops.residual_norm import (
    norm,
    norm_reference,
    residual_dropout,
    residual_dropout_reference,
    residual_norm,
    residual_norm_reference,
)
from transformer_ext.ops.softmax import (
    masked_log_softmax,
    masked_log_softmax_reference,
    masked_softmax,
    masked_softmax_reference,
)

__all__ = [
    "LossOutput",
    "activation",
    "activation_reference",
    "attention",
    "attention_packed",
    "attention_packed_reference",
    "attention_reference",
    "backend",
    "causal_mask",
    "cross_attention_packed",
    "dropout",
    "embedding",
    "embedding_reference",
    "from_torch_mask",
    "from_zero_mask",
    "has_kernel",
    "keep_mask",
    "key_padding_mask",
    "label_smoothing_loss",
    "label_smoothing_loss_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_reference",
    "masked_log_softmax",
    "masked_log_softmax_reference",
    "masked_softmax",
    "masked_softmax_reference",
    "norm",
    "norm_reference",
    "residual_dropout",
    "residual_dropout_reference",
    "residual_norm",
    "residual_norm_reference",
    "self_attention_packed",
    "set_backend",
    "sinusoidal_positions",
    "subsequent_mask",
    "to_torch_mask",
    "use_compiled",
]
