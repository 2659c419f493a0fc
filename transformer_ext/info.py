"""What is installed, what was built and how, what is in use and why: for a bug report.

`python -m transformer_ext.info` prints text, `--json` the same for programs. It works when torch or
the compiled part is missing or broken, and then says how to mend that; the exit status is 1 then.
`--check` computes small problems by every compiled op and by plain PyTorch, and compares.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer_ext import __version__, _native
from transformer_ext._command import command
from transformer_ext.config import ArgumentParser

PACKAGES = (
    "numpy",
    "sentencepiece",
    "sacrebleu",
    "PyYAML",
    "matplotlib",
)
VARIABLES = (
    "TRANSFORMER_EXT_BACKEND",
    "TRANSFORMER_EXT_CUDA_ATTENTION",
    "TRANSFORMER_EXT_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return model[1] if model else platform.machine()


def _system() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _compiled(problems: list[str]) -> dict[str, Any]:
    compiled = _native.find_compiled()
    if compiled is None:
        problems.append(f"Nothing compiled was found. To build it: {_native.repair_command()}")
        return {}
    if compiled.stale:
        problems.append(
            "The compiled files were made from another state of this source tree. "
            f"To build them anew: {_native.repair_command()}"
        )
    return {"folder": str(compiled.folder), "stale": compiled.stale, **compiled.info}


def _other_state(what: str, error: Exception) -> str:
    return (
        f"The compiled {what} are not those that the Python files expect ({error}). "
        f"To build them anew: {_native.repair_command()}"
    )


def _decoding(native: Any, problems: list[str]) -> dict[str, str]:
    from transformer_ext.inference.engine import resolve_compute_type

    try:
        chosen = resolve_compute_type("auto")
        return {
            "compute_type_auto": chosen,
            "compute_type_auto_reason": (
                "the fastest" if chosen == "int8" else "int8 is slower without AVX2"
            ),
            "int8_instruction": native.int8_instruction(),
            "bfloat16_instruction": (
                "vdpbf16ps" if native.has_bfloat16() else "none: the engine needs AVX512_BF16"
            ),
        }
    except AttributeError as error:
        problems.append(_other_state("files", error))
        return {}


def _cpu(problems: list[str]) -> dict[str, Any]:
    try:
        native = _native.native()
        best, isa = native.best_isa(), native.isa()
    except (ImportError, RuntimeError) as error:
        if _native.find_compiled() is not None:
            problems.append(str(error))
        return {}
    if os.environ.get("TRANSFORMER_EXT_ISA"):
        why = f"asked for by TRANSFORMER_EXT_ISA; the best of this machine is {best}"
    else:
        why = "the best that this machine and this build have"
    return {
        "isa": isa,
        "isa_reason": why,
        "features": native.cpu_features(),
        "decoding": _decoding(native, problems),
        "default_threads": native.default_threads(),
    }


def _cuda_devices(torch: Any, ops: _native.LoadedOps) -> list[dict[str, Any]]:
    devices = []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    problems: dict[tuple[int, int], str] = {}
    if ops.cuda and found:
        # To ask makes a context there, of hundreds of MB: on this process's own GPU, and no other
        # of its kind, since for those the answer is the same.
        own = torch.cuda.current_device()
        for index in (own, *range(len(found))):
            kind = (found[index].major, found[index].minor)
            if kind not in problems:
                problems[kind] = _native.cuda_problem(index)
    for properties in found:
        capability = (properties.major, properties.minor)
        problem = problems[capability] if ops.cuda else ops.why_not_cuda
        kernels = f"no, plain PyTorch instead: {problem}" if problem else "yes"
        devices.append(
            {
                "name": properties.name,
                "capability": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compiled_kernels": kernels,
            }
        )
    return devices


def _gemm() -> Any:
    from transformer_ext.ops import _tensor_cores
    from transformer_ext.ops.linear import gemm_choices

    _tensor_cores.asked()  # A wrong variable of the environment is an error on any machine.
    return gemm_choices()


def _torch(problems: list[str]) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken torch can raise anything
        problems.append(_native.why_no_torch(error))
        return {"version": _version("torch")}
    ops = _native.loaded_ops()
    if not ops.cpu and _native.find_compiled() is not None:
        problems.append(ops.why_not_cpu)
    result: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_ops": ops.cpu,
        "cuda_ops": ops.cuda,
    }
    if not ops.cuda:
        result["cuda_ops_reason"] = ops.why_not_cuda
    result["cuda_devices"] = _cuda_devices(torch, ops)
    if torch.version.cuda and not result["cuda_devices"]:
        result["cuda_devices_reason"] = "torch has CUDA, but finds no GPU (nvidia-smi says more)"
    if ops.cpu:
        try:
            result["gemm"] = _gemm()
        except (AttributeError, ImportError, RuntimeError) as error:
            problems.append(_other_state("ops", error))
    return result


def collect() -> dict[str, Any]:
    """All that :func:`main` prints, as one dict; `problems` lists what hinders work, and the cure.

    Raises:
        ValueError: a variable of the environment is none of its values.
    """
    problems: list[str] = []
    compiled = _compiled(problems)
    cpu = _cpu(problems)
    torch = _torch(problems)
    return {
        "transformer_ext": {"version": __version__, "folder": str(Path(__file__).parent)},
        "system": _system(),
        "compiled": compiled,
        "cpu": cpu,
        "torch": torch,
        "problems": problems,
    }


def _check(wanted: str, problems: list[str]) -> dict[str, Any]:
    """The rows of the check on a device.

    Raises:
        ValueError: a device that is not to be had.
    """
    if not _native.load_ops():
        return {"device": wanted, "rows": []}  # A problem says why.
    from transformer_ext.ops import _backend, _check
    from transformer_ext.training.environment import choose_device

    device = choose_device(wanted)
    rows = _check.check(device) if device.type in ("cpu", "cuda") else []
    for row in rows:
        if not row.agrees:
            problems.append(f"{row.problem}. {row.cure}")
    if not rows:
        why = _backend.problem_on(device)
        if not why:
            cause = (
                _native.loaded_ops().why_not_cuda if device.type == "cuda" else "only CPU and CUDA"
            )
            why = f"there are no compiled ops for {device} ({cause})"
        problems.append(f"--check: nothing was checked: {why}")
    return {"device": str(device), "rows": [_check_row(row) for row in rows]}


def _check_row(row: Any) -> dict[str, Any]:
    return {
        "op": row.op,
        "dtype": row.dtype,
        "cases": row.cases,
        "agrees": row.agrees,
        "error_of_allowed": round(row.share, 3),
    }


def _check_lines(check: dict[str, Any]) -> list[str]:
    if not check["rows"]:
        return ["check: nothing was checked"]  # A problem says why.
    lines = [f"check on {check['device']}, the greatest error as a share of what is allowed:"]
    for row in check["rows"]:
        verdict = f"ok, {row['error_of_allowed']:.2f}" if row["agrees"] else "FAILED"
        lines.append(f"  {row['op']:45s} {row['dtype']:9s} {row['cases']:3d} cases: {verdict}")
    agree = sum(row["agrees"] for row in check["rows"])
    return [*lines, f"  {agree} of {len(check['rows'])} agree with plain PyTorch"]


def _lines(value: Any, indent: str = "") -> list[str]:
    lines = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, (dict, list)):
            lines.append(f"{indent}{key}:{'' if item else ' none'}")
            lines += _lines(item, indent + "  ")
        else:
            if item is None or item == "":
                item = "none"
            elif isinstance(item, bool):
                item = "yes" if item else "no"
            lines.append(f"{indent}{key}: {item}")
    return lines


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = ArgumentParser(
        prog="python -m transformer_ext.info",
        description="Print what is installed, built and in use, for a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every compiled op with plain PyTorch on this machine too, forward and "
        "gradients; takes seconds",
    )
    parser.add_argument(
        "--device",
        help="auto, cpu, cuda, cuda:1: what --check runs on; auto takes a GPU if there is one",
    )
    arguments = parser.parse_args(argv)
    if arguments.device and not arguments.check:
        parser.error(f"--device: got {arguments.device!r} without --check, which it is for")
    info = collect()
    if arguments.check:
        info["check"] = _check(arguments.device or "auto", info["problems"])
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        problems = info.pop("problems")
        print("\n".join(_lines({name: info[name] for name in info if name != "check"})))
        if "check" in info:
            print("\n".join(_check_lines(info["check"])))
        for problem in problems:
            print(f"\nPROBLEM: {problem}")
        info["problems"] = problems
    return 1 if info["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
