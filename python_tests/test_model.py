"""The model: against torch.nn.Transformer, against itself in its two layouts, and its choices."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import needs_compiled, threads
from torch import nn

from transformer_ext import ops
from transformer_ext.model import Transformer, TransformerConfig, make_model, preset
from transformer_ext.model.attention import DenseAttention, PackedAttention
from transformer_ext.model.interop import copy_nn_transformer
from transformer_ext.ops.linear import gemm_choices
from transformer_ext.packed import Packed

SMALL = {
    "src_vocab_size": 37,
    "tgt_vocab_size": 37,
    "d_model": 24,
    "nhead": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 40,
}

VARIANTS = {
    "paper": {},
    "pre_norm": {"norm_first": True},
    "rms_rope_swiglu": {
        "norm": "rms",
        "norm_first": True,
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
    },
    "learned_gelu": {"positions": "learned", "activation": "gelu", "max_positions": 32},
    "halves_silu": {"positions": "sinusoidal_halves", "activation": "silu", "output_bias": True},
    "grouped_heads": {"nhead": 6, "num_kv_heads": 2, "head_dim": 5},
    "untied": {"tie": "none", "tgt_vocab_size": 41},
    "tied_target": {"tie": "target", "tgt_vocab_size": 41},
    "student": {"num_encoder_layers": 3, "num_decoder_layers": 1, "final_norm": True},
    "embedding_norm": {"embedding_norm": True, "scale_embedding": False, "positions": "none"},
}


def build(**changes) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def sentences(lengths, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, vocab, (length,), generator=generator)
    return ids


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_nn_transformer(norm_first, activation):
    """Outputs and gradients, with padding and causal masks, in float32 and in float64."""
    torch.manual_seed(0)
    theirs = nn.Transformer(
        24, 3, 2, 2, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    theirs.encoder.enable_nested_tensor = False
    model = build(dropout=0.0, activation=activation, norm_first=norm_first, final_norm=True)
    copy_nn_transformer(model, theirs)
    source_lengths, target_lengths = [7, 3, 5], [4, 6, 1]
    source, target = torch.randn(3, 7, 24), torch.randn(3, 6, 24)
    source_pad = torch.arange(7) >= torch.tensor(source_lengths)[:, None]
    target_real = torch.arange(6) < torch.tensor(target_lengths)[:, None]

    def run_theirs(module, dtype):
        x, y = (t.detach().to(dtype).requires_grad_() for t in (source, target))
        out = module.to(dtype)(
            x,
            y,
            tgt_mask=ops.from_torch_mask(ops.causal_mask(6)),
            src_key_padding_mask=source_pad,
            memory_key_padding_mask=source_pad,
            tgt_key_padding_mask=~target_real,
        )
        module.zero_grad()
        (out * target_real[..., None]).square().sum().backward()
        return out[target_real], x.grad[~source_pad], y.grad[target_real], module

    def run_ours(layout):
        x, y = (t.clone().requires_grad_() for t in (source, target))
        if layout == "packed":
            src, tgt = Packed.from_lengths(source_lengths), Packed.from_lengths(target_lengths)
            memory = model.encoder(src.pack(x), PackedAttention(src, src))
            out = model.decoder(
                tgt.pack(y), memory, PackedAttention(tgt, tgt, True), PackedAttention(tgt, src)
            )
            real = out
        else:
            keep_source = ops.from_torch_mask(source_pad)[:, None, None]
            memory = model.encoder(x, DenseAttention(keep_source))
            out = model.decoder(
                y,
                memory,
                DenseAttention(target_real[:, None, None], causal=True),
                DenseAttention(keep_source),
            )
            real = out[target_real]
        model.zero_grad()
        real.square().sum().backward()
        return real, x.grad[~source_pad], y.grad[target_real]

    theirs32 = run_theirs(theirs, torch.float32)
    linear1_32 = theirs.encoder.layers[0].linear1.weight.grad.clone()
    theirs64 = run_theirs(theirs, torch.float64)
    linear1_64 = theirs.encoder.layers[0].linear1.weight.grad.clone()
    for layout in ("packed", "dense"):
        ours = run_ours(layout)
        for mine, their32, their64 in zip(ours, theirs32[:3], theirs64[:3], strict=True):
            bound = 2 * (their32.double() - their64).abs().max() + 1e-6
            assert (mine.double() - their64).abs().max() <= bound
        mine = model.encoder.layers[0].feed_forward.in_projection.weight.grad
        bound = 2 * (linear1_32.double() - linear1_64).abs().max() + 1e-6
        assert (mine.double() - linear1_64).abs().max() <= bound


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_dense(name):
    """forward (packed inside) and encode/decode under masks give the same states and gradients."""
    model = build(**VARIANTS[name]).eval()
    src = sentences([6, 2, 9], model.config.src_vocab_size)
    tgt = sentences([3, 8, 5], model.config.tgt_vocab_size, seed=1)
    real = tgt != 0
    packed = model(src, tgt)
    model.generator.logits(packed[real]).square().sum().backward()
    packed_grad = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    src_mask = (src != 0)[:, None]
    dense = model.decode(
        model.encode(src, src_mask), src_mask, tgt, (tgt != 0)[:, None] & ops.subsequent_mask(8)
    )
    model.generator.logits(dense[real]).square().sum().backward()
    torch.testing.assert_close(packed[real], dense[real], rtol=1e-4, atol=1e-5)
    assert (packed[~real] == 0).all()
    for n, p in model.named_parameters():
        torch.testing.assert_close(packed_grad[n], p.grad, rtol=1e-3, atol=1e-4, msg=n)


@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_follows_reference(name):
    """With dropout on: the masks are the same, so the compiled ops must follow their twins."""
    results = []
    src, tgt = sentences([6, 2, 9], 37), sentences([3, 8, 5], 37, seed=1)
    for chosen in ("auto", "reference"):
        model = build(**VARIANTS[name]).train()
        model.seed_dropout(11)
        with ops.set_backend(chosen):
            out = model.logits(src, tgt)
            out.square().mean().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    for ours, reference in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-3)


def test_slack_rows_have_no_effect():
    """Rows past the last sequence, NaN included, change no result and no gradient."""
    model = build().train()
    src, tgt = sentences([6, 2], 37), sentences([3, 5], 37, seed=1)
    gradients, states = [], []
    for slack in (0, 3):
        model.zero_grad()
        model.seed_dropout(5)
        s, t = Packed.from_lengths([6, 2], 8 + slack), Packed.from_lengths([3, 5], 8 + slack)
        hidden = model.forward_packed(s.pack(src), s, t.pack(tgt), t)
        hidden[:8].square().sum().backward()
        states.append(hidden[:8])
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sentence_does_not_see_its_neighbours():
    model = build().eval()
    src, tgt = sentences([6, 4, 9], 37), sentences([3, 8, 5], 37, seed=1)
    together = model(src, tgt)[1, :8]
    alone = model(src[1:2, :4], tgt[1:2, :8])[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["paper", "rms_rope_swiglu"])
def test_bfloat16_is_close_and_gradients_are_float32(name):
    src, tgt = sentences([6, 2, 9], 37), sentences([3, 8, 5], 37, seed=1)
    outputs = {}
    for precision in ("float32", "bfloat16"):
        model = build(**VARIANTS[name]).eval().set_precision(precision)
        out = model(src, tgt)
        model.generator.logits(out).float().square().mean().backward()
        outputs[precision] = out.float()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert out.dtype == torch.bfloat16
    error = (outputs["bfloat16"] - outputs["float32"]).norm() / outputs["float32"].norm()
    assert 0 < error < 0.03


@needs_compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_and_gradients_are_the_same_bits_for_any_number_of_threads(precision):
    libraries = {c["library"] for c in gemm_choices() if c["dtype"] == precision}
    if libraries != {"transformer_ext"}:
        pytest.skip(f"on this machine torch multiplies {precision}")
    src, tgt = sentences([60, 20, 95] * 4, 370), sentences([33, 80, 54] * 4, 370, seed=1)
    sizes = {"src_vocab_size": 370, "tgt_vocab_size": 370, "d_model": 96, "dim_feedforward": 200}
    results = []
    for count in (1, 2, 4):
        with threads(count):
            model = build(**sizes, dropout=0.1).set_precision(precision)
            model.seed_dropout(5)
            hidden = model(src, tgt).flatten(0, 1)
            loss = ops.linear_cross_entropy(hidden, model.generator.weight, tgt.flatten()).loss
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_draws_anew_each_forward_and_repeats_by_seed():
    model = build().train()
    src, tgt = sentences([6], 37), sentences([5], 37, seed=1)
    model.seed_dropout(1)
    first, second = model(src, tgt), model(src, tgt)
    model.seed_dropout(1)
    again = model(src, tgt)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


def test_every_dropout_site_is_its_own():
    model = build()
    sites = [m.site for m in model.modules() if hasattr(m, "site")]
    sites += [s for m in model.modules() if hasattr(m, "sites") for s in m.sites]
    sites += [model.encoder.embedding_site, model.decoder.embedding_site]
    assert len(sites) == len(set(sites))
    assert len(sites) == 2 + 2 * 4 + 2 * 6


def test_tying_shares_one_parameter():
    tied = build()
    assert tied.source_embedding.weight is tied.target_embedding.weight is tied.generator.weight
    target = build(tie="target")
    assert target.source_embedding.weight is not target.target_embedding.weight
    assert target.generator.weight is target.target_embedding.weight
    assert build(tie="none").generator.weight is not build(tie="none").target_embedding.weight


def test_projections_are_initialised_each_on_its_own():
    model = Transformer(TransformerConfig(**{**SMALL, "d_model": 240}))
    bound = (6 / (240 + 240)) ** 0.5
    weight = model.encoder.layers[0].self_attention.in_projection.weight
    assert 0.99 * bound < weight.abs().max() <= bound


def test_step_by_step_equals_teacher_forcing():
    model = build(positions="rope").eval()
    src, tgt = sentences([6, 4], 37), sentences([5, 5], 37, seed=1)
    memory = model.encode_padded(src)
    whole = torch.log_softmax(model.logits(src, tgt), -1)
    for length in (1, 3, 5):
        step = model.next_log_probs(tgt[:, :length], memory, torch.tensor([6, 4]))
        torch.testing.assert_close(step, whole[:, length - 1], rtol=1e-4, atol=1e-5)


def test_start_token_may_be_the_pad_token():
    """As in Marian's models: the target begins with the id that pads it."""
    model = build(decoder_start_id=0).eval()
    src = sentences([6, 2], 37)
    tgt = torch.tensor([[0, 5, 6], [0, 7, 0]])
    together = model(src, tgt)
    alone = model(src[1:, :2], tgt[1:, :2])
    torch.testing.assert_close(together[1, :2], alone[0], rtol=1e-5, atol=1e-6)
    assert (together[1, 2] == 0).all() and (together[1, 0] != 0).any()
    assert len(model.trace(src, tgt).attentions) == 6


def test_compiles_whole():
    model = build().eval()
    src, tgt = sentences([6, 2, 9], 37), sentences([3, 8, 5], 37, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(src, tgt), model(src, tgt), rtol=1e-4, atol=1e-5)


def test_compiles_whole_in_training():
    src, tgt = sentences([6, 2, 9], 37), sentences([3, 8, 5], 37, seed=1)
    gradients = []
    for compile_it in (False, True):
        model = build(dropout=0.0).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        run(src, tgt).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


def test_make_model_is_the_notebooks():
    model = make_model(11, 13, N=2, d_model=16, d_ff=32, h=2)
    assert model.config.norm_first and model.config.tie == "none"
    src, tgt = torch.randint(1, 11, (2, 10)), torch.randint(1, 13, (2, 9))
    src_mask = torch.ones(2, 1, 10, dtype=torch.bool)
    out = model.forward(src, tgt, src_mask, ops.subsequent_mask(9))
    assert model.generator(out).shape == (2, 9, 13)
    torch.testing.assert_close(model.generator(out).exp().sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 25}, "nhead: 3 does not divide"),
        ({"tie": "all", "tgt_vocab_size": 40}, "tie: 'all' needs one vocabulary"),
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"num_kv_heads": 2}, "num_kv_heads: expected a divisor"),
        ({"nhead": 0}, "nhead: expected an integer of at least 1"),
        ({"positions": "rope", "head_dim": 7}, "even head_dim"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **changes})


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'd_model'"):
        TransformerConfig.from_dict({**SMALL, "dmodel": 12})


def test_config_comes_back_from_its_dictionary():
    config = preset("tiny", 100, 100, activation="swiglu")
    assert TransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("given", ["src_mask", "tgt_mask"])
def test_one_mask_is_enough(given):
    model = build(dropout=0.0).eval()
    src, tgt = sentences([6, 2], 37), sentences([5, 5], 37, seed=1)
    masks = {
        "src_mask": (src != 0)[:, None],
        "tgt_mask": ops.subsequent_mask(5),
    }
    with torch.no_grad():
        got, expected = model(src, tgt, **{given: masks[given]}), model(src, tgt)
    torch.testing.assert_close(got, expected)


def test_wrong_arguments_are_named():
    model = build()
    ids = torch.full((1, 3), 5)
    with pytest.raises(TypeError, match="config: expected a TransformerConfig, got 512"):
        Transformer(512)
    with pytest.raises(TypeError, match="mask: expected bool .* from_torch_mask"):
        model(ids, ids, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3)[None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead": 2}, "nhead: expected 3 .*, got 2"),
        ({"norm_first": True}, "norm_first: expected False .*, got True"),
        ({"dim_feedforward": 48}, "dim_feedforward: expected 40 .*, got 48"),
    ],
)
def test_another_architecture_is_not_copied(changes, message):
    theirs = nn.Transformer(24, 3, 2, 2, 40)
    with pytest.raises(ValueError, match=message):
        copy_nn_transformer(build(final_norm=True, **changes), theirs)


def test_wrong_ids_are_named():
    model = build(positions="learned", max_positions=8)
    with pytest.raises(ValueError, match="src_ids: expected int64"):
        model(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="padding .* stands before a token"):
        model(torch.tensor([[0, 5]]), torch.tensor([[2, 5]]))
    with pytest.raises(ValueError, match="as many sentences"):
        model(torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="longer than the 8 learned positions"):
        model(torch.ones(1, 9, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    good, bad = torch.tensor([[2, 5]]), torch.tensor([[2, 1005]])
    with pytest.raises(ValueError, match=r"src_ids: got 1005, expected ids from 0 to \d+"):
        model(bad, good)
    with pytest.raises(ValueError, match="tgt_ids: got -2, expected ids"):
        model(good, -bad)
    with pytest.raises(ValueError, match="tgt_ids: got 1005 in row 0, column 1, expected ids"):
        model(good, bad, torch.ones(1, 1, 2, dtype=torch.bool))
