"""Processes that share the work on a text, in order.

Not the standard library's pools: those import the main program anew in each process (for a training
that is torch) or copy it as it is, threads and all. A worker here imports only what its function
needs, and ends by itself when its parent is gone, however that was killed.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from transformer_ext.data.corpus import CorpusError

TaskT = TypeVar("TaskT")

# Tasks under way for each worker: one at work, one that waits for it, one whose result waits.
_AHEAD = 3
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from transformer_ext.data.workers import serve; serve()"
)


class WorkerError(CorpusError):
    """A process that ended before its work was done."""


class Workers:
    """Applies a function to tasks, in several processes, with results in the order of the tasks.

    Args:
        function: what is done with each task; it, the tasks and the results can be pickled.
        count: number of processes; 0: the work is done in this one.
    """

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        self._function = function
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, count))
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One that shares the work has no use for threads of its own.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._processes.append(process)
        self._idle.put(process)
        self._send(process, self._function)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, also in the middle of their work."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()
            process.wait()
        self._processes.clear()

    def map(self, tasks: Iterable[TaskT]) -> Iterator[Any]:
        """The results, as tasks are taken a few ahead.

        Raises:
            WorkerError: a process was killed.
            Exception: what the function or the tasks raise, that of the earliest task first.
        """
        if not self._processes:
            for task in tasks:
                yield self._function(task)
            return
        waiting: deque[Future[Any]] = deque()
        failure: BaseException | None = None
        iterator = iter(tasks)
        while True:
            try:
                task = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            waiting.append(self._threads.submit(self._call, task))
            if len(waiting) >= _AHEAD * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def _call(self, task: Any) -> Any:
        process = self._idle.get()
        try:
            self._send(process, task)
            assert process.stdout is not None
            try:
                failed, result = pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError):
                raise self._ended(process) from None
        finally:
            self._idle.put(process)
        if failed:
            raise result
        return result

    def _send(self, process: subprocess.Popen[bytes], value: Any) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(value, process.stdin, protocol=5)
            process.stdin.flush()
        except OSError:
            raise self._ended(process) from None

    def _ended(self, process: subprocess.Popen[bytes]) -> WorkerError:
        try:
            status = process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return WorkerError(
            f"a process that shared the work ended {how}; --prepare-workers gives another number "
            "of them, 0 none"
        )


def serve() -> None:
    """What a worker does: it reads the function, then tasks, until there are no more."""
    import signal

    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source: BinaryIO = sys.stdin.buffer
    result = io.FileIO(os.dup(sys.stdout.fileno()), "wb")
    # What is printed must not get between the results.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        function = pickle.load(source)
        with io.BufferedWriter(result, 1 << 20) as out:
            while True:
                task = pickle.load(source)
                try:
                    answer = (False, function(task))
                except Exception as error:
                    answer = (True, error)
                pickle.dump(answer, out, protocol=5)
                out.flush()
