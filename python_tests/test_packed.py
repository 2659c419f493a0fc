"""Packed batches: lengths, positions, slack, and the way there and back."""

from __future__ import annotations

import pytest
import torch

from transformer_ext.packed import Packed


def test_layout_of_a_batch():
    packed = Packed.from_lengths([3, 0, 2], capacity=7)
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert (packed.tokens, packed.max_length, packed.capacity) == (5, 3, 7)
    assert packed.lengths.tolist() == [3, 0, 2]


def test_pack_and_unpack_are_inverse():
    packed = Packed.from_lengths([3, 0, 2], capacity=7)
    padded = torch.arange(24.0).view(3, 4, 2)
    padded[0, 3] = padded[1] = padded[2, 2:] = float("nan")
    rows = packed.pack(padded)
    assert rows.shape == (7, 2)
    assert (rows[5:] == 0).all() and not rows.isnan().any()
    back = packed.unpack(rows, 4, fill=-1)
    real = ~padded.isnan()
    assert torch.equal(back[real], padded[real])
    assert (back[~real] == -1).all()


def test_unpack_lets_no_gradient_into_slack():
    packed = Packed.from_lengths([2, 1], capacity=5)
    rows = torch.randn(5, 3, requires_grad=True)
    packed.unpack(rows).sum().backward()
    assert torch.equal(rows.grad, torch.tensor([1.0, 1, 1, 0, 0])[:, None].expand(5, 3))


def test_empty_batches():
    for lengths in ([], [0, 0]):
        packed = Packed.from_lengths(lengths)
        assert packed.capacity == 0
        assert packed.unpack(torch.zeros(0, 4)).shape == (len(lengths), 0, 4)
        assert packed.pack(torch.zeros(len(lengths), 0, 4)).shape == (0, 4)


def test_known_bounds_need_no_reading_back():
    packed = Packed.from_lengths(torch.tensor([2, 1]), capacity=4, max_length=9)
    assert packed.tokens is None
    assert packed.positions.tolist() == [0, 1, 0, 0]


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="capacity: 4 rows cannot hold 5 tokens"):
        Packed.from_lengths([3, 2], capacity=4)
    with pytest.raises(ValueError, match="max_length: got 2, but one length is 3"):
        Packed.from_lengths([3, 2], max_length=2)
    with pytest.raises(ValueError, match="none below 0"):
        Packed.from_lengths([3, -1])
    with pytest.raises(ValueError, match="one dimension"):
        Packed.from_lengths(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="expected 2 sequences"):
        Packed.from_lengths([1, 1]).pack(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="expected 2 rows"):
        Packed.from_lengths([1, 1]).unpack(torch.zeros(3, 1))
