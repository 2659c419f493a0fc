"""Attention, forward + backward, against torch's scaled_dot_product_attention and the explicit
composition softmax(Q K^T) V.

    python benchmarks/attention.py [--dtype float32] [--lengths 32 64] [--memory]

`ours` takes padded [batch, heads, length, head_dim] tensors as its peers do, `packed` one
[tokens, 3 * heads * head_dim] buffer as in the model; the ratio is that of the better peer to each.
The last rows are what training has: sentences of many lengths, with causal mask and dropout too;
there `packed` has no padding, and all others mask it. The ceiling is the fastest matrix product
found in the same run (that of the bare multiply-adds is in benchmarks/csrc/attention_benchmark.cpp).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from timing import median_seconds

from transformer_ext.ops.attention import attention, self_attention_packed
from transformer_ext.ops.linear import linear
from transformer_ext.packed import Packed
from transformer_ext.training.environment import keep_freed_memory

HEADS, HEAD_DIM = 8, 64
#: Tokens of sentences as a batch of training has them, sorted roughly by length.
MIX = [9, 11, 12, 14, 15, 17, 18, 18, 19, 20, 21, 22, 22, 23, 24, 25] * 2 + [26, 28, 29, 31, 33, 40]


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


def mixed(dtype: torch.dtype, causal: bool, dropout: float) -> dict[str, Callable[[], object]]:
    """The same for sentences of the lengths MIX."""
    lengths = torch.tensor(MIX)
    longest = max(MIX)
    padded = [
        torch.randn(len(MIX), longest, HEADS, HEAD_DIM).to(dtype).requires_grad_().transpose(1, 2)
        for _ in range(3)
    ]
    grad = torch.randn(len(MIX), longest, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)
    packed = Packed.from_lengths(MIX)
    qkv = torch.randn(sum(MIX), 3 * HEADS * HEAD_DIM).to(dtype).requires_grad_()
    packed_grad = torch.randn(sum(MIX), HEADS * HEAD_DIM).to(dtype)
    rng = torch.tensor([1, 2, 0])
    keep = (torch.arange(longest) < lengths[:, None])[:, None, None]
    if causal:
        keep = keep & torch.ones(longest, longest, dtype=torch.bool).tril()
    hide = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).to(dtype)

    def composition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5 + hide
        return functional.dropout(scores.softmax(-1), dropout) @ value

    def both(face: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(face(*padded), padded, grad)

    options: dict[str, Any] = {"causal": causal, "dropout_p": dropout, "rng": rng}
    return {
        "packed": lambda: torch.autograd.grad(
            self_attention_packed(qkv, HEADS, HEADS, packed, **options), qkv, packed_grad
        ),
        "ours": both(lambda q, k, v: attention(q, k, v, key_lengths=lengths, **options)),
        "sdpa": both(
            lambda q, k, v: functional.scaled_dot_product_attention(
                q, k, v, attn_mask=keep, dropout_p=dropout
            )
        ),
        "explicit": both(composition),
    }


def ceiling(dtype: torch.dtype) -> float:
    """flop/s of the fastest matrix product."""
    x, weight = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024)
    w = weight.to(dtype)
    with torch.no_grad():
        times = median_seconds({"mm": lambda: x @ w, "linear": lambda: linear(x, weight)}, 0.5)
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


def row(
    shape: str,
    faces: dict[str, Callable[[], object]],
    pairs: int,
    dtype: torch.dtype,
    top: float,
    seconds: float,
) -> str:
    """A line of the table; ``pairs`` of tokens are attended to, ``top`` is the ceiling."""
    times = median_seconds(faces, seconds)
    peer = min(times["sdpa"], times["explicit"])
    flop = 14 * HEADS * HEAD_DIM * pairs
    line = f"{str(dtype)[6:]:9s}{shape:21s}"
    line += "".join(f"{1e3 * times[k]:8.2f}" for k in ("packed", "ours", "sdpa", "explicit"))
    line += f" | {peer / times['packed']:22.2f}x {peer / times['ours']:8.2f}x | "
    return line + f"{flop / times['packed'] / top:4.0%} of {top / 1e9:.0f} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 16, 32, 64, 128, 2048])
    parser.add_argument("--seconds", type=float, default=1.0, help="a shape and dtype")
    parser.add_argument("--memory", action="store_true", help="a column of peak memory, MB")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, batch, length, dtype = arguments.one
        one_pass(name, int(batch), int(length), getattr(torch, dtype))
        return
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{'dtype':9s}{'shape':21s}ms:  packed    ours    sdpa explicit | "
        "better peer: to packed   to ours | packed"
    )
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        top = ceiling(dtype)
        for length in arguments.lengths:
            batch = 32 if length < 1024 else 4
            faces = contenders(batch, length, dtype)
            shape, pairs = f"{batch}x{HEADS}x{length}x{HEAD_DIM}", batch * length * length
            line = row(shape, faces, pairs, dtype, top, arguments.seconds)
            if arguments.memory:
                megabytes = {k: peak_megabytes(k, batch, length, dtype) for k in faces}
                line += "  MB " + " ".join(f"{k} {v:.0f}" for k, v in megabytes.items())
            print(line, flush=True)
        for causal, dropout in ((False, 0.0), (False, 0.1), (True, 0.1)):
            shape = "mix" + (" causal" if causal else "") + (" dropout" if dropout else "")
            pairs = sum(n * (n + 1) // 2 if causal else n * n for n in MIX)
            faces = mixed(dtype, causal, dropout)
            print(row(shape, faces, pairs, dtype, top, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
