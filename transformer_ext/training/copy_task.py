"""The first example of the Annotated Transformer: learn to repeat a sequence of random symbols.

Sequences of 10 symbols out of 10, the first always 1; the model reads the sequence and writes it
again. It shows in a minute that attention, masks, loss, optimizer and decoding work together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer_ext.model import Transformer, make_model
from transformer_ext.training.batches import BatchStream
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, duration
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.trainer import Plan, Trainer

__all__ = ["CopyResult", "CopyTask", "copied_exactly", "random_sequences", "run"]

VOCAB_SIZE = 11
LENGTH = 10
START = 1
_BATCHES_PER_EPOCH = 20
_UNSEEN = 200


def random_sequences(count: int, generator: np.random.Generator) -> np.ndarray:
    """``[count, 10]`` int64 symbols from 1 to 10, the first always 1."""
    data = generator.integers(1, VOCAB_SIZE, (count, LENGTH), dtype=np.int64)
    data[:, 0] = START
    return data


@dataclass(frozen=True)
class CopyTask:
    """Makes the batches: sampler and collate function of a :class:`BatchStream` in one.

    Attributes:
        seed: Of the sequences.
        batch_size: Sequences in a batch.
    """

    seed: int = 1
    batch_size: int = 80

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """20 batches; example numbers never come twice."""
        first = epoch * _BATCHES_PER_EPOCH * self.batch_size
        return [
            np.arange(self.batch_size) + first + i * self.batch_size
            for i in range(_BATCHES_PER_EPOCH)
        ]

    def collate(self, examples: np.ndarray) -> Any:
        """The batch of these examples, as ``transformer_ext.data`` makes them."""
        count = len(examples)
        data = random_sequences(count, np.random.default_rng([self.seed, int(examples[0])]))
        return SimpleNamespace(
            src_ids=data.ravel(),
            src_lengths=np.full(count, LENGTH),
            tgt_ids=data[:, :-1].ravel(),
            tgt_lengths=np.full(count, LENGTH - 1),
            labels=data[:, 1:].ravel(),
            target_tokens=count * (LENGTH - 1),
            sentences=count,
        )


@dataclass(frozen=True)
class CopyResult:
    """How the copy task went.

    Attributes:
        copied: Unseen sequences that came back without a wrong symbol.
        sequences: How many were tried.
        steps: Optimizer steps done.
        seconds: Time of training and trying.
        example: A sequence and what came back.
    """

    copied: int
    sequences: int
    steps: int
    seconds: float
    example: tuple[list[int], list[int]]


def copied_exactly(model: Transformer, sequences: Tensor) -> tuple[int, Tensor]:
    """Greedy copies of ``[count, 10]`` sequences: (how many are exact, the copies)."""
    model.eval()
    with torch.no_grad():
        source_mask = torch.ones(
            len(sequences), 1, LENGTH, dtype=torch.bool, device=sequences.device
        )
        memory = model.encode(sequences, source_mask)
        output = sequences[:, :1]
        for _ in range(LENGTH - 1):
            hidden = model.decode(memory, source_mask, output)
            following = model.generator(hidden[:, -1]).argmax(-1)
            output = torch.cat([output, following[:, None]], dim=1)
    return int((output == sequences).all(1).sum()), output


def run(
    device: torch.device,
    *,
    precision: str = "float32",
    max_steps: int = 500,
    seed: int = 1,
    console: Console | None = None,
) -> CopyResult:
    """Trains until 200 unseen sequences are copied without an error, or ``max_steps`` are done.

    Args:
        device: Where to train.
        precision: Type of the activations.
        max_steps: Most optimizer steps.
        seed: Of weights, data and dropout.
        console: Where to report; nowhere by default.
    """
    console = console or Console(silent=True)
    torch.manual_seed(seed)
    model = make_model(VOCAB_SIZE, VOCAB_SIZE, N=2, d_model=64, d_ff=256, h=4, dropout=0.0)
    model.to(device).set_precision(precision)
    task = CopyTask(seed)
    stream = BatchStream(
        task.collate, task, np.broadcast_to(np.int64(LENGTH - 1), (1 << 40,)), accum_steps=1
    )
    optimizer = Optimizer(
        parameters_by_name(model).items(),
        clip_norm=1.0,
        loss_scale=2.0**16 if precision == "float16" else None,
    )
    unseen = torch.as_tensor(random_sequences(_UNSEEN, np.random.default_rng([seed, 0, 1])))
    unseen = unseen.to(device)
    schedule = Schedule("linear", 2e-3, 50, max_steps, final_fraction=0.02)
    began = time.monotonic()
    trainer = Trainer(
        model,
        stream,
        optimizer,
        schedule,
        Plan(max_steps, log_every=50, validate_every=max_steps, label_smoothing=0.0, seed=seed),
        console=console,
    )
    for step in range(1, max_steps + 1):
        trainer.train_step()
        if step % 50 and step != max_steps:
            continue
        trainer.progress.seconds = time.monotonic() - began
        trainer.report()
        copied, copies = copied_exactly(model, unseen)
        console.print(f"step {step}: {copied} of {_UNSEEN} unseen sequences copied exactly")
        if copied == _UNSEEN:
            break
    seconds = time.monotonic() - began
    console.print(f"{step} steps in {duration(seconds)}")
    return CopyResult(copied, _UNSEEN, step, seconds, (unseen[0].tolist(), copies[0].tolist()))
