"""Learning rate schedules: pure functions of the optimizer step, so that resuming needs no state.

``noam`` is the schedule of "Attention Is All You Need", section 5.3:
``d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)``, times ``learning_rate`` as a factor (1 in
the paper). The others rise linearly to the peak ``learning_rate`` during the warm-up and then stay
(``constant``) or fall: with the inverse square root of the step (``inverse_sqrt``), along half a
cosine (``cosine``) or along a line (``linear``), the last two to ``final_fraction`` of the peak at
the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule"]


def _falling(step: int, warmup: int, total: int) -> float:
    """Share of the way from the end of the warm-up to the last step, in [0, 1]."""
    return min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))


def _constant(step: int, warmup: int, total: int, final: float) -> float:
    return 1.0


def _inverse_sqrt(step: int, warmup: int, total: int, final: float) -> float:
    return math.sqrt(max(1, warmup) / max(step, warmup, 1))


def _cosine(step: int, warmup: int, total: int, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _falling(step, warmup, total)))


def _linear(step: int, warmup: int, total: int, final: float) -> float:
    return final + (1.0 - final) * (1.0 - _falling(step, warmup, total))


#: name -> factor on the peak after the warm-up: (step, warmup, total, final_fraction) -> float
SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "noam": _inverse_sqrt,
    "inverse_sqrt": _inverse_sqrt,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each optimizer step.

    Attributes:
        name: One of :data:`SCHEDULES`.
        learning_rate: Learning rate at the end of the warm-up; for ``noam`` the factor before its
            formula.
        warmup_steps: Steps of linear rise from 0; 0 starts at the peak.
        total_steps: Steps of the whole training; read by ``cosine`` and ``linear``.
        final_fraction: Share of the peak that ``cosine`` and ``linear`` end at.
        d_model: Model width, read by ``noam``.

    Raises:
        ValueError: An unknown name, or a number out of its range.
    """

    name: str
    learning_rate: float
    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.0
    d_model: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule: got {self.name!r}, expected one of {', '.join(SCHEDULES)}")
        if self.name == "noam" and not self.d_model:
            raise ValueError(f"d_model: got {self.d_model}, expected the model's width for noam")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, expected 0 or more")
        if self.total_steps < 1:
            raise ValueError(f"max_steps: got {self.total_steps}, expected 1 or more")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(
                f"final_fraction: got {self.final_fraction}, expected a number from 0 to 1"
            )

    @property
    def peak(self) -> float:
        """The learning rate at the end of the warm-up."""
        if self.name == "noam" and self.d_model:
            return self.learning_rate * (self.d_model * max(1, self.warmup_steps)) ** -0.5
        return self.learning_rate

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 1."""
        if step < 1:
            raise ValueError(f"step: got {step}, expected 1 or more (the first step is 1)")
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        factor = SCHEDULES[self.name]
        return self.peak * factor(step, self.warmup_steps, self.total_steps, self.final_fraction)
