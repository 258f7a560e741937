"""SIGTERM and Ctrl-C at any moment of a run: a checkpoint where there is something to save, and exit code 75."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

from gpt1_jax.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0  # a launcher may send one to a process and to its group: within so many seconds it is one
_WAKE_SECONDS = 0.2  # between two attempts to have the main thread leave
_GRACE_SECONDS = 3.0  # for the main thread to leave by itself; it cannot where it is in native code, such as a compiler


class _Stops(Protocol):
    """What is told to stop."""

    def stop(self, reason: str) -> None: ...


class Interruption:
    """While it is entered, the first signal is a request to stop, and a second one ends the process at once.

    Python answers a signal between two instructions of the main thread, so never while a function compiles. So a
    thread answers it.

    Attributes:
        received: the name of the signal that came first.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._stops: _Stops | None = None
        self._leaving: str | None = None
        self._raised = False
        self._left = threading.Event()

    def tell(self, stops: _Stops) -> None:
        """From now on a request is handed on; before, it is answered by :meth:`leave`."""
        self._stops = stops

    def leave(self, reason: str, last: Callable[[], None] = lambda: None) -> None:
        """Has the main thread leave where it is, with :class:`Interrupted`; if it does not, the process ends.

        Args:
            reason: for people.
            last: to be done before the process ends so.
        """
        self._leaving = f"{reason}: stopped, with nothing to save; run the same command again to go on"
        until = time.monotonic() + _GRACE_SECONDS
        while not self._left.is_set():
            if time.monotonic() > until:
                last()
                _end(self._leaving, Interrupted.exit_code)
            # It wakes the main thread, unless that is about to wait just now.
            os.kill(os.getpid(), signal.SIGTERM)
            self._left.wait(_WAKE_SECONDS)

    def arm(self) -> None:
        """Takes the signals; again, where a library may have taken them over."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._heard, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._previous_wake = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="gpt1-signals", daemon=True).start()
        self.arm()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._previous_wake)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._wake.close()
        if self._leaving and isinstance(error, KeyboardInterrupt):
            raise Interrupted(self._leaving) from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if self._leaving and not self._raised:
            self._raised = True
            raise KeyboardInterrupt  # which no library takes for an error of its own

    def _listen(self) -> None:
        first: float | None = None
        with self._heard:
            while numbers := self._heard.recv(64):
                for number in numbers:
                    if number not in _SIGNALS or self._leaving:
                        continue
                    if first is None:
                        first = time.monotonic()
                        self._request(signal.Signals(number).name)
                    elif time.monotonic() - first > _SAME_SECONDS:
                        _end(f"{signal.Signals(number).name}, a second signal: ended at once", 128 + number)

    def _request(self, name: str) -> None:
        self.received = name
        print(f"{name}: stopping; a second signal ends at once", file=sys.stderr, flush=True)
        if self._stops:
            self._stops.stop(name)
        else:
            self.leave(name)


def _end(message: str, code: int) -> None:
    print(f"gpt1: {message}", file=sys.stderr, flush=True)
    os._exit(code)
