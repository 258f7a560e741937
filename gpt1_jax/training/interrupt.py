"""SIGTERM and Ctrl-C, on any host, as a request that the loop answers between two steps."""

import signal
from types import FrameType, TracebackType

from gpt1_jax.training.hosts import Hosts


class Interruption:
    """While it is entered, the first signal is noted and the second acts as usual.

    Args:
        hosts: those that stop together.

    Attributes:
        requested: what was received, and where, if the run is to stop.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, hosts: Hosts) -> None:
        self.requested: str | None = None
        self._hosts = hosts
        self._received: str | None = None

    def after(self, step: int) -> bool:
        """Whether to make no step after this one; to be asked before each."""
        if self._received:
            self._hosts.stop(self._received)
            self._received = None
        self.requested = self._hosts.stops_after(step)
        return self.requested is not None

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        self._restore()  # a user who asks twice means it

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
