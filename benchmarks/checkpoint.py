"""Saving and loading a checkpoint, beside ``torch.save`` and ``torch.load`` of the same state.

The state is that of a training: float32 weights and Adam's two moments, 12 bytes a parameter. Both
sides write to the same disk, wait until it has the bytes (fsync of the file, and of the folder after
the renaming), and replace what was there only then. Ours writes model and training state as two
safetensors files and checks sizes and checksums before it loads; ``torch.save`` writes one file,
which is loaded with ``weights_only=True``. Loading reads what was just written from the system's
cache. Nothing is pickled by ours, and nothing by the other but dictionaries and numbers.

    python benchmarks/checkpoint.py --preset base

The bound is what this disk takes to write the same bytes from one buffer, fsync included; of loading,
what a copy of them in memory takes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from transformer_ext.files import Tensors, save_tensors
from transformer_ext.model import Transformer, preset
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.optimizer import Optimizer, parameters_by_name


def trained(name: str, vocabulary: int) -> tuple[Transformer, Optimizer]:
    """A model and its optimizer after one step, so that all moments are there."""
    torch.manual_seed(0)
    model = Transformer(preset(name, vocabulary, vocabulary))
    optimizer = Optimizer(parameters_by_name(model).items(), clip_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-4)
    return model, optimizer


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Cases:
    """What is timed, each in a folder of its own."""

    def __init__(self, folder: Path, model: Transformer, optimizer: Optimizer) -> None:
        self.folder = folder
        self.weights = {n: p.detach() for n, p in optimizer.parameters.items()}
        self.model, self.optimizer = model, optimizer
        self.checkpoints = Checkpoints(folder / "ours", keep=1)
        self.size = 12 * sum(p.numel() for p in self.weights.values())
        self.buffer = torch.randint(256, (self.size,), dtype=torch.uint8)
        self.step = 0

    def save_ours(self) -> None:
        self.step += 1
        self.checkpoints.save(
            self.step,
            lambda folder: save_tensors(folder / "model.safetensors", self.weights),
            self.optimizer.state_dict(),
            {"progress": {"epoch": 1}},
            model_bytes=self.size // 3,
        )

    def save_torch(self) -> None:
        path = self.folder / "torch.pt"
        temporary = path.with_suffix(".tmp")
        state = {"model": self.weights, "optimizer": self.optimizer._adam.state_dict()}
        torch.save(state, temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(self.folder)

    def write_buffer(self) -> None:
        path = self.folder / "buffer"
        path.unlink(missing_ok=True)
        with open(path, "wb", buffering=0) as file:
            file.write(self.buffer.numpy().data)
            os.fsync(file.fileno())

    def load_ours(self) -> None:
        step = self.checkpoints.last_good()
        assert step is not None
        self.checkpoints.load(step)
        weights = Tensors(self.checkpoints.path(step) / "model.safetensors")
        for name, weight in self.weights.items():
            weight.copy_(torch.from_numpy(weights[name]))

    def load_unchecked(self) -> None:
        self.checkpoints.load(self.step)
        weights = Tensors(self.checkpoints.path(self.step) / "model.safetensors")
        for name, weight in self.weights.items():
            weight.copy_(torch.from_numpy(weights[name]))

    def load_torch(self) -> None:
        state: dict[str, Any] = torch.load(self.folder / "torch.pt", weights_only=True)
        for name, weight in self.weights.items():
            weight.copy_(state["model"][name])

    def copy_buffer(self) -> None:
        self.buffer.clone()

    def checksum(self) -> None:
        zlib.crc32(self.buffer.numpy().data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base")
    parser.add_argument("--vocabulary", type=int, default=37000)
    parser.add_argument(
        "--rounds", type=int, default=7, help="all cases take turns, in random order"
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's)"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        cases = Cases(folder, *trained(options.preset, options.vocabulary))
        functions: dict[str, Callable[[], None]] = {
            "save, ours": cases.save_ours,
            "save, torch.save": cases.save_torch,
            "write of a buffer": cases.write_buffer,
            "load, ours": cases.load_ours,
            "load, ours, files not checked": cases.load_unchecked,
            "load, torch.load": cases.load_torch,
            "copy in memory": cases.copy_buffer,
            "CRC-32 in memory": cases.checksum,
        }
        times: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(options.rounds + 1):
            order = list(functions.items())
            if turn:
                # Not always in the same order: who writes after another one has removed a file finds
                # free memory for the system's cache, and who reads finds it filled.
                random.Random(turn).shuffle(order)
            for name, function in order:
                started = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - started)
    finally:
        shutil.rmtree(folder)
    print(f"{options.preset}: {cases.size // 12:,} parameters, {cases.size / 1e6:,.0f} MB")
    for name, values in times.items():
        middle = median(values[1:])
        kind = name.split(",")[0]
        peer = {"save": "save, torch.save", "load": "load, torch.load"}.get(kind, name)
        print(
            f"{name:32s} {1e3 * middle:8.0f} ms  {cases.size / middle / 1e9:6.2f} GB/s  "
            f"{median(times[peer][1:]) / middle:5.2f}x"
        )


if __name__ == "__main__":
    main()
