"""From and to ``nn.Transformer`` and ``nn.MultiheadAttention``: weights, outputs, gradients, masks."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from transformer_ext import ops
from transformer_ext.model import Transformer
from transformer_ext.model.attention import CrossAttention, DenseAttention, SelfAttention
from transformer_ext.model.interop import (
    copy_nn_transformer,
    from_nn_masks,
    from_nn_multihead_attention,
    from_nn_transformer,
    to_nn_masks,
    to_nn_multihead_attention,
    to_nn_transformer,
)
from transformer_ext.model.layers import Sites

SIZES = {
    "d_model": 24,
    "nhead": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "dim_feedforward": 40,
}
OPTIONS = {
    "paper": {},
    "pre_norm": {"norm_first": True},
    "no_bias": {"bias": False, "norm_first": True},
    "gelu_eps": {"activation": "gelu", "layer_norm_eps": 1e-3},
    "silu": {"activation": functional.silu, "dropout": 0.3},
    "tanh": {"activation": functools.partial(functional.gelu, approximate="tanh")},
    "time_first": {"batch_first": False},
}
SOURCE_LENGTHS, TARGET_LENGTHS = [7, 3, 5], [4, 6, 1]


def nn_transformer(**options) -> nn.Transformer:
    """With values of their own in the norms and biases too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, which no test here uses
        module = nn.Transformer(**{**SIZES, "batch_first": True, **options})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name and "weight" in name), 0.2)
    return module


def run_theirs(module: nn.Transformer, x, y, source_real, target_real):
    if not module.batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    out = module(
        x,
        y,
        tgt_mask=ops.to_torch_mask(ops.causal_mask(y.shape[0 if not module.batch_first else 1])),
        src_key_padding_mask=~source_real,
        memory_key_padding_mask=~source_real,
        tgt_key_padding_mask=~target_real,
    )
    return out if module.batch_first else out.transpose(0, 1)


def run_ours(model: Transformer, x, y, source_real, target_real):
    keep = from_nn_masks(key_padding_mask=~source_real)
    memory = model.encoder(x, DenseAttention(keep))
    causal = ops.to_torch_mask(ops.causal_mask(y.shape[1]), torch.float32)
    target = from_nn_masks(causal, ~target_real, is_causal=True)
    return model.decoder(y, memory, DenseAttention(target), DenseAttention(keep))


def outputs_and_gradients(run, module: nn.Module, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, n, 24, generator=generator) for n in (7, 6))
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    source_real = torch.arange(7) < torch.tensor(SOURCE_LENGTHS)[:, None]
    target_real = torch.arange(6) < torch.tensor(TARGET_LENGTHS)[:, None]
    module.to(dtype).eval().zero_grad()
    out = run(module, x, y, source_real, target_real)[target_real]
    out.square().sum().backward()
    return {"out": out, "x": x.grad[source_real], "y": y.grad[target_real]}


def gradients_in_their_words(model: Transformer) -> dict[str, torch.Tensor]:
    """By way of the converter itself: a gradient has the layout of its parameter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stacks = name.startswith(("encoder", "decoder"))
            parameter.copy_(parameter.grad if stacks else torch.zeros_like(parameter))
            if not model.config.bias and "norm" in name and name.endswith("bias"):
                parameter.zero_()  # theirs has none
    return to_nn_transformer(model).state_dict()


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_those_of_nn_transformer(name):
    theirs = nn_transformer(**OPTIONS[name])
    model = from_nn_transformer(theirs, 11, 13, tie="none")
    ours = outputs_and_gradients(run_ours, model, torch.float32)
    single = outputs_and_gradients(run_theirs, theirs, torch.float32)
    single |= {n: p.grad.clone() for n, p in theirs.named_parameters()}
    double = outputs_and_gradients(run_theirs, theirs, torch.float64)
    double |= {n: p.grad.clone() for n, p in theirs.named_parameters()}
    ours |= gradients_in_their_words(model)
    assert set(ours) == set(single)
    for key, exact in double.items():
        bound = 2 * (single[key].double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours[key].double() - exact).abs().max() <= bound, key


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back(name):
    theirs = nn_transformer(**OPTIONS[name]).eval()
    model = from_nn_transformer(theirs, 11, 13, positions="learned", pad_id=5)
    assert model.config.tie == "target" and model.config.pad_id == 5 and not model.training
    again = to_nn_transformer(model, batch_first=theirs.batch_first)
    assert not again.training and again.batch_first == theirs.batch_first
    assert not again.encoder.enable_nested_tensor
    expected = theirs.state_dict()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for mine, other in zip(again.modules(), theirs.modules(), strict=True):
        assert type(mine) is type(other)
        for option in ("p", "eps", "norm_first", "batch_first", "num_heads"):
            assert getattr(mine, option, None) == getattr(other, option, None), option
        if isinstance(mine, nn.MultiheadAttention):
            assert mine.dropout == other.dropout


def test_our_dropouts_are_kept():
    fields = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    model = Transformer(src_vocab_size=9, tgt_vocab_size=9, **SIZES, **fields)
    theirs = to_nn_transformer(model)
    layer = theirs.decoder.layers[0]
    assert (layer.dropout1.p, layer.dropout3.p, layer.dropout.p) == (0.1, 0.1, 0.3)
    assert (layer.self_attn.dropout, layer.multihead_attn.dropout) == (0.2, 0.2)
    config = from_nn_transformer(theirs, 9, 9).config
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.final_norm is False and theirs.encoder.norm is None


def test_custom_stacks_and_other_types():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, 40, batch_first=True), 3, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 3, 40, batch_first=True), 2)
    theirs = nn.Transformer(
        24, 3, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
    ).double()
    model = from_nn_transformer(theirs, 9, 9)
    config = model.config
    assert (config.num_encoder_layers, config.num_decoder_layers) == (3, 2)
    assert not config.final_norm and model.source_embedding.weight.dtype == torch.float64
    half = from_nn_transformer(nn_transformer().bfloat16(), 9, 9)
    assert half.source_embedding.weight.dtype == torch.float32


def with_changed(change) -> nn.Transformer:
    module = nn_transformer()
    change(module)
    return module


class OtherLayer(nn.TransformerEncoderLayer):
    pass


REFUSED_OF_THEIRS = {
    "activation: expected one of relu, gelu, gelu_tanh, silu, got <function tanh": lambda: (
        nn_transformer(activation=functional.tanh)
    ),
    "custom_encoder: expected nn.TransformerEncoder, got Identity": lambda: nn.Transformer(
        24, 3, custom_encoder=nn.Identity()
    ),
    r"encoder.layers.0: expected nn.TransformerEncoderLayer, got OtherLayer": lambda: (
        nn.Transformer(
            24,
            3,
            custom_encoder=nn.TransformerEncoder(
                OtherLayer(24, 3, 40), 1, enable_nested_tensor=False
            ),
        )
    ),
    "dropout: expected one value for all layers, got 0.1, 0.5": lambda: with_changed(
        lambda m: setattr(m.encoder.layers[1].dropout1, "p", 0.5)
    ),
    "layer_norm_eps: expected one value for all layers": lambda: with_changed(
        lambda m: setattr(m.decoder.norm, "eps", 0.5)
    ),
    "bias: expected one value for all layers, got True, False": lambda: with_changed(
        lambda m: setattr(m.encoder.layers[1], "linear2", nn.Linear(40, 24, bias=False))
    ),
    "bias: expected one value for all layers, got False, True": lambda: with_changed(
        lambda m: [setattr(x.self_attn, "in_proj_bias", None) for x in m.encoder.layers]
    ),
    "norm after the stack: expected one value for all layers, got False, True": lambda: (
        with_changed(lambda m: setattr(m.encoder, "norm", None))
    ),
    "norm: expected nn.LayerNorm with weights, got RMSNorm": lambda: with_changed(
        lambda m: setattr(m.encoder.layers[0], "norm1", nn.RMSNorm(24))
    ),
    "decoder.layers.0: add_zero_attn: expected False, got True": lambda: with_changed(
        lambda m: setattr(m.decoder.layers[0].multihead_attn, "add_zero_attn", True)
    ),
    "decoder.layers.0: kdim: expected 24 as embed_dim, got 8": lambda: with_changed(
        lambda m: setattr(
            m.decoder.layers[0], "multihead_attn", nn.MultiheadAttention(24, 3, kdim=8)
        )
    ),
    # As PyTorch itself has it: copies of a decoder layer lose an activation that is a module.
    "activation: expected one value for all layers, got gelu_tanh, relu": lambda: nn_transformer(
        activation=nn.GELU("tanh")
    ),
    "both are 0": lambda: nn_transformer(num_encoder_layers=0, num_decoder_layers=0),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("message", REFUSED_OF_THEIRS)
def test_what_a_model_cannot_hold_is_named(message):
    with pytest.raises(ValueError, match=message):
        from_nn_transformer(REFUSED_OF_THEIRS[message](), 9, 9)


def test_what_is_theirs_to_decide_is_named():
    with pytest.raises(ValueError, match=r"nhead: is that of nn.Transformer \(3\)"):
        from_nn_transformer(nn_transformer(), 9, 9, nhead=4)
    with pytest.raises(ValueError, match="unknown key 'tye'; did you mean 'tie'"):
        from_nn_transformer(nn_transformer(), 9, 9, tye="all")
    with pytest.raises(TypeError, match="source: expected an nn.Transformer, got nn.Linear"):
        from_nn_transformer(nn.Linear(2, 2), 9, 9)
    ours = from_nn_transformer(nn_transformer(), 9, 9)
    with pytest.raises(TypeError, match=r"source: .*an nn.Transformer, got transformer_ext.Transf"):
        copy_nn_transformer(ours, ours)
    for convert in (to_nn_transformer, lambda model: copy_nn_transformer(model, ours)):
        for wrong, name in ((None, "NoneType"), (nn_transformer(), "nn.Transformer")):
            with pytest.raises(TypeError, match=f"model: .*transformer_ext.Transf.*, got {name}$"):
                convert(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead": 4, "num_kv_heads": 2}, "num_kv_heads: expected 4 .*, got 2"),
        ({"head_dim": 4}, "head_dim: expected 24 / 3 .*, got 4"),
        ({"norm": "rms"}, "norm: expected layer .*, got rms"),
        ({"activation": "swiglu"}, "activation: expected one of relu, .*, got swiglu"),
        ({"positions": "rope"}, "positions: expected any but rope .*, got rope"),
        ({"num_decoder_layers": 0}, "num_decoder_layers: got 0, expected at least one layer"),
    ],
)
def test_what_nn_transformer_cannot_hold_is_named(changes, message):
    model = Transformer(src_vocab_size=9, tgt_vocab_size=9, **{**SIZES, **changes})
    with pytest.raises(ValueError, match=message):
        to_nn_transformer(model)


def test_biases_of_norms_beside_no_bias_are_named():
    model = Transformer(src_vocab_size=9, tgt_vocab_size=9, bias=False, **SIZES)
    to_nn_transformer(model)
    with torch.no_grad():
        model.encoder.layers[1].self_attention_norm.bias[3] = 1.0
    with pytest.raises(ValueError, match="encoder.layers.1: norm1.bias: has values other than 0"):
        to_nn_transformer(model)


# --- nn.MultiheadAttention -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("kind", ["padding", "causal", "heads"])
def test_multihead_attention(bias, cross, kind):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, dropout=0.2, bias=bias, batch_first=True).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours = from_nn_multihead_attention(theirs, cross=cross)
    assert isinstance(ours, CrossAttention if cross else SelfAttention) and ours.dropout == 0.2
    again = to_nn_multihead_attention(ours)
    assert again.dropout == 0.2 and again.batch_first and not again.training
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])

    keys = 5
    padding = torch.arange(keys) >= torch.tensor([[5], [2]])
    masks = {
        "padding": {"key_padding_mask": padding},
        "causal": {
            "attn_mask": nn.Transformer.generate_square_subsequent_mask(keys),
            "key_padding_mask": torch.zeros(2, keys).masked_fill(padding, -torch.inf),
        },
        "heads": {"attn_mask": torch.rand(6, 5, keys).argsort(-1) > 2},
    }[kind]
    keep = from_nn_masks(**masks, nhead=3)

    def run(module, dtype):
        generator = torch.Generator().manual_seed(2)
        query, memory = (
            torch.randn(2, 5, 24, generator=generator).to(dtype).requires_grad_() for _ in "qk"
        )
        module.to(dtype)
        inputs = (query, memory) if cross else (query,)
        if isinstance(module, nn.MultiheadAttention):
            typed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in masks.items()}
            out, _ = module(query, inputs[-1], inputs[-1], need_weights=False, **typed)
        else:
            out = module(*inputs, DenseAttention(keep))
        module.zero_grad()
        out.square().sum().backward()
        last = getattr(module, "out_proj" if module is theirs else "out_projection")
        return [out, *(t.grad for t in (*inputs, *last.parameters()))]

    mine, single = run(ours, torch.float32), run(theirs, torch.float32)
    double = run(theirs, torch.float64)
    for found, other, exact in zip(mine, single, double, strict=True):
        bound = 2 * (other.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kdim": 8}, "kdim: expected 24 as embed_dim, got 8"),
        ({"vdim": 8}, "vdim: expected 24 as embed_dim, got 8"),
        ({"add_bias_kv": True}, "add_bias_kv: expected False, got True"),
        ({"add_zero_attn": True}, "add_zero_attn: expected False, got True"),
    ],
)
def test_options_of_multihead_attention_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_nn_multihead_attention(nn.MultiheadAttention(24, 3, **options))


def test_attentions_that_are_refused():
    sizes = (0.0, True, Sites(), "a")
    for attention, message in (
        (SelfAttention(24, 4, 2, 6, *sizes), "num_kv_heads: expected 4 .*, got 2"),
        (CrossAttention(24, 4, 4, 5, *sizes), "head_dim: expected 24 / 4 .*, got 5"),
        (SelfAttention(24, 4, 4, 6, *sizes, rotary=True), "positions: expected any but rope"),
    ):
        with pytest.raises(ValueError, match=message):
            to_nn_multihead_attention(attention)
    with pytest.raises(TypeError, match="expected SelfAttention or CrossAttention, got Linear"):
        to_nn_multihead_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected an nn.MultiheadAttention, got Linear"):
        from_nn_multihead_attention(nn.Linear(2, 2))


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 5), (1, 1, 4, 5), (2, 1, 4, 5), (2, 3, 4, 5), (1, 3, 4, 5), (4, 5), (5,)]
)
def test_masks_there_and_back(shape, dtype):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    attn_mask, padding = to_nn_masks(keep, nhead=3, dtype=dtype)
    assert (attn_mask is None) != (padding is None)
    back = from_nn_masks(attn_mask, padding, nhead=3)
    whole = (keep.shape[0] if keep.dim() == 4 else 1, 3, 4, 5)
    assert torch.equal(back.expand(whole), keep.expand(whole))


def test_masks_are_joined():
    padding = torch.tensor([[False, False, True], [False, True, True]])
    keep = from_nn_masks(ops.to_torch_mask(ops.causal_mask(3)), padding, is_causal=True)
    assert keep.shape == (2, 1, 3, 3)
    assert torch.equal(keep, ops.causal_mask(3) & ~padding[:, None, None])
    assert torch.equal(from_nn_masks(key_padding_mask=padding[0])[0, 0, 0], ~padding[0])
    assert from_nn_masks() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attn_mask": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "attn_mask: expected bool"),
        ({"attn_mask": torch.tensor([[0.5]])}, ValueError, "attn_mask: .* additive bias"),
        ({"key_padding_mask": torch.tensor([[1.0]])}, ValueError, "key_padding_mask: .* additive"),
        ({"attn_mask": torch.zeros(3, 2, 2), "nhead": 2}, ValueError, r"\[batch \* 2, queries"),
        ({"key_padding_mask": torch.zeros(1, 2, 2)}, ValueError, r"expected \[batch, keys\]"),
        ({"attn_mask": [[1]]}, TypeError, r"attn_mask: expected a tensor, .*, got list: \[\[1\]\]"),
        ({"attn_mask": torch.zeros(3, 2, 2), "nhead": 0}, ValueError, "nhead: got 0, expected an"),
        ({"is_causal": True}, ValueError, "attn_mask: got none, expected the causal one"),
        ({"attn_mask": torch.zeros(2, 2), "is_causal": True}, ValueError, "is not the causal one"),
        ({"attn_mask": torch.zeros(2, 3), "is_causal": True}, ValueError, "is not the causal one"),
        (
            {"attn_mask": torch.zeros(2, 2), "key_padding_mask": torch.zeros(1, 3)},
            ValueError,
            r"key_padding_mask: \[1, 3\] does not fit to attn_mask \[2, 2\]",
        ),
        (
            {"attn_mask": torch.zeros(2, 2, 2), "key_padding_mask": torch.zeros(1, 2)},
            ValueError,
            r"key_padding_mask: \[1, 2\] does not fit to attn_mask \[2, 2, 2\]",
        ),
    ],
)
def test_masks_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        from_nn_masks(**arguments)


def test_keep_masks_that_are_refused():
    with pytest.raises(TypeError, match="keep: expected bool"):
        to_nn_masks(torch.zeros(2, 2), nhead=2)
    with pytest.raises(ValueError, match=r"keep: expected \[batch or 1, 2 or 1, .*, got \[1, 3"):
        to_nn_masks(torch.ones(1, 3, 2, 2, dtype=torch.bool), nhead=2)
    with pytest.raises(TypeError, match="keep: expected a tensor, .* got NoneType"):
        to_nn_masks(None, nhead=2)
    for nhead in (0, -1, "a"):
        with pytest.raises(ValueError, match=f"nhead: got {nhead!r}, expected an integer"):
            to_nn_masks(torch.ones(2, 2, dtype=torch.bool), nhead=nhead)
