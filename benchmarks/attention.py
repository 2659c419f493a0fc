"""Attention, forward + backward, against torch's scaled_dot_product_attention and the explicit
composition softmax(Q K^T) V.

    python benchmarks/attention.py [--dtypes float32] [--lengths 32 64] [--memory]
    python benchmarks/attention.py --device cuda [--quick]

`ours` takes padded [batch, heads, length, head_dim] tensors as its peers do, `packed` one
[tokens, 3 * heads * head_dim] buffer as in the model; the ratio is that of the better peer to each.
The last rows are what training has: sentences of many lengths, with causal mask and dropout too;
there `packed` has no padding, and all others mask it. The ceiling is the fastest matrix product
found in the same run (that of the bare multiply-adds is in benchmarks/csrc/attention_benchmark.cpp).

On a GPU (or with --backends) the table is another: 102,400 tokens of one length and of training's
mix, `packed` against each backend of scaled_dot_product_attention on the same tokens, padded and
masked where the lengths differ, and packed in a nested tensor. Forward, and backward alone; the
ceiling is a copy of the bytes that must be read and written. TRANSFORMER_EXT_CUDA_ATTENTION=simple
takes the kernels without tensor cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from processes import say
from timing import Times, arguments, copier, dtypes, median_seconds, print_row, save_row
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_ext.ops.attention import attention, self_attention_packed
from transformer_ext.ops.linear import linear
from transformer_ext.packed import Packed

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


#: Tokens on a GPU, four batches of training: what they take does not fit into its caches. And with
#: --quick.
TOKENS, QUICK_TOKENS = 102400, 640
CUDA_LENGTHS = [16, 32, 64, 128, 512, 2048]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def on_backends(
    lengths: list[int], causal: bool, dropout: float, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], torch.Tensor], Any, torch.Tensor]]:
    """By name: the forward pass, what it differentiates, and the gradient of its result."""
    longest, width = max(lengths), HEADS * HEAD_DIM
    packed = Packed.from_lengths(lengths).to(torch.get_default_device())
    qkv = torch.randn(sum(lengths), 3 * width).to(dtype).requires_grad_()
    padded = [
        torch.randn(len(lengths), longest, HEADS, HEAD_DIM).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    grad = torch.randn(len(lengths), longest, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)
    rng = torch.tensor([1, 2, 0])
    keep = None
    if min(lengths) < longest:
        keep = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
        if causal:
            keep = keep & torch.ones(longest, longest, dtype=torch.bool).tril()

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in padded),
                attn_mask=keep,
                dropout_p=dropout,
                is_causal=causal and keep is None,
            )

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = [torch.randn(sum(lengths), HEADS, HEAD_DIM).to(dtype).requires_grad_() for _ in range(3)]

    sides: list[torch.Tensor] = []

    def nested() -> torch.Tensor:
        if not sides:
            # Once: a model would have its tensors so.
            with torch.enable_grad():
                sides.extend(
                    torch.nested.nested_tensor_from_jagged(
                        x, offsets, min_seqlen=min(lengths), max_seqlen=longest
                    ).transpose(1, 2)
                    for x in flat
                )
        result = functional.scaled_dot_product_attention(
            *sides, dropout_p=dropout, is_causal=causal
        )
        return result.transpose(1, 2).values()

    faces: dict[str, tuple[Callable[[], torch.Tensor], Any, torch.Tensor]] = {
        "ours": (
            lambda: self_attention_packed(
                qkv, HEADS, HEADS, packed, causal, dropout_p=dropout, rng=rng
            ),
            qkv,
            torch.randn(sum(lengths), width).to(dtype),
        ),
        "nested": (nested, flat, torch.randn(sum(lengths), HEADS, HEAD_DIM).to(dtype)),
    }
    for name, backend in BACKENDS.items():
        faces[name] = (lambda backend=backend: sdpa(backend), padded, grad)
    return faces


def backend_rows(
    lengths: list[int], causal: bool, dropout: float, dtype: torch.dtype, seconds: float
) -> None:
    """Two lines of the table: forward, and backward."""
    title = f"{lengths[0]}" if min(lengths) == max(lengths) else "mix"
    title += f"{' causal' if causal else ''}{' dropout' if dropout else ''} "
    title += str(dtype).removeprefix("torch.")
    element = sum(lengths) * HEADS * HEAD_DIM * dtype.itemsize
    passes: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}}
    why = ""
    try:
        faces_by_name = on_backends(lengths, causal, dropout, dtype)
    except RuntimeError as error:
        faces_by_name, why = {}, _first_line(error)
    for name, (face, inputs, grad) in faces_by_name.items():
        try:
            with torch.no_grad():
                face()
            result = face()
            torch.autograd.grad(result, inputs, grad, retain_graph=True)
            if grad.is_cuda:
                # Errors of kernels come late.
                torch.cuda.synchronize()
        except RuntimeError as error:
            reason = _first_line(error)
            say(f"{title}: {name}: left out: {reason}")
            why = reason if name == "ours" else why
            continue

        def forward(face: Callable[[], torch.Tensor] = face) -> None:
            with torch.no_grad():
                face()

        passes["forward"][name] = forward
        passes["backward"][name] = lambda result=result, inputs=inputs, grad=grad: (
            torch.autograd.grad(result, inputs, grad, retain_graph=True)
        )
    # Queries, keys, values and the result; then their gradients too.
    for kind, count in (("forward", 4), ("backward", 8)):
        case, size = f"{kind} {title}", count * element
        try:
            times = median_seconds({**passes[kind], "copy": copier(size, dtype)}, seconds)
        except RuntimeError as error:
            why, times = _first_line(error), Times()
        if "ours" in times:
            print_row(case, times, size)
        else:
            print(f"{case:44s} FAILED: {why}", flush=True)
            save_row(case=case, seconds=dict(times), bytes=size, failed=why)


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:100]


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
    save_row(case=f"{shape} {str(dtype)[6:]}", seconds=times)
    peer = min(times["sdpa"], times["explicit"])
    flop = 14 * HEADS * HEAD_DIM * pairs
    line = f"{str(dtype)[6:]:9s}{shape:21s}"
    line += "".join(f"{1e3 * times[k]:8.2f}" for k in ("packed", "ours", "sdpa", "explicit"))
    line += f" | {peer / times['packed']:22.2f}x {peer / times['ours']:8.2f}x | "
    return line + f"{flop / times['packed'] / top:4.0%} of {top / 1e9:.0f} GFLOP/s"


def main() -> None:
    options = arguments(
        __doc__,
        lengths={"nargs": "+", "type": int},
        memory={"action": "store_true", "help": "a column of peak memory, MB"},
        backends={"action": "store_true", "help": "the table of a GPU on a CPU too"},
        one={"nargs": 4, "help": "(for --memory)"},
    )
    if options.one:
        name, batch, length, dtype = options.one
        one_pass(name, int(batch), int(length), getattr(torch, dtype))
        return
    torch.manual_seed(0)
    on_gpu = torch.device(options.device).type != "cpu"
    variant = os.environ.get("TRANSFORMER_EXT_CUDA_ATTENTION", "")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads {variant}")
    if on_gpu or options.backends:
        tokens = QUICK_TOKENS if options.quick else TOKENS
        lengths = options.lengths or (CUDA_LENGTHS[:2] if options.quick else CUDA_LENGTHS)
        mix = MIX * max(tokens // sum(MIX), 1)
        for dtype in dtypes(options):
            if dtype == torch.float32 and on_gpu and not options.dtypes:
                continue
            for length in lengths:
                same = [length] * max(tokens // length, 1)
                for causal in (False, True) if length >= 512 else (False,):
                    backend_rows(same, causal, 0.0, dtype, options.seconds)
            for causal, dropout in ((False, 0.0), (False, 0.1), (True, 0.1)):
                backend_rows(mix, causal, dropout, dtype, options.seconds)
        return
    print(
        f"{'dtype':9s}{'shape':21s}ms:  packed    ours    sdpa explicit | "
        "better peer: to packed   to ours | packed"
    )
    for dtype in dtypes(options):
        top = ceiling(dtype)
        for length in options.lengths or ([8] if options.quick else [8, 16, 32, 64, 128, 2048]):
            batch = 32 if length < 1024 else 4
            faces = contenders(batch, length, dtype)
            shape, pairs = f"{batch}x{HEADS}x{length}x{HEAD_DIM}", batch * length * length
            line = row(shape, faces, pairs, dtype, top, options.seconds)
            if options.memory:
                megabytes = {k: peak_megabytes(k, batch, length, dtype) for k in faces}
                line += "  MB " + " ".join(f"{k} {v:.0f}" for k, v in megabytes.items())
            print(line, flush=True)
        for causal, dropout in ((False, 0.0), (False, 0.1), (True, 0.1)):
            shape = "mix" + (" causal" if causal else "") + (" dropout" if dropout else "")
            pairs = sum(n * (n + 1) // 2 if causal else n * n for n in MIX)
            faces = mixed(dtype, causal, dropout)
            print(row(shape, faces, pairs, dtype, top, options.seconds), flush=True)


if __name__ == "__main__":
    main()
