"""What a model computed on the way to its result, for study and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass(frozen=True, repr=False)
class AttentionTrace:
    """One attention (paper section 3.2), of all heads.

    Attributes:
        query: ``[batch, nhead, queries, head_dim]``, rotated where positions are rotary.
        key: ``[batch, num_kv_heads, keys, head_dim]``, rotated alike.
        value: ``[batch, num_kv_heads, keys, head_dim]``.
        scores: ``[batch, nhead, queries, keys]``: ``query key^T / sqrt(head_dim)``, -inf where the
            query may not attend to the key.
        weights: softmax of the scores; all 0 for a query that may attend to nothing.
        context: ``[batch, nhead, queries, head_dim]``: ``weights value``.
        output: ``[batch, queries, d_model]``: the contexts of all heads side by side, times W^O.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    weights: Tensor
    context: Tensor
    output: Tensor

    def __repr__(self) -> str:
        """The shapes; the numbers would be thousands of lines."""
        parts = (f"{part.name} {list(getattr(self, part.name).shape)}" for part in fields(self))
        return f"AttentionTrace({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Trace:
    """The attentions and the states of one pass.

    Attributes:
        attentions: by the name of the module: ``encoder.layers.0.self_attention``,
            ``decoder.layers.0.self_attention``, ``decoder.layers.0.cross_attention``, ...
        states: ``[batch, length, d_model]`` in the order in which they came to be. For each stack
            ``<stack>.tokens`` (the embeddings of the tokens, scaled), ``<stack>.positions``
            (``[length, d_model]``, what is added; not where positions are rotary or none) and
            ``<stack>.token_types`` (where the model has them); ``<stack>.input`` (what the first
            layer reads); after each sublayer, residual and norm included,
            ``<stack>.layers.0.self_attention``, ``....cross_attention``, ``....feed_forward``; and
            ``<stack>.output``, after the last norm.
    """

    attentions: dict[str, AttentionTrace] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The names, and the shapes of weights and states, equal layers in one line."""
        weights = {name: list(found.weights.shape) for name, found in self.attentions.items()}
        states = {name: list(state.shape) for name, state in self.states.items()}
        lines = ["Trace", "  attentions, with the shape of their weights:", *_listed(weights)]
        return "\n".join([*lines, "  states:", *_listed(states)])


def _listed(shapes: dict[str, list[int]]) -> list[str]:
    """A line for each name; layers 0 to 5 are ``encoder.layers.0-5.self_attention``."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for name, shape in shapes.items():
        before, _, rest = name.partition(".layers.")
        number, _, part = rest.partition(".")
        layers.setdefault((before, part, str(shape)), []).append(number)
    names = []
    for (before, part, size), numbers in layers.items():
        if part:
            span = numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            before = f"{before}.layers.{span}.{part}"
        names.append((before, size))
    width = max((len(name) for name, _ in names), default=0)
    return [f"    {name:{width}}  {size}" for name, size in names]
