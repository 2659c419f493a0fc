"""How much memory a case of a benchmark needs, measured in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from processes import Worker, memory_of_process


def raised_peak(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB by which ``prepare(*arguments)()`` raises the greatest resident size of a new process.

    Args:
        prepare: a function of a module (it is looked up by name in the new process); what it makes
            itself, the inputs, is not counted.

    NaN where the system does not tell (Linux does).
    """
    worker = Worker(_prepared, prepare, arguments)
    try:
        return float(worker.ask(None))
    finally:
        worker.close()


def _prepared(
    prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> Callable[[None], float]:
    call = prepare(*arguments)

    def answer(_: None) -> float:
        before = memory_of_process("VmHWM")
        call()
        after = memory_of_process("VmHWM")
        return (after - before) / 2**20 if after else float("nan")

    return answer
