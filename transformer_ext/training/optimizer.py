"""Adam with clipping, loss scaling and the skipping of broken steps folded into one fused pass.

torch's fused Adam divides each gradient by a scalar tensor ``grad_scale`` as it reads it and skips
the step where another, ``found_inf``, is set. Clipping by the global norm is such a division, so it
costs one read of the gradients (the norm) and, on a CPU, no write; a GPU's kernel writes them back.

All state lies in tensors on the device that are written in place, the learning rate, the number of
the step and the scale of the loss among it, so a step can be recorded as a CUDA graph, and nothing
waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Optimizer", "parameters_by_name"]

#: Steps without an overflow after which the float16 loss scale is doubled.
_GROWTH_INTERVAL = 2000


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Optimizer:
    """Adam (AdamW where ``weight_decay`` > 0) over a model's parameters.

    Args:
        parameters: Name and float32 parameter of each tensor to train.
        betas: Decay of the two moments; the paper's are (0.9, 0.98), section 5.3.
        eps: Added to the root of the second moment; the paper's is 1e-9.
        weight_decay: Decoupled weight decay of matrices; vectors (biases, norms) have none.
        clip_norm: Largest global norm of the gradients; 0 means no clipping.
        loss_scale: First factor of the float16 loss scaling; None means no scaling.

    Raises:
        ValueError: No parameter, or a number out of its range.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-9,
        weight_decay: float = 0.0,
        clip_norm: float = 0.0,
        loss_scale: float | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        if not self.parameters:
            raise ValueError("parameters: got none, expected a model with trainable parameters")
        for name, value in (("clip_norm", clip_norm), ("weight_decay", weight_decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value}, expected a number of 0 or more")
        self._tensors = list(self.parameters.values())
        self.device = self._tensors[0].device
        self._learning_rate = torch.zeros((), device=self.device)
        matrices = [p for p in self._tensors if p.dim() > 1]
        vectors = [p for p in self._tensors if p.dim() <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, weight_decay), (vectors, 0.0))
            if params
        ]
        if weight_decay == 0:
            groups = [{"params": self._tensors, "weight_decay": 0.0}]
        kind = torch.optim.AdamW if weight_decay > 0 else torch.optim.Adam
        self._adam: Any = kind(
            groups,
            lr=self._learning_rate,
            betas=betas,
            eps=eps,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.clip_norm = clip_norm
        self.scale = (
            None if loss_scale is None else torch.tensor(float(loss_scale), device=self.device)
        )
        self._steps_without_overflow = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self.broken = torch.zeros((), device=self.device)
        self.gradient_norm = torch.zeros((), device=self.device)

    def clear_gradients(self) -> None:
        """Forgets the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def step(self, learning_rate: float | Tensor) -> None:
        """Applies the gradients and clears them; queues work only, never waits for the device.

        A step whose gradients hold a NaN or an infinity changes nothing; ``broken`` is then 1, and
        ``skipped`` counts it.

        Args:
            learning_rate: A number, or a tensor without dimensions on the device.
        """
        if isinstance(learning_rate, Tensor):
            self._learning_rate.copy_(learning_rate)
        else:
            self._learning_rate.fill_(learning_rate)
        gradients = [p.grad for p in self._tensors if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        broken = (~norm.isfinite()).to(torch.float32)
        divisor = torch.ones_like(norm) if self.scale is None else self.scale
        norm = norm / divisor
        if self.clip_norm > 0:
            # The small constant keeps a gradient of exactly 0 from dividing by 0.
            divisor = divisor * (norm / self.clip_norm).clamp(min=1.0)
        self._adam.grad_scale = torch.where(broken > 0, torch.ones_like(divisor), divisor)
        self._adam.found_inf = broken
        self._adam.step()
        # What is made while a graph is recorded is the graph's to use again.
        self._adam.grad_scale = self._adam.found_inf = None
        self.clear_gradients()
        self.gradient_norm.copy_(norm)
        self.broken.copy_(broken)
        self.skipped += broken
        if self.scale is not None:
            self._update_scale(self.scale, broken)

    def _update_scale(self, scale: Tensor, broken: Tensor) -> None:
        run = (self._steps_without_overflow + 1) * (1 - broken)
        grow = (run >= _GROWTH_INTERVAL).to(torch.float32)
        scale.mul_(1 - 0.5 * broken).mul_(1 + grow)
        self._steps_without_overflow.copy_(run * (1 - grow))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by parameter name.

        ``first_moment.NAME`` and ``second_moment.NAME`` have the parameter's shape; ``steps.NAME``
        and the scalars of the loss scaling have none. A parameter without a step yet is absent.
        """
        state: dict[str, Tensor] = {"skipped": self.skipped}
        for name, parameter in self.parameters.items():
            moments = self._adam.state.get(parameter)
            if moments:
                state[f"first_moment.{name}"] = moments["exp_avg"]
                state[f"second_moment.{name}"] = moments["exp_avg_sq"]
                state[f"steps.{name}"] = moments["step"]
        if self.scale is not None:
            state["loss_scale"] = self.scale
            state["steps_without_overflow"] = self._steps_without_overflow
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: A moment of a parameter that is not here, or of another shape.
        """
        known = {f"{kind}.{name}" for name in self.parameters for kind in _MOMENTS}
        known |= {"skipped", "loss_scale", "steps_without_overflow"}
        unknown = sorted(set(state) - known)
        if unknown:
            raise ValueError(
                f"training state: got {unknown[0]!r}, expected only names of this model's "
                "parameters (the checkpoint belongs to another model)"
            )
        for name, parameter in self.parameters.items():
            if f"first_moment.{name}" not in state:
                continue
            moments = {key: state[f"{kind}.{name}"] for kind, key in _MOMENTS.items()}
            for kind, key in _MOMENTS.items():
                expected = () if key == "step" else tuple(parameter.shape)
                if tuple(moments[key].shape) != expected:
                    raise ValueError(
                        f"training state: {kind}.{name} has shape {tuple(moments[key].shape)}, "
                        f"expected {expected}"
                    )
            self._adam.state[parameter] = {
                key: value.detach().to(self.device, torch.float32).clone()
                for key, value in moments.items()
            }
        self.skipped.copy_(state["skipped"])
        if self.scale is not None and "loss_scale" in state:
            self.scale.copy_(state["loss_scale"])
            self._steps_without_overflow.copy_(state["steps_without_overflow"])


#: Our name of each part of the state -> torch's.
_MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq", "steps": "step"}
