"""Sequences without padding: one row a token, all sequences of a batch behind one another.

A batch of B sentences of lengths L1..LB travels as one tensor ``[capacity, d_model]`` and a small
:class:`Packed` beside it, which says where each sentence begins. Only attention and positions need
it; every per-token module takes the plain tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Packed:
    """Where the sequences lie in a packed batch.

    Attributes:
        cu_seqlens: ``[batch + 1]`` int32; sequence b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        max_length: a bound on the longest sequence, on the host.
        positions: ``[capacity]`` int32, the position of each row within its sequence, 0 in slack.
        tokens: number of real rows, or None where only the device knows it. Rows past
            ``cu_seqlens[-1]`` are slack: no result and no gradient depends on them.
    """

    cu_seqlens: Tensor
    max_length: int
    positions: Tensor
    tokens: int | None

    @property
    def capacity(self) -> int:
        """Number of rows, slack included."""
        return self.positions.shape[0]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @staticmethod
    def from_lengths(
        lengths: Tensor | Sequence[int],
        capacity: int | None = None,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Packed:
        """Describe sequences of the given lengths, packed one behind the other.

        Args:
            lengths: ``[batch]`` integers, each at least 0.
            capacity: rows of the packed tensors; None means the sum of the lengths.
            max_length: a known bound on the lengths. With it and ``capacity`` given, nothing is
                read back from the device.
            device: where the tensors go; None means that of ``lengths``, or the CPU.

        Raises:
            ValueError: lengths that are negative, above ``max_length``, or do not fit into
                ``capacity`` (not looked for where nothing is read back).
        """
        lengths = torch.as_tensor(lengths, device=device)
        if lengths.dim() != 1:
            raise ValueError(f"lengths: expected one dimension, got shape {tuple(lengths.shape)}")
        lengths = lengths.to(torch.int32)
        tokens: int | None = None
        if capacity is None or max_length is None:
            tokens = int(lengths.sum())
            longest = int(lengths.max()) if lengths.numel() else 0
            if lengths.numel() and int(lengths.min()) < 0:
                raise ValueError("lengths: expected none below 0")
            if max_length is not None and longest > max_length:
                raise ValueError(f"max_length: got {max_length}, but one length is {longest}")
            max_length = longest if max_length is None else max_length
            capacity = tokens if capacity is None else capacity
            if tokens > capacity:
                raise ValueError(f"capacity: {capacity} rows cannot hold {tokens} tokens")
        cu_seqlens = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        rows = torch.arange(capacity, dtype=torch.int32, device=lengths.device)
        if tokens is not None:
            # bucketize starts threads for a thousand rows: 0.3 ms on a CPU, this 0.02.
            starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens)
            positions = functional.pad(rows[:tokens] - starts, (0, capacity - tokens))
        elif lengths.numel():
            starts = cu_seqlens[_sequence_of_row(rows, cu_seqlens)]
            positions = torch.where(rows < cu_seqlens[-1], rows - starts, 0).to(torch.int32)
        else:
            positions = torch.zeros_like(rows)
        return Packed(cu_seqlens, max_length, positions, tokens)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on another device."""
        return Packed(
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_length,
            self.positions.to(device, non_blocking=non_blocking),
            self.tokens,
        )

    @property
    def lengths(self) -> Tensor:
        """``[batch]`` int32 lengths of the sequences."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def pack(self, padded: Tensor) -> Tensor:
        """``[batch, length, ...]`` padded on the right -> ``[capacity, ...]``; slack rows are 0.

        Raises:
            ValueError: ``padded`` has another batch size.
        """
        if padded.shape[0] != self.batch_size:
            raise ValueError(
                f"padded: expected {self.batch_size} sequences, got shape {tuple(padded.shape)}"
            )
        rows = torch.arange(self.capacity, dtype=torch.int32, device=self.positions.device)
        if not padded.shape[0] or not padded.shape[1]:
            return padded.new_zeros(self.capacity, *padded.shape[2:])
        index = _sequence_of_row(rows, self.cu_seqlens).long() * padded.shape[1] + self.positions
        taken = padded.flatten(0, 1)[index]
        real = (rows < self.cu_seqlens[-1]).view(-1, *[1] * (taken.dim() - 1))
        return torch.where(real, taken, torch.zeros((), dtype=taken.dtype, device=taken.device))

    def unpack(self, packed: Tensor, length: int | None = None, fill: float = 0) -> Tensor:
        """``[capacity, ...]`` -> ``[batch, length, ...]``, padded on the right with ``fill``.

        Args:
            packed: rows as described by this object.
            length: padded length, at least the longest sequence; None means ``max_length``.
            fill: value of the padding.

        Raises:
            ValueError: ``packed`` has another number of rows.
        """
        if packed.shape[0] != self.capacity:
            raise ValueError(
                f"packed: expected {self.capacity} rows, got shape {tuple(packed.shape)}"
            )
        length = self.max_length if length is None else length
        if not self.capacity:
            return packed.new_full((self.batch_size, length, *packed.shape[1:]), fill)
        columns = torch.arange(length, dtype=torch.int32, device=packed.device)
        real = columns < self.lengths[:, None]
        index = torch.where(real, self.cu_seqlens[:-1, None] + columns, 0)
        taken = packed[index]
        real = real.view(*real.shape, *[1] * (packed.dim() - 1))
        return torch.where(
            real, taken, torch.full((), fill, dtype=taken.dtype, device=taken.device)
        )


def _sequence_of_row(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the sequence that each row belongs to; slack rows count to the last."""
    ends = cu_seqlens[1:].contiguous()
    return torch.bucketize(rows, ends, right=True, out_int32=True).clamp_(max=ends.shape[0] - 1)
