"""Masked softmax of attention scores [batch, 8, 128, 128], forward and backward, against PyTorch.

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
from timing import Shape, arguments, by_device, copier, dtypes, median_seconds, print_row

from transformer_ext.ops import masked_softmax

SHAPE = (32, 8, 128, 128)
# 134 MB in bfloat16: more than the caches of a GPU.
CUDA_SHAPE = (256, 16, 128, 128)


def step(name: str, dtype: torch.dtype, shape: Shape) -> Callable[[], object]:
    """One forward and backward of ``ours`` or ``torch``."""
    torch.manual_seed(0)
    scores = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    mask = torch.rand(shape[0], 1, 1, shape[-1]) < 0.8
    mask[..., 0] = True

    def ours() -> object:
        return torch.autograd.grad(masked_softmax(scores, mask), scores, grad)

    def peer() -> object:
        masked = scores.masked_fill(~mask, -torch.inf)
        return torch.autograd.grad(torch.softmax(masked, -1), scores, grad)

    return ours if name == "ours" else peer


def main() -> None:
    options = arguments(__doc__)
    (shape,) = by_device(options, (SHAPE,), (CUDA_SHAPE,))
    for dtype in dtypes(options):
        size = 5 * torch.Size(shape).numel() * dtype.itemsize
        calls = {name: step(name, dtype, shape) for name in ("ours", "torch")}
        times = median_seconds({**calls, "copy": copier(size, dtype)}, options.seconds)
        name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        if options.device == "cpu":
            memory = {name: raised_peak(step, name, dtype, shape) for name in ("ours", "torch")}
            name += f", MiB {memory['ours']:.0f} : {memory['torch']:.0f}"
        print_row(name, times, size)


if __name__ == "__main__":
    main()
