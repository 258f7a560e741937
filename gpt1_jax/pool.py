"""A parallel map that keeps the order, holds a bounded number of results, and leaves no process behind."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from gpt1_jax.errors import GPT1Error

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 3  # items under way for each worker


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes.

    The results, and their order, do not depend on ``workers``. One worker, or a single item, needs no process.

    Args:
        function: a module-level function.
        items: read as needed, in this process.
        workers: number of processes.

    Raises:
        GPT1Error: if a worker was killed.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if workers == 1 or len(first) < 2:
        yield from map(function, itertools.chain(first, items))
        return
    # Spawned, not forked: a fork would copy the locks of JAX's and other libraries' threads.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for item in itertools.chain(first, items):
            pending.append(executor.submit(function, item))
            while pending and (len(pending) > _AHEAD * workers or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise GPT1Error(
            "a worker process was killed, perhaps for want of memory; run the same command again: it goes on from "
            "what is done (data.workers=1 needs the least memory)"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


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
