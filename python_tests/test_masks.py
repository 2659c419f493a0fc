import pytest
import torch
from torch import nn

from transformer_ext.ops import masks


def test_key_padding_mask_keeps_the_first_keys():
    keep = masks.key_padding_mask(torch.tensor([2, 0, 3]), 3)
    assert keep.dtype == torch.bool and keep.shape == (3, 1, 1, 3)
    assert keep.int().flatten(1).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_causal_mask_keeps_the_past_and_the_present():
    assert masks.causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert masks.subsequent_mask(3).shape == (1, 3, 3)
    assert torch.equal(masks.subsequent_mask(3)[0], masks.causal_mask(3))
    assert masks.causal_mask(0).shape == (0, 0)


def test_masks_combine_by_and():
    keep = masks.key_padding_mask(torch.tensor([1, 2]), 2) & masks.causal_mask(2)
    assert keep.shape == (2, 1, 2, 2)
    assert keep.int().tolist() == [[[[1, 0], [1, 0]]], [[[1, 0], [1, 1]]]]


def test_zero_mask_is_the_annotated_transformers():
    mask = torch.tensor([[1, 0], [1, 1]])
    scores = torch.randn(2, 2)
    keep = masks.from_zero_mask(mask)
    assert torch.equal(
        scores.masked_fill(mask == 0, -torch.inf), scores.masked_fill(~keep, -torch.inf)
    )


def test_torch_mask_has_the_opposite_polarity():
    assert masks.from_torch_mask(torch.tensor([True, False])).tolist() == [False, True]
    square = nn.Transformer.generate_square_subsequent_mask(4)
    assert torch.equal(masks.from_torch_mask(square), masks.causal_mask(4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_to_torch_and_back(dtype):
    keep = masks.causal_mask(4)[None] & masks.key_padding_mask(torch.tensor([2, 4]), 4)[:, 0]
    there = masks.to_torch_mask(keep, dtype)
    assert there.dtype == dtype and torch.equal(masks.from_torch_mask(there), keep)
    if dtype == torch.float32:
        square = nn.Transformer.generate_square_subsequent_mask(4)
        assert torch.equal(masks.to_torch_mask(masks.causal_mask(4), dtype), square)


def test_what_is_no_keep_mask_is_refused():
    with pytest.raises(TypeError, match="keep: expected bool .*, got torch.float32"):
        masks.to_torch_mask(torch.zeros(2))
    with pytest.raises(TypeError, match="dtype: expected torch.bool or a floating type"):
        masks.to_torch_mask(torch.tensor([True]), torch.int64)


def test_masks_that_do_not_say_what_they_mean_are_refused():
    with pytest.raises(TypeError, match="from_zero_mask"):
        masks.from_torch_mask(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="additive bias"):
        masks.from_torch_mask(torch.tensor([0.0, -1.0]))
    with pytest.raises(ValueError, match=r"lengths: .*\[2, 1\]"):
        masks.key_padding_mask(torch.tensor([[1], [2]]), 3)
    with pytest.raises(ValueError, match="lengths: .*float32"):
        masks.key_padding_mask(torch.tensor([1.0]), 3)
    for wrong in (9, -1):
        with pytest.raises(IndexError, match=f"^lengths: got {wrong}, expected 0 to 3"):
            masks.key_padding_mask(torch.tensor([2, wrong]), 3)
    for wrong in (-1, 2.5, True, None, "3"):
        with pytest.raises(ValueError, match=f"^length: expected .*, got {wrong!r}"):
            masks.causal_mask(wrong)
