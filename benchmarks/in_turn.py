"""Measures peers in turn, each in a process of its own, so that a machine whose speed drifts treats them alike.

A script starts a :class:`Peer` for each, and asks one after the other, round by round, for the seconds of a window of
work. In its process the peer answers with :func:`serve`. They speak JSON, a line each, over standard streams.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Seconds(NamedTuple):
    """Of a window of work."""

    median: float
    best: float
    worst: float


class Peer:
    """A process that makes something ready, and then does a window of it whenever it is asked."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str] | None = None):
        self.name = name
        self._process = subprocess.Popen(
            command, env=os.environ | (environment or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def facts(self) -> dict[str, Any] | None:
        """What the peer says of itself once it is ready; None where it does not fit into memory."""
        return self._answer()

    def seconds(self) -> float:
        """Of one window, done now."""
        lines = self._process.stdin
        assert lines is not None
        lines.write("\n")
        lines.flush()
        return self._answer()

    def end(self) -> None:
        """Ends the process, which gives its memory back."""
        self._process.communicate()

    def _answer(self) -> Any:
        answers = self._process.stdout
        assert answers is not None
        line = answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}; what it says is above")
        return json.loads(line)


def measure(peers: list[Peer], rounds: int) -> dict[str, Seconds]:
    """Asks peers that are ready for a window each, in turn, and ends them."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            seconds[peer.name].append(peer.seconds())
    for peer in peers:
        peer.end()
    return {name: Seconds(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def serve(make: Callable[[], tuple[Callable[[], object], dict[str, Any]]]) -> None:
    """Answers in a peer's process.

    Args:
        make: returns a window of work, done once before it is measured, and what is said of it. The work waits for
            the device at its end.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        window, facts = make()
    except Exception as error:
        if not _out_of_memory(error):
            raise
        answer(None)
        return
    answer(facts)
    for _ in sys.stdin:
        started = time.perf_counter()
        window()
        answer(time.perf_counter() - started)


def _out_of_memory(error: Exception) -> bool:
    """Whether a device's memory was too small, as JAX and torch say it."""
    return "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError"
