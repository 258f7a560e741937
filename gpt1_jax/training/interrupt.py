"""SIGTERM and Ctrl-C as a request that the loop answers between two steps."""

import signal
from types import FrameType, TracebackType


class Interruption:
    """While it is entered, the first signal is noted and the second acts as usual.

    Attributes:
        requested: name of the signal that was received, or None.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()  # a user who asks twice means it

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
