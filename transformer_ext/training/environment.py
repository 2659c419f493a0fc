"""What the machine offers: device, precision, memory settings, memory in use.

Process-wide settings are made only by functions that a command calls from its ``main``, never at
import.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping

import torch

__all__ = [
    "choose_device",
    "choose_precision",
    "describe_device",
    "keep_freed_memory",
    "peak_memory_bytes",
]

#: glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Lets malloc keep the pages that a step frees for the next step; True if it took effect.

    By default glibc maps each tensor above 32 MiB anew and gives it back when it is freed: the page
    faults cost more than the arithmetic on such a tensor (ReLU of 32 MiB: 16 ms against 1.3 ms).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # mallopt takes an int, and 2 GiB - 1 is the largest; 1 GiB covers every tensor of a step. An
    # older glibc refuses a threshold above 32 MiB, but lets mmap be turned off.
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _GIB) or libc.mallopt(_M_MMAP_MAX, 0)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1))


def choose_device(wanted: str = "auto", local_rank: int = 0) -> torch.device:
    """The device to train on.

    Args:
        wanted: "auto" (a GPU of CUDA if torch can use one, else the CPU), or torch's name of one.
        local_rank: Number of this process on its machine, which picks the GPU.

    Raises:
        ValueError: torch does not know or cannot use that device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(
            f"--device: got {wanted!r}, expected auto, cpu, cuda, cuda:N or mps"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or "none: this torch is a CPU build"
            raise ValueError(f"--device: got {wanted!r}, but torch sees no CUDA GPU (CUDA {built})")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"--device: got cuda:{index}, but this machine has {torch.cuda.device_count()} GPUs"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device: got 'mps', but torch cannot use it on this machine")
    return device


def choose_precision(
    wanted: str, device: torch.device, cpu_features: Mapping[str, bool] | None = None
) -> str:
    """Type of the activations: "float32", "bfloat16" or (CUDA only) "float16".

    ``auto`` is bfloat16 where the hardware multiplies it (AVX512_BF16 or AMX; CUDA capability 8.0)
    and float32 elsewhere, except on CUDA before 8.0: float16.

    Args:
        wanted: "auto" or one of the three.
        device: Where the model is.
        cpu_features: As ``transformer_ext.info.collect()["cpu"]["features"]`` has them.

    Raises:
        ValueError: An unknown precision, float16 on a device other than CUDA, or bfloat16 on a GPU
            that does not multiply it.
    """
    known = ("auto", "float32", "bfloat16", "float16")
    if wanted not in known:
        raise ValueError(f"--precision: got {wanted!r}, expected one of {', '.join(known)}")
    if wanted == "float16" and device.type != "cuda":
        raise ValueError(
            f"--precision: float16 needs a CUDA GPU, and the device is {device.type}; "
            "use bfloat16 or float32"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if wanted == "bfloat16" and device.type == "cuda" and capability < (8, 0):
        raise ValueError(
            f"--precision: bfloat16 needs a GPU of compute capability 8.0, and {device} has "
            f"{capability[0]}.{capability[1]}; use float16 or float32"
        )
    if wanted != "auto":
        return wanted
    features = cpu_features or {}
    if device.type == "cuda":
        return "bfloat16" if capability >= (8, 0) else "float16"
    if device.type == "cpu" and (features.get("bf16") or features.get("amx_bf16")):
        return "bfloat16"
    return "float32"


def describe_device(device: torch.device, cpu_name: str) -> str:
    """Name of the device for people: the GPU's name and memory, or the CPU's model."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / _GIB
        return f"{device}, {torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    return f"cpu, {cpu_name}" if device.type == "cpu" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
