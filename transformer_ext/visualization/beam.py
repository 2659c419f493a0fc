"""The tree of a beam search: every hypothesis that was kept at some step, with its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformer_ext.inference.options import SearchOptions, SearchResult
from transformer_ext.model.config import LanguageModelConfig, TransformerConfig
from transformer_ext.visualization.figure import SMALL_TEXT, new_figure, piece_labels, text_width
from transformer_ext.visualization.pieces import piece_contents, spelt_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transformer_ext.data.tokenizer import Tokenizer
    from transformer_ext.inference.search import SentenceSearch
    from transformer_ext.model import LanguageModel, Transformer

__all__ = ["WIDEST_BEAM", "BeamNode", "BeamTree", "beam_tree", "check_beam", "draw_beam"]

#: Hypotheses of a step in a tree that can be looked at.
WIDEST_BEAM = 32
#: Leaves of one, each a line of the picture.
_MOST_LEAVES = 200
_ADVICE = "choose a shorter text, or a smaller beam_size or max_length"


@dataclass
class BeamNode:
    """A hypothesis that the search kept; a node's tokens are those on the way to it.

    Attributes:
        parent: index of the node that it extends; -1: of the start.
        token: its last token.
        piece: of that token, readable: see
            :func:`transformer_ext.visualization.pieces.spelt_out`.
        step: from 1: length of the hypothesis, end of sentence included.
        log_prob: of the token, given those before.
        total: what the search has added up.
        end: ``went on``, ``dropped`` (nothing that extends it was kept), ``ended`` (by the end of
            the sentence) or ``cut`` (it lived when the search stopped).
        score: what it is ranked by, with the length penalty; None while it has not ended.
        rank: its place in the result, from 1; None where it is not in it.
        best: whether it is on the way to the best of the result.
    """

    parent: int
    token: int
    piece: str
    step: int
    log_prob: float
    total: float
    end: Literal["went on", "dropped", "ended", "cut"]
    score: float | None = None
    rank: int | None = None
    best: bool = False


@dataclass
class BeamTree:
    """The nodes of a search, parents before children, and its result."""

    nodes: list[BeamNode]
    result: SearchResult


def check_beam(options: SearchOptions) -> None:
    """Raise a ValueError for a search that has no tree, or one that nobody could look at."""
    if options.sampling:
        raise ValueError("sampling: the tree is one of a beam search, expected sampling off")
    if options.beam_size > WIDEST_BEAM:
        raise ValueError(
            f"beam_size: got {options.beam_size}, expected at most {WIDEST_BEAM} in a picture"
        )


def beam_tree(
    model: Transformer | LanguageModel,
    source_ids: Sequence[int],
    tokenizer: Tokenizer,
    options: SearchOptions | None = None,
    *,
    drawable: bool = False,
) -> BeamTree:
    """Translates a sentence, or continues a text, by the plain Python search, and keeps every step.

    Args:
        model: in evaluation mode.
        source_ids: token ids of the source, its end included; of a language model those of the
            beginning, without a start token.
        tokenizer: of what is written.
        options: how to search; the defaults if None.
        drawable: stop at once where the tree has more leaves than :func:`draw_beam` takes.

    Raises:
        TypeError: a model that writes nothing.
        ValueError: an empty source, options that sample, a beam wider than :data:`WIDEST_BEAM`, what
            the search refuses, or a tree that is not ``drawable``.
    """
    from transformer_ext.inference.continuation import continuations
    from transformer_ext.inference.search import beam_search

    options = options or SearchOptions()
    check_beam(options)
    if not isinstance(model.config, TransformerConfig | LanguageModelConfig):
        raise TypeError(
            f"model: expected a Transformer or a LanguageModel, got {type(model).__name__}, which "
            "writes nothing"
        )
    if not source_ids:
        raise ValueError("source: expected at least one token, got none")
    nodes: list[BeamNode] = []
    by_tokens: dict[tuple[int, ...], int] = {(): -1}
    seen = leaves = 0

    def add(tokens: Sequence[int], scores: Sequence[float], total: float, step: int) -> BeamNode:
        node = BeamNode(
            parent=by_tokens[tuple(tokens[:-1])],
            token=tokens[-1],
            piece="",
            step=step,
            log_prob=scores[-1],
            total=total,
            end="dropped",
        )
        by_tokens[tuple(tokens)] = len(nodes)
        nodes.append(node)
        nonlocal leaves
        leaves += node.parent < 0 or nodes[node.parent].end == "went on"
        if node.parent >= 0:
            nodes[node.parent].end = "went on"
        return node

    def observe(sentence: int, state: SentenceSearch) -> None:
        nonlocal seen
        # A step without any token to follow leaves the hypotheses as they were.
        if state.stop == "no_token":
            return
        for live in state.live:
            add(live.tokens, live.token_scores, live.total, state.steps)
        for found in state.finished[seen:]:
            tokens = [*found.tokens, model.config.eos_id]
            before = by_tokens[tuple(found.tokens)]
            # An end of sentence is never a repetition: it has no penalty.
            total = found.token_scores[-1] + (nodes[before].total if before >= 0 else 0.0)
            node = add(tokens, found.token_scores, total, state.steps)
            node.end, node.score = "ended", found.score
        seen = len(state.finished)
        if drawable:
            _check_leaves(leaves)

    search: Any = continuations if isinstance(model.config, LanguageModelConfig) else beam_search
    (result,) = search(model, [source_ids], options, observe=observe)
    contents = piece_contents(tokenizer, [node.token for node in nodes])
    for index, node in enumerate(nodes):
        # What a byte is part of follows from those before it on the way.
        way = [contents[index]]
        before = node.parent
        while isinstance(way[0], bytes) and before >= 0:
            way.insert(0, contents[before])
            before = nodes[before].parent
        node.piece = spelt_out(way)[-1]
    for rank, found in enumerate(result.hypotheses, 1):
        ending = [model.config.eos_id] if found.ended else []
        index = by_tokens[tuple(found.tokens + ending)]
        if index < 0:
            # No token may follow the start: nothing was written.
            continue
        node = nodes[index]
        node.rank, node.score = rank, found.score
        if not found.ended:
            node.end = "cut"
        while rank == 1 and index >= 0:
            nodes[index].best = True
            index = nodes[index].parent
    last = max((node.step for node in nodes), default=0)
    for node in nodes:
        if node.step == last and node.end == "dropped":
            node.end = "cut"
    return BeamTree(nodes, result)


def _check_leaves(count: int) -> None:
    if count > _MOST_LEAVES:
        raise ValueError(
            f"picture: the tree has {count:,} leaves, a line each, expected at most {_MOST_LEAVES}; "
            f"{_ADVICE}"
        )


def _rows(nodes: Sequence[BeamNode]) -> list[int]:
    """The row of each node: a node stands beside the best of what extends it."""
    children: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(index)
    rows = [0] * len(nodes)
    next_row = 0
    # By hand: a translation may be longer than Python's stack is deep.
    waiting = [(index, True) for index in _best_first(nodes, children.get(-1, []))]
    while waiting:
        index, new_row = waiting.pop(0)
        if new_row:
            rows[index] = next_row
            next_row += 1
        else:
            rows[index] = rows[nodes[index].parent]
        after = _best_first(nodes, children.get(index, []))
        waiting[:0] = [(child, place > 0) for place, child in enumerate(after)]
    return rows


def _best_first(nodes: Sequence[BeamNode], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (not nodes[i].best, -nodes[i].total))


_BEST = "#0969da"
_COLORS = {"went on": "#333333", "dropped": "#8c8c8c", "ended": "#1a7f37", "cut": "#9a6700"}
_LEGEND = (
    (_BEST, "on the way to the best"),
    (_COLORS["went on"], "went on"),
    (_COLORS["ended"], "ended"),
    (_COLORS["dropped"], "dropped"),
    (_COLORS["cut"], "alive when the search stopped"),
)
_NOTES = (
    "Below a piece: sum of the log-probabilities so far; where a hypothesis ended, its score; "
    "no.: its place in the result."
)


def draw_beam(tree: BeamTree, title: str = "") -> Figure:
    """The tree from left to right, a column for each step.

    Under each piece stands what the search has added up so far; where a hypothesis ended, its score
    and its place in the result. The way to the best is blue.

    Raises:
        ValueError: more leaves than a picture can show.
    """
    nodes = tree.nodes
    labels = piece_labels(node.piece for node in nodes)
    steps = max((node.step for node in nodes), default=0)
    widths = [0.6] + [0.0] * steps
    notes = [_note(node) for node in nodes]
    for node, label, note in zip(nodes, labels, notes, strict=True):
        needed = max(0.083 * text_width(label), 0.07 * len(note)) + 0.3
        widths[node.step] = max(widths[node.step], needed)
    left = [sum(widths[:step]) for step in range(steps + 1)]
    rows = _rows(nodes)
    leaves = max(rows, default=0) + 1
    _check_leaves(leaves)
    height = 0.38
    tall = height * leaves + 1.2
    wide = max(sum(widths) + 0.1, 8.0, 0.09 * text_width(title))
    figure = new_figure(wide, tall, layout=None, advice=_ADVICE)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0.0, wide)
    axes.set_ylim(0.0, tall)
    axes.axis("off")
    top = tall - 1.05

    def place(index: int) -> tuple[float, float]:
        if index < 0:
            return 0.1, top
        return left[nodes[index].step], top - height * rows[index]

    axes.text(0.1, tall - 0.12, title, fontsize=10, va="top", parse_math=False)
    x = 0.1
    for color, meaning in _LEGEND:
        axes.plot([x, x + 0.2], [tall - 0.45] * 2, color=color, linewidth=3.0)
        axes.text(x + 0.26, tall - 0.45, meaning, fontsize=SMALL_TEXT, va="center", color=color)
        x += 0.55 + 0.068 * len(meaning)
    axes.text(0.1, tall - 0.68, _NOTES, fontsize=SMALL_TEXT, va="center", color="#555555")
    # Lines run behind the texts, whose width depends on the font.
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(*place(-1), "start", fontsize=SMALL_TEXT, va="center", color="#555555", bbox=behind)
    for index, node in enumerate(nodes):
        x, y = place(index)
        parent_x, parent_y = place(node.parent)
        middle = left[node.step] - 0.14
        color = _BEST if node.best else "#bbbbbb"
        axes.plot(
            [parent_x, middle, middle, x],
            [parent_y, parent_y, y, y],
            color=color,
            linewidth=1.6 if node.best else 0.8,
            zorder=2 if node.best else 1,
            solid_joinstyle="round",
        )
        color = _BEST if node.best and node.end == "went on" else _COLORS[node.end]
        weight = "bold" if node.best else "normal"
        axes.text(
            x, y, labels[index], fontsize=8.5, va="center", color=color, weight=weight, bbox=behind
        )
        axes.text(x, y - 0.08, notes[index], fontsize=SMALL_TEXT, va="top", color=color)
    return figure


def _note(node: BeamNode) -> str:
    if node.score is None:
        return f"{node.total:.2f}"
    place = "" if node.rank is None else f"  no. {node.rank}"
    return f"{node.total:.2f}  score {node.score:.3f}{place}"
