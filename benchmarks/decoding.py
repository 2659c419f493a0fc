"""Speed of decoding on the CPU: the engine, and CTranslate2 on equal weights where it is installed.

    python benchmarks/decoding.py --preset base --batch-size 64 --beam-size 4

The weights are random, every output has the same length, and the rounds of both are interleaved:
trust the ratio, not the single figure. Before that, both decode a few sentences, and the shares of
equal outputs are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from transformer_ext.files import parameter_shapes
from transformer_ext.inference.engine import Engine
from transformer_ext.inference.options import COMPUTE_TYPES, SearchOptions
from transformer_ext.model.config import PRESETS, TransformerConfig, preset

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def random_weights(config: TransformerConfig, seed: int = 1) -> dict[str, np.ndarray]:
    """Matrices of variance 1 / inputs, norms that do nothing, no biases."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            scale = shape[1] ** -0.5
            weights[name] = (generator.standard_normal(shape, dtype=np.float32) * scale).astype(
                np.float32
            )
        else:
            value = 1.0 if name.endswith("weight") else 0.0
            weights[name] = np.full(shape, value, dtype=np.float32)
    return weights


def sinusoids(length: int, width: int) -> np.ndarray:
    """Section 3.5 of the paper, sine and cosine interleaved."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, width).astype(np.float32)


def ctranslate2_model(config: TransformerConfig, weights: dict[str, np.ndarray], folder: str):
    """Write the model (post-norm, sinusoids, all embeddings tied) for CTranslate2."""
    from ctranslate2.specs import common_spec, transformer_spec

    def linear(spec, name: str) -> None:
        spec.weight = weights[f"{name}.weight"]
        spec.bias = weights[f"{name}.bias"]

    def norm(spec, name: str) -> None:
        spec.gamma = weights[f"{name}.weight"]
        spec.beta = weights[f"{name}.bias"]

    def feed_forward(spec, layer: str) -> None:
        linear(spec.linear_0, f"{layer}.feed_forward.in_projection")
        linear(spec.linear_1, f"{layer}.feed_forward.out_projection")
        norm(spec.layer_norm, f"{layer}.feed_forward_norm")

    def self_attention(spec, layer: str) -> None:
        linear(spec.linear[0], f"{layer}.self_attention.in_projection")
        linear(spec.linear[1], f"{layer}.self_attention.out_projection")
        norm(spec.layer_norm, f"{layer}.self_attention_norm")

    spec = transformer_spec.TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.nhead,
        pre_norm=False,
        activation=common_spec.Activation.RELU,
    )
    table = weights["source_embedding.weight"]
    positions = sinusoids(512, config.d_model)
    spec.encoder.embeddings[0].weight = table
    spec.decoder.embeddings.weight = table
    spec.encoder.position_encodings.encodings = positions
    spec.decoder.position_encodings.encodings = positions
    spec.decoder.projection.weight = table
    for i, layer in enumerate(spec.encoder.layer):
        self_attention(layer.self_attention, f"encoder.layers.{i}")
        feed_forward(layer.ffn, f"encoder.layers.{i}")
    for i, layer in enumerate(spec.decoder.layer):
        name = f"decoder.layers.{i}"
        self_attention(layer.self_attention, name)
        linear(layer.attention.linear[0], f"{name}.cross_attention.query_projection")
        linear(layer.attention.linear[1], f"{name}.cross_attention.key_value_projection")
        linear(layer.attention.linear[2], f"{name}.cross_attention.out_projection")
        norm(layer.attention.layer_norm, f"{name}.cross_attention_norm")
        feed_forward(layer.ffn, name)
    tokens = SPECIAL + [f"t{i}" for i in range(len(SPECIAL), config.src_vocab_size)]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.layer_norm_epsilon = config.layer_norm_eps
    spec.validate()
    spec.save(folder)
    return tokens


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print output tokens per second of each, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="base")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--beam-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=27, help="tokens of every output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--our-type", choices=COMPUTE_TYPES, default="float32")
    parser.add_argument(
        "--compute-type", default="float32", help="of CTranslate2 (float32, int8, ...)"
    )
    arguments = parser.parse_args()

    config = preset(arguments.preset, arguments.vocab_size, arguments.vocab_size)
    weights = random_weights(config)
    engine = Engine(config, weights, threads=arguments.threads, compute_type=arguments.our_type)
    generator = np.random.default_rng(2)
    sources = [
        [*generator.integers(len(SPECIAL), config.src_vocab_size, size=n).tolist(), config.eos_id]
        for n in generator.integers(
            arguments.length // 2, arguments.length * 3 // 2 + 1, size=arguments.batch_size
        )
    ]
    options = SearchOptions(
        beam_size=arguments.beam_size, max_length=arguments.length, min_length=arguments.length
    )
    output_tokens = arguments.batch_size * arguments.length
    runs: dict[str, Callable[[], object]] = {
        f"transformer_ext {arguments.our_type}": lambda: engine.search(
            sources, options, batch_size=arguments.batch_size
        )
    }
    folder = tempfile.TemporaryDirectory()
    try:
        import ctranslate2
    except ImportError:
        print("ctranslate2 is not installed: no comparison")
    else:
        tokens = ctranslate2_model(config, weights, folder.name)
        other = ctranslate2.Translator(
            folder.name,
            compute_type=arguments.compute_type,
            intra_threads=arguments.threads,
        )
        texts = [[tokens[i] for i in source] for source in sources]
        keywords = dict(
            beam_size=arguments.beam_size,
            min_decoding_length=arguments.length,
            max_decoding_length=arguments.length,
            max_batch_size=arguments.batch_size,
        )
        found = other.translate_batch(
            texts[:8], suppress_sequences=[["<pad>"], ["<s>"]], **keywords
        )
        ours = engine.search(sources[:8], options)
        equal = [
            [tokens.index(token) for token in theirs.hypotheses[0]] == mine.hypotheses[0].tokens
            for theirs, mine in zip(found, ours, strict=True)
        ]
        print(f"outputs equal to ctranslate2's: {sum(equal)} of {len(equal)}")
        runs[f"ctranslate2 {arguments.compute_type}"] = lambda: other.translate_batch(
            texts, **keywords
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for call in runs.values():
        call()
    for _ in range(arguments.rounds):
        for name, call in runs.items():
            times[name].append(seconds(call))
    for name, values in times.items():
        print(f"{name:28} {output_tokens / statistics.median(values):8.0f} output tokens/s")
    if len(runs) == 2:
        mine, theirs = times.values()
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        print(f"ratio (median, least, most)  {statistics.median(ratios):.2f}", end="")
        print(f"  {min(ratios):.2f}  {max(ratios):.2f}")


if __name__ == "__main__":
    main()
