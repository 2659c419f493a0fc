"""Finds and loads the compiled files: `_C` (no torch), `_ops.so` and `_ops_cuda.so` (for torch).

They lie together in one folder, which is one of
- `transformer_ext/_compiled` beside this file: the installed package;
- `build/dev/compiled` (or `build/cuda/compiled`) in a source tree, made there by
  `cmake --preset dev && cmake --build --preset dev`;
- `transformer_ext/_compiled` of the installed package, when this file is that of a source tree: so
  Python started in the repository works after a plain `pip install .` although the source folder
  hides the installed one.
In a source tree the folder made from this very source wins.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
import shlex
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from transformer_ext._build_stamp import source_stamp

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent
_PRESETS = ("cuda", "dev")
_loading = threading.Lock()

#: What TRANSFORMER_EXT_BACKEND and `transformer_ext.ops.set_backend` can ask for.
BACKENDS = ("auto", "compiled", "reference")
_IS_SOURCE_TREE = (_ROOT / "csrc" / "ops.cpp").is_file()


class NativeError(ImportError):
    """The compiled part is missing or does not load; the message says how to mend that."""


@dataclass(frozen=True)
class Compiled:
    """A folder of compiled files and the `build_info.json` in it."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def stale(self) -> bool:
        """True if this is a source tree and the files were made from another state of it."""
        return _IS_SOURCE_TREE and self.info.get("stamp") != _stamp()


@functools.cache
def _stamp() -> str:
    return source_stamp(_ROOT)


def repair_command() -> str:
    """The command that makes the compiled part fit."""
    if _IS_SOURCE_TREE:
        command = "pip install ."
        found = find_compiled()
        if found is not None and found.folder.is_relative_to(_ROOT / "build"):
            preset = found.folder.parent.name
            command = f"cmake --preset {preset} && cmake --build --preset {preset}"
        return f"cd {shlex.quote(str(_ROOT))} && {command}"
    return "pip install --force-reinstall --no-deps <the folder of the repository>"


def _candidates() -> Iterator[Path]:
    yield _PACKAGE / "_compiled"
    if _IS_SOURCE_TREE:
        for preset in _PRESETS:
            yield _ROOT / "build" / preset / "compiled"
        # Not before it is needed: importing it takes as long as a small model takes to load.
        import importlib.metadata

        try:
            distribution = importlib.metadata.distribution("transformer-ext")
        except importlib.metadata.PackageNotFoundError:
            return
        yield Path(str(distribution.locate_file("transformer_ext/_compiled")))


@functools.cache
def find_compiled() -> Compiled | None:
    """The folder of compiled files in use, or None where there is none."""
    first = None
    for folder in _candidates():
        try:
            info = json.loads((folder / "build_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        compiled = Compiled(folder, info)
        if not compiled.stale:
            return compiled
        first = first or compiled
    return first


@functools.cache
def _compiled() -> Compiled:
    compiled = find_compiled()
    if compiled is None:
        looked = ", ".join(str(folder) for folder in _candidates())
        raise NativeError(
            f"transformer_ext: no compiled files (looked in {looked}).\n"
            f"To build them: {repair_command()}"
        )
    if compiled.stale:
        warnings.warn(
            f"transformer_ext: the compiled files in {compiled.folder} were made from another "
            f"state of this source tree.\nTo build them anew: {repair_command()}",
            stacklevel=2,
        )
    return compiled


def asked_backend() -> str:
    """What TRANSFORMER_EXT_BACKEND asks of the ops, see `transformer_ext.ops`.

    Raises:
        ValueError: it is none of BACKENDS.
    """
    name = os.environ.get("TRANSFORMER_EXT_BACKEND") or "auto"
    return checked_backend(name, "TRANSFORMER_EXT_BACKEND")


def checked_backend(name: str, where: str) -> str:
    """The name of a backend; `where` is for the message.

    Raises:
        ValueError: it is none of BACKENDS.
    """
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def native() -> ModuleType:
    """The module `_C`: everything compiled that does not need torch.

    Raises:
        NativeError: it is missing, or does not load in this Python.
        ValueError: TRANSFORMER_EXT_ISA asks for an instruction set that there is not, or
            TRANSFORMER_EXT_BACKEND, which says nothing to this module, is wrong.
    """
    # It cannot be loaded twice, as by two threads that come first.
    with _loading:
        return _native()


@functools.cache
def _native() -> ModuleType:
    asked_backend()
    compiled = _compiled()
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = compiled.folder / f"_C{suffix}"
        if path.is_file():
            break
    else:
        raise NativeError(
            f"transformer_ext: {compiled.folder} holds no _C for Python "
            f"{sys.version_info.major}.{sys.version_info.minor} (it was built for Python "
            f"{compiled.info.get('python')}).\nTo build it: {repair_command()}"
        )
    name = "transformer_ext._C"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        # The instruction set is chosen here, so that a wrong choice is met here.
        module.isa()
    except RuntimeError as error:
        sys.modules.pop(name, None)
        # A build with the kernels of one instruction set says so where this is not the machine's.
        kind = ValueError if os.environ.get("TRANSFORMER_EXT_ISA") else NativeError
        raise kind(str(error)) from None
    except ImportError as error:
        sys.modules.pop(name, None)
        raise NativeError(
            f"transformer_ext: {path} does not load: {error}\nTo build it anew: {repair_command()}"
        ) from error
    return module


def why_no_torch(error: Exception) -> str:
    """What to say of an `import torch` that failed: the cause, and what mends it."""
    return f"torch does not import ({error}). To mend it: pip install 'torch>=2.11'"


@dataclass(frozen=True)
class LoadedOps:
    """Which op libraries are in this process, and for those that are not, why."""

    cpu: bool
    cuda: bool
    why_not_cpu: str = ""
    why_not_cuda: str = ""


@functools.cache
def loaded_ops() -> LoadedOps:
    """Loads `_ops.so`, and `_ops_cuda.so` where it was built and torch has CUDA; never raises."""
    try:
        import torch
    except (ImportError, OSError) as error:
        why = why_no_torch(error)
        return LoadedOps(False, False, why, why)
    try:
        folder = _compiled().folder
        torch.ops.load_library(str(folder / "_ops.so"))
    except (NativeError, OSError) as error:
        why = str(error)
        if not isinstance(error, NativeError):
            # torch's own message names the file only; what the loader said is the cause.
            why = f"{error}: {error.__cause__}\nTo build it anew: {repair_command()}"
        return LoadedOps(False, False, why, why)
    if torch.version.cuda is None:
        return LoadedOps(True, False, why_not_cuda=f"torch {torch.__version__} has no CUDA")
    cuda = folder / "_ops_cuda.so"
    if not cuda.is_file():
        reason = _compiled().info.get("cuda_reason")
        return LoadedOps(True, False, why_not_cuda=f"the CUDA ops were not built: {reason}")
    try:
        torch.ops.load_library(str(cuda))
    except OSError as error:
        return LoadedOps(True, False, why_not_cuda=f"{error}: {error.__cause__}")
    return LoadedOps(True, True)


_cuda_problems: dict[int, str] = {}


def cuda_problem(device: int) -> str:
    """Why the compiled CUDA ops do not run on a GPU; empty where they do, or are not loaded.

    What may pass, such as a GPU whose memory is all taken, is asked for again by the next call.
    """
    known = _cuda_problems.get(device)
    if known is not None:
        return known
    problem, lasts = _ask_for_cuda_problem(device)
    if lasts:
        _cuda_problems[device] = problem
    return problem


def _ask_for_cuda_problem(device: int) -> tuple[str, bool]:
    if not loaded_ops().cuda:
        return "", True
    import torch

    try:
        ask = ctypes.CDLL(str(_compiled().folder / "_ops_cuda.so")).transformer_ext_cuda_problem
    except (AttributeError, OSError) as error:
        return str(error), True
    ask.restype = ctypes.c_char_p
    lasts = ctypes.c_int(0)
    # Not by cudaSetDevice in there: to come back with it would make a context on the former device.
    with torch.cuda.device(device):
        problem = ask(ctypes.byref(lasts))
    return problem.decode() if problem else "", bool(lasts.value)


def load_ops() -> bool:
    """True once the ops for CPU tensors are registered as `torch.ops.transformer_ext.*`."""
    return loaded_ops().cpu


def ops_error() -> str:
    """Why :func:`load_ops` is False, and the command that mends it; empty where it is True."""
    return loaded_ops().why_not_cpu
