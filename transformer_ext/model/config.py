"""What a model is made of: every choice of architecture, in dataclasses without torch.

:class:`ModelConfig` holds what all kinds of model have in common; :class:`TransformerConfig`
(encoder and decoder), :class:`LanguageModelConfig` (decoder only) and :class:`TextEncoderConfig`
(encoder only) add their own. The same dataclass describes the model to the trainer, to the files on
disk (the ``model`` part of ``config.json``) and to the compiled decoding engine.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu")
GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu")
NORMS = ("layer", "rms")
POSITIONS = ("sinusoidal", "sinusoidal_halves", "learned", "rope", "none")
TYINGS = ("none", "target", "all")
POOLINGS = ("first", "mean")

#: Sizes and ids are 32-bit integers in the kernels.
_LARGEST_SIZE = 2**31 - 1
#: So that a nonsensical number is an error, and not a list of names as long as the memory.
_MOST_LAYERS = 10_000


ConfigT = TypeVar("ConfigT", bound="ModelConfig")


@dataclass(kw_only=True)
class ModelConfig:
    """What the kinds of model have in common.

    The defaults are those of "Attention Is All You Need". A field given as None has its value, as
    described, once the object is made.

    Attributes:
        d_model: width of every activation between sublayers.
        nhead: query heads of each attention.
        num_kv_heads: key/value heads; None means ``nhead``. Must divide ``nhead`` (grouped heads).
        head_dim: width of one head; None means ``d_model // nhead``.
        dim_feedforward: inner width of the position-wise network (paper section 3.3).
        dropout: probability for embeddings and sublayer outputs (section 5.4).
        attention_dropout: probability for attention weights; None means ``dropout``.
        activation_dropout: probability inside the position-wise network; None means ``dropout``.
        activation: one of ``relu, gelu, gelu_tanh, silu``, or gated: ``swiglu, geglu, reglu``
            (the inner projection then has ``2 * dim_feedforward`` rows, the gate's first).
        norm_first: False is ``norm(x + sublayer(x))`` (the paper), True is
            ``x + sublayer(norm(x))``.
        norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm, without bias).
        layer_norm_eps: added to the variance before the square root.
        positions: ``sinusoidal`` (section 3.5, sine and cosine interleaved),
            ``sinusoidal_halves`` (all sines, then all cosines), ``learned``, ``rope`` (rotary, on
            queries and keys of self-attention; dimension i of a head is paired with
            i + head_dim / 2, base 10000), or ``none``.
        max_positions: rows of the learned position tables; the other kinds have no limit.
        scale_embedding: multiply embeddings by ``sqrt(d_model)`` (section 3.4).
        embedding_norm: normalise the embeddings before the first layer.
        final_norm: normalise after the last layer of each stack; None means ``norm_first``.
        bias: whether projections have a bias.
        output_bias: whether the output projection has a bias.
        pad_id, unk_id, bos_id, eos_id: special tokens.
    """

    #: What the kind is called in ``config.json`` and in messages.
    kind: ClassVar[str]
    #: Fields that have no default.
    _REQUIRED: ClassVar[tuple[str, ...]] = ()
    #: Fields that hold the depth of a stack.
    _DEPTHS: ClassVar[tuple[str, ...]] = ("num_layers",)

    d_model: int = 512
    nhead: int = 8
    num_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    dim_feedforward: int = 2048
    dropout: float = 0.1
    attention_dropout: float = None  # type: ignore[assignment]
    activation_dropout: float = None  # type: ignore[assignment]
    activation: str = "relu"
    norm_first: bool = False
    norm: str = "layer"
    layer_norm_eps: float = 1e-5
    positions: str = "sinusoidal"
    max_positions: int = 1024
    scale_embedding: bool = True
    embedding_norm: bool = False
    final_norm: bool = None  # type: ignore[assignment]
    bias: bool = True
    output_bias: bool = False
    pad_id: int = 0
    unk_id: int = 1
    bos_id: int = 2
    eos_id: int = 3

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            self.num_kv_heads = self.nhead
        for name in ("d_model", "nhead", "num_kv_heads", "dim_feedforward", "max_positions"):
            _require_integer(name, getattr(self, name), 1, _LARGEST_SIZE)
        if self.head_dim is None:
            if self.d_model % self.nhead:
                raise ValueError(
                    f"nhead: {self.nhead} does not divide d_model {self.d_model}; "
                    "choose one that does, or set head_dim"
                )
            self.head_dim = self.d_model // self.nhead
        _require_integer("head_dim", self.head_dim, 1, _LARGEST_SIZE)
        if self.nhead % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of nhead ({self.nhead}), got {self.num_kv_heads}"
            )
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.activation_dropout is None:
            self.activation_dropout = self.dropout
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value < 1.0:
                raise ValueError(
                    f"{name}: expected a probability in [0, 1), got {reprlib.repr(value)}"
                )
        eps = self.layer_norm_eps
        # Less would be 0 in float32.
        if not _is_number(eps) or not 1e-37 <= eps < 1.0:
            raise ValueError(
                f"layer_norm_eps: expected a number above 0 and below 1, got {reprlib.repr(eps)}"
            )
        _require_one_of("activation", self.activation, ACTIVATIONS)
        _require_one_of("norm", self.norm, NORMS)
        _require_one_of("positions", self.positions, POSITIONS)
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"positions: 'rope' needs an even head_dim, got {self.head_dim}")
        if self.positions.startswith("sinusoidal") and self.d_model % 2:
            raise ValueError(
                f"positions: {self.positions!r} needs an even d_model, got {self.d_model}"
            )
        if self.final_norm is None:
            self.final_norm = self.norm_first
        for name in ("norm_first", "scale_embedding", "embedding_norm", "final_norm", "bias"):
            _require_boolean(name, getattr(self, name))
        _require_boolean("output_bias", self.output_bias)

    @property
    def gated(self) -> bool:
        """Whether the position-wise network has a gate."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence (rows of the learned positions), or None for any number."""
        return self.max_positions if self.positions == "learned" else None

    @property
    def layers(self) -> int:
        """Number of layers, of all stacks together."""
        return sum(getattr(self, name) for name in self._DEPTHS)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown key (the message has the nearest known one), a missing or an
                impossible value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"model configuration: unknown key {key!r}{hint}")
        for key in cls._REQUIRED:
            if key not in values:
                raise ValueError(f"model configuration: {key} is missing")
        return cls(**values)


@dataclass
class TransformerConfig(ModelConfig):
    """Architecture of an encoder-decoder Transformer.

    The defaults are the base model of "Attention Is All You Need" (table 3): post-norm, sinusoidal
    positions, ReLU, all three embedding matrices shared. :class:`ModelConfig` has the rest of the
    fields.

    Attributes:
        src_vocab_size: rows of the source embedding.
        tgt_vocab_size: rows of the target embedding and of the output projection.
        num_encoder_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder; may differ from the encoder's.
        tie: ``all`` shares source embedding, target embedding and output projection, ``target``
            the latter two, ``none`` nothing.
        decoder_start_id: first token fed to the decoder; None means ``bos_id``.
    """

    kind: ClassVar[str] = "encoder-decoder"
    _REQUIRED: ClassVar[tuple[str, ...]] = ("src_vocab_size", "tgt_vocab_size")
    _DEPTHS: ClassVar[tuple[str, ...]] = ("num_encoder_layers", "num_decoder_layers")

    src_vocab_size: int
    tgt_vocab_size: int
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    tie: str = "all"
    decoder_start_id: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("src_vocab_size", "tgt_vocab_size"):
            _require_integer(name, getattr(self, name), 1, _LARGEST_SIZE)
        for name in ("num_encoder_layers", "num_decoder_layers"):
            _require_integer(name, getattr(self, name), 0, _MOST_LAYERS)
        super().__post_init__()
        _require_one_of("tie", self.tie, TYINGS)
        if self.tie == "all" and self.src_vocab_size != self.tgt_vocab_size:
            raise ValueError(
                "tie: 'all' needs one vocabulary for both sides, but src_vocab_size is "
                f"{self.src_vocab_size} and tgt_vocab_size is {self.tgt_vocab_size}; "
                "use 'target' or 'none'"
            )
        if self.decoder_start_id is None:
            self.decoder_start_id = self.bos_id
        # Of the tokens in a source, and of those in a target.
        both = min(self.src_vocab_size, self.tgt_vocab_size)
        for name in ("pad_id", "unk_id", "eos_id"):
            _require_integer(name, getattr(self, name), 0, both - 1)
        for name in ("bos_id", "decoder_start_id"):
            _require_integer(name, getattr(self, name), 0, self.tgt_vocab_size - 1)
        for name in ("pad_id", "unk_id"):
            if getattr(self, name) == self.eos_id:
                raise ValueError(f"eos_id: expected another id than {name}, got {self.eos_id}")


@dataclass
class LanguageModelConfig(ModelConfig):
    """Architecture of a language model: a decoder alone, in which a token sees those before it.

    GPT-2's (Radford et al. 2019) is ``norm_first=True, positions="learned",
    activation="gelu_tanh", scale_embedding=False, prepend_bos=False``; :class:`ModelConfig` has the
    other fields.

    Attributes:
        vocab_size: rows of the embedding and of the output projection.
        num_layers: depth.
        tie: whether embedding and output projection share their weights.
        prepend_bos: whether the tokens of every text follow ``bos_id``; else only those of an empty
            text do, as it must have a first token.
    """

    kind: ClassVar[str] = "decoder-only"
    _REQUIRED: ClassVar[tuple[str, ...]] = ("vocab_size",)

    vocab_size: int
    num_layers: int = 6
    tie: bool = True
    prepend_bos: bool = True

    def __post_init__(self) -> None:
        _require_integer("vocab_size", self.vocab_size, 1, _LARGEST_SIZE)
        _require_integer("num_layers", self.num_layers, 0, _MOST_LAYERS)
        super().__post_init__()
        for name in ("tie", "prepend_bos"):
            _require_boolean(name, getattr(self, name))
        # They may be one id, as the only special token of GPT-2 is.
        for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
            _require_integer(name, getattr(self, name), 0, self.vocab_size - 1)


@dataclass
class TextEncoderConfig(ModelConfig):
    """Architecture of a text encoder: an encoder alone, a state for each token, heads for texts.

    BERT's (Devlin et al. 2019) is ``positions="learned", activation="gelu", embedding_norm=True,
    scale_embedding=False, pooler=True, num_token_types=2, layer_norm_eps=1e-12, output_bias=True``;
    :class:`ModelConfig` has the other fields.

    Attributes:
        vocab_size: rows of the embedding.
        num_layers: depth.
        pooling: ``first`` takes the state of a text's first token (the start token), ``mean`` the
            mean of all.
        pooler: whether a projection with tanh follows (BERT's pooler).
        normalize: whether a text's vector is then divided by its Euclidean length, as for sentences
            that are compared by cosine.
        num_token_types: rows of the embedding of token types, which tell the first text of a pair
            from the second; 0: none.
        labels: names of the classes of a classifier, in the order of its output projection's rows;
            none: the model has no classifier.
        masked_lm_head: whether the model guesses masked tokens (Devlin et al. 2019, section 3.1,
            task 1): projection, activation and norm, then the embedding as output projection, with
            a bias of its own.
    """

    kind: ClassVar[str] = "encoder-only"
    _REQUIRED: ClassVar[tuple[str, ...]] = ("vocab_size",)

    vocab_size: int
    num_layers: int = 6
    pooling: str = "first"
    pooler: bool = False
    normalize: bool = False
    num_token_types: int = 0
    labels: list[str] = dataclasses.field(default_factory=list)
    masked_lm_head: bool = False

    def __post_init__(self) -> None:
        _require_integer("vocab_size", self.vocab_size, 1, _LARGEST_SIZE)
        _require_integer("num_layers", self.num_layers, 0, _MOST_LAYERS)
        _require_integer("num_token_types", self.num_token_types, 0, _LARGEST_SIZE)
        if not isinstance(self.labels, (list, tuple)) or not all(
            isinstance(label, str) for label in self.labels
        ):
            raise ValueError(f"labels: expected a list of texts, got {reprlib.repr(self.labels)}")
        self.labels = list(self.labels)
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(
                f"labels: expected each once, got one twice in {reprlib.repr(self.labels)}"
            )
        super().__post_init__()
        _require_one_of("pooling", self.pooling, POOLINGS)
        for name in ("pooler", "normalize", "masked_lm_head"):
            _require_boolean(name, getattr(self, name))
        if self.masked_lm_head and self.gated:
            raise ValueError(
                f"activation: {self.activation!r} is gated, which the masked_lm_head cannot be"
            )
        for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
            _require_integer(name, getattr(self, name), 0, self.vocab_size - 1)


#: Every kind of model by its name in ``config.json``.
KINDS: dict[str, type[ModelConfig]] = {
    config.kind: config for config in (TransformerConfig, LanguageModelConfig, TextEncoderConfig)
}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "d_model": 128,
        "nhead": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dim_feedforward": 512,
    },
    "small": {
        "d_model": 256,
        "nhead": 4,
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "dim_feedforward": 1024,
    },
    "base": {
        "d_model": 512,
        "nhead": 8,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "dim_feedforward": 2048,
    },
    "big": {
        "d_model": 1024,
        "nhead": 16,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "dim_feedforward": 4096,
        "dropout": 0.3,
    },
}


def preset(
    name: str, src_vocab_size: int, tgt_vocab_size: int, **changes: Any
) -> TransformerConfig:
    """The configuration of a named size: ``tiny``, ``small``, and the paper's ``base`` and ``big``.

    Args:
        name: a key of :data:`PRESETS`.
        src_vocab_size: size of the source vocabulary.
        tgt_vocab_size: size of the target vocabulary.
        changes: any other field of :class:`TransformerConfig`.

    Raises:
        ValueError: an unknown name or an impossible value.
    """
    _require_one_of("preset", name, tuple(PRESETS))
    return TransformerConfig.from_dict(
        {
            **PRESETS[name],
            "src_vocab_size": src_vocab_size,
            "tgt_vocab_size": tgt_vocab_size,
            **changes,
        }
    )


def language_model_preset(name: str, vocab_size: int, **changes: Any) -> LanguageModelConfig:
    """The decoder of a named size as a language model; see :func:`preset`.

    Args:
        name: a key of :data:`PRESETS`.
        vocab_size: size of the vocabulary.
        changes: any other field of :class:`LanguageModelConfig`.
    """
    fields = {"vocab_size": vocab_size, **changes}
    return LanguageModelConfig.from_dict({**_one_stack(name, "num_decoder_layers"), **fields})


def classifier_preset(
    name: str, vocab_size: int, labels: Sequence[str], **changes: Any
) -> TextEncoderConfig:
    """The encoder of a named size with a classifier; see :func:`preset`.

    Args:
        name: a key of :data:`PRESETS`.
        vocab_size: size of the vocabulary.
        labels: names of the classes.
        changes: any other field of :class:`TextEncoderConfig`.
    """
    fields = {"vocab_size": vocab_size, "labels": list(labels), "output_bias": True, **changes}
    return TextEncoderConfig.from_dict({**_one_stack(name, "num_encoder_layers"), **fields})


def _one_stack(name: str, depth: str) -> dict[str, Any]:
    _require_one_of("preset", name, tuple(PRESETS))
    fields = dict(PRESETS[name])
    layers = fields[depth]
    del fields["num_encoder_layers"], fields["num_decoder_layers"]
    return {**fields, "num_layers": layers}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        expected = f"of at least {least}"
        if isinstance(value, int) and value > most:
            expected = f"from {least} to {most}"
        raise ValueError(f"{name}: expected an integer {expected}, got {reprlib.repr(value)}")


def _require_boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {reprlib.repr(value)}")


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name}: expected one of {', '.join(choices)}, got {reprlib.repr(value)}{hint}"
        )
