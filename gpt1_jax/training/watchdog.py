"""A deadline for progress, past which this process ends with exit code 5, whatever it is stuck in.

A thread could not see to that: native code that holds Python's lock stops all threads, and a stopped process has none
that run. So another process watches the deadline (:mod:`gpt1_jax.training.watcher`). It ends this one by a signal
whose handler is not Python's either: it writes the stacks of all threads, and leaves.
"""

import ctypes
import faulthandler
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from gpt1_jax.errors import StalledError
from gpt1_jax.training import watcher

_SIZE = 4096  # bytes that the two processes share
# The handler is the system's own _exit, which a signal calls with its number: the one whose number is the exit code.
_SIGNAL = signal.Signals(StalledError.exit_code)


class Watchdog:
    """While it is entered, this process ends where something takes longer than it may.

    Args:
        stacks: the file to write the stacks to, on this machine.
        grace: seconds past a deadline that are left to others to find out who is to blame.

    Attributes:
        turns: how often something was expected; hosts that do the same are at the same turn.
        doing: what is expected now.
    """

    def __init__(self, stacks: str, grace: float = 0.0):
        self.turns, self.doing = 0, "starting"
        self._stacks, self._grace = os.path.abspath(stacks), grace
        self._seconds, self._deadline = math.inf, math.inf

    def expect(self, doing: str, seconds: float) -> None:
        """Something begins that may take so many seconds: until the next call."""
        self.turns += 1
        self.doing, self._seconds = doing, seconds
        self._allow(seconds)

    def renew(self, counted: bool = True) -> None:
        """What is expected goes on, and has its time again; or no deadline, where none can be known."""
        self._allow(self._seconds if counted else math.inf)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No deadline inside: somebody else's is waited for."""
        self._allow(math.inf)
        yield
        self._allow(self._seconds)

    def late(self) -> float:
        """Seconds since the deadline; negative before."""
        return time.monotonic() - self._deadline

    def dump(self, why: str) -> None:
        """Writes the stacks from here, where Python still runs: so no thread of it is in the middle of something."""
        watcher.tell(why, self._stacks)
        watcher.write(self._stacks, why, b"")
        with open(self._stacks, "ab") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def leave(self) -> None:
        """Ends this process now, its stacks being written."""
        os._exit(StalledError.exit_code)

    def end(self, why: str, seconds: float = 0.0) -> None:
        """Has this process end now, or in so many seconds, with its stacks written."""
        self._write(time.monotonic() + seconds, why)

    def arm(self) -> None:
        """Sets up how this process ends; again, where a library may have taken the signal over."""
        faulthandler.unregister(_SIGNAL)
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        library.signal(_SIGNAL, ctypes.cast(library._exit, ctypes.c_void_p))
        faulthandler.register(_SIGNAL, self._pipe, all_threads=True, chain=True)

    def __enter__(self) -> "Watchdog":
        with tempfile.TemporaryFile() as file:
            file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)
            self._write(math.inf, "")
            command = [sys.executable, "-I", "-S", watcher.__file__, str(file.fileno()), self._stacks]
            self._watcher = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()], bufsize=0
            )
        assert self._watcher.stdin is not None
        self._pipe = self._watcher.stdin
        self.arm()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        faulthandler.unregister(_SIGNAL)
        signal.signal(_SIGNAL, signal.SIG_DFL)
        self._pipe.close()
        self._watcher.wait()

    def _allow(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._write(self._deadline + self._grace, f"no progress in {seconds:g} seconds, while {self.doing}")

    def _write(self, deadline: float, why: str) -> None:
        text = why.encode()[: _SIZE - watcher.DEADLINE.size - 1]
        self._memory[watcher.DEADLINE.size : watcher.DEADLINE.size + len(text) + 1] = text + b"\0"
        watcher.DEADLINE.pack_into(self._memory, 0, deadline)
