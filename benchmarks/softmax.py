"""Masked softmax of attention scores [32, 8, 128, 128], forward and backward, against PyTorch.

    python benchmarks/softmax.py
    python benchmarks/softmax.py --device cuda

The peer is torch.softmax(scores.masked_fill(~mask, -inf), -1). The bytes are those of the five
passes over the scores that forward (read, write) and backward (two reads, one write) need; memory
(CPU only) is by how much a step raises the peak of a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from memory import raised_peak
from timing import arguments, copier, dtypes, median_seconds, print_row

from transformer_ext.ops import masked_softmax

SHAPE = (32, 8, 128, 128)


def step(name: str, dtype: torch.dtype) -> Callable[[], object]:
    """One forward and backward of ``ours`` or ``torch``."""
    torch.manual_seed(0)
    scores = torch.randn(SHAPE).to(dtype).requires_grad_()
    grad = torch.randn(SHAPE).to(dtype)
    mask = torch.rand(SHAPE[0], 1, 1, SHAPE[-1]) < 0.8
    mask[..., 0] = True

    def ours() -> object:
        return torch.autograd.grad(masked_softmax(scores, mask), scores, grad)

    def peer() -> object:
        masked = scores.masked_fill(~mask, -torch.inf)
        return torch.autograd.grad(torch.softmax(masked, -1), scores, grad)

    return ours if name == "ours" else peer


def main() -> None:
    options = arguments(__doc__)
    for dtype in dtypes(options):
        size = 5 * torch.Size(SHAPE).numel() * dtype.itemsize
        calls = {name: step(name, dtype) for name in ("ours", "torch")}
        times = median_seconds({**calls, "copy": copier(size, dtype)}, options.seconds)
        name = f"masked softmax {dtype}"
        if options.device == "cpu":
            memory = {name: raised_peak(step, name, dtype) for name in ("ours", "torch")}
            name += f", MiB {memory['ours']:.0f} : {memory['torch']:.0f}"
        print_row(name, times, size)


if __name__ == "__main__":
    main()
