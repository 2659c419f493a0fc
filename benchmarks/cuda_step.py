"""Kernels and bytes of a training step on a GPU, counted without one, and the time they should take.

The model runs on tensors without data that count as those of a GPU, so each op that a GPU would be
given is seen with its shapes. A kernel's bytes are those of its inputs and outputs, read or written
once; matrix products are counted by their operations. An op of torch is taken for one kernel.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_ext.model import Transformer, preset
from transformer_ext.ops import _backend, cross_entropy
from transformer_ext.ops.linear import converted_weights, forget_copies
from transformer_ext.training.batches import Layout
from transformer_ext.training.device_step import DeviceStep, Numbers
from transformer_ext.training.optimizer import Optimizer
from transformer_ext.training.trainer import LossModule

_VIEWS = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view", "alias")
_PRODUCTS = ("aten::mm", "aten::addmm")
#: An op in Python, the same for all devices: what a GPU is given lies within.
_LOSS = "transformer_ext::linear_cross_entropy"


class Counter(TorchDispatchMode):
    """Counts calls, bytes and operations of each op that is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == _LOSS:
            with self:
                return cross_entropy._linear_cross_entropy(*args)
        results = func(*args, **(kwargs or {}))
        if func.is_view or name.partition("::")[2] in _VIEWS:
            return results
        tensors = {
            id(value): value.nbytes
            for value in torch.utils._pytree.tree_leaves((args, kwargs, results))
            if isinstance(value, torch.Tensor)
        }
        self.calls[name] += 1
        self.bytes[name] += sum(tensors.values())
        if name.endswith("_") and isinstance(args[0], torch.Tensor):
            self.bytes[name] += args[0].nbytes  # read, then written
        if name in _PRODUCTS:
            left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            self.operations[name] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return results


def count(name: str, vocabulary: int, precision: str, tokens: int, length: int) -> Counter:
    """What one forward and backward pass gives the GPU."""
    model = Transformer(preset(name, vocabulary, vocabulary)).set_precision(precision)
    model = model.to("meta").train()
    # Moving a model to such tensors makes a tensor of its own of each that is tied.
    if model.config.tie == "all":
        model.target_embedding.weight = model.source_embedding.weight
    if model.config.tie != "none":
        model.generator.weight = model.target_embedding.weight
    losses = LossModule(model, 0.1)
    optimizer = Optimizer([("none", torch.nn.Parameter(torch.zeros(1)))])
    optimizer.broken = torch.zeros((), device="meta")
    step = DeviceStep(losses, losses, optimizer, torch.device("meta"))
    longest = max(32, 1 << (2 * length - 1).bit_length())
    layout = Layout((tokens, tokens), (longest, longest), tokens // length, tokens)
    with (
        mock.patch.dict(_backend._DTYPES, {"meta": _backend._DTYPES["cuda"]}),
        mock.patch.dict(cross_entropy._CHUNK_BYTES, {"meta": cross_entropy._CHUNK_BYTES["cuda"]}),
        mock.patch.object(_backend, "has_kernel", lambda op, device: True),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
        mock.patch.object(optimizer, "step", lambda rate: model.zero_grad()),
    ):
        batch = layout.views(layout.block("meta"))
        numbers = Numbers.zeros(1, "meta")
        # As a recorded step, which knows from the first one which weights are converted.
        step._compute([batch], numbers)
        step._converted = converted_weights()
        forget_copies()
        with Counter() as counter:
            step._compute([batch], numbers)
    parameters = sum(p.numel() for p in model.parameters())
    # Norm of the gradients; Adam reads and writes weight, gradient and both moments.
    counter.calls["norm, Adam"] += 8
    counter.bytes["norm, Adam"] += parameters * (4 + 32)
    return counter


def arguments(
    description: str | None, teraflops: float, **more: Mapping[str, Any]
) -> argparse.Namespace:
    """The options: of the model, of the GPU, and more of them, by name, as ``add_argument`` has it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base")
    parser.add_argument("--vocabulary", type=int, default=37_000)
    parser.add_argument("--precision", default="bfloat16")
    for name, settings in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--teraflops", type=float, default=teraflops, help="of matrix products")
    parser.add_argument("--terabytes", type=float, default=3.65, help="a second, of all kernels")
    parser.add_argument("--least", type=float, default=2.5, help="us of the shortest kernel")
    return parser.parse_args()


def print_table(counter: Counter, options: argparse.Namespace, least: float) -> float:
    """A row for each op that takes ``least`` us; the us of all.

    A kernel takes as long as its products or its bytes, whichever is longer, or as the shortest.
    """
    print("| op | kernels | MB | GFLOP | us |")
    print("| --- | --- | --- | --- | --- |")
    total = 0.0
    for name, calls in sorted(counter.calls.items(), key=lambda item: -counter.bytes[item[0]]):
        operations, size = counter.operations[name], counter.bytes[name]
        us = max(
            1e-6 * operations / options.teraflops,
            1e-6 * size / options.terabytes,
            calls * options.least,
        )
        total += us
        if us >= least:
            print(f"| `{name}` | {calls} | {size / 1e6:.1f} | {operations / 1e9:.1f} | {us:.0f} |")
    print(f"| all | {counter.calls.total()} | {counter.bytes.total() / 1e6:.0f} | | {total:.0f} |")
    return total


def main() -> None:
    """Counts and prints."""
    options = arguments(
        __doc__,
        700.0,
        max_tokens={"type": int, "default": 25_000, "help": "rows of each side"},
        length={"type": int, "default": 27, "help": "tokens of a sentence"},
    )
    counter = count(
        options.preset, options.vocabulary, options.precision, options.max_tokens, options.length
    )
    us = print_table(counter, options, 20.0)
    print(f"\n{options.max_tokens / us:.2f} million tokens/s")


if __name__ == "__main__":
    main()
