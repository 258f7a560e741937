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

from gpt1_jax.errors import GPT1Error

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 3  # items under way for each worker


class Pool(AbstractContextManager["Pool"]):
    """Some worker processes, started when they are first needed; they end with the context.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``map(function, items)`` in the processes.

        The results, and their order, do not depend on how many they are. One worker, or a single item, needs none.

        Args:
            function: a module-level function.
            items: read as needed, in this process.

        Raises:
            GPT1Error: if a worker was killed.
        """
        items = iter(items)
        first = list(itertools.islice(items, 2))
        if self._workers == 1 or len(first) < 2:
            yield from map(function, itertools.chain(first, items))
            return
        if not self._executor:
            # Spawned, not forked: a fork would copy the locks of JAX's and other libraries' threads.
            self._executor = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _start_worker)
        pending: deque[Future[Result]] = deque()
        try:
            for item in itertools.chain(first, items):
                pending.append(self._executor.submit(function, item))
                while pending and (len(pending) > _AHEAD * self._workers or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise GPT1Error(
                "a worker process was killed, perhaps for want of memory; run the same command again: it goes on from "
                "what is done (data.workers=1 needs the least memory)"
            ) from None
        finally:
            for future in pending:
                future.cancel()


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
