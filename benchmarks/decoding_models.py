"""One set of weights in the form of each program of ``benchmarks/decoding.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext.data.corpus import read_lines, shipped_corpus
from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from transformer_ext.files import ModelDir, parameter_shapes, save_model_dir
from transformer_ext.model.config import TransformerConfig

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
#: Rows of a table of positions: longer than any text here.
POSITIONS = 1024


def random_weights(config: TransformerConfig, seed: int = 1) -> dict[str, np.ndarray]:
    """Matrices of variance 1 / inputs, norms that do nothing, no biases."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            scale = np.float32(shape[1] ** -0.5)
            weights[name] = generator.standard_normal(shape, dtype=np.float32) * scale
        else:
            value = 1.0 if name.endswith("weight") else 0.0
            weights[name] = np.full(shape, value, dtype=np.float32)
    return weights


def tokenizer_of(size: int, path: Path) -> Tokenizer:
    """A tokenizer of the shipped text with so many pieces, most of which no text has.

    The text is too small for 32,000 pieces of its own.
    """
    test = shipped_corpus().test
    lines = [line.decode() for side in (test.src, test.tgt) for line in read_lines(side[0])]
    model, pieces = train_tokenizer(lines, vocab_size=min(size, 2000))
    for number in range(pieces, size):
        # An entry of a repeated field of a protocol buffer may simply follow the rest.
        text = f"\u2042{number}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-number).tobytes()
        model += b"\x0a" + bytes([len(piece)]) + piece
    path.write_bytes(model)
    return SentencePieceTokenizer(path)


def random_model(config: TransformerConfig, folder: Path) -> None:
    """A model directory of random weights."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "tokenizer.model"
    tokenizer = tokenizer_of(config.src_vocab_size, file)
    save_model_dir(folder, config, random_weights(config), tokenizer, tokenizer)


def _refuse(program: str, config: TransformerConfig, wanted: dict[str, tuple[Any, ...]]) -> None:
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{program} has no {name} {getattr(config, name)!r} here")


_COMMON: dict[str, tuple[Any, ...]] = {
    "positions": ("sinusoidal", "sinusoidal_halves"),
    "activation": ("relu",),
    "norm": ("layer",),
    "bias": (True,),
    "output_bias": (False,),
    "embedding_norm": (False,),
    "scale_embedding": (True,),
    "tie": ("all",),
}


def ctranslate2_model(
    config: TransformerConfig,
    weights: Any,
    tokens: list[str],
    folder: Path,
    quantization: str | None = None,
) -> None:
    """Write a model for CTranslate2.

    Args:
        config: the architecture.
        weights: float32 arrays by parameter name.
        tokens: of the one vocabulary.
        folder: where to.
        quantization: type of the weights in the file; None: float32.

    Raises:
        ValueError: an architecture that this function does not know to write.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    from transformer_ext.ops import sinusoidal_positions

    _refuse(
        "ctranslate2",
        config,
        {**_COMMON, "num_kv_heads": (config.nhead,), "final_norm": (config.norm_first,)},
    )

    def linear(spec: Any, name: str) -> None:
        spec.weight = weights[f"{name}.weight"]
        spec.bias = weights[f"{name}.bias"]

    def norm(spec: Any, name: str) -> None:
        spec.gamma = weights[f"{name}.weight"]
        spec.beta = weights[f"{name}.bias"]

    spec = transformer_spec.TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.nhead,
        pre_norm=config.norm_first,
        activation=common_spec.Activation.RELU,
    )
    table = weights["source_embedding.weight"]
    halves = config.positions == "sinusoidal_halves"
    positions = sinusoidal_positions(POSITIONS, config.d_model, halves=halves).numpy()
    spec.encoder.embeddings[0].weight = table
    spec.decoder.embeddings.weight = table
    spec.encoder.position_encodings.encodings = positions
    spec.decoder.position_encodings.encodings = positions
    spec.decoder.projection.weight = table
    for stack, name in ((spec.encoder, "encoder"), (spec.decoder, "decoder")):
        if config.final_norm:
            norm(stack.layer_norm, f"{name}.norm")
        for number, layer in enumerate(stack.layer):
            ours = f"{name}.layers.{number}"
            linear(layer.self_attention.linear[0], f"{ours}.self_attention.in_projection")
            linear(layer.self_attention.linear[1], f"{ours}.self_attention.out_projection")
            norm(layer.self_attention.layer_norm, f"{ours}.self_attention_norm")
            linear(layer.ffn.linear_0, f"{ours}.feed_forward.in_projection")
            linear(layer.ffn.linear_1, f"{ours}.feed_forward.out_projection")
            norm(layer.ffn.layer_norm, f"{ours}.feed_forward_norm")
            if name == "decoder":
                cross = f"{ours}.cross_attention"
                linear(layer.attention.linear[0], f"{cross}.query_projection")
                linear(layer.attention.linear[1], f"{cross}.key_value_projection")
                linear(layer.attention.linear[2], f"{cross}.out_projection")
                norm(layer.attention.layer_norm, f"{cross}_norm")
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.layer_norm_epsilon = config.layer_norm_eps
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def marian_ids(folder: Path, tokenizer: Tokenizer) -> dict[int, int]:
    """Our id of each id of a MarianMT directory that a text can have."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ours = {tokenizer.piece(id): id for id in range(tokenizer.vocab_size)}
    return {id: ours[piece] for piece, id in vocabulary.items() if piece in ours}


def ctranslate2_tokens(model: ModelDir) -> list[str]:
    """Its vocabulary: SentencePiece's pieces."""
    tokenizer = model.source_tokenizer
    # A model may have spare rows behind the tokenizer's pieces.
    return [
        tokenizer.piece(id) if id < tokenizer.vocab_size else f"\u2042{id}"
        for id in range(model.config.src_vocab_size)
    ]


def write_for_ctranslate2(model: ModelDir, folder: Path, quantization: str | None) -> None:
    """A model directory of ours as one of CTranslate2."""
    ctranslate2_model(model.config, model.weights, ctranslate2_tokens(model), folder, quantization)
