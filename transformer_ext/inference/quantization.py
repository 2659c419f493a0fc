"""8-bit integers in the engine (``compute_type="int8"``), in plain PyTorch: what its products compute.

Symmetric quantisation: a row of weights, one output's, and a row of activations, one token's, each
have a scale of their own, with which their greatest magnitude becomes 127. Sums of products of
integers are exact, so the compiled product (csrc/gemm) gives this result on every machine, but for
the rounding of the two scales and the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The integer that stands for the greatest magnitude of a row.
LARGEST = 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales: ``x`` is about ``integers * scales``.

    Args:
        x: ``[..., columns]``, floating point, finite.

    Returns:
        integers from -127 to 127, in ``x``'s type; scales ``[..., 1]``. A row of zeros has scale 0.
    """
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, LARGEST / largest, 0.0)
    return torch.round(x * inverse), largest / LARGEST


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` on integers.

    Args:
        x: ``[..., in]``, float32 or float64 (float32 holds the sums exactly up to 1,040 inputs).
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``.
    """
    x_integers, x_scales = quantize_rows(x)
    weight_integers, weight_scales = quantize_rows(weight)
    y = x_integers @ weight_integers.T * (x_scales * weight_scales.T)
    return y if bias is None else y + bias
