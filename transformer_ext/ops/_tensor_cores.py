"""Whether attention may multiply on the tensor cores of a GPU: after a trial, not before.

A class of those kernels (device, type, head_dim) is taken once it has computed a small problem as
plain PyTorch does, on this device, in this process: at the first call that would take it. Until
then, and for good where it fails, the simple kernels compute attention. The trial must wait for the
device and allocates memory, so it is left for a later call where that cannot be done: while a CUDA
graph is recorded, under ``torch.compile`` and other tracing, on fake tensors.

``TRANSFORMER_EXT_CUDA_ATTENTION`` in the environment, read at each call: ``auto`` or nothing is the
above, ``simple`` never takes the tensor cores, ``tensor`` takes them without a trial.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from transformer_ext.ops._backend import has_numbers

__all__ = ["HEAD_DIMS", "allowed", "exist_on", "only", "settle", "what_takes_their_place"]

VARIABLE = "TRANSFORMER_EXT_CUDA_ATTENTION"
#: What there are such kernels for.
HEAD_DIMS = (32, 64, 128)
_TYPES = (torch.bfloat16, torch.float16)
_DEVICE = "cuda"

# By device index, type and head_dim: whether the class is taken.
_verdicts: dict[tuple[int, str, int], bool] = {}
# Of those without room for their trial: how many calls to let go by before the next, and how many
# are left of them. An attempt makes torch give its cached memory back.
_waits: dict[tuple[int, str, int], tuple[int, int]] = {}
_trial = threading.Lock()
_thread = threading.local()


def exist_on(device: torch.device) -> bool:
    """Whether the GPU has the instructions."""
    return device.type == _DEVICE and torch.cuda.get_device_capability(device) >= (8, 0)


def allowed(query: Tensor, head_dim: int) -> bool:
    """Whether the kernels may be used for a query, after a trial if there was none.

    Raises:
        ValueError: the variable of the environment is none of its values.
    """
    device = query.device
    if device.type != _DEVICE or query.dtype not in _TYPES or head_dim not in HEAD_DIMS:
        return False
    index = 0 if device.index is None else device.index
    known = _known(index, _name(query.dtype), head_dim)
    if known is not None:
        return known
    return _can_wait(query) and _try(torch.device(device.type, index), query.dtype, head_dim)


@contextlib.contextmanager
def only(kernels: bool) -> Iterator[None]:
    """Within it, this thread takes the kernels wherever they fit, or never."""
    before = getattr(_thread, "only", None)
    _thread.only = kernels
    try:
        yield
    finally:
        _thread.only = before


def settle(device: torch.device, dtype: torch.dtype, head_dim: int, agrees: bool) -> None:
    """The verdict on a class, from now on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    _verdicts[index, _name(dtype), head_dim] = agrees


def what_takes_their_place() -> str:
    """Where they have failed, for people."""
    choice = os.environ.get(VARIABLE) or "auto"
    if choice == "tensor":
        return f"{VARIABLE}=tensor takes it nevertheless, =simple takes the simple kernels"
    if choice == "simple":
        return f"nothing changes, {VARIABLE}=simple never takes it"
    return "the simple kernels take its place"


def asked() -> str:
    """What the variable of the environment asks for.

    Raises:
        ValueError: it is none of its values.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "simple", "tensor"):
        raise ValueError(f"{VARIABLE}: expected auto, simple or tensor, got {choice!r}")
    return choice


# torch.compile cannot trace it; what is not known when a graph is made stays off in it.
@torch.compiler.assume_constant_result
def _known(index: int, dtype: str, head_dim: int) -> bool | None:
    forced: bool | None = getattr(_thread, "only", None)
    if forced is not None:
        return forced
    choice = asked()
    return _verdicts.get((index, dtype, head_dim)) if choice == "auto" else choice == "tensor"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _can_wait(query: Tensor) -> bool:
    """Whether this is a call with numbers, whose device may be waited for."""
    return has_numbers(query) and not _is_recorded(query)


def _is_recorded(query: Tensor) -> bool:
    """Whether what is queued goes into a CUDA graph."""
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        return torch.cuda.is_current_stream_capturing()


def _try(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    # A thread that waited here inside a backward pass could keep the trial's own from running.
    if not _trial.acquire(blocking=False):
        return False
    try:
        known = _known(device.index, _name(dtype), head_dim)
        if known is not None:
            return known
        if not exist_on(device):
            settle(device, dtype, head_dim, False)
            return False
        key = (device.index, _name(dtype), head_dim)
        wait, left = _waits.get(key, (0, 0))
        if left:
            _waits[key] = wait, left - 1
            return False
        # It imports all ops, this one's too.
        from transformer_ext.ops import _check

        try:
            row = _check.attention_on_tensor_cores(device, dtype, head_dim)
        except torch.OutOfMemoryError:
            wait = 2 * wait or 1
            _waits[key] = wait, wait
            return False
        settle(device, dtype, head_dim, row.agrees)
        if row.device_lost:
            raise RuntimeError(f"{row.problem}. {row.cure}")
        if not row.agrees:
            print(
                f"transformer_ext: {row.problem}; the simple kernels compute this attention from "
                "now on",
                file=sys.stderr,
            )
        return row.agrees
    finally:
        _trial.release()
