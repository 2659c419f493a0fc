"""Output projection and label-smoothed loss, forward and backward, against PyTorch's modules.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --device cuda

The peer is nn.Linear's function and nn.CrossEntropyLoss(label_smoothing=0.1), in bfloat16 under
autocast. The products' column is the three matrix products of either alone, by torch.mm into memory
that is there; memory is by how much a step raises the peak of a fresh process, or of what torch has
on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from memory import raised_peak
from timing import arguments, by_device, dtypes, median_seconds, save_row
from torch import nn
from torch.nn import functional

from transformer_ext.ops import linear_cross_entropy

CASES = (
    (2048, 8000, 256),
    (2048, 32000, 512),
)
CUDA_CASES = ((4096, 37000, 512), (25000, 37000, 512), (25000, 37000, 1024))


def step(name: str, case: tuple[int, ...], dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of ``ours`` or ``torch``, or the ``products`` alone."""
    torch.manual_seed(0)
    tokens, vocabulary, features = case
    x = torch.randn(tokens, features).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, features) * features**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    divisor = torch.tensor(float(tokens))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100, reduction="sum")

    def ours() -> None:
        x.grad = weight.grad = None
        linear_cross_entropy(x, weight, targets, normalizer=divisor).loss.backward()

    def peer() -> None:
        x.grad = weight.grad = None
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = criterion(functional.linear(x, weight), targets)
        (loss / tokens).backward()

    if name != "products":
        return {"ours": ours, "torch": peer}[name]

    left, right = x.detach(), weight.detach().to(dtype)
    grad_x, grad_weight = torch.empty_like(left), torch.empty_like(right)
    logits = torch.empty(tokens, vocabulary, dtype=dtype)

    def products() -> None:
        torch.mm(left, right.t(), out=logits)
        torch.mm(logits, right, out=grad_x)
        torch.mm(logits.t(), left, out=grad_weight)

    return products


def raised(name: str, case: tuple[int, ...], dtype: torch.dtype) -> float:
    """MiB that a step needs beside its inputs."""
    if torch.get_default_device().type == "cpu":
        return raised_peak(step, name, case, dtype)
    call = step(name, case, dtype)
    # The first call also makes what libraries keep.
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    options = arguments(__doc__)
    print(
        "tokens x vocabulary x d_model            ours    torch   ratio  products    ours   torch"
    )
    for case in by_device(options, CASES, CUDA_CASES):
        for dtype in dtypes(options):
            names = ("ours", "torch", "products")
            times = median_seconds(
                {name: step(name, case, dtype) for name in names}, options.seconds
            )
            ms = {name: seconds * 1e3 for name, seconds in times.items()}
            memory = {name: raised(name, case, dtype) for name in ("ours", "torch")}
            shape, kind = " x ".join(map(str, case)), str(dtype).removeprefix("torch.")
            print(
                f"{shape:20} {kind:9} {ms['ours']:6.1f} "
                f"{ms['torch']:8.1f} ms {ms['torch'] / ms['ours']:4.2f}x {ms['products']:6.1f} ms "
                f"{memory['ours']:6.0f} {memory['torch']:6.0f} MiB",
                flush=True,
            )
            save_row(case=f"{shape} {kind}", seconds=times, memory=memory)


if __name__ == "__main__":
    main()
