"""The pictures: the data behind each, and that what is drawn is that data."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from matplotlib import colormaps
from matplotlib.text import Text
from tokenizers import decoders, models, pre_tokenizers

from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.inference.continuation import continuations
from transformer_ext.inference.options import SearchOptions, SearchResult
from transformer_ext.inference.search import beam_search
from transformer_ext.model import LanguageModel, TextEncoder, Transformer
from transformer_ext.ops import label_smoothing_loss
from transformer_ext.ops.activation import activation_reference
from transformer_ext.packed import Packed
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.sizing import Recipe
from transformer_ext.visualization import flow
from transformer_ext.visualization.attention import (
    AttentionMap,
    draw_attention,
    of_kind,
    text_attention,
    translation_attention,
)
from transformer_ext.visualization.beam import BeamNode, BeamTree, beam_tree, draw_beam
from transformer_ext.visualization.figure import (
    SIGNED_COLORS,
    SMALL_TEXT,
    WEIGHT_COLORS,
    new_figure,
    piece_labels,
    save_figure,
)
from transformer_ext.visualization.flow import FlowStep, draw_flow, flow_text, model_flow
from transformer_ext.visualization.label_smoothing import (
    confidence_curve,
    draw_label_smoothing,
    smoothed_targets,
)
from transformer_ext.visualization.pieces import piece_contents, readable_pieces, spelt_out
from transformer_ext.visualization.positions import draw_positions, position_table
from transformer_ext.visualization.schedules import (
    draw_schedules,
    every_schedule,
    noam_schedules,
    schedule_curve,
)
from transformer_ext.visualization.training import draw_training, training_curves

SIZES = {"d_model": 24, "nhead": 3, "dim_feedforward": 40}


class Letters:
    """A tokenizer of 37 ids with names of their own."""

    pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3

    def piece(self, id: int) -> str:
        return {2: "<s>", 3: "</s>"}.get(id, f"p{id}")

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.piece(id) for id in ids]


def transformer(**changes) -> Transformer:
    torch.manual_seed(3)
    sizes = {"src_vocab_size": 37, "tgt_vocab_size": 37, **SIZES}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 2}
    return Transformer(**{**sizes, **layers, **changes}).eval()


# --- files ---------------------------------------------------------------------------------------


def test_a_picture_is_the_same_file_each_time(tmp_path: Path) -> None:
    for ending in ("png", "svg", "pdf"):
        files = []
        for name in ("a", "b"):
            figure = new_figure(2, 2)
            figure.add_subplot().plot([1, 2])
            save_figure(figure, tmp_path / f"{name}.{ending}")
            files.append((tmp_path / f"{name}.{ending}").read_bytes())
        assert files[0] == files[1]
        if ending == "png":  # 100 pixels an inch
            assert struct.unpack(">2I", files[0][16:24]) == (200, 200)
    assert files[0].startswith(b"%PDF")


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: expected a file in \.png, \.svg, \.pdf, got"):
        save_figure(new_figure(1, 1), tmp_path / "x.gif")
    with pytest.raises(
        ValueError,
        match="picture: would be 400 x 2 inches, expected at most 300 a side .*; choose fewer",
    ):
        new_figure(400, 2)
    with pytest.warns(UserWarning, match="no font here has some of the characters"):
        figure = new_figure(2, 2)
        figure.text(0.5, 0.5, "\U0001f9ff\U00013080")
        save_figure(figure, tmp_path / "x.png")


def test_labels_are_plain_text() -> None:
    assert piece_labels(["\u2581the", "a\nb", " ", "$x$", "\u2581", "\ud800"]) == [
        "_the",
        r"a\nb",
        "_",
        r"\$x\$",
        "_",
        r"\ud800",
    ]


def test_byte_level_pieces_are_readable(tmp_path: Path) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate([*sorted(alphabet), "<|endoftext|>"])}, [])
    )
    library.decoder = decoders.ByteLevel()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    roles = dict.fromkeys(("bos", "eos", "pad", "unk"), "<|endoftext|>")
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", roles)
    ids = [*tokenizer.encode(" a\u00f6"), tokenizer.eos_id]
    parts = ["\u00f6 1/2", "\u00f6 2/2"]
    assert readable_pieces(tokenizer, ids) == ["\u2581", "a", *parts, "<|endoftext|>"]
    every = piece_contents(tokenizer, range(256))
    assert sorted(every) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("contents", "texts"),
    [
        # Byte fallback: three pieces of one character, then one that is broken off.
        ([b"\xe7", b"\x82", b"\xb9"], ["\u70b9 1/3", "\u70b9 2/3", "\u70b9 3/3"]),
        (["\u2581", b"\xe7", b"\x82", "a"], ["\u2581", r"\xe7", r"\x82", "a"]),
        # Bytes of two characters in one piece, and a character whole.
        ([b" \xe4\xbd", b"\xa0\xe5", b"\xa5\xbdx"], ["\u2581\u4f60 1/2", "\u4f60 2/2\u597d 1/2", "\u597d 2/2x"]),
        ([b" w\xc3\xb6", "</s>", b"\n"], ["\u2581w\u00f6", "</s>", "\n"]),
        ([], []),
    ],
)  # fmt: skip
def test_bytes_are_joined_to_characters(contents, texts) -> None:
    assert spelt_out(contents) == texts


class Bytes(Letters):
    """Every id is a byte piece, as those of SentencePiece's byte fallback."""

    def piece(self, id: int) -> str:
        return f"<0x{0xE0 + id % 4:02X}>" if id >= 4 else super().piece(id)


# --- all of them -----------------------------------------------------------------------------------

PICTURES = {
    "attention": lambda: draw_attention(
        text_attention(TextEncoder(vocab_size=37, num_layers=2, **SIZES), [5], Letters())["encoder"]
    ),
    "beam": lambda: draw_beam(
        beam_tree(transformer(), [5, 3], Letters(), SearchOptions(max_length=3))
    ),
    "flow": lambda: draw_flow(transformer()),
    "label smoothing": draw_label_smoothing,
    "positions": draw_positions,
    "schedules": lambda: draw_schedules({"noam": noam_schedules(50)}),
    "training": lambda: draw_training(
        [{"event": "train", "step": 1, "nll": 2.0, "learning_rate": 1}]
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_be_read(name) -> None:
    """No small letters, a name at each axis, and a colour bar where colours are numbers."""
    figure = PICTURES[name]()
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        assert not text.get_text() or text.get_fontsize() >= SMALL_TEXT, text
    shared = figure.get_supxlabel() and figure.get_supylabel()
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    for axes in figure.axes:
        if axes in bars:
            assert axes.get_ylabel()
        elif axes.axison:
            assert shared or (axes.get_xlabel() and axes.get_ylabel())
        for image in axes.images:
            assert bars and image.get_cmap().name in (WEIGHT_COLORS, SIGNED_COLORS)


@pytest.mark.parametrize("colors", [WEIGHT_COLORS, SIGNED_COLORS])
def test_more_is_darker(colors) -> None:
    lightness = colormaps[colors](np.linspace(0.5, 1.0, 50))[:, :3] @ (0.3, 0.6, 0.1)
    assert (np.diff(lightness) < 0).all()


# --- attention -----------------------------------------------------------------------------------


def test_attention_of_a_translation() -> None:
    model = transformer()
    maps = translation_attention(model, [5, 6, 7], [8, 9], Letters(), Letters())
    trace = model.trace(torch.tensor([[5, 6, 7, 3]]), torch.tensor([[2, 8, 9]]))
    assert list(maps) == ["cross", "encoder", "decoder"]
    cross = maps["cross"]
    assert cross.rows == ["p8", "p9", "</s>"] and cross.columns == ["p5", "p6", "p7", "</s>"]
    assert cross.weights.shape == (2, 3, 3, 4)
    found = trace.attentions["decoder.layers.1.cross_attention"].weights[0]
    assert np.array_equal(cross.weights[1], found.numpy())
    decoder = maps["decoder"]
    assert decoder.rows == decoder.columns == ["<s>", "p8", "p9"]
    assert not np.triu(decoder.weights, 1).any()
    assert maps["encoder"].rows == cross.columns
    assert list(translation_attention(transformer(num_decoder_layers=0), [5], [], Letters(), Letters())) == ["encoder"]  # fmt: skip


def test_attention_of_a_text() -> None:
    language_model = LanguageModel(vocab_size=37, num_layers=2, **SIZES)
    ((kind, found),) = text_attention(language_model, [5, 6], Letters()).items()
    assert kind == "decoder" and found.rows == ["<s>", "p5", "p6"]
    assert found.weights.shape == (2, 3, 3, 3) and not np.triu(found.weights, 1).any()
    alone = LanguageModel(vocab_size=37, num_layers=1, prepend_bos=False, **SIZES)
    assert text_attention(alone, [5, 6], Letters())["decoder"].rows == ["p5", "p6"]
    encoder = TextEncoder(vocab_size=37, num_layers=1, **SIZES)
    found = text_attention(encoder, [5], Letters())["encoder"]
    assert found.rows == ["<s>", "p5", "</s>"] and (found.weights > 0).all()
    np.testing.assert_allclose(found.weights.sum(-1), 1.0, rtol=1e-5)


def test_one_panel_for_each_layer_and_head() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3, 2)).astype(np.float32)
    found = AttentionMap("T", ["a", "b"], ["\u2581c", "d", "e", "f"], weights)
    drawn = [axes for axes in draw_attention(found).axes if axes.images]
    assert len(drawn) == 6
    assert drawn[4].get_title() == "layer 2, head 2"
    for axes, each in zip(drawn, weights.reshape(6, 2, 4), strict=True):
        (image,) = axes.images
        assert np.array_equal(image.get_array(), each) and image.get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in drawn[3].get_xticklabels()] == ["_c", "d", "e", "f"]
    chosen = [axes for axes in draw_attention(found, [2], [3, 1]).axes if axes.images]
    assert [axes.get_title() for axes in chosen] == ["layer 2, head 3", "layer 2, head 1"]
    assert np.array_equal(chosen[0].images[0].get_array(), weights[1, 2])


def test_wrong_attention_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected \[layers, heads, 1, 2\] for 1 rows"):
        AttentionMap("T", ["a"], ["b", "c"], np.zeros((1, 1, 3, 2), np.float32))
    found = AttentionMap("T", ["a"], ["b"], np.ones((2, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match="layer: got 3, expected 1 to 2"):
        draw_attention(found, [3])
    with pytest.raises(ValueError, match="head: got 0, expected 1 to 1"):
        draw_attention(found, heads=[0])
    with pytest.raises(ValueError, match="kind: got 'cross', expected one of encoder"):
        of_kind({"encoder": found}, "cross")


# --- positions, schedules, training, label smoothing ---------------------------------------------


def test_position_table_is_the_formula() -> None:
    table, halves = position_table(20, 512), position_table(20, 512, "sinusoidal_halves")
    for position, i in ((0, 0), (3, 5), (19, 255)):
        angle = position / 10000 ** (2 * i / 512)
        assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    assert np.array_equal(halves, np.concatenate([table[:, ::2], table[:, 1::2]], axis=1))
    figure = draw_positions()
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert np.array_equal(maps[0], table) and np.array_equal(maps[1], halves)
    lines = figure.axes[-1].get_lines()
    for dimension, line in zip((4, 5, 6, 7), lines, strict=True):
        assert line.get_label() == f"dimension {dimension}"
        assert np.array_equal(line.get_ydata(), position_table(100, 20)[:, dimension])
    # A column is as wide as its neighbours: whole pixels, from a whole pixel on.
    for axes in figure.axes[:-1]:
        left, _, width, _ = axes.get_position().bounds * (
            100 * figure.get_size_inches().repeat(2)[[0, 2, 0, 2]]
        )
        assert left == pytest.approx(round(left))
        assert not axes.images or width == pytest.approx(2 * 512)
    (title,) = [
        axes.get_title("left")
        for axes in draw_positions(9, 4, layouts=["sinusoidal_halves"]).axes
        if axes.images
    ]
    assert title.startswith("sinusoidal_halves: all sines, then all cosines")
    halves = draw_positions(layouts=["sinusoidal_halves"]).axes[-1].get_lines()
    assert all(
        np.array_equal(a.get_ydata(), b.get_ydata()) for a, b in zip(lines, halves, strict=True)
    )
    assert [line.get_label() for line in halves] == [f"dimension {i}" for i in (2, 12, 3, 13)]
    with pytest.raises(ValueError, match="d_model: got 7, expected an even number"):
        draw_positions(d_model=7)


def test_schedule_curves() -> None:
    noam = noam_schedules(20000)
    steps, rates = schedule_curve(noam["d_model 512, warm-up 4,000"])
    assert steps[0] == 1 and steps[-1] == 20000 and len(steps) <= 1001
    assert rates.max() == 512**-0.5 * 4000**-0.5 and steps[rates.argmax()] == 4000
    others = every_schedule(1e-3, 10, 100, 0.1)
    assert set(others) == {"inverse_sqrt", "cosine", "linear", "constant"}
    assert all(max(schedule_curve(each)[1]) == 1e-3 for each in others.values())
    figure = draw_schedules({"a": noam, "b": others})
    for axes, schedules in zip(figure.axes, (noam, others), strict=True):
        drawn = {line.get_label(): np.stack(line.get_data()) for line in axes.get_lines()}
        assert list(drawn) == list(schedules)
        for name, schedule in schedules.items():
            assert np.array_equal(drawn[name], np.stack(schedule_curve(schedule)))
    assert len(schedule_curve(Schedule("constant", 1.0, 0, 3))[0]) == 3


def test_training_curves() -> None:
    events = [
        {"event": "start"},
        {"event": "train", "step": 5, "nll": 3.0, "learning_rate": 0.1, "gradient_norm": 1.0},
        {"event": "train", "step": 10, "nll": None, "learning_rate": 0.2, "gradient_norm": 2.0},
        {"event": "validation", "step": 10, "nll": 2.5, "accuracy": 0.25, "bleu": 11.0},
    ]
    panels = training_curves(events)
    assert panels["negative log-likelihood a token, nats"] == {
        "training": [(5, 3.0)],
        "validation": [(10, 2.5)],
    }
    assert panels["validation"] == {"BLEU": [(10, 11.0)], "accuracy, %": [(10, 25.0)]}
    assert panels["norm of the gradient"] == {"before clipping": [(5, 1.0), (10, 2.0)]}
    figure = draw_training(events, "T")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes, curves in zip(figure.axes, panels.values(), strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert drawn == {name: [[*point] for point in points] for name, points in curves.items()}
    assert training_curves(events[:1]) == {} and len(draw_training(events[:1]).axes) == 1


def test_smoothed_targets_are_what_the_loss_pulls_to() -> None:
    """The gradient of the loss is the model's distribution less the target."""
    table = smoothed_targets([2, 1, 0, 3], 5, 0.4)
    np.testing.assert_allclose(table.sum(1), [1, 1, 0, 1], rtol=1e-6)
    logits = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([2, 1, 0, 3])
    label_smoothing_loss(
        logits, target, label_smoothing=0.4, ignore_index=0, normalizer=1.0
    ).loss.backward()
    expected = logits.softmax(-1).detach().numpy() - logits.grad.numpy()
    expected[2] = 0.0  # padding: no gradient at all
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert not logits.grad[2].any()


def test_confidence_has_a_cost() -> None:
    odds = [1.0, 10.0, 1e4]
    sure, smooth = (confidence_curve(odds, 5, value) for value in (0.0, 0.4))
    assert sure[0] == pytest.approx(math.log(5)) and sure[0] > sure[1] > sure[2]
    assert smooth[0] == pytest.approx(math.log(5)) and smooth[1] < smooth[0] < smooth[2]
    figure = draw_label_smoothing(0.4)
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown[:5] == ["0.08", "0.08", "0.68", "0.08", "0.08"]
    for value, line in zip((0.0, 0.1, 0.3), figure.axes[1].get_lines(), strict=True):
        assert line.get_label() == f"label smoothing {value:g}"
        assert np.array_equal(line.get_ydata(), confidence_curve(line.get_xdata(), 5, value))
    with pytest.raises(ValueError, match="label_smoothing: got 1.5"):
        draw_label_smoothing(1.5)
    with pytest.raises(ValueError, match="target: got 7, expected 0 to 4"):
        draw_label_smoothing(targets=[7])
    assert Recipe.label_smoothing == 0.1
    large = draw_label_smoothing(vocab_size=1000).axes[0]
    assert large.get_title() == "targets with label smoothing 0.1"
    assert large.get_xlabel() == "token of the vocabulary (the first 10 of 1,000)"
    assert [text.get_text() for text in large.texts[:3]] == ["1e-04", "1e-04", "0.90"]
    assert len(draw_label_smoothing(vocab_size=2).axes[0].texts) == 10


# --- beam ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ended"),
    [
        ({}, True),
        ({"beam_size": 1}, False),
        ({"max_length": 6, "min_length": 5}, True),
        ({"repetition_penalty": 1.3}, True),
        ({"num_hypotheses": 3, "min_length": 2}, True),
    ],
)
def test_the_tree_holds_every_step_of_the_search(changes, ended) -> None:
    model = transformer(tie="none", output_bias=True)
    with torch.no_grad():
        model.generator.bias[3] = 1.0  # so that hypotheses end at different steps
    source = [5, 6, 7, 3]
    options = SearchOptions(**{"beam_size": 3, "num_hypotheses": 1, "max_length": 12, **changes})
    tree = beam_tree(model, source, Letters(), options)
    (expected,) = beam_search(model, [source], options)
    assert tree.result == expected
    nodes = tree.nodes
    ways = []
    for index, node in enumerate(nodes):
        assert node.parent < index
        before = nodes[node.parent] if node.parent >= 0 else None
        assert node.step == 1 + (before.step if before else 0)
        total = node.total - (before.total if before else 0.0)
        if "repetition_penalty" not in changes:
            assert total == pytest.approx(node.log_prob)
        ways.append((ways[node.parent] if node.parent >= 0 else []) + [node.token])
        assert node.piece == Letters().piece(node.token)
    best = expected.hypotheses[0]
    ending = [3] if best.ended else []
    assert [node.token for node in nodes if node.best] == best.tokens + ending
    (winner,) = [i for i, node in enumerate(nodes) if node.rank == 1]
    assert ways[winner] == best.tokens + ending and nodes[winner].score == best.score
    assert sum(node.log_prob for node in nodes if node.best) == pytest.approx(best.log_prob)
    assert any(node.end == "ended" for node in nodes) == ended
    ranked = {node.rank: node.score for node in nodes if node.rank is not None}
    assert ranked == {i: found.score for i, found in enumerate(expected.hypotheses, 1)}
    parents = {node.parent for node in nodes}
    last = max(node.step for node in nodes)
    for index, node in enumerate(nodes):
        assert (node.end == "went on") == (index in parents)
        assert (node.end == "ended") == (node.token == 3)
        assert node.end != "cut" or node.step == last
        if node.end == "ended":
            assert node.score == pytest.approx(node.total / options.penalty(node.step - 1, True))
        else:
            assert (node.score is None) == (node.rank is None)
    for step in range(1, last + 1):
        alive = [node for node in nodes if node.step == step and node.token != 3]
        assert len(alive) <= options.beam_size
    axes = draw_beam(tree, "title").axes[0]
    drawn = axes.texts
    assert len({text.get_position() for text in drawn}) == len(drawn)  # none upon another
    texts = [text.get_text() for text in drawn]
    assert texts[0] == "title" and len(texts) == 8 + 2 * len(nodes)
    # The legend has every colour that there is.
    legend = {text.get_color() for text in drawn[1:6]}
    legend_best = drawn[1].get_color()
    assert len(legend) == 5 and {text.get_color() for text in drawn[8:]} <= legend
    assert any(f"score {best.score:.3f}  no. 1" in text for text in texts)
    # A node stands at the end of its edge, which begins at its parent; beside the parent is the
    # best of its children, further down the next best.
    places = [text.get_position() for text in drawn[8::2]]
    rows: dict[int, list[tuple[float, bool, float]]] = {}
    for index, (node, edge) in enumerate(zip(nodes, axes.lines[5:], strict=True)):
        begin, *_, end = edge.get_xydata().tolist()
        start = places[node.parent] if node.parent >= 0 else drawn[7].get_position()
        assert (*begin,) == start and (*end,) == places[index] and begin[0] < end[0]
        assert (edge.get_color() == legend_best) == node.best
        assert texts[8 + 2 * index] == node.piece
        assert texts[9 + 2 * index].split()[0] == f"{node.total:.2f}"
        rows.setdefault(node.parent, []).append((end[1], node.best, node.total))
    for parent, children in rows.items():
        downwards = sorted(children, reverse=True)
        assert downwards == sorted(children, key=lambda child: child[1:], reverse=True)
        assert downwards[0][0] == (places[parent] if parent >= 0 else drawn[7].get_position())[1]


def test_a_tree_where_no_token_may_follow() -> None:
    model = transformer()
    none = SearchOptions(suppressed_tokens=tuple(range(37)))
    tree = beam_tree(model, [5, 3], Letters(), none)
    assert tree.nodes == [] and tree.result.stop == "no_token"
    assert len(draw_beam(tree).axes[0].texts) == 8
    others = tuple(id for id in range(37) if id not in (5, 6))
    options = SearchOptions(suppressed_tokens=others, no_repeat_ngram_size=1, beam_size=2)
    tree = beam_tree(model, [5, 3], Letters(), options)
    assert tree.result.stop == "no_token"
    assert sorted((node.step, node.token) for node in tree.nodes) == [
        (1, 5),
        (1, 6),
        (2, 5),
        (2, 6),
    ]


def test_what_has_no_tree_is_named() -> None:
    with pytest.raises(ValueError, match="sampling: the tree is one of a beam search"):
        beam_tree(transformer(), [5, 3], Letters(), SearchOptions(sampling=True))
    with pytest.raises(ValueError, match="beam_size: got 33, expected at most 32 in a picture"):
        beam_tree(transformer(), [5, 3], Letters(), SearchOptions(beam_size=33))
    with pytest.raises(ValueError, match="source: expected at least one token"):
        beam_tree(transformer(), [], Letters())
    encoder: Any = TextEncoder(vocab_size=37, num_layers=1, **SIZES)
    with pytest.raises(TypeError, match="model: expected a Transformer .*, got TextEncoder, which"):
        beam_tree(encoder, [5, 3], Letters())
    leaves = [BeamNode(-1, 5, "x", 1, -1.0, -1.0, "dropped") for _ in range(201)]
    with pytest.raises(
        ValueError, match=r"the tree has 201 leaves, .* at most 200; choose a shorter text"
    ):
        draw_beam(BeamTree(leaves, SearchResult([], "exact", 1)))


def test_the_tree_of_a_continuation() -> None:
    torch.manual_seed(1)
    model = LanguageModel(vocab_size=37, num_layers=1, **SIZES).eval()
    options = SearchOptions(beam_size=3, max_length=5)
    tree = beam_tree(model, [5, 6], Bytes(), options)
    (expected,) = continuations(model, [[5, 6]], options)
    assert tree.result == expected
    best = [node for node in tree.nodes if node.best]
    assert [node.token for node in best][:5] == expected.hypotheses[0].tokens
    # A byte is spelt with those before it on its way, not with its neighbours in the list.
    way = [f"<0x{0xE0 + node.token % 4:02X}>" for node in best if node.token != 3]
    assert [node.piece for node in best][: len(way)] == [
        rf"\x{piece[3:5].lower()}" for piece in way
    ]


# --- flow ----------------------------------------------------------------------------------------

KINDS = {
    "paper": lambda: transformer(),
    "pre-norm, grouped": lambda: transformer(
        norm_first=True, nhead=4, num_kv_heads=2, head_dim=5, tie="none", output_bias=True
    ),
    "gated, rotary": lambda: transformer(
        positions="rope", activation="swiglu", norm="rms", bias=False, embedding_norm=True
    ),
    "language model": lambda: LanguageModel(
        vocab_size=37, num_layers=2, positions="learned", norm_first=True, **SIZES
    ),
    "text encoder": lambda: TextEncoder(
        vocab_size=37,
        num_layers=2,
        positions="learned",
        num_token_types=2,
        embedding_norm=True,
        pooler=True,
        normalize=True,
        labels=["a", "b", "c"],
        masked_lm_head=True,
        **SIZES,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_flow_names_every_parameter_once(name) -> None:
    model = KINDS[name]().eval()
    steps = model_flow(model)
    found = [(key, shape) for step in steps for key, shape in step.parameters.items()]
    expected = {
        key: tuple(value.shape) for key, value in model.named_parameters(remove_duplicate=False)
    }
    assert len(found) == len(expected) and dict(found) == expected
    assert all(step.type == ("float32" if step.parameters else "") for step in steps)
    assert len({step.name for step in steps}) == len(steps)


@pytest.mark.parametrize("name", KINDS)
def test_flow_has_the_shapes_of_the_model(name) -> None:
    """As the modules themselves compute them, for 5 source and 4 target tokens."""
    model = KINDS[name]().eval()
    steps = {step.name: step for step in model_flow(model)}
    seen = set()

    def hook(path: str):
        def compare(module, inputs, output) -> None:
            step = steps.get(path)
            if step is None or not isinstance(output, torch.Tensor):
                return
            # A module that holds others is a step for what lies between them.
            if any(True for _ in module.children()):
                return
            shape = [{"S": 5, "T": 4}.get(size, size) for size in step.outputs]
            rows = [1, *shape] if len(shape) == 1 else shape
            assert list(output.shape) == rows, path
            seen.add(path)

        return compare

    for path, module in model.named_modules():
        module.register_forward_hook(hook(path))
    with torch.no_grad():
        if isinstance(model, Transformer):
            source, target = Packed.from_lengths([5]), Packed.from_lengths([4])
            model.forward_packed(torch.arange(5), source, torch.arange(4), target)
            assert len(seen) >= 1 * 3 + 2 * 5
        elif isinstance(model, LanguageModel):
            model.forward_packed(torch.arange(4), Packed.from_lengths([4]))
            assert len(seen) >= 2 * 3
        else:
            packed = Packed.from_lengths([5])
            model.forward_packed(torch.arange(5), packed)
            assert "pooler" in seen and len(seen) >= 2 * 3
    # One step's output is the next one's input, except where keys and values come in.
    order: list[FlowStep] = list(steps.values())
    for before, after in zip(order, order[1:], strict=False):
        straight = not {"key_value_projection", "embedding"} & {
            before.name.split(".")[-1], after.name.split(".")[-1].split("_")[-1],
            after.name.split(".")[-1],
        }  # fmt: skip
        if straight and after.kind != "pooling":
            assert before.outputs == after.inputs, (before.name, after.name)


@pytest.mark.parametrize("name", KINDS)
def test_flow_as_text_and_as_picture(name) -> None:
    model = KINDS[name]()
    steps = model_flow(model)
    text = flow_text(model)
    first = [step for step in steps if not re.search(r"\.layers\.[1-9]", step.name)]
    assert [line.split()[0] for line in text.splitlines()[3:]] == [step.name for step in first]
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    drawn = draw_flow(model).axes[0]
    boxes = [patch for patch in drawn.patches if patch.get_facecolor()[3] == 1.0]
    assert len(boxes) == len(first)
    shown = [text.get_text() for text in drawn.texts]
    assert "softmax(q k" in " ".join(shown)
    depths = [len(stack.layers) for stack in model.children() if hasattr(stack, "layers")]
    assert [each for each in shown if each.startswith("×")] == [f"× {depth}" for depth in depths]
    assert {*re.findall(r"\(x \d+\)", text)} == {f"(x {depth})" for depth in depths if depth > 1}
    # A residual line goes from above the box whose output it adds to the middle of its own.
    names = [step.name for step in first]
    lines = [line for line in drawn.lines if line.get_color() == "#888888"]
    adding = [step for step in first if step.residual]
    for step, line in zip(adding, lines, strict=True):
        if step.residual in names:
            below = names.index(step.residual)
        else:
            stack = step.residual.removesuffix("input")
            below = [name.startswith(f"{stack}layers") for name in names].index(True) - 1
        start, end = line.get_ydata()[0], line.get_ydata()[-1]
        assert boxes[below].get_y() + boxes[below].get_height() < start < boxes[below + 1].get_y()
        own = boxes[names.index(step.name)]
        assert end == pytest.approx(own.get_y() + own.get_height() / 2)


@pytest.mark.parametrize("kind", flow._ACTIVATIONS)
def test_flow_has_the_equation_of_the_activation(kind) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    equation = flow._ACTIVATIONS[kind]
    for theirs, ours in (
        ("·", "*"), (" h³", " * h**3"), ("√(2/π)", "sqrt(2 / pi)"), ("σ", "sigmoid"), ("Φ", "ndtr"),
    ):  # fmt: skip
        equation = equation.replace(theirs, ours)
    g, h = x.chunk(2, -1) if "g" in re.findall(r"\b\w\b", equation) else (x, x)
    values = {
        "g": g, "h": h, "max": lambda zero, x: x.clamp(zero), "pi": math.pi, "sqrt": math.sqrt,
        "tanh": torch.tanh, "sigmoid": torch.sigmoid, "ndtr": torch.special.ndtr,
    }  # fmt: skip
    step = {step.kind: step for step in model_flow(transformer(activation=kind))}[kind]
    assert step.equation == flow._ACTIVATIONS[kind]
    torch.testing.assert_close(eval(equation, values), activation_reference(x, kind=kind))


@pytest.mark.parametrize("norm_first", [False, True])
def test_flow_names_what_is_added(norm_first) -> None:
    steps = model_flow(transformer(norm_first=norm_first, num_encoder_layers=2))
    found = {step.name[1:]: step.residual for step in steps if step.residual}
    assert len(found) == sum(step.kind == "residual" for step in steps)
    for stack, parts in (
        ("encoder", "self ff self ff"),
        ("decoder", "self cross ff self cross ff"),
    ):
        layer, before = -1, f"{stack}.input"
        for part in parts.split():
            layer += part == "self"
            name = "feed_forward" if part == "ff" else f"{part}_attention"
            name = f"{stack}.layers.{layer}.{name}"
            assert found.pop(name) == before
            before = f"+{name}" if norm_first else f"{name}_norm"
    assert not found


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("tie", "note"),
    [
        ("none", ""),
        ("target", "   (W is that of target_embedding)"),
        ("all", "   (W is that of source_embedding and target_embedding)"),
    ],
)
def test_flow_says_what_is_scaled_and_tied(scaled, tie, note) -> None:
    steps = {step.name: step for step in model_flow(transformer(scale_embedding=scaled, tie=tie))}
    for side in ("source", "target"):
        assert steps[f"{side}_embedding"].equation == ("E[id] · √24" if scaled else "E[id]")
    assert steps["generator"].equation == f"x Wᵀ{note}"


def test_flow_has_the_equation_of_the_masked_lm_head() -> None:
    head = TextEncoder(
        vocab_size=37, num_layers=1, activation="gelu_tanh", masked_lm_head=True, **SIZES
    )
    (step,) = [step for step in model_flow(head) if step.name == "masked_lm_head.norm"]
    assert step.equation.startswith("x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), then (x")


def test_flow_of_something_else_is_named() -> None:
    with pytest.raises(TypeError, match="model: expected one of this package, got Linear"):
        model_flow(torch.nn.Linear(2, 2))
