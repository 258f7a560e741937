"""Processes for a parallel map that keeps the order, holds a bounded number of results, and leaves none behind."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import connection
from types import TracebackType
from typing import TypeVar

from gpt1_jax.errors import GPT1Error, StalledError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 3  # items under way for each worker


class Pool(AbstractContextManager["Pool"]):
    """Some worker processes, started when they are first needed; they end with the context.

    Args:
        workers: number of processes.
        seconds: that one may take for an item, or to end; then all are killed.
    """

    def __init__(self, workers: int, seconds: float = threading.TIMEOUT_MAX) -> None:
        self._workers, self._seconds = workers, seconds
        self._executor: ProcessPoolExecutor | None = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._executor:
            late = threading.Timer(self._seconds, self._kill)
            late.daemon = True  # so that it keeps nobody from leaving, whom an interrupt has woken here
            late.start()
            self._executor.shutdown(wait=True, cancel_futures=True)
            late.cancel()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``map(function, items)`` in the processes.

        The results, and their order, do not depend on how many they are. One worker, or a single item, needs none.

        Args:
            function: a module-level function.
            items: read as needed, in this process.

        Raises:
            GPT1Error: if a worker was killed.
            StalledError: if one does not answer in time.
        """
        items = iter(items)
        first = list(itertools.islice(items, 2))
        if self._workers == 1 or len(first) < 2:
            yield from map(function, itertools.chain(first, items))
            return
        if not self._executor:
            # Spawned, not forked: a fork would copy the locks of JAX's and other libraries' threads.
            self._executor = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _start_worker)
        # None of them is cancelled here, should this end early: the executor's thread fails where it marks a cancelled
        # one as broken (python/cpython#107219), and whoever leaves then waits for ever. It cancels them by itself.
        pending: deque[Future[Result]] = deque()
        try:
            for item in itertools.chain(first, items):
                pending.append(self._executor.submit(function, item))
                while pending and (len(pending) > _AHEAD * self._workers or pending[0].done()):
                    yield self._result(pending.popleft())
            while pending:
                yield self._result(pending.popleft())
        except BrokenProcessPool:
            raise GPT1Error(
                "a worker process was killed, perhaps for want of memory; run the same command again: it goes on from "
                "what is done (data.workers=1 needs the least memory)"
            ) from None

    def _result(self, future: Future[Result]) -> Result:
        try:
            return future.result(self._seconds)
        except TimeoutError:
            if future.done():  # just now, or the error is the function's own
                return future.result()
            self._kill()
            raise StalledError(
                f"a worker process has not answered for {self._seconds:g} seconds (deadlines.start); run the same "
                "command again: it goes on from what is done"
            ) from None

    def _kill(self) -> None:
        """Ends the workers, whatever they are stuck in; Python has no public way to it before 3.14."""
        assert self._executor
        for worker in list(self._executor._processes.values()):
            worker.kill()
        # Else the rest of what one of them has sent half of is waited for.
        self._executor._result_queue._writer.close()  # pyrefly: ignore[missing-attribute]


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Leaves an interrupt to the parent, and ends the worker when the parent is gone, killed for instance."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
