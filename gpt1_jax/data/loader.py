"""Global batches on the devices, prepared beside the step.

The position in the data is one integer, the global index of the next example, so it outlives a change of the batch
size, of the mesh and of the number of processes.
"""

import atexit
import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding


class Examples(Protocol):
    """A sequence of training examples that is a pure function of their global index."""

    def examples(self, indices: np.ndarray) -> Any:
        """Examples ``indices``, n of one batch: an array [n, ...], or a tree of such arrays.

        All but n is the same for any of the examples of a batch.
        """
        ...


def global_batch(examples: Examples, position: int, batch_size: int, sharding: Sharding) -> Any:
    """Examples [position, position + batch_size) as arrays over all processes.

    Each process reads only the rows that its own devices hold, each of them once.

    Args:
        examples: where they come from.
        position: global index of the first.
        batch_size: rows of the global batch.
        sharding: of the result, along its rows.

    Returns:
        An array [batch_size, ...], or a tree of them; row i is example position + i on any number of devices.
    """
    # Devices along other axes than the batch's hold the same rows.
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    held = sorted({index[0].indices(batch_size)[:2] for index in indices if index is not None})
    read = {rows: examples.examples(np.arange(position + rows[0], position + rows[1])) for rows in held}
    leaves = {rows: jax.tree.leaves(tree) for rows, tree in read.items()}
    structure = jax.tree.structure(next(iter(read.values())))

    def joined(number: int, part: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return leaves[index[0].indices(batch_size)[:2]][number]

        return jax.make_array_from_callback((batch_size, *part.shape[1:]), sharding, rows)

    # The transfer is meant, but JAX counts that of a callback's arrays as an implicit one.
    with jax.transfer_guard_host_to_device("allow"):
        return structure.unflatten([joined(*pair) for pair in enumerate(next(iter(leaves.values())))])


class Batches(Iterator[tuple[int, Any]]):
    """Iterates over (position, batch) for ever; a thread keeps the next batches on the devices.

    Position is the global index of the batch's first example, so ``position + batch_size`` is where to go on after it.
    An error of the thread is raised by :func:`next`. Close it, or use it as a context manager.

    Args:
        examples: where they come from.
        batch_size: rows of the global batch.
        sharding: of the batches.
        position: where to begin: the global index of the first example.
        prefetch: batches that are ready, or being made, beyond the one last returned; at least 1.
    """

    def __init__(self, examples: Examples, batch_size: int, sharding: Sharding, position: int = 0, prefetch: int = 2):
        self._worker = _Worker(examples, batch_size, sharding, position, prefetch)
        # The thread is a daemon so that a forgotten loader cannot keep the interpreter alive. It must be gone before
        # the interpreter and JAX are taken down, hence atexit: what is registered last runs first. The finalizer
        # does not keep this object alive, so a forgotten loader stops when it is collected, too.
        self._close = weakref.finalize(self, self._worker.stop)
        self._close.atexit = False  # pyrefly: ignore[missing-attribute]  # a property, which the stub declares amiss
        atexit.register(self._close)

    def __next__(self) -> tuple[int, Any]:
        return self._worker.next()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread, after the batch that it is making; may be called twice."""
        self._close()
        atexit.unregister(self._close)


class _Worker:
    """The thread of :class:`Batches`, apart from it so that the thread does not keep the iterator alive."""

    def __init__(self, examples: Examples, batch_size: int, sharding: Sharding, position: int, prefetch: int):
        self._ready: SimpleQueue[tuple[int, Any] | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(prefetch)
        self._end: BaseException | None = None  # why there is no next batch
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(examples, batch_size, sharding, position), name="gpt1-loader", daemon=True
        )
        self._thread.start()

    def _run(self, examples: Examples, batch_size: int, sharding: Sharding, position: int) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stopping.is_set():
                    return
                self._ready.put((position, global_batch(examples, position, batch_size, sharding)))
                position += batch_size
        except BaseException as error:  # whatever it is, next() raises it in the thread that waits
            self._ready.put(error)

    def next(self) -> tuple[int, Any]:
        if self._end is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                self._room.release()
                return item
            self._end = item
        raise self._end

    def stop(self) -> None:
        self._end = RuntimeError("the loader is closed")
        self._stopping.set()
        self._room.release()
        self._ready.put(self._end)  # for a thread that waits in next()
        if threading.current_thread() is not self._thread:  # it is, where the collector runs there
            self._thread.join()
