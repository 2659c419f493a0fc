"""How much memory a case of a benchmark needs, measured in a fresh process."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any


def raised_peak(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB by which ``prepare(*arguments)()`` raises the greatest resident size of a new process.

    Args:
        prepare: a function of a module (it is looked up by name in the new process); what it makes
            itself, the inputs, is not counted.

    NaN where the system does not tell (it does on Linux).
    """
    if not sys.platform.startswith("linux"):
        return float("nan")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_raised_peak, (prepare, arguments))


def _raised_peak(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> float:
    call = prepare(*arguments)
    before = _peak()
    call()
    return _peak() - before


def _peak() -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
