"""One training step (forward, backward, Adam) beside ``torch.nn.Transformer`` on the CPU.

Same sizes, same sentences, dropout and label smoothing on. The peers, each as its users run it:

- ``eager``: ``nn.Transformer``, ``nn.CrossEntropyLoss(label_smoothing=0.1)``, Adam, float32;
- ``autocast``: the same under bfloat16 autocast with fused Adam.

Random sentences with about the lengths of the shipped corpus, in buckets as a training would have
them; the peers get them padded. All take turns on every batch, and a figure is the median over
batches of target tokens (without padding) per second. ``--keep-freed-memory`` gives all of them the
malloc settings that only our train command makes.

    python benchmarks/training.py --preset small --max-tokens 2048 --keep-freed-memory
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from transformer_ext import Packed, Transformer, ops, preset
from transformer_ext.training.environment import keep_freed_memory

VOCABULARIES = {"tiny": 8000, "small": 8000, "base": 32000, "big": 32000}


class Eager(nn.Module):
    """The model as a user of ``nn.Transformer`` writes it: tied embeddings, sinusoidal positions."""

    def __init__(self, config, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.transformer = nn.Transformer(
            config.d_model,
            config.nhead,
            config.num_encoder_layers,
            config.num_decoder_layers,
            config.dim_feedforward,
            config.dropout,
            batch_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.d_model**0.5
        self.register_buffer("positions", ops.sinusoidal_positions(1024, config.d_model))

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.scale + self.positions[: ids.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        hidden = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal.isinf(),
            src_key_padding_mask=padding,
            tgt_key_padding_mask=target == 0,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return hidden @ self.embedding.weight.t()


def batches(max_tokens: int, count: int, vocabulary: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Random sentences with lengths like those of the shipped corpus, in buckets."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(2.75, 0.55, 50 * max_tokens), 3, 100).astype(int)
    lengths.sort()
    result = []
    for start in random.integers(0, len(lengths) * 9 // 10, count):
        batch, tokens = [], 0
        for length in lengths[start:]:
            if tokens + length > max_tokens:
                break
            tokens += length
            other = max(2, int(length * random.uniform(0.8, 1.2)))
            batch.append(
                tuple(torch.from_numpy(random.integers(4, vocabulary, n)) for n in (other, length))
            )
        result.append(batch)
    return result


def ours(config, precision: str) -> Callable[[list], None]:
    model = Transformer(config).set_precision(precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(batch) -> None:
        sources, targets = zip(*batch, strict=True)
        source = Packed.from_lengths([len(s) for s in sources])
        target = Packed.from_lengths([len(t) for t in targets])
        labels = torch.cat(targets)
        model.rng[1] += 1
        hidden = model.forward_packed(torch.cat(sources), source, labels, target)
        output = ops.linear_cross_entropy(
            hidden,
            model.generator.weight,
            labels,
            label_smoothing=0.1,
            normalizer=float(target.capacity),
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer(config, vocabulary: int, autocast: bool) -> Callable[[list], None]:
    model = Eager(config, vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=autocast)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0)

    def step(batch) -> None:
        source, target = (
            nn.utils.rnn.pad_sequence(list(side), batch_first=True)
            for side in zip(*batch, strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(source, target)
            loss = criterion(logits.flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(VOCABULARIES), default="small")
    parser.add_argument("--max-tokens", type=int, default=2048, help="target tokens a batch")
    parser.add_argument("--batches", type=int, default=5, help="batches, each run by all in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-freed-memory", action="store_true", help="set malloc, for all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.keep_freed_memory and keep_freed_memory()
    vocabulary = VOCABULARIES[options.preset]
    config = preset(options.preset, vocabulary, vocabulary)
    steps = {
        "ours, bfloat16": ours(config, "bfloat16"),
        "ours, float32": ours(config, "float32"),
        "nn.Transformer, float32 (eager)": peer(config, vocabulary, autocast=False),
        "nn.Transformer, bfloat16 autocast": peer(config, vocabulary, autocast=True),
    }
    data = batches(options.max_tokens, options.batches + 1, vocabulary)
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for index, batch in enumerate(data):
        tokens = sum(len(target) for _, target in batch)
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if index:  # the first batch warms up
                speeds[name].append(tokens / (time.perf_counter() - start))
    print(
        f"{options.preset}, {options.max_tokens} target tokens a batch, {options.threads} threads, "
        f"torch {torch.__version__}, freed memory {'kept' if kept else 'given back'}"
    )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reference = medians["nn.Transformer, float32 (eager)"]
    for name, value in medians.items():
        print(f"{name:36s} {value:8,.0f} tokens/s  {value / reference:5.2f}x")


if __name__ == "__main__":
    main()
