"""Which implementation of an op runs: the compiled one, or its twin in plain PyTorch.

``auto`` (the default) takes the compiled one wherever this build has it for the device and dtype at
hand, else the twin, and says so once. ``reference`` forces the twins: to step through with a
debugger, to find whose NaN it is, or to run on a device without compiled kernels. ``compiled``
makes a missing kernel an error. The environment variable ``TRANSFORMER_EXT_BACKEND`` sets the
choice at start, :func:`set_backend` at any time.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from transformer_ext._native import (
    asked_backend,
    checked_backend,
    cuda_problem,
    loaded_ops,
)

# Which dtypes the compiled kernels take, by device type.
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

_libraries = loaded_ops()
_known: dict[tuple[str, str], bool] = {}
_refused: dict[tuple[str, str], str] = {}
_said: set[str] = set()


_backend = asked_backend()


def backend() -> str:
    """The choice in force: ``auto``, ``compiled`` or ``reference``."""
    return _backend


class set_backend:
    """Choose the implementation of all ops: ``set_backend("reference")``.

    As a context manager (``with set_backend("reference"):``) the former choice comes back at the
    end of the block.

    Raises:
        ValueError: the name is not one of ``auto``, ``compiled``, ``reference``.
    """

    def __init__(self, name: str):
        global _backend
        self._former = _backend
        _backend = checked_backend(name, "set_backend")

    def __enter__(self) -> set_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _backend
        _backend = self._former


# torch.compile cannot trace the question to the dispatcher; the answer never changes.
@torch.compiler.assume_constant_result
def has_kernel(op: str, device_type: str) -> bool:
    """Whether this build has the raw op ``transformer_ext::<op>`` for the device type."""
    key = (op, device_type)
    known = _known.get(key)
    if known is None:
        dispatch_key = _DISPATCH_KEYS.get(device_type)
        known = (
            _libraries.cpu
            and dispatch_key is not None
            and hasattr(torch.ops.transformer_ext, op)
            and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"transformer_ext::{op}", dispatch_key
            )
        )
        _known[key] = known
    return known


@torch.compiler.assume_constant_result
def _problem_on(device: int) -> str:
    """Why none of the compiled ops runs on a GPU, or nothing."""
    problem = cuda_problem(device)
    return problem and f"the compiled ops do not run on cuda:{device}: {problem}"


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the raw op ``transformer_ext::<op>`` does not run there, whatever was chosen, or nothing."""
    kind = device.type
    if not has_kernel(op, kind):
        return _why_no_kernel(op, kind)
    if kind == "cuda" and (reason := _problem_on(device.index)):
        return reason
    if (op, kind) in _refused:
        return _refused[op, kind]
    return "" if dtype in _DTYPES[kind] else f"{op}: no compiled kernel for {dtype} on {kind}"


def problem_on(device: torch.device) -> str:
    """Why none of the compiled ops runs on a device, though this build has them, or nothing."""
    if device.type != "cuda":
        return ""
    return _problem_on(torch.cuda.current_device() if device.index is None else device.index)


def use_compiled(op: str, *tensors: Tensor | None) -> bool:
    """Whether the raw op ``transformer_ext::<op>`` is to be used for these tensors.

    Args:
        op: name of the raw op.
        tensors: the tensors whose device and dtype decide; None is passed over.

    Raises:
        RuntimeError: the backend is ``compiled`` and this build has no kernel for them.
    """
    if _backend == "reference":
        return False
    reason = ""
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            return False  # The twin says which argument it is.
        if reason := why_not(op, tensor.device, tensor.dtype):
            if not tensor.is_floating_point():
                return False
            break
    if not reason:
        return True
    if _backend == "compiled":
        raise RuntimeError(reason)
    if not torch.compiler.is_compiling():
        _say_once(reason)
    return False


def check_tensors(**arguments: Tensor | None) -> None:
    """Raise a TypeError for an argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise no_tensor(name, value)


def no_tensor(name: str, value: object) -> TypeError:
    """The error for an argument that is none; a check in a line of its own is the quickest."""
    return TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_floating(name: str, x: Tensor) -> None:
    """Raise a TypeError for what is no tensor of a floating-point type."""
    if not isinstance(x, Tensor):
        raise no_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that a decision in Python may depend on."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )


def refuse(op: str, device_type: str, reason: str) -> None:
    """Takes the raw op's kernels on a kind of device for missing from now on, without a word."""
    _refused[op, device_type] = reason
    _said.add(reason)


def _why_no_kernel(op: str, device: str) -> str:
    reason = f"{op}: no compiled kernel for {device}"
    if device == "cpu" and _libraries.why_not_cpu:
        reason += f" ({_libraries.why_not_cpu})"
    elif device == "cuda" and _libraries.why_not_cuda:
        reason += f" ({_libraries.why_not_cuda}; python -m transformer_ext.info says more)"
    return reason


def _say_once(reason: str) -> None:
    if reason in _said:
        return
    _said.add(reason)
    print(
        f"transformer_ext: {reason}; running the plain PyTorch reference instead",
        file=sys.stderr,
    )
