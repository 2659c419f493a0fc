"""Attention, forward + backward, against torch's scaled_dot_product_attention and the explicit
composition softmax(Q K^T) V: interleaved runs, medians, ratios.

    python benchmarks/attention.py [--dtype float32] [--lengths 32 64] [--memory]

`ours` takes padded [batch, heads, length, head_dim] tensors as its peers do, `packed` one
[tokens, 3 * heads * head_dim] buffer as in the model. The ceiling is the fastest matrix product
found in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

from transformer_ext.ops.attention import attention, self_attention_packed
from transformer_ext.ops.linear import linear
from transformer_ext.packed import Packed

HEADS, HEAD_DIM = 8, 64


def explicit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
    return scores.softmax(-1) @ value


def contenders(batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One forward and backward pass of each."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    padded = [make(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3)]
    grad = make(batch, length, HEADS, HEAD_DIM).detach()
    qkv = make(batch * length, 3 * HEADS * HEAD_DIM)
    packed = Packed.from_lengths([length] * batch)

    def both(face: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(face(*padded), padded, grad.transpose(1, 2))

    return {
        "packed": lambda: torch.autograd.grad(
            self_attention_packed(qkv, HEADS, HEADS, packed), qkv, grad.flatten(2).flatten(0, 1)
        ),
        "ours": both(attention),
        "sdpa": both(functional.scaled_dot_product_attention),
        "explicit": both(explicit),
    }


def interleaved(faces: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in faces}
    for face in faces.values():
        face()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, face in faces.items():
            start = time.perf_counter()
            face()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of) for name, of in times.items()}


def ceiling(dtype: torch.dtype) -> float:
    """flop/s of the fastest matrix product."""
    x, weight = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024)
    w = weight.to(dtype)
    with torch.no_grad():
        times = interleaved({"mm": lambda: x @ w, "linear": lambda: linear(x, weight)}, 0.5)
    return 2 * 2048 * 1024 * 1024 / min(times.values())


def peak_megabytes(name: str, batch: int, length: int, dtype: torch.dtype) -> float:
    """Growth of the resident memory by one pass, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(batch), str(length), str(dtype)[6:]]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one_pass(name: str, batch: int, length: int, dtype: torch.dtype) -> None:
    contenders(1, 16, dtype)[name]()
    face = contenders(batch, length, dtype)[name]
    # Linux: forget the peak so far, which is that of importing torch.
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    before = _kilobytes(status.read_text(), "VmRSS")
    face()
    print((_kilobytes(status.read_text(), "VmHWM") - before) / 1024)


def _kilobytes(status: str, field: str) -> int:
    return int(status.split(f"{field}:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128, 2048])
    parser.add_argument("--seconds", type=float, default=1.0, help="a shape and dtype")
    parser.add_argument("--memory", action="store_true", help="a column of peak memory, MB")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, batch, length, dtype = arguments.one
        one_pass(name, int(batch), int(length), getattr(torch, dtype))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("dtype     shape            ms: packed    ours    sdpa explicit | packed: sdpa  explicit")
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        top = ceiling(dtype)
        for length in arguments.lengths:
            batch = 32 if length < 1024 else 4
            faces = contenders(batch, length, dtype)
            ms = {k: 1e3 * v for k, v in interleaved(faces, arguments.seconds).items()}
            flop = 14 * batch * HEADS * length * length * HEAD_DIM
            line = f"{str(dtype)[6:]:9s} {f'{batch}x{HEADS}x{length}x{HEAD_DIM}':16s}"
            line += "".join(f"{ms[k]:9.2f}" for k in ("packed", "ours", "sdpa", "explicit"))
            line += "".join(f"{ms[k] / ms['packed']:9.2f}x" for k in ("sdpa", "explicit"))
            line += f"  {flop / (ms['packed'] * 1e-3) / top:5.0%} of {top / 1e9:.0f} GFLOP/s"
            if arguments.memory:
                megabytes = {k: peak_megabytes(k, batch, length, dtype) for k in faces}
                line += "  MB " + " ".join(f"{k} {v:.0f}" for k, v in megabytes.items())
            print(line, flush=True)


if __name__ == "__main__":
    main()
