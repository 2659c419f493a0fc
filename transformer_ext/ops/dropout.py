"""Counter-based dropout: the mask is a function of where it is applied, not of a generator's state.

``rng`` is an int64 tensor of three numbers on the device of the activations: seed, step and
microstep. Each call site has a number. Element (row, column) is kept or dropped by the Philox4x32
generator with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

- key = low and high 32 bits of the seed;
- counter = (column // 8, row, step, site + microstep * 65536), each modulo 2**32;
- the four 32-bit output words are eight 16-bit values, those of columns 8 i to 8 i + 7, the low
  half of a word first;
- kept if the value >= threshold, threshold = round(p * 65536); what is kept is multiplied by
  65536 / (65536 - threshold), so that the expectation is the input, exactly.

The compiled kernels draw the same bits (``csrc/dropout/philox.h``), on any device and for any number
of threads, and make them again in the backward pass instead of storing a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_ext.ops._backend import no_tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold of dropout probability ``p``: round(p * 65536), ties to even.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """
    if p is None or isinstance(p, str) or not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability: expected a number from 0 to 1, got {p!r}")
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """The factor of what is kept: 1 / (1 - p) with ``p`` rounded to 16 bits; 0 for p = 1."""
    threshold = dropout_threshold(p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def check_dropout(p: float, rng: Tensor | None, site: int) -> bool:
    """Whether dropout is on (``p`` rounds to more than 0).

    Raises:
        ValueError: ``p`` is outside [0, 1]; or it is on, and ``rng`` is not an int64 tensor of
            three numbers, or ``site`` is outside [0, 65536).
    """
    if dropout_threshold(p) == 0:
        return False
    if rng is None:
        raise ValueError(
            f"rng: expected an int64 tensor of shape (3,) = (seed, step, microstep) for a dropout "
            f"probability of {p}, got None"
        )
    if not isinstance(rng, Tensor):
        raise no_tensor("rng", rng)
    if rng.dtype != torch.int64 or rng.shape != (3,):
        raise ValueError(
            "rng: expected an int64 tensor of shape (3,) = (seed, step, microstep), "
            f"got {rng.dtype} of shape {tuple(rng.shape)}"
        )
    if not 0 <= site < 65536:
        raise ValueError(f"site: expected a number from 0 to 65535, got {site}")
    return True


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps around into the sign bit; its two halves are right all the same.
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = _ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words; the shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(rng: Tensor, site: int, rows: Tensor | int, columns: int, p: float) -> Tensor:
    """The keep mask that every implementation of dropout uses, in plain PyTorch.

    Args:
        rng: int64 ``[3]``: seed, step, microstep. The mask is made on its device.
        site: number of the call site, 0 <= site < 65536.
        rows: row numbers (int64, any shape), or how many rows, counted from 0.
        columns: number of columns, counted from 0.
        p: probability that an element is dropped.

    Returns:
        bool ``[*rows.shape, columns]``, True = kept.
    """
    if not check_dropout(p, rng, site):
        shape = (rows,) if isinstance(rows, int) else rows.shape
        return torch.ones(*shape, columns, dtype=torch.bool, device=rng.device)
    if isinstance(rows, int):
        rows = torch.arange(rows, device=rng.device)
    blocks = torch.arange((columns + 7) // 8, device=rng.device)
    seed, step, microstep = rng[0], rng[1], rng[2]
    words = philox4x32(
        (
            blocks,
            rows.to(torch.int64)[..., None] & _WORD,
            step & _WORD,
            (site + (microstep << 16)) & _WORD,
        ),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    values = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return values.flatten(-2)[..., :columns] >= dropout_threshold(p)


def dropout_reference(x: Tensor, p: float, rng: Tensor | None, site: int = 0) -> Tensor:
    """``dropout`` in plain PyTorch: any device, any floating type, differentiable."""
    if not check_dropout(p, rng, site):
        return x
    assert rng is not None
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    mask = keep_mask(rng, site, rows, columns, p).view(x.shape)
    return torch.where(mask, x * dropout_scale(p), 0.0)


def dropout(x: Tensor, p: float, rng: Tensor | None, site: int = 0) -> Tensor:
    """Dropout (the paper's section 5.4) with a mask from (``rng``, ``site``).

    Args:
        x: ``[..., columns]``; all dimensions but the last are flattened into rows.
        p: probability that an element is dropped.
        rng: int64 ``[3]`` (seed, step, microstep); not read with ``p`` = 0.
        site: number of the call site; two sites of one step draw different masks.

    Returns:
        ``x`` with dropped elements 0 and the others scaled by ``dropout_scale(p)``.

    Raises:
        ValueError: see ``check_dropout``.
    """
    from transformer_ext.ops.residual_norm import residual_dropout

    return residual_dropout(x, None, dropout_p=p, rng=rng, site=site)
