"""The per-token parts: projections, norms, the position-wise network, embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from transformer_ext import ops


class Sites:
    """Hands out the call-site numbers that keep the dropout masks of a model apart."""

    def __init__(self) -> None:
        self._last = -1

    def next(self) -> int:
        """A number not given before."""
        self._last += 1
        return self._last


def dropout_p(p: float, module: nn.Module, rng: Tensor | None) -> float:
    """``p`` in training; 0 in evaluation, and without a state of dropout."""
    return p if module.training and rng is not None else 0.0


class Linear(nn.Linear):
    """``x W^T + b``: parameters in float32, activations in whatever type ``x`` has."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return ops.linear(input, self.weight, self.bias)


def xavier_per_projection(linear: Linear, heads: list[int], head_dim: int) -> None:
    """Initialise projections that share one matrix each as the matrix of its own that it is.

    Drawn over the fused ``[3d, d]`` shape, Xavier's bound would be sqrt(2) too small.
    """
    with torch.no_grad():
        for part in linear.weight.split([count * head_dim for count in heads]):
            nn.init.xavier_uniform_(part)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, alone or fused with dropout and residual."""

    def __init__(self, d_model: int, kind: str = "layer", eps: float = 1e-5):
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model]``, normalised."""
        return ops.norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps)

    def after_residual(
        self, x: Tensor, residual: Tensor, dropout_p: float, rng: Tensor | None, site: int
    ) -> tuple[Tensor, Tensor]:
        """``residual + dropout(x)`` and its norm, in one pass."""
        return ops.residual_norm(
            x,
            residual,
            self.weight,
            self.bias,
            kind=self.kind,
            eps=self.eps,
            dropout_p=dropout_p,
            rng=rng,
            site=site,
        )


class FeedForward(nn.Module):
    """The position-wise network ``max(0, x W1 + b1) W2 + b2`` (paper section 3.3, equation 2)."""

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: str,
        gated: bool,
        dropout: float,
        bias: bool,
        sites: Sites,
    ):
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.site = sites.next()
        width = 2 * dim_feedforward if gated else dim_feedforward
        self.in_projection = Linear(d_model, width, bias)
        self.out_projection = Linear(dim_feedforward, d_model, bias)

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``, before the residual connection."""
        # The bias is added in the pass that applies activation and dropout.
        inner = ops.linear(x, self.in_projection.weight, None)
        inner = ops.activation(
            inner,
            self.in_projection.bias,
            kind=self.activation,
            dropout_p=dropout_p(self.dropout, self, rng),
            rng=rng,
            site=self.site,
        )
        return self.out_projection(inner)


class Embedding(nn.Module):
    """Token embedding, drawn so that ``weight * sqrt(d_model)`` has unit variance (section 3.4)."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)


class Positions(nn.Module):
    """The table of positions that is added to embeddings (section 3.5), or none."""

    table: Tensor

    def __init__(self, kind: str, d_model: int, max_positions: int):
        super().__init__()
        self.kind = kind
        self.d_model = d_model
        self.weight: nn.Parameter | None = None
        if kind == "learned":
            self.weight = nn.Parameter(torch.empty(max_positions, d_model))
            nn.init.normal_(self.weight, std=d_model**-0.5)
        elif kind.startswith("sinusoidal"):
            self.register_buffer("table", self._sinusoidal(256), persistent=False)

    def _sinusoidal(self, length: int) -> Tensor:
        return ops.sinusoidal_positions(
            length, self.d_model, halves=self.kind == "sinusoidal_halves"
        )

    def up_to(self, length: int) -> Tensor | None:
        """A table of at least ``length`` rows ``[rows, d_model]``, or None.

        Raises:
            ValueError: learned positions that end before ``length``.
        """
        if self.weight is not None:
            if length > self.weight.shape[0]:
                raise ValueError(
                    f"a sequence of {length} tokens is longer than the {self.weight.shape[0]} "
                    "learned positions of this model (max_positions)"
                )
            return self.weight
        if not self.kind.startswith("sinusoidal"):
            return None
        if length > self.table.shape[0]:
            rows = 1 << math.ceil(math.log2(length))
            self.table = self._sinusoidal(rows).to(self.table)
        return self.table


class Generator(nn.Module):
    """The output projection: decoder states to scores over the target vocabulary."""

    def __init__(self, vocab_size: int, d_model: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., d_model]`` -> unnormalised scores ``[..., vocabulary]``."""
        return ops.linear(hidden, self.weight, self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., d_model]`` -> log-probabilities ``[..., vocabulary]``."""
        return ops.masked_log_softmax(self.logits(hidden))
