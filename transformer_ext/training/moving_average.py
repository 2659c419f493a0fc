"""An exponential moving average of the weights, which validates and translates in their place.

It does for every step what averaging checkpoints does for some (Polyak and Juditsky, "Acceleration
of Stochastic Approximation by Averaging", 1992; the decay that grows with the steps is that of
TensorFlow's ``ExponentialMovingAverage``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Averages of a model's parameters.

    Args:
        parameters: float32 parameters by name; their present values are the first average.
        decay: Share of the old average kept by a step, in (0, 1); in the first steps less,
            ``(1 + step) / (10 + step)``, so that the first weights are soon forgotten.

    Raises:
        ValueError: ``decay`` out of its range.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: got {decay}, expected a number between 0 and 1")
        self.decay = decay
        self._parameters = dict(parameters)
        self._kept: dict[str, Tensor] | None = None
        self._averages = [p.detach().clone() for p in parameters.values()]

    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step ``step``, from 1 on."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[dict[str, Tensor]]:
        """The model has the averages within the block, which is given the weights by name.

        A block within such a block changes nothing more.
        """
        if self._kept is not None:
            yield self._kept
            return
        weights = {name: p.detach() for name, p in self._parameters.items()}
        self._kept = {name: weight.clone() for name, weight in weights.items()}
        torch._foreach_copy_(list(weights.values()), self._averages)
        try:
            yield self._kept
        finally:
            torch._foreach_copy_(list(weights.values()), list(self._kept.values()))
            self._kept = None

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the model's present values for the averages, and gives it ``weights`` instead."""
        parameters = [p.detach() for p in self._parameters.values()]
        torch._foreach_copy_(self._averages, parameters)
        for name, parameter in zip(self._parameters, parameters, strict=True):
            parameter.copy_(weights[name])
