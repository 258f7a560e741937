"""The processes that train a run together, one on each host: how they find each other, and end together.

Each keeps a connection to process 0 (:mod:`gpt1_jax.training.hub`) for as long as the run is trained. Where a process
ends, the system closes its connection, so the others know within moments which one it was. JAX alone would notice
after a minute or more, and abort.
"""

import atexit
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, TypeVar

import jax

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.errors import GPT1Error, Interrupted, StalledError
from gpt1_jax.training.cluster import Place, find_place
from gpt1_jax.training.hub import Hello, Hub, encode, has_gone, keep_alive, listen

_T = TypeVar("_T")

_SAY_EVERY = 10.0  # seconds between two lines on waiting for process 0
_RETRY_SECONDS = 0.3  # between two attempts to reach it
_GRACE_SECONDS = 3.0  # for this process to end by itself when the run is over, before it is ended
_SETTLE_SECONDS = 2.0  # for the news that a host has gone to overtake the errors that it causes here
_SHUTDOWN_SECONDS = 10  # that JAX waits at the end for the others, who are there, or have gone


class Hosts:
    """The processes of a run, seen from one of them; a context manager around what they do together.

    An error that leaves it ends all processes, each with the exit code of the error. It is also the only process of a
    run, if it is given no line to others.

    Attributes:
        process: the number of this process.
        processes: how many there are.
    """

    def __init__(self, line: "Line | None" = None):
        self.process, self.processes = (line.process, line.processes) if line else (0, 1)
        self._line = line
        self._stop: str | None = None

    def gather(self, value: _T) -> list[_T]:
        """What every process gives, JSON, in their order; all must call it. It waits for as long as it takes."""
        return self._line.gather(value) if self._line else [value]

    def first(self, work: Callable[[], _T]) -> _T:
        """Has process 0 alone do something, while the others wait; its result, JSON, is that of all."""
        return self.gather(work() if self.process == 0 else None)[0]  # type: ignore[return-value]

    def stop(self, reason: str) -> None:
        """Asks all to stop training, each after the same step."""
        if self._line:
            self._line.send(stop=reason)
        else:
            self._stop = reason

    def stops_after(self, step: int) -> str | None:
        """Why to make no step after this one, or None; to be asked before every step, by all processes.

        It does not wait, unless it was just asked to stop: then until all have said how far they are.
        """
        return self._line.stops_after(step) if self._line else self._stop

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._line:
            self._line.leave(error)


def join(config: Config | FinetuneConfig, say: Callable[[str], None]) -> Hosts:
    """Waits until all processes of the run are there, and connects JAX's.

    To be called before JAX is asked for its devices. Where this is the only process, nothing happens.

    Args:
        config: the run; it says where this process is, or it is found.
        say: prints a line.

    Raises:
        UserError: if it cannot be found out which process this is, or the processes were started differently.
        StalledError: if one is missing after ``distributed.timeout`` seconds, naming it.
    """
    place = find_place(config.distributed)
    if place is None:
        return Hosts()
    hello = Hello(process=place.process, processes=place.processes, host=platform.node(), settings=_settings(config))
    timeout = config.distributed.timeout
    _results_alone_on_stdout()
    hub = Hub(listen(place), place, hello, timeout, say) if place.process == 0 else None
    try:
        line = Line(place, hello, timeout, say, hub)
    except GPT1Error:
        if hub:
            hub.close()
        raise
    # Behind whatever is registered later, and before what JAX has registered when it was imported.
    atexit.register(line.exit_if_failed)
    _initialize_jax(place, line, timeout)
    return Hosts(line)


def _initialize_jax(place: Place, line: "Line", timeout: float) -> None:
    # Signals are answered by the loop; JAX would take SIGTERM over for good.
    jax.config.update("jax_enable_preemption_service", False)
    address = f"{place.coordinator.rpartition(':')[0]}:{line.port}"
    try:
        jax.distributed.initialize(
            address,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout) + 1,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        unreachable = StalledError(
            f"JAX's processes do not reach process 0 at {address}: {error}; allow all ports between the hosts"
        )
        line.leave(unreachable)
        raise unreachable from error


class Line:
    """The connection of a process to process 0.

    Attributes:
        process: the number of this process.
        processes: how many there are.
        port: of process 0 that is JAX's.
        exit_code: what the process ends with, if an error ended its work with the others.
    """

    def __init__(self, place: Place, hello: Hello, timeout: float, say: Callable[[str], None], hub: Hub | None):
        self.process, self.processes = place.process, place.processes
        self._hub = hub
        self._connection, self._lines, begin = _meet(place, hello, timeout, say)
        self.port: int = begin["begin"]
        self._first = begin["hosts"][0]
        self._changed = threading.Condition()  # of all that follows
        self._values: list[Any] | None = None
        self._over: GPT1Error | None = None
        self._step, self._last, self._why = -1, sys.maxsize, ""
        self._held = False  # between being asked how far this process is, and knowing where to stop
        self._left = threading.Event()
        self.exit_code: int | None = None
        threading.Thread(target=self._listen, name="gpt1-line", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Tells process 0 something; where it has gone, :meth:`_listen` finds out."""
        with contextlib.suppress(OSError):
            self._connection.sendall(encode(**message))

    def gather(self, value: Any) -> list[Any]:
        """As :meth:`Hosts.gather`."""
        self.send(value=value)
        with self._changed:
            self._changed.wait_for(lambda: self._values is not None or self._over)
            if self._values is None:
                raise self._over  # pyrefly: ignore[bad-raise]  # what was waited for
            values, self._values = self._values, None
            return values

    def stops_after(self, step: int) -> str | None:
        """As :meth:`Hosts.stops_after`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._over)
            self._step = step
            return self._why if step >= self._last else None

    def leave(self, error: BaseException | None) -> None:
        """Ends the work with the others: in order, or because of an error, which ends them too.

        Raises:
            GPT1Error: if the error is the consequence of what has happened elsewhere, saying that.
        """
        if error is None or isinstance(error, Interrupted):
            try:
                self.gather(None)  # the run is on the disk when the slowest has come here
            except GPT1Error as of_another:
                self._fail(of_another)
                raise
            jax.distributed.shutdown()
            self._left.set()
            self.send(leave=True)
            self._close()
            return
        if not isinstance(error, GPT1Error):
            with self._changed:
                self._changed.wait_for(lambda: self._over, _SETTLE_SECONDS)
        consequence = None if isinstance(error, GPT1Error) else self._over
        self._fail(consequence or error)
        if consequence:
            raise consequence from None

    def _fail(self, error: BaseException) -> None:
        """Lets the others know."""
        self._left.set()
        code = error.exit_code if isinstance(error, GPT1Error) else GPT1Error.exit_code
        self.exit_code = 130 if isinstance(error, KeyboardInterrupt) else code
        self.send(failed=str(error) or type(error).__name__, code=code)
        self._close()

    def exit_if_failed(self) -> None:
        """Ends the process before JAX does, which would wait for the others, and abort when they have gone."""
        if self.exit_code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        if self._hub:
            self._hub.close()

    def _listen(self) -> None:
        with self._lines, contextlib.suppress(OSError, ValueError):
            for line in self._lines:
                self._take(json.loads(line))
        if not self._left.is_set():
            gone = StalledError(has_gone(0, self._first))
            # JAX, whose service has gone too, is about to abort this process with a trace of its own.
            self._end(gone, grace=0.0 if self.process else _GRACE_SECONDS)

    def _take(self, message: dict[str, Any]) -> None:
        with self._changed:
            match message:
                case {"values": values}:
                    self._values = values
                case {"stop": why}:
                    self._why, self._held = why, True
                    self.send(step=self._step)
                case {"last": last}:
                    self._last, self._held = last, False
                case {"failed": what, "code": code}:
                    self._over = GPT1Error(what)
                    self._over.exit_code = code
            self._changed.notify_all()
        if self._over:
            self._end(self._over)

    def _end(self, error: GPT1Error, grace: float = _GRACE_SECONDS) -> None:
        """Ends this process, if it does not end by itself: it may wait for a device, and so for who has gone."""
        with self._changed:
            self._over = self._over or error
            self._changed.notify_all()
        if not self._left.wait(grace):
            print(f"gpt1: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)


def _meet(
    place: Place, hello: Hello, timeout: float, say: Callable[[str], None]
) -> tuple[socket.socket, IO[bytes], dict[str, Any]]:
    """Connects to process 0 and waits until all have; what it says then."""
    deadline = time.monotonic() + timeout
    host, _, port = place.coordinator.rpartition(":")
    said = -math.inf
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), max(1.0, deadline - time.monotonic()))
        except OSError as error:
            why = str(error)
        else:
            # Process 0 may have started later, and waits as long; then it says who is missing.
            lines, answer = _greet(connection, hello, timeout + 2 * _RETRY_SECONDS)
            if "begin" in answer:
                return connection, lines, answer
            lines.close()
            connection.close()
            if "failed" in answer:
                refused = GPT1Error(answer["failed"])
                refused.exit_code = answer["code"]
                raise refused
            why = answer.get("busy", "it does not speak as one")
        if time.monotonic() > deadline:
            raise StalledError(
                f"process 0 did not answer at distributed.coordinator={place.coordinator} in {timeout:g} seconds: "
                f"{why}; see that the same command runs there, and that this host may reach the port"
            )
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            say(f"waiting for process 0 at {place.coordinator}: {why}")
        time.sleep(_RETRY_SECONDS)


def _greet(connection: socket.socket, hello: Hello, seconds: float) -> tuple[IO[bytes], dict[str, Any]]:
    """Says hello, and waits for the answer."""
    lines = connection.makefile("rb")
    try:
        keep_alive(connection)
        connection.sendall(hello.model_dump_json().encode() + b"\n")
        connection.settimeout(seconds)
        answer = json.loads(lines.readline() or b"{}")
        connection.settimeout(None)
    except (OSError, ValueError) as error:
        answer = {"busy": str(error)}
    return lines, answer


def _results_alone_on_stdout() -> None:
    """Has what libraries print go to standard error: Gloo, the collectives of CPUs, reports on standard output."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def _settings(config: Config | FinetuneConfig) -> dict[str, Any]:
    """What must be the same on all hosts, but for the keys that are of a host."""
    versions = {name: importlib.metadata.version(name) for name in ("gpt1-jax", "jax", "jaxlib")}
    return versions | config.model_dump(mode="json")
