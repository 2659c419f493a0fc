"""What a model computes, module by module: shapes, types, equations, as a table and as a picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformer_ext.visualization.figure import SMALL_TEXT, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transformer_ext.model import Model

__all__ = ["FlowStep", "draw_flow", "flow_text", "model_flow"]


#: Of numbers, and of the letters that :class:`FlowStep` explains.
Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class FlowStep:
    """One step of the computation.

    Shapes are of one sentence: ``S`` is the number of source tokens, ``T`` of target tokens. A text
    encoder has ``S`` tokens, a language model ``T``.

    Attributes:
        name: of the module, as in the names of its parameters; of a residual connection the
            sublayer's with ``+`` before it.
        kind: the module's class, or what the step is.
        equation: what it computes of its input ``x``.
        inputs, outputs: their shapes.
        parameters: name -> shape.
        type: of the parameters; empty where there are none.
        residual: name of the step whose output is added; empty: none (``input`` of a stack: what
            its first layer reads).
    """

    name: str
    kind: str
    equation: str
    inputs: Shape
    outputs: Shape
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    type: str = ""
    residual: str = ""


_ACTIVATIONS = {
    "relu": "max(0, h)",
    "gelu": "h · Φ(h)",
    "gelu_tanh": "h/2 · (1 + tanh(√(2/π) · (h + 0.044715 h³)))",
    "silu": "h · σ(h)",
    "swiglu": "g · σ(g) · h",
    "geglu": "g · Φ(g) · h",
    "reglu": "max(0, g) · h",
}
_POSITIONS = {
    "sinusoidal": "x + P,  P[t, 2i] = sin(t / 10000^(2i/{d})),  P[t, 2i+1] = cos(same)",
    "sinusoidal_halves": "x + P,  P[t, i] = sin(t / 10000^(i/{h})),  P[t, {h}+i] = cos(same)",
    "learned": "x + P[t]",
}


def model_flow(model: Model) -> list[FlowStep]:
    """The steps of a model, in the order in which they are computed.

    Args:
        model: of any kind.

    Raises:
        TypeError: it is of none of the kinds of this package.
    """
    from transformer_ext.model import LanguageModel, TextEncoder, Transformer

    if isinstance(model, Transformer):
        return [
            *_stack(model, "encoder", "source_embedding", "S"),
            *_stack(model, "decoder", "target_embedding", "T"),
            *_generator(model, ("T", model.config.d_model), "next token"),
        ]
    if isinstance(model, LanguageModel):
        return [
            *_stack(model, "decoder", "embedding", "T"),
            *_generator(model, ("T", model.config.d_model), "next token"),
        ]
    if isinstance(model, TextEncoder):
        return [*_stack(model, "encoder", "embedding", "S"), *_text_heads(model)]
    raise TypeError(f"model: expected one of this package, got {type(model).__name__}")


def _step(
    model: Any,
    name: str,
    equation: str,
    inputs: Shape,
    outputs: Shape,
    *,
    kind: str = "",
) -> FlowStep:
    """Of a module: its class and its own parameters are looked up."""
    module = model.get_submodule(name)
    own = dict(module.named_parameters(recurse=False))
    return FlowStep(
        name,
        kind or type(module).__name__,
        equation,
        inputs,
        outputs,
        {f"{name}.{part}": tuple(value.shape) for part, value in own.items()},
        ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in own.values()})),
    )


def _linear(module: Any, x: str = "x") -> str:
    return f"{x} Wᵀ" if module.bias is None else f"{x} Wᵀ + b"


def _norm(norm: Any) -> str:
    if norm.kind == "rms":
        return f"x / √(mean(x²) + {norm.eps:g}) · w"
    return f"(x − mean) / √(var + {norm.eps:g}) · w + b"


def _stack(model: Any, name: str, embedding: str, n: str) -> Iterator[FlowStep]:
    stack = model.get_submodule(name)
    width = model.config.d_model
    x = (n, width)
    scaled = f"E[id] · √{width}" if stack.scale != 1.0 else "E[id]"
    yield _step(model, embedding, scaled, (n,), x)
    if stack.positions.kind in _POSITIONS:
        equation = _POSITIONS[stack.positions.kind].format(d=width, h=width // 2)
        yield _step(model, f"{name}.positions", equation, x, x)
    if stack.token_types is not None:
        yield _step(model, f"{name}.token_types", "x + E[type]", x, x)
    if stack.embedding_norm is not None:
        yield _step(model, f"{name}.embedding_norm", _norm(stack.embedding_norm), x, x)
    before = f"{name}.input"
    for i in range(len(stack.layers)):
        for step in _layer(model, f"{name}.layers.{i}", before, x):
            yield step
        before = step.name
    if stack.norm is not None:
        yield _step(model, f"{name}.norm", _norm(stack.norm), x, x)


def _layer(model: Any, name: str, before: str, x: Shape) -> Iterator[FlowStep]:
    layer = model.get_submodule(name)
    for part in ("self_attention", "cross_attention", "feed_forward"):
        if not hasattr(layer, part):
            continue
        norm = _step(model, f"{name}.{part}_norm", _norm(getattr(layer, f"{part}_norm")), x, x)
        if layer.norm_first:
            yield norm
        describe = _feed_forward if part == "feed_forward" else _attention
        yield from describe(model, f"{name}.{part}", x)
        yield FlowStep(f"+{name}.{part}", "residual", "before + x", x, x, residual=before)
        before = f"+{name}.{part}"
        if not layer.norm_first:
            yield norm
            before = norm.name


def _attention(model: Any, name: str, x: Shape) -> Iterator[FlowStep]:
    module = model.get_submodule(name)
    heads, shared, width = module.nhead, module.num_kv_heads, module.head_dim
    n = x[0]
    joined: Shape = (n, heads * width)
    cross = hasattr(module, "query_projection")
    if cross:
        memory: Shape = ("S", x[1])
        yield _step(
            model, f"{name}.query_projection", f"q = {_linear(module.query_projection)}", x, joined
        )
        yield _step(
            model,
            f"{name}.key_value_projection",
            f"[k, v] = {_linear(module.key_value_projection, 'memory')}",
            memory,
            ("S", 2 * shared * width),
        )
        inputs = joined
    else:
        inputs = (n, (heads + 2 * shared) * width)
        turned = f", q and k turned by t · 10000^(−2i/{width})" if module.rotary else ""
        equation = f"[q, k, v] = {_linear(module.in_projection)}{turned}"
        yield _step(model, f"{name}.in_projection", equation, x, inputs)
    seen = "S" if cross else n
    causal = name.startswith("decoder") and not cross
    yield _step(
        model,
        name,
        f"softmax(q kᵀ / √{width}{' + mask' if causal else ''}) v   in {heads} heads"
        + (f", {shared} of k and v" if shared != heads else "")
        + f"; weights [{heads}, {n}, {seen}]",
        inputs,
        joined,
    )
    yield _step(model, f"{name}.out_projection", _linear(module.out_projection), joined, x)


def _feed_forward(model: Any, name: str, x: Shape) -> Iterator[FlowStep]:
    module = model.get_submodule(name)
    inner: Shape = (x[0], module.in_projection.out_features)
    hidden: Shape = (x[0], module.out_projection.in_features)
    left = "h" if inner == hidden else "[g, h]"
    yield _step(
        model, f"{name}.in_projection", f"{left} = {_linear(module.in_projection)}", x, inner
    )
    yield _step(model, name, _ACTIVATIONS[module.activation], inner, hidden, kind=module.activation)
    yield _step(model, f"{name}.out_projection", _linear(module.out_projection), hidden, x)


def _generator(model: Any, inputs: Shape, of: str) -> Iterator[FlowStep]:
    weight = model.generator.weight
    outputs = (*inputs[:-1], weight.shape[0])
    tied = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and name != "generator.weight"
    ]
    note = f"   (W is that of {' and '.join(tied)})" if tied else ""
    yield _step(model, "generator", _linear(model.generator) + note, inputs, outputs)
    equation = f"exp(x) / sum of exp(x): probability of each {of}"
    yield FlowStep("softmax", "softmax", equation, outputs, outputs)


def _text_heads(model: Any) -> Iterator[FlowStep]:
    config = model.config
    states: Shape = ("S", config.d_model)
    pooled: Shape = (config.d_model,)
    if model.masked_lm_head is not None:
        yield _step(
            model,
            "masked_lm_head.projection",
            _linear(model.masked_lm_head.projection).replace("x", "state"),
            states,
            states,
        )
        activation = re.sub(r"\bh", "x", _ACTIVATIONS[config.activation])
        equation = f"{activation}, then {_norm(model.masked_lm_head.norm)}"
        yield _step(model, "masked_lm_head.norm", equation, states, states)
        scores: Shape = ("S", config.vocab_size)
        yield _step(model, "masked_lm_head", "x Eᵀ + b   (E is embedding)", states, scores)
    of = "state of the first token" if config.pooling == "first" else "mean of the states"
    yield FlowStep("pooling", "pooling", of, states, pooled)
    if model.pooler is not None:
        yield _step(model, "pooler", "tanh(x Wᵀ + b)", pooled, pooled)
    if config.normalize:
        yield FlowStep("normalize", "normalize", "x / |x|", pooled, pooled)
    if model.generator is not None:
        yield from _generator(model, pooled, "label")


_LAYER = re.compile(r"^(\+?)(\w+)\.layers\.(\d+)\.")


def _plain(shape: Sequence[str | int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _folded(steps: Sequence[FlowStep]) -> list[tuple[FlowStep, int]]:
    """The steps without the layers after the first of a stack, each with the number of layers."""
    layers: dict[str, int] = {}
    for step in steps:
        if found := _LAYER.match(step.name):
            layers[found[2]] = max(layers.get(found[2], 0), int(found[3]) + 1)
    kept = []
    for step in steps:
        found = _LAYER.match(step.name)
        if found is None:
            kept.append((step, 1))
        elif found[3] == "0":
            kept.append((step, layers[found[2]]))
    return kept


def _letters(steps: Sequence[FlowStep]) -> str:
    both = {step.inputs[0] for step in steps} >= {"S", "T"}
    return "S source tokens, T target tokens" if both else f"{steps[0].inputs[0]} tokens"


def flow_text(model: Model) -> str:
    """The steps as a table; of equal layers the first is written out."""
    steps = model_flow(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{type(model).__name__}: {total:,} parameters; {_letters(steps)}; "
        f"activations {str(model.activation_dtype).removeprefix('torch.')}",
        "",
    ]
    rows = []
    for step, layers in _folded(steps):
        weights = ", ".join(
            f"{name.rsplit('.', 1)[1]} {_plain(shape)}" for name, shape in step.parameters.items()
        )
        rows.append(
            (
                step.name + (f"  (x {layers})" if layers > 1 else ""),
                step.kind,
                f"{_plain(step.inputs)} → {_plain(step.outputs)}",
                step.equation.replace("before", step.residual),
                f"{weights} {step.type}".strip(),
            )
        )
    head = ("module", "type", "shape", "equation", "parameters")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


#: What a box is filled with, by the colours of the paper's figure 1.
_FILLS = (
    ("norm", "#f2f5c8"),
    ("attention", "#ffe2bb"),
    ("feed_forward", "#c3e8f7"),
    ("embedding", "#fbdcdc"),
    ("positions", "#fbdcdc"),
    ("token_types", "#fbdcdc"),
    ("softmax", "#cbeecb"),
)


def _fill(step: FlowStep) -> str:
    if step.kind == "residual":
        return "#eeeeee"
    last = step.name.rsplit(".", 1)[-1]
    for text, color in _FILLS:
        if text in last:
            return color
    return next((color for text, color in _FILLS if text in step.name), "#dde3ff")


_WIDE, _TALL, _GAP, _MARGIN = 5.4, 0.52, 0.28, 0.75


def draw_flow(model: Model) -> Figure:
    """The steps as boxes from below to above, as in the paper's figure 1; equal layers are drawn once.

    Beside the arrows stand the shapes; a line at the left of a layer is a residual connection.
    """
    steps = model_flow(model)
    folded = _folded(steps)
    columns: list[list[tuple[FlowStep, int]]] = [[]]
    for step, layers in folded:
        if step.name == "target_embedding":
            columns.append([])
        columns[-1].append((step, layers))
    longest = max(map(len, columns))
    wide = len(columns) * (_WIDE + 2 * _MARGIN)
    tall = longest * (_TALL + _GAP) + 1.1
    figure = new_figure(wide, tall, layout=None)
    axes: Any = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0.0, wide)
    axes.set_ylim(0.0, tall)
    axes.axis("off")
    tops: list[float] = []
    places: dict[str, tuple[float, float]] = {}
    for number, column in enumerate(columns):
        left = number * (_WIDE + 2 * _MARGIN) + _MARGIN
        _draw_column(axes, column, left, places)
        tops.append(0.6 + len(column) * (_TALL + _GAP))
    memory = places.get("decoder.layers.0.cross_attention.key_value_projection")
    if memory is not None and len(columns) > 1:
        out = _MARGIN + _WIDE / 2
        between = 2 * _MARGIN + _WIDE - 0.3
        y = tops[0]
        axes.plot(
            [out, out, between, between], [y - _GAP, y + 0.1, y + 0.1, memory[1]], color="#444444"
        )
        _arrow(axes, (between, memory[1]), memory)
        axes.text(between - 0.08, y + 0.16, "memory", fontsize=SMALL_TEXT, ha="right")
    total = sum(parameter.numel() for parameter in model.parameters())
    axes.text(
        0.15,
        tall - 0.12,
        f"{type(model).__name__}, {total:,} parameters; {_letters(steps)}",
        fontsize=11,
        va="top",
    )
    return figure


def _draw_column(
    axes: Any,
    column: Sequence[tuple[FlowStep, int]],
    left: float,
    places: dict[str, tuple[float, float]],
) -> None:
    """Boxes from below; puts the middle of each box's left side into ``places``."""
    from matplotlib.patches import FancyBboxPatch

    center = left + _WIDE / 2
    y = 0.45
    axes.text(
        center + 0.1,
        y - 0.16,
        f"ids {_plain(column[0][0].inputs)}",
        fontsize=SMALL_TEXT,
        va="center",
    )
    spans: list[float] = []
    for step, layers in column:
        # Keys and values come from the memory: what is above goes past their box.
        narrow = step.name.endswith("key_value_projection")
        bypass = left + 0.92 * _WIDE
        if narrow:
            _arrow(axes, (bypass, y - _GAP), (bypass, y + _TALL + _GAP))
        else:
            _arrow(axes, (center, y - _GAP), (center, y + 0.02))
        if layers > 1 or _LAYER.match(step.name):
            spans.append(y)
        width = 0.84 * _WIDE if narrow else _WIDE
        axes.add_patch(
            FancyBboxPatch(
                (left, y),
                width,
                _TALL,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=_fill(step),
                edgecolor="#555555",
                linewidth=0.8,
            )
        )
        places[step.name] = (left, y + _TALL / 2)
        name = _LAYER.sub("", step.name)
        title, kind = name, step.kind
        if step.kind == "residual":
            title, kind = f"add {name}", ""
        if narrow:
            title = name.rsplit(".", 1)[1]
        weights = " ".join(_plain(shape) for shape in step.parameters.values())
        high = y + _TALL - 0.09
        axes.text(left + 0.1, high, title, fontsize=SMALL_TEXT, weight="bold", va="top")
        axes.text(
            left + width - 0.1,
            high,
            f"{kind} {weights}".strip(),
            fontsize=SMALL_TEXT,
            va="top",
            ha="right",
            color="#444444",
        )
        equation = textwrap.shorten(step.equation, 82, placeholder=" …")
        axes.text(
            left + 0.1, y + 0.09, equation, fontsize=SMALL_TEXT, va="bottom", parse_math=False
        )
        top = y + _TALL
        shape = center if not step.name.endswith("query_projection") else bypass - 0.62
        axes.text(
            shape + 0.1, top + _GAP / 2, _plain(step.outputs), fontsize=SMALL_TEXT, va="center"
        )
        if step.residual:
            begin = 0.45 if step.residual not in places else places[step.residual][1] + _TALL / 2
            if step.residual.endswith(".input"):
                begin = spans[0] - _GAP
            start, side = begin + _GAP * 0.35, left - 0.22
            end = y + _TALL / 2
            axes.plot([center, side, side], [start, start, end], color="#888888", lw=0.9, zorder=0)
            _arrow(axes, (side, end), (left, end), color="#888888")
        y = top + _GAP
    if spans:
        layers = max(count for _, count in column)
        bottom = spans[0] - 0.21
        height = spans[-1] + _TALL + 0.05 - bottom
        axes.add_patch(
            FancyBboxPatch(
                (left - 0.32, bottom),
                _WIDE + 0.42,
                height,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor="none",
                edgecolor="#777777",
                linewidth=1.0,
            )
        )
        axes.text(left + _WIDE + 0.16, bottom + height / 2, f"× {layers}", fontsize=13, va="center")


def _arrow(
    axes: Any, begin: tuple[float, float], end: tuple[float, float], color: str = "#222222"
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 0.9, "shrinkA": 0.0, "shrinkB": 0.0}
    axes.annotate("", end, begin, arrowprops=style)
