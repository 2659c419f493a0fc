"""``model.trace``: its parts follow from each other, and it is the model's own pass."""

from __future__ import annotations

import math

import pytest
import torch

from transformer_ext import ops
from transformer_ext.model import LanguageModel, TextEncoder, Transformer
from transformer_ext.model.attention import rotate
from transformer_ext.model.trace import Trace

SIZES = {"d_model": 24, "nhead": 6, "num_kv_heads": 2, "head_dim": 4, "dim_feedforward": 40}
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 3], [5, 3, 0, 0, 0, 0]])
TARGET = torch.tensor([[2, 8, 9, 0, 0], [2, 10, 11, 12, 13]])


def transformer(**changes) -> Transformer:
    torch.manual_seed(3)
    sizes = {"src_vocab_size": 37, "tgt_vocab_size": 37, **SIZES}
    return Transformer(**{**sizes, "num_encoder_layers": 2, "num_decoder_layers": 3, **changes})


def check_attentions(trace: Trace, model: torch.nn.Module) -> None:
    """The equations of section 3.2, one by one."""
    for name, found in trace.attentions.items():
        shared = found.query.shape[1] // found.key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (found.key, found.value))
        scores = found.query @ key.transpose(2, 3) / math.sqrt(found.query.shape[-1])
        seen = found.scores > -math.inf
        torch.testing.assert_close(found.scores[seen], scores[seen])
        weights = found.scores.softmax(-1).nan_to_num(0)
        torch.testing.assert_close(found.weights, weights)
        assert not found.weights[~seen].any()
        torch.testing.assert_close(found.context, weights @ value)
        projection = model.get_submodule(name).out_projection
        joined = found.context.transpose(1, 2).flatten(2)
        torch.testing.assert_close(found.output, projection(joined))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("positions", ["sinusoidal", "rope"])
def test_of_an_encoder_decoder(norm_first, positions):
    model = transformer(norm_first=norm_first, positions=positions).train()
    model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    trace = model.trace(SOURCE, TARGET)
    assert [module.training for module in model.modules()] == modes and len({*modes}) == 2
    model.eval()
    assert list(trace.attentions) == [
        *(f"encoder.layers.{i}.self_attention" for i in range(2)),
        *(f"decoder.layers.{i}.{kind}_attention" for i in range(3) for kind in ("self", "cross")),
    ]
    with torch.no_grad():
        check_attentions(trace, model)
        real = TARGET != 0
        expected = model(SOURCE, TARGET)
    torch.testing.assert_close(trace.states["decoder.output"][real], expected[real])
    cross = trace.attentions["decoder.layers.1.cross_attention"]
    assert cross.weights.shape == (2, 6, 5, 6) and cross.output.shape == (2, 5, 24)
    assert cross.query.shape == (2, 6, 5, 4) and cross.value.shape == (2, 2, 6, 4)
    assert (cross.scores[1, :, :, 2:] == -math.inf).all()
    causal = trace.attentions["decoder.layers.0.self_attention"]
    future = ops.causal_mask(5).logical_not()
    assert (causal.scores[..., future] == -math.inf).all()
    assert (causal.scores[0, :, :, 3:] == -math.inf).all()  # padding of the target
    assert not any(x.requires_grad for x in trace.states.values())


def test_states_lead_to_each_other():
    model = transformer().eval()
    trace = model.trace(SOURCE, TARGET)
    assert list(trace.states)[:6] == [
        "encoder.tokens",
        "encoder.positions",
        "encoder.input",
        "encoder.layers.0.self_attention",
        "encoder.layers.0.feed_forward",
        "encoder.layers.1.self_attention",
    ]
    states = trace.states
    torch.testing.assert_close(
        states["encoder.tokens"], model.source_embedding.weight[SOURCE] * math.sqrt(24)
    )
    torch.testing.assert_close(states["encoder.positions"], ops.sinusoidal_positions(6, 24))
    torch.testing.assert_close(
        states["encoder.input"], states["encoder.tokens"] + states["encoder.positions"]
    )
    first = model.encoder.layers[0]
    with torch.no_grad():
        attended = trace.attentions["encoder.layers.0.self_attention"].output
        after = first.self_attention_norm(states["encoder.input"] + attended)
        torch.testing.assert_close(states["encoder.layers.0.self_attention"], after)
        last = first.feed_forward_norm(after + first.feed_forward(after))
    torch.testing.assert_close(states["encoder.layers.0.feed_forward"], last)
    torch.testing.assert_close(states["encoder.output"], states["encoder.layers.1.feed_forward"])
    with torch.no_grad():
        attended = trace.attentions["decoder.layers.2.self_attention"].output
        after = model.decoder.layers[2].self_attention_norm(
            states["decoder.layers.1.feed_forward"] + attended
        )
    torch.testing.assert_close(states["decoder.layers.2.self_attention"], after)
    layer = model.decoder.layers[2]
    before = states["decoder.layers.2.self_attention"]
    with torch.no_grad():
        after = layer.cross_attention_norm(
            before + trace.attentions["decoder.layers.2.cross_attention"].output
        )
        torch.testing.assert_close(states["decoder.layers.2.cross_attention"], after)
        last = layer.feed_forward_norm(after + layer.feed_forward(after))
    torch.testing.assert_close(states["decoder.layers.2.feed_forward"], last)
    torch.testing.assert_close(states["decoder.output"], last)


def test_rotary_queries_are_rotated():
    model = transformer(positions="rope")
    trace = model.trace(SOURCE, TARGET)
    assert "encoder.positions" not in trace.states
    attention = model.encoder.layers[0].self_attention
    with torch.no_grad():
        plain = attention.in_projection(trace.states["encoder.input"])[..., :24]
    rotated = rotate(plain.unflatten(-1, (6, 4)), torch.arange(6)).transpose(1, 2)
    found = trace.attentions["encoder.layers.0.self_attention"].query
    torch.testing.assert_close(found, rotated)


def test_of_a_language_model():
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=37, num_layers=2, positions="learned", **SIZES).train()
    lengths = torch.tensor([6, 2])
    trace = model.trace(SOURCE, lengths)
    assert list(trace.attentions) == [f"decoder.layers.{i}.self_attention" for i in range(2)]
    with torch.no_grad():
        check_attentions(trace, model)
        expected = model.eval()(SOURCE, lengths)
    real = SOURCE != 0
    torch.testing.assert_close(trace.states["decoder.output"][real], expected[real])
    first = trace.attentions["decoder.layers.0.self_attention"]
    assert (first.scores[..., ops.causal_mask(6).logical_not()] == -math.inf).all()


def test_of_a_text_encoder():
    torch.manual_seed(0)
    model = TextEncoder(
        vocab_size=37, num_layers=2, num_token_types=2, embedding_norm=True, **SIZES
    ).eval()
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]])
    trace = model.trace(SOURCE, token_types=types)
    with torch.no_grad():
        check_attentions(trace, model)
        states = trace.states
        torch.testing.assert_close(
            states["encoder.token_types"], model.encoder.token_types.weight[types]
        )
        total = sum(states[f"encoder.{part}"] for part in ("tokens", "positions", "token_types"))
        torch.testing.assert_close(states["encoder.input"], model.encoder.embedding_norm(total))
        pooled = model(SOURCE, token_types=types)
    torch.testing.assert_close(trace.states["encoder.output"][:, 0], pooled)


EMPTY = torch.zeros(2, 0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((SOURCE, TARGET[:1]), r"tgt_ids: expected as many sentences as src_ids has \(2\), got 1"),
        ((SOURCE.float(), TARGET), r"src_ids: expected int64 .*, got torch.float32 \[2, 6\]"),
        ((SOURCE.tolist(), TARGET), r"src_ids: expected a tensor, int64 .*, got list: \[\[5, 6,"),
        ((SOURCE, TARGET[0]), r"tgt_ids: expected int64 \[batch, length\], got torch.int64 \[5\]"),
        ((SOURCE.flip(1), TARGET), "src_ids: padding .* stands before a token"),
        ((SOURCE * 7, TARGET), "src_ids: got 42 in row 0, column 1, expected ids from 0 to 36"),
        ((SOURCE, -TARGET), "tgt_ids: got -2 in row 0, column 0, expected ids from 0 to 36"),
        (
            (SOURCE * torch.tensor([[1], [0]]), TARGET),
            "src_ids: .* one token .*, got none in row 1",
        ),
        ((SOURCE, EMPTY), "tgt_ids: expected at least one token in each row, got none in row 0"),
        (
            (SOURCE[:0], TARGET[:0]),
            r"src_ids: expected at least one token .*, got no row: \[0, 6\]",
        ),
    ],
)
def test_wrong_ids_are_named(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        transformer().trace(*arguments)


def test_wrong_ids_of_one_stack_are_named():
    encoder = TextEncoder(vocab_size=37, num_layers=1, **SIZES)
    typed = TextEncoder(vocab_size=37, num_layers=1, num_token_types=2, **SIZES)
    for model, arguments, error in (
        (encoder, {"token_types": SOURCE}, "token_types: expected none"),
        (encoder, {"lengths": [6, 2]}, r"lengths: expected a tensor, integers \[2\], got list"),
        (encoder, {"lengths": torch.tensor([6, 0])}, "ids: .*, got none in row 1"),
        (encoder, {"ids": SOURCE.tolist()}, "ids: expected a tensor"),
        (typed, {"token_types": SOURCE}, "token_types: got 5 in row 0, column 0, .* 0 to 1"),
        (
            typed,
            {"token_types": SOURCE.float()},
            r"token_types: expected int64 \[2, 6\], got torch.fl",
        ),
        (typed, {"token_types": [1]}, "token_types: expected a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            model.trace(**{"ids": SOURCE, **arguments})


def test_the_text_of_a_trace_is_short():
    trace = transformer(positions="learned").trace(SOURCE, TARGET)
    lines = repr(trace).splitlines()
    assert len(lines) == 19 and max(map(len, lines)) < 60
    assert lines[3].split() == ["decoder.layers.0-2.self_attention", "[2,", "6,", "5,", "5]"]
    assert lines[7].split() == ["encoder.positions", "[6,", "24]"]
    (first, *_) = trace.attentions.values()
    assert repr(first).startswith("AttentionTrace(query [2, 6, 6, 4], key [2, 2, 6, 4], value")
