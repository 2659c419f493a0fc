"""What bounds decoding: the arithmetic and the bytes of an output token, and what the machine does.

The machine's side is a small C++ program, ``csrc/ceilings.cpp``, compiled where it runs: Python has
no function that does bare multiply-adds, and a matrix product of a library is no ceiling (ours pass
it). Without a compiler there are no ceilings.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformer_ext.model.config import (
    LanguageModelConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
)

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = [
    _ROOT / "benchmarks/csrc/ceilings.cpp",
    *(_ROOT / f"csrc/common/{name}.cpp" for name in ("isa", "thread_pool", "parallel")),
]
#: Bytes of a factor, by the type that it is multiplied in.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Machine:
    """What it can do at all, on the threads asked for.

    Attributes:
        operations: additions and multiplications a second by type: ``float32``, ``bfloat16``,
            ``int8``; where it has no instructions for a type, those of float32.
        read: bytes a second from memory.
    """

    operations: dict[str, float]
    read: float


def program(folder: Path) -> Path | None:
    """The compiled ``ceilings``, made in the folder if it is not there; None without compiler."""
    path = folder / "ceilings"
    newest = max(
        source.stat().st_mtime for source in (*_SOURCES, _ROOT / "benchmarks/csrc/arithmetic.h")
    )
    if path.exists() and path.stat().st_mtime > newest:
        return path
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++20", "-O3", "-march=native", "-pthread", f"-I{_ROOT / 'csrc'}"]
    subprocess.run([*command, "-o", str(path), *map(str, _SOURCES)], check=True)
    return path


def measure(path: Path, threads: int) -> Machine:
    """Runs the program (half a second)."""
    found = json.loads(subprocess.check_output([str(path), str(threads)], text=True))
    read = found.pop("read")
    return Machine(found, read)


@dataclass(frozen=True)
class Work:
    """What a batch takes at the least.

    Attributes:
        operations: additions and multiplications of the matrix products and of attention.
        weights: numbers in weight matrices that are read, counted again at each step.
        cached: numbers among the keys and values of earlier positions that are read, of which one
            has 4 bytes in float32 and 2 else. (Of a translation they stay in the processor.)
    """

    operations: float
    weights: float
    cached: float = 0.0

    def seconds(self, type: str, machine: Machine) -> float:
        """The longer of the time of the arithmetic and that of reading weights and cache from memory.

        It is no bound where weights stay in a cache that all threads share.
        """
        return max(
            self.operations / machine.operations[type],
            (self.weights * BYTES[type] + self.cached * max(2, BYTES[type])) / machine.read,
        )


def _layer(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of self-attention and of the feed-forward network of a layer."""
    d = config.d_model
    q, k = config.nhead * config.head_dim, config.num_kv_heads * config.head_dim
    return d * (q + 2 * k) + q * d, d * config.dim_feedforward * (3 if config.gated else 2)


def encoder_work(config: TextEncoderConfig, lengths: Sequence[int]) -> Work:
    """The work of one batch of texts through an encoder alone, without its heads; see :func:`work`.

    Args:
        config: of the model.
        lengths: tokens of each text.
    """
    layer = sum(_layer(config))
    attention = 4 * config.nhead * config.head_dim
    operations = sum(2 * length * layer + attention * length**2 for length in lengths)
    return Work(config.num_layers * operations, config.num_layers * layer)


def language_work(
    config: LanguageModelConfig, prompt: int, new: int, beam: int, batch: int
) -> Work:
    """The work of a batch of continuations; see :func:`work`.

    The prompt's tokens are taken at once, which reads the layers' weights once; the first new token
    follows from them, and each of the others takes a step, which reads layers, vocabulary, and the
    keys and values of at least one hypothesis of each prompt.

    Args:
        config: of the model.
        prompt: tokens of each prompt.
        new: tokens of each output.
        beam: hypotheses of a prompt.
        batch: prompts worked on together.
    """
    layers = config.num_layers * sum(_layer(config))
    vocabulary = config.d_model * config.vocab_size
    attention = 4 * config.nhead * config.head_dim * config.num_layers
    rows = beam * (new - 1)
    operations = 2 * layers * (prompt + rows) + 2 * vocabulary * (1 + rows)
    operations += attention * (prompt**2 / 2 + rows * (prompt + new / 2))
    cached = 2 * config.num_kv_heads * config.head_dim * config.num_layers * (new - 1)
    return Work(
        batch * operations, new * (layers + vocabulary), batch * cached * (prompt + new / 2)
    )


def work(
    config: TransformerConfig,
    sources: Sequence[int],
    steps: Sequence[int],
    beam: int,
    batch: int,
) -> Work:
    """The work of decoding sentences.

    Of a model with d = d_model, f = dim_feedforward (twice the inner projection if gated), V output
    tokens, and attention q and k wide for queries and for keys (both d without grouped heads),
    a sentence of S source tokens and T steps takes, a multiply-add as two operations,

    - encoder, for each source token and layer: 2 d (q + 2 k) + 2 q d for the projections,
      4 d f for the feed-forward network, 4 q S for attention;
    - keys and values of the source, for each source token and decoder layer: 2 d 2 k;
    - decoder, for each row and layer: 2 d (q + 2 k) + 2 q d for self-attention, 2 * 2 q d for
      cross-attention's query and output, 4 d f, and 4 q (S + the row's position) for attention;
    - vocabulary, for each row: 2 d V.

    The first step has one row, all others one for each hypothesis of the beam: 1 + beam (T - 1).

    Weights of the decoder and of the vocabulary are read at each step of a batch, those of the
    encoder once a batch; with sentences of different length a batch takes as many steps as its
    longest.

    Args:
        config: of the model.
        sources: tokens of each source, its end counted.
        steps: of each sentence: tokens of its output, its end counted where it has one.
        beam: hypotheses of a sentence.
        batch: sentences decoded together; those of similar length are taken together.
    """
    d, vocabulary = config.d_model, config.tgt_vocab_size
    q, k = config.nhead * config.head_dim, config.num_kv_heads * config.head_dim
    self_attention, feed_forward = _layer(config)
    encoder_layer = self_attention + feed_forward
    decoder_layer = self_attention + 2 * q * d + feed_forward
    encoder = config.num_encoder_layers * encoder_layer
    source_keys = config.num_decoder_layers * d * 2 * k
    row = config.num_decoder_layers * decoder_layer + d * vocabulary
    operations = 0.0
    for length, count in zip(sources, steps, strict=True):
        rows = 1 + beam * (count - 1)
        operations += 2 * length * (encoder + source_keys)
        operations += 4 * q * config.num_encoder_layers * length**2
        operations += 2 * rows * row
        operations += 4 * q * config.num_decoder_layers * rows * (length + (count + 1) / 2)
    weights = 0.0
    order = sorted(steps, reverse=True)
    for first in range(0, len(order), batch):
        weights += encoder + source_keys + order[first] * row
    return Work(operations, weights)
