"""Modules and masks from and to PyTorch's own ``nn.Transformer`` and ``nn.MultiheadAttention``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer_ext.model.attention import CrossAttention, SelfAttention
from transformer_ext.model.base import check_tensor
from transformer_ext.model.config import TransformerConfig
from transformer_ext.model.layers import Sites
from transformer_ext.model.transformer import Transformer
from transformer_ext.ops.masks import causal_mask, from_torch_mask, to_torch_mask

__all__ = [
    "copy_nn_transformer",
    "from_nn_masks",
    "from_nn_multihead_attention",
    "from_nn_transformer",
    "to_nn_masks",
    "to_nn_multihead_attention",
    "to_nn_transformer",
]

# --- nn.Transformer ------------------------------------------------------------------------------


def from_nn_transformer(
    source: nn.Transformer, src_vocab_size: int, tgt_vocab_size: int, **fields: Any
) -> Transformer:
    """A model with the stacks of an ``nn.Transformer``.

    That holds neither embeddings nor output projection: these are new, and so are positions.

    Args:
        source: the module, on any device. Of float64 the model is float64, else float32.
        src_vocab_size, tgt_vocab_size: sizes of the vocabularies.
        fields: other fields of :class:`TransformerConfig` that are not of the stacks: ``tie``,
            ``positions``, ``scale_embedding``, ``embedding_norm``, the special ids, ...

    Raises:
        ValueError: a field that ``source`` decides, or something in ``source`` that a model cannot
            hold; the message names it.
    """
    architecture = _architecture(source)
    for name in fields:
        if name in architecture:
            raise ValueError(f"{name}: is that of nn.Transformer ({architecture[name]})")
    sizes = {"src_vocab_size": src_vocab_size, "tgt_vocab_size": tgt_vocab_size}
    if "tie" not in fields and src_vocab_size != tgt_vocab_size:
        sizes["tie"] = "target"  # type: ignore[assignment]
    model = Transformer(TransformerConfig.from_dict({**architecture, **sizes, **fields}))
    parameter = next(source.parameters())
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    model.to(parameter.device, wide)
    copy_nn_transformer(model, source)
    return model.train(source.training)


def copy_nn_transformer(model: Transformer, source: nn.Transformer) -> None:
    """Copy the weights of an ``nn.Transformer`` into a model of the same architecture.

    Embeddings and the output projection of ``model`` stay as they are, and so do its probabilities
    of dropout.

    Args:
        model: of the same sizes, depths, activation and norms.
        source: the module to copy from.

    Raises:
        TypeError: ``model`` or ``source`` is of another type.
        ValueError: the two are not of one architecture, or ``source`` holds what no model can.
    """
    _require_plain_stacks(model)
    for name, expected in _architecture(source).items():
        found = getattr(model.config, name)
        if found != expected and not name.endswith("dropout"):
            raise ValueError(
                f"model: {name}: expected {expected} as of nn.Transformer, got {found}"
            )
    with torch.no_grad():
        for _, ours, theirs in _stack_pairs(model, source):
            if theirs is None:
                ours.zero_()
            else:
                ours.copy_(theirs)


def to_nn_transformer(model: Transformer, *, batch_first: bool = True) -> nn.Transformer:
    """The stacks of a model as an ``nn.Transformer``.

    It reads embedded tokens, positions added (``model.encoder.embed``), and gives the states that
    ``model.generator`` reads.

    Args:
        model: the model.
        batch_first: whether its tensors are ``[batch, length, d_model]``; else
            ``[length, batch, d_model]``.

    Raises:
        TypeError: ``model`` is of another type.
        ValueError: something in ``model`` that ``nn.Transformer`` cannot hold; the message names
            it.
    """
    _require_plain_stacks(model)
    config = model.config
    for name in ("num_encoder_layers", "num_decoder_layers"):
        if getattr(config, name) == 0:
            raise ValueError(f"{name}: got 0, expected at least one layer for nn.Transformer")
    parameter = model.source_embedding.weight
    place: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    options: dict[str, Any] = {
        "d_model": config.d_model,
        "nhead": config.nhead,
        "dim_feedforward": config.dim_feedforward,
        "dropout": config.dropout,
        "activation": _FUNCTIONS[config.activation],
        "layer_norm_eps": config.layer_norm_eps,
        "batch_first": batch_first,
        "norm_first": config.norm_first,
        "bias": config.bias,
        **place,
    }

    def norm() -> nn.LayerNorm | None:
        if not config.final_norm:
            return None
        return nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias, **place)

    # Without nested tensors, so that padding is treated alike in training and evaluation.
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**options),
        config.num_encoder_layers,
        norm(),
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(**options), config.num_decoder_layers, norm()
    )
    result = nn.Transformer(
        config.d_model,
        config.nhead,
        custom_encoder=encoder,
        custom_decoder=decoder,
        batch_first=batch_first,
    )
    for layer in (*encoder.layers, *decoder.layers):
        layer.dropout.p = config.activation_dropout
        for attention in _attentions_of(layer):
            attention.dropout = config.attention_dropout
    with torch.no_grad():
        for name, ours, theirs in _stack_pairs(model, result):
            _put(name, ours, theirs)
    return result.train(model.training)


#: What is written beside the name of an activation in ``nn.Transformer``.
_FUNCTIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


def _activation(function: Any) -> str:
    """Its name here.

    Raises:
        ValueError: there is none.
    """
    approximate = "none"
    if isinstance(function, functools.partial) and set(function.keywords) <= {"approximate"}:
        approximate = function.keywords.get("approximate", "none")
        function = function.func
    elif isinstance(function, nn.GELU):
        approximate, function = function.approximate, functional.gelu
    names = {
        functional.relu: "relu",
        torch.relu: "relu",
        nn.ReLU: "relu",
        functional.gelu: "gelu" if approximate == "none" else "gelu_tanh",
        functional.silu: "silu",
        nn.SiLU: "silu",
    }
    key = type(function) if isinstance(function, nn.Module) else function
    try:
        return names[key]
    except (KeyError, TypeError):
        raise ValueError(
            f"nn.Transformer: activation: expected one of {', '.join(_FUNCTIONS)}, got {function!r}"
        ) from None


def _architecture(source: nn.Transformer) -> dict[str, Any]:
    """The fields of a configuration that an ``nn.Transformer`` decides.

    Raises:
        ValueError: it holds what no model can; the message names it.
    """
    stacks = _their_stacks(source)
    layers = [layer for _, stack in stacks for layer in stack.layers]
    if not layers:
        raise ValueError("nn.Transformer: num_encoder_layers, num_decoder_layers: both are 0")
    attentions = [attention for layer in layers for attention in _attentions_of(layer)]
    finals = [stack.norm for _, stack in stacks]
    norms = [norm for layer in layers for norm in _norms_of(layer)]
    norms += [norm for norm in finals if norm is not None]
    for norm in norms:
        if type(norm) is not nn.LayerNorm or norm.weight is None:
            raise ValueError(
                f"nn.Transformer: norm: expected nn.LayerNorm with weights, got {norm}"
            )
    return {
        "num_encoder_layers": len(stacks[0][1].layers),
        "num_decoder_layers": len(stacks[1][1].layers),
        "d_model": _one("d_model", [source.d_model, *(a.embed_dim for a in attentions)]),
        "nhead": _one("nhead", (a.num_heads for a in attentions)),
        "num_kv_heads": attentions[0].num_heads,
        "head_dim": attentions[0].head_dim,
        "dim_feedforward": _one("dim_feedforward", (x.linear1.out_features for x in layers)),
        "dropout": _one("dropout", (p for layer in layers for p in _sublayer_dropouts(layer))),
        "attention_dropout": _one("dropout of attention", (a.dropout for a in attentions)),
        "activation_dropout": _one("dropout of activation", (x.dropout.p for x in layers)),
        "activation": _one("activation", (_activation(x.activation) for x in layers)),
        "norm_first": _one("norm_first", (x.norm_first for x in layers)),
        "norm": "layer",
        "layer_norm_eps": _one("layer_norm_eps", (norm.eps for norm in norms)),
        "final_norm": _one("norm after the stack", (norm is not None for norm in finals)),
        "bias": _one(
            "bias",
            [
                *(a.in_proj_bias is not None for a in attentions),
                *(a.out_proj.bias is not None for a in attentions),
                *(x.bias is not None for layer in layers for x in (layer.linear1, layer.linear2)),
            ],
        ),
    }


def _type_name(value: object) -> str:
    """Of its type; both modules are called ``Transformer``."""
    kind = type(value)
    if kind.__module__.startswith("torch.nn."):
        return f"nn.{kind.__name__}"
    if kind.__module__.startswith("transformer_ext."):
        return f"transformer_ext.{kind.__name__}"
    return kind.__name__


def _their_stacks(source: nn.Transformer) -> list[tuple[str, Any]]:
    """Encoder and decoder, made of nothing but what PyTorch makes them of."""
    if not isinstance(source, nn.Transformer):
        raise TypeError(f"source: expected an nn.Transformer, got {_type_name(source)}")
    parts: list[tuple[str, Any, Any, Any]] = [
        ("encoder", source.encoder, nn.TransformerEncoder, nn.TransformerEncoderLayer),
        ("decoder", source.decoder, nn.TransformerDecoder, nn.TransformerDecoderLayer),
    ]
    for name, stack, stack_type, layer_type in parts:
        if type(stack) is not stack_type:
            raise ValueError(
                f"nn.Transformer: custom_{name}: expected nn.{stack_type.__name__}, got "
                f"{type(stack).__name__}"
            )
        for index, layer in enumerate(stack.layers):
            if type(layer) is not layer_type:
                raise ValueError(
                    f"nn.Transformer: {name}.layers.{index}: expected nn.{layer_type.__name__}, "
                    f"got {type(layer).__name__}"
                )
            for attention in _attentions_of(layer):
                _check_multihead(attention, f"nn.Transformer: {name}.layers.{index}: ")
    return [(name, stack) for name, stack, _, _ in parts]


def _attentions_of(layer: Any) -> list[Any]:
    cross = getattr(layer, "multihead_attn", None)
    return [layer.self_attn] if cross is None else [layer.self_attn, cross]


def _norms_of(layer: Any) -> list[Any]:
    names = ("norm1", "norm2", "norm3")
    return [getattr(layer, name) for name in names if hasattr(layer, name)]


def _sublayer_dropouts(layer: Any) -> list[float]:
    names = ("dropout1", "dropout2", "dropout3")
    return [getattr(layer, name).p for name in names if hasattr(layer, name)]


def _one(name: str, values: Iterable[Any]) -> Any:
    """The value that all have."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise ValueError(
            f"nn.Transformer: {name}: expected one value for all layers, got "
            f"{', '.join(map(str, found))}"
        )
    return found[0]


def _require_plain_stacks(model: Transformer) -> None:
    """Raise a TypeError for no model, a ValueError for what no ``nn.Transformer`` has."""
    if not isinstance(model, Transformer):
        raise TypeError(f"model: expected a transformer_ext.Transformer, got {_type_name(model)}")
    config = model.config
    for name, expected, found in (
        ("num_kv_heads", config.nhead, config.num_kv_heads),
        ("head_dim", f"{config.d_model} / {config.nhead}", config.head_dim),
        ("norm", "layer", config.norm),
        ("activation", f"one of {', '.join(_FUNCTIONS)}", config.activation),
        ("positions", "any but rope", config.positions),
    ):
        fits = {
            "head_dim": config.head_dim * config.nhead == config.d_model,
            "activation": config.activation in _FUNCTIONS,
            "positions": config.positions != "rope",
        }.get(name, expected == found)
        if not fits:
            raise ValueError(
                f"model: {name}: expected {expected} as of nn.Transformer, got {found}"
            )


#: A parameter of ours by name, and what of theirs is in its place; None: theirs has none.
_Pairs = Iterator[tuple[str, Tensor, Tensor | None]]


def _stack_pairs(model: Transformer, source: nn.Transformer) -> _Pairs:
    ours: Any
    for name, theirs in _their_stacks(source):
        ours = model.get_submodule(name)
        for index, (layer, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
            yield from _layer_pairs(f"{name}.layers.{index}", layer, other)
        if ours.norm is not None:
            yield from _affine_pairs(f"{name}.norm", ours.norm, theirs.norm)


def _layer_pairs(name: str, ours: Any, theirs: Any) -> _Pairs:
    yield from _attention_pairs(f"{name}.self_attention", ours.self_attention, theirs.self_attn)
    norms = [ours.self_attention_norm, ours.feed_forward_norm]
    if hasattr(ours, "cross_attention"):
        cross = ours.cross_attention
        yield from _attention_pairs(f"{name}.cross_attention", cross, theirs.multihead_attn)
        norms.insert(1, ours.cross_attention_norm)
    for number, (norm, other) in enumerate(zip(norms, _norms_of(theirs), strict=True), 1):
        yield from _affine_pairs(f"{name}: norm{number}", norm, other)
    inner = ours.feed_forward
    yield from _affine_pairs(f"{name}.linear1", inner.in_projection, theirs.linear1)
    yield from _affine_pairs(f"{name}.linear2", inner.out_projection, theirs.linear2)


def _affine_pairs(name: str, ours: Any, theirs: Any) -> _Pairs:
    for part in ("weight", "bias"):
        mine = getattr(ours, part)
        if mine is not None:
            yield f"{name}.{part}", mine, getattr(theirs, part)


def _attention_pairs(name: str, ours: SelfAttention | CrossAttention, theirs: Any) -> _Pairs:
    width = theirs.embed_dim
    for part in ("weight", "bias"):
        packed = getattr(theirs, f"in_proj_{part}")
        if packed is None:
            continue
        if isinstance(ours, SelfAttention):
            yield f"{name}.in_proj_{part}", getattr(ours.in_projection, part), packed
        else:
            query, key_value = ours.query_projection, ours.key_value_projection
            yield f"{name}.in_proj_{part}", getattr(query, part), packed[:width]
            yield f"{name}.in_proj_{part}", getattr(key_value, part), packed[width:]
    yield from _affine_pairs(f"{name}.out_proj", ours.out_projection, theirs.out_proj)


def _put(name: str, ours: Tensor, theirs: Tensor | None) -> None:
    if theirs is not None:
        theirs.copy_(ours)
    elif ours.any():
        raise ValueError(
            f"{name}: has values other than 0, but with bias=False the norms of nn.Transformer "
            "have no bias"
        )


# --- nn.MultiheadAttention -----------------------------------------------------------------------


def from_nn_multihead_attention(
    source: nn.MultiheadAttention, *, cross: bool = False
) -> SelfAttention | CrossAttention:
    """The attention module with the weights of an ``nn.MultiheadAttention``.

    Args:
        source: the module.
        cross: False: for queries, keys and values from one tensor (:class:`SelfAttention`); True:
            for keys and values from another (:class:`CrossAttention`).

    Raises:
        ValueError: it was made with ``kdim``, ``vdim``, ``add_bias_kv`` or ``add_zero_attn``.
    """
    if not isinstance(source, nn.MultiheadAttention):
        raise TypeError(f"source: expected an nn.MultiheadAttention, got {type(source).__name__}")
    _check_multihead(source, "nn.MultiheadAttention: ")
    kind = CrossAttention if cross else SelfAttention
    ours = kind(
        source.embed_dim,
        source.num_heads,
        source.num_heads,
        source.head_dim,
        source.dropout,
        source.in_proj_bias is not None,
        Sites(),
        "attention",
    )
    weight: Tensor = source.in_proj_weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    ours.to(weight.device, wide)
    with torch.no_grad():
        for _, mine, theirs in _attention_pairs("attention", ours, source):
            assert theirs is not None
            mine.copy_(theirs)
    return ours.train(source.training)


def to_nn_multihead_attention(
    attention: SelfAttention | CrossAttention, *, batch_first: bool = True
) -> nn.MultiheadAttention:
    """An ``nn.MultiheadAttention`` with the weights of an attention module.

    Args:
        attention: of either kind.
        batch_first: as of ``nn.MultiheadAttention``.

    Raises:
        ValueError: fewer key/value heads than query heads, heads of another width than
            ``d_model / nhead``, or rotary positions.
    """
    if not isinstance(attention, (SelfAttention, CrossAttention)):
        raise TypeError(
            f"attention: expected SelfAttention or CrossAttention, got {type(attention).__name__}"
        )
    width = attention.out_projection.out_features
    if attention.num_kv_heads != attention.nhead:
        raise ValueError(
            f"attention: num_kv_heads: expected {attention.nhead} as of nn.MultiheadAttention, got "
            f"{attention.num_kv_heads}"
        )
    if attention.head_dim * attention.nhead != width:
        raise ValueError(
            f"attention: head_dim: expected {width} / {attention.nhead} as of "
            f"nn.MultiheadAttention, got {attention.head_dim}"
        )
    if isinstance(attention, SelfAttention) and attention.rotary:
        raise ValueError("attention: positions: expected any but rope for nn.MultiheadAttention")
    weight = attention.out_projection.weight
    theirs = nn.MultiheadAttention(
        width,
        attention.nhead,
        attention.dropout,
        attention.out_projection.bias is not None,
        batch_first=batch_first,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        for name, ours, other in _attention_pairs("attention", attention, theirs):
            _put(name, ours, other)
    return theirs.train(attention.training)


def _check_multihead(attention: Any, where: str) -> None:
    """Raise a ValueError for options of ``nn.MultiheadAttention`` that have no place here."""
    if type(attention) is not nn.MultiheadAttention:
        raise ValueError(f"{where}expected nn.MultiheadAttention, got {type(attention).__name__}")
    for name, width in (("kdim", attention.kdim), ("vdim", attention.vdim)):
        if width != attention.embed_dim:
            raise ValueError(
                f"{where}{name}: expected {attention.embed_dim} as embed_dim, got {width}"
            )
    if attention.bias_k is not None or attention.bias_v is not None:
        raise ValueError(f"{where}add_bias_kv: expected False, got True")
    if attention.add_zero_attn:
        raise ValueError(f"{where}add_zero_attn: expected False, got True")


# --- masks ---------------------------------------------------------------------------------------


def from_nn_masks(
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    nhead: int = 1,
    is_causal: bool = False,
) -> Tensor | None:
    """The keep-mask that masks of ``nn.Transformer`` and ``nn.MultiheadAttention`` come to.

    A query that may attend to nothing has a context of 0 here, of 0 or NaN there.

    Args:
        attn_mask: ``[queries, keys]`` or ``[batch * nhead, queries, keys]``: bool with True =
            hidden, or floating point with 0 and -inf.
        key_padding_mask: ``[batch, keys]`` (or ``[keys]`` of one sequence), alike.
        nhead: heads, where ``attn_mask`` has three dimensions.
        is_causal: the caller says that ``attn_mask`` is the causal one; it is looked at whether
            that is so.

    Returns:
        bool with True = may attend, broadcastable to ``[batch, heads, queries, keys]``; None where
        all may attend to all.

    Raises:
        TypeError: no tensor, or an integer mask.
        ValueError: other shapes, or no number of heads; values other than 0 and -inf, which are a bias and no mask;
            ``is_causal`` with another mask than the causal one.
    """
    _check_nhead(nhead)
    keep = None
    if attn_mask is not None:
        keep = _named("attn_mask", attn_mask)
        if keep.dim() == 3 and keep.shape[0] % nhead == 0:
            keep = keep.unflatten(0, (-1, nhead))
        elif keep.dim() == 2:
            keep = keep[None, None]
        else:
            raise ValueError(
                f"attn_mask: expected [queries, keys] or [batch * {nhead}, queries, keys], got "
                f"{list(attn_mask.shape)}"
            )
    if is_causal:
        if keep is None:
            raise ValueError("attn_mask: got none, expected the causal one beside is_causal")
        if keep.shape[2] != keep.shape[3] or not torch.equal(
            keep, causal_mask(keep.shape[3], device=keep.device).expand_as(keep)
        ):
            raise ValueError("attn_mask: is not the causal one, but is_causal says so")
    if key_padding_mask is None:
        return keep
    padding = _named("key_padding_mask", key_padding_mask)
    if padding.dim() not in (1, 2):
        raise ValueError(
            f"key_padding_mask: expected [batch, keys], got {list(key_padding_mask.shape)}"
        )
    padding = padding.reshape(-1, 1, 1, padding.shape[-1])
    if keep is None:
        return padding
    if keep.shape[3] != padding.shape[3] or keep.shape[0] not in (1, padding.shape[0]):
        raise ValueError(
            f"key_padding_mask: {list(key_padding_mask.shape)} does not fit to attn_mask "
            f"{list(attn_mask.shape if attn_mask is not None else ())}"
        )
    return keep & padding


def _named(name: str, mask: Tensor) -> Tensor:
    """:func:`from_torch_mask`, with the argument's name in its errors."""
    check_tensor(name, mask, "bool (True = hidden) or floating point (0 and -inf)")
    try:
        return from_torch_mask(mask)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("mask:", f"{name}:", 1)) from None


def _check_nhead(nhead: int) -> None:
    if type(nhead) is not int or nhead < 1:
        raise ValueError(f"nhead: got {nhead!r}, expected an integer of at least 1")


def to_nn_masks(
    keep: Tensor, *, nhead: int, dtype: torch.dtype = torch.bool
) -> tuple[Tensor | None, Tensor | None]:
    """``attn_mask`` and ``key_padding_mask`` that hide what a keep-mask hides.

    Args:
        keep: bool with True = may attend, ``[batch or 1, nhead or 1, queries or 1, keys]``, or
            fewer dimensions from the right.
        nhead: heads.
        dtype: ``torch.bool`` (True = hidden), or a floating type (0 and -inf).

    Returns:
        ``(attn_mask, key_padding_mask)``, one of them None: ``key_padding_mask`` ``[batch, keys]``
        where all queries and heads see the same keys of their sequence, ``attn_mask``
        ``[queries, keys]`` where all sequences and heads are alike, else
        ``[batch * nhead, queries, keys]``.

    Raises:
        TypeError: no tensor, or not of bool.
        ValueError: another shape, or no number of heads.
    """
    _check_nhead(nhead)
    check_tensor("keep", keep, "bool (True = may attend)")
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected bool (True = may attend), got {keep.dtype}")
    if not 1 <= keep.dim() <= 4 or (keep.dim() == 4 and keep.shape[1] not in (1, nhead)):
        raise ValueError(
            f"keep: expected [batch or 1, {nhead} or 1, queries or 1, keys], got {list(keep.shape)}"
        )
    keep = keep[(None,) * (4 - keep.dim())]
    batch, heads, queries, keys = keep.shape
    hidden = to_torch_mask(keep, dtype)
    if heads == 1 and queries == 1:
        return None, hidden[:, 0, 0]
    if heads == 1 and batch == 1:
        return hidden[0, 0], None
    return hidden.expand(batch, nhead, queries, keys).reshape(batch * nhead, queries, keys), None
