"""Boolean keep-masks: True where a query may attend to a key.

Attention Is All You Need, section 3.2.3: the decoder's self-attention masks out (sets to minus
infinity) all connections that would look ahead; padding is masked the same way. Every mask of this
package is a keep-mask and broadcasts to ``[batch, heads, query_length, key_length]``, so masks are
combined with ``&``. The converters take and give masks of the opposite or of the 0/1 convention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_ext.ops._backend import has_numbers

__all__ = [
    "causal_mask",
    "from_torch_mask",
    "from_zero_mask",
    "key_padding_mask",
    "subsequent_mask",
    "to_torch_mask",
]


def key_padding_mask(lengths: Tensor, length: int) -> Tensor:
    """True for the first ``lengths[b]`` keys of each sequence.

    Args:
        lengths: integer tensor ``[batch]``, real keys of each sequence.
        length: padded length, in keys.

    Returns:
        bool ``[batch, 1, 1, length]`` on the device of ``lengths``.

    Raises:
        ValueError: lengths of another shape or type.
        IndexError: on a CPU, a length outside ``[0, length]``.
    """
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise ValueError(
            f"lengths: expected an integer tensor [batch], got {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    check_lengths("lengths", lengths, length)
    keys = torch.arange(length, device=lengths.device)
    return (keys < lengths[:, None])[:, None, None, :]


def check_lengths(name: str, lengths: Tensor, longest: int) -> None:
    """Look for lengths outside ``[0, longest]``, on a CPU: a GPU would have to be waited for.

    Raises:
        IndexError: there is one.
    """
    if lengths.device.type != "cpu" or not has_numbers(lengths):
        return
    wrong = lengths[(lengths < 0) | (lengths > longest)]
    if len(wrong):
        raise IndexError(f"{name}: got {int(wrong[0])}, expected 0 to {longest}")


def causal_mask(length: int, *, device: torch.device | str | None = None) -> Tensor:
    """True where key <= query: bool ``[length, length]`` (queries, keys).

    Raises:
        ValueError: ``length`` is negative, or not an integer.
    """
    if length is None or isinstance(length, (bool, float, str)) or length < 0:
        raise ValueError(f"length: expected an integer from 0, got {length!r}")
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def subsequent_mask(size: int) -> Tensor:
    """`causal_mask` in the shape of The Annotated Transformer: bool ``[1, size, size]``."""
    return causal_mask(size)[None]


def from_zero_mask(mask: Tensor) -> Tensor:
    """Keep-mask from a mask in which 0 means masked (``scores.masked_fill(mask == 0, -inf)``).

    Args:
        mask: any dtype, any shape.

    Returns:
        bool, the same shape.
    """
    return mask != 0


def from_torch_mask(mask: Tensor) -> Tensor:
    """Keep-mask from a mask of `torch.nn.Transformer`.

    Args:
        mask: bool with True = masked, or floating point with 0 = kept and -inf = masked
            (`torch.nn.Transformer.generate_square_subsequent_mask`). A key padding mask
            ``[batch, keys]`` needs ``[:, None, None, :]`` to meet attention scores.

    Returns:
        bool, the same shape.

    Raises:
        TypeError: an integer mask, which does not say which convention it follows.
        ValueError: a floating-point mask with values other than 0 and -inf (an additive bias;
            pass it as one).
    """
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(
            f"mask: expected bool (True = masked) or floating point (-inf = masked), got "
            f"{mask.dtype}; for a 0/1 keep-mask use from_zero_mask"
        )
    keep = mask == 0
    if not torch.compiler.is_compiling() and not bool((keep | (mask == -torch.inf)).all()):
        raise ValueError(
            "mask: a floating-point mask must hold only 0 and -inf; pass other values as an "
            "additive bias"
        )
    return keep


def to_torch_mask(keep: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """The inverse of `from_torch_mask`.

    Args:
        keep: bool with True = may attend, any shape.
        dtype: ``torch.bool``: True = masked; a floating type: 0 = kept and -inf = masked, as
            `torch.nn.Transformer.generate_square_subsequent_mask` has it.

    Returns:
        the same shape.

    Raises:
        TypeError: a mask that is not bool, or a type that is neither bool nor floating.
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected bool (True = may attend), got {keep.dtype}")
    if dtype == torch.bool:
        return ~keep
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected torch.bool or a floating type, got {dtype}")
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, -torch.inf)
