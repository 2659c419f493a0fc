"""Kernels and bytes of a step of a beam search on a GPU, counted without one, and the time it should take.

The search runs on tensors without data that count as those of a GPU, as in ``cuda_step.py``. Of what
only some rows are read or written of, those rows count.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from cuda_step import Counter, arguments, print_table

from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.torch_engine import TorchEngine
from transformer_ext.inference.torch_search import TorchSearch
from transformer_ext.model import Transformer, preset
from transformer_ext.ops import _backend

#: Of which no more is read than is written, and what is written is the result or the last argument.
_READS = ("aten::index_select", "aten::gather", "transformer_ext::embedding_forward")
_WRITES = ("aten::index_copy_", "aten::scatter_")
#: Says of itself that it gives a view, which it does where nothing is to be converted.
_CONVERTS = "aten::to"


class StepCounter(Counter):
    """Counts a step of decoding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        before = self.bytes[name]
        results = super().__torch_dispatch__(func, types, args, kwargs)
        if name in (*_READS, *_WRITES):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            written = results if name in _READS else tensors[-1]
            self.bytes[name] = before + 2 * written.nbytes
        elif name == "aten::index_fill_":
            self.bytes[name] = before + args[0][:, 0].nbytes * len(args[2])
        elif name == _CONVERTS and results.dtype != args[0].dtype:
            self.calls[name] += 1
            self.bytes[name] += args[0].nbytes + results.nbytes
        return results


def count(options: argparse.Namespace) -> StepCounter:
    """What one step gives the GPU, of which every hypothesis has so many tokens."""
    model = Transformer(preset(options.preset, options.vocabulary, options.vocabulary))
    model = model.set_precision(options.precision).to("meta").eval()
    engine = TorchEngine(model)
    source = [[5] * (options.source - 1) + [model.config.eos_id]] * options.batch
    counter = StepCounter()

    def run(search: TorchSearch) -> list[Any]:
        for _ in range(options.position - 1):
            search.step()
        with counter:
            search.step()
        return [None] * options.batch

    with (
        mock.patch.dict(_backend._DTYPES, {"meta": _backend._DTYPES["cuda"]}),
        mock.patch.object(_backend, "has_kernel", lambda op, device: True),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
        mock.patch.object(TorchSearch, "run", run),
    ):
        search = SearchOptions(beam_size=options.beam)
        engine.search(source, search, batch_size=options.batch, batch_tokens=10**9)
    return counter


def main() -> None:
    """Counts and prints."""
    options = arguments(
        __doc__,
        400.0,
        batch={"type": int, "default": 64, "help": "sentences"},
        beam={"type": int, "default": 4},
        source={"type": int, "default": 27, "help": "tokens of a sentence"},
        position={"type": int, "default": 27, "help": "of the step"},
        queue={"type": float, "default": 10.0, "help": "us to queue a kernel from Python"},
    )
    counter = count(options)
    print_table(counter, options, 20.0)
    print(f"\nqueued from Python: {1e-3 * counter.calls.total() * options.queue:.2f} ms")


if __name__ == "__main__":
    main()
