"""What benchmarks of whole programs share: a process for each competitor, facts, tables, files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds after a turn in which the threads of a program may still spin.
PAUSE = 0.3


def memory_of_process(field: str, process: int | str = "self") -> int:
    """A line of /proc/PROCESS/status in bytes; 0 where there is none."""
    try:
        with open(f"/proc/{process}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    except (OSError, StopIteration):
        return 0


def free_memory() -> int:
    """Bytes that new processes can have."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)


def machine() -> str:
    """What the figures belong to."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return name


def setting_title(title: str, threads: int, packages: Sequence[str], device: str = "cpu") -> str:
    """What figures belong to: the title, threads, machine, and versions of packages that are there."""
    if device != "cpu":
        import torch

        on_gpu = torch.device(device).type == "cuda"
        title += f", on {torch.cuda.get_device_name(device) if on_gpu else device}"
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{title}; {threads} threads, {machine()}, {', '.join(versions)}"


def first_missing(*modules: str) -> str | None:
    """The first of them that is not installed."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), None)


def require(*modules: str, what: str) -> None:
    """Ends the process with one line, status 2, if one of them is not installed."""
    missing = first_missing(*modules)
    if missing:
        say(f'error: {what} needs {missing}, which is not installed (pip install ".[test]")')
        sys.exit(2)


class WorkerError(RuntimeError):
    """The process of a competitor refused, failed, or ended without a result."""


class Worker:
    """A process of its own that prepares once, and then answers each message.

    Args:
        prepare: a function of a module (it is looked up by name in the new process) that gives the
            function which answers a message.
        arguments: of ``prepare``.
        environment: variables that the process has beside those of this one, from its start.

    Raises:
        WorkerError: as :meth:`ask`.
    """

    def __init__(
        self,
        prepare: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, prepare, arguments))
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()

    def ask(self, message: Any) -> Any:
        """The answer to a message.

        Raises:
            WorkerError: what the process raised, as a text, or that it has ended.
        """
        try:
            self._connection.send(message)
        except ConnectionError:
            pass  # It has ended; why may be there to be read.
        try:
            good, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerError("ended without a result") from None
        if not good:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Any, prepare: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer = prepare(*arguments)
        while True:
            connection.send((True, answer(connection.recv())))
    except EOFError:
        pass
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))


def in_turns(
    makers: Mapping[str, Callable[[], Worker]],
    load: Any,
    messages: Iterable[Any],
    between: Callable[[], None] | None = None,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What each competitor answers, all of them in turns; who refuses to load is left out.

    Args:
        makers: of their processes, by name.
        load: the first message, to each of them before all else.
        messages: of the rounds.
        between: called before each round.

    Returns:
        by name, the answer to the first message, and those to the others.

    Raises:
        WorkerError: one of them failed later.
    """
    workers: dict[str, Worker] = {}
    loaded: dict[str, Any] = {}
    answers: dict[str, list[Any]] = {}
    try:
        for name, make in makers.items():
            say(f"... {name}")
            worker = make()
            try:
                loaded[name] = worker.ask(load)
            except WorkerError as error:
                say(f"{name}: left out: {error}")
                worker.close()
                continue
            workers[name] = worker
            answers[name] = []
        for message in messages:
            if between is not None:
                time.sleep(PAUSE)
                between()
            for name, worker in workers.items():
                time.sleep(PAUSE)
                answers[name].append(worker.ask(message))
    finally:
        for worker in workers.values():
            worker.close()
    return loaded, answers


@dataclass(frozen=True)
class Command:
    """A fresh Python that gets a line, and prints one when it is done with it.

    Attributes:
        arguments: of Python.
        environment: variables that it has beside those of this process.
    """

    arguments: list[str]
    environment: tuple[tuple[str, str], ...] = ()


def start(command: Command, line: str) -> tuple[float, int]:
    """Seconds to the first line of a fresh Python that gets a line, and its peak memory.

    Raises:
        WorkerError: it failed, or printed nothing.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment |= dict(command.environment)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdin and process.stdout
    process.stdin.write(line + "\n")
    process.stdin.flush()
    printed = process.stdout.readline()
    seconds = time.perf_counter() - began
    # It waits for the end of its input. (The peak that the system tells of a process that has ended
    # can be that of the one that started it.)
    peak = memory_of_process("VmHWM", process.pid)
    _, errors = process.communicate()
    if not printed.strip() or process.returncode:
        raise WorkerError(errors.strip().splitlines()[-1] if errors.strip() else "no output")
    return seconds, peak


def starts_in_turns(
    commands: Mapping[str, Command], line: str, runs: int
) -> dict[str, dict[str, Any]]:
    """Seconds of each of so many starts, and the peak memory, by name; who fails is left out.

    A round before them warms the page cache.
    """
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in commands}
    for number in range(runs + 1):
        for name in list(found):
            try:
                seconds, peak = start(commands[name], line)
            except WorkerError as error:
                say(f"{name}: left out: {error}")
                del found[name]
                continue
            if number:
                found[name]["seconds"].append(seconds)
                found[name]["peak"] = peak
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """The lines of a table, for a terminal or for a document."""
    if markdown:
        return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def graphs_said(facts: dict[str, Any]) -> str:
    """Of a competitor's figures: how many CUDA graphs it replays, where that is of concern."""
    if "graphs" not in facts:
        return ""
    return f", {facts['graphs']} graphs" if facts["graphs"] else ", NO GRAPHS"


def append_json(path: Path | None, value: Any) -> None:
    """Adds a line to a file, where there is one."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """What :func:`append_json` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def say(text: str) -> None:
    """Tells how far it is, beside the results."""
    print(text, file=sys.stderr, flush=True)
