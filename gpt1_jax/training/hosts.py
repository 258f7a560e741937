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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TypeVar

import jax

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.data.storage import is_remote
from gpt1_jax.errors import GPT1Error, Interrupted, StalledError
from gpt1_jax.training.cluster import Place, find_place
from gpt1_jax.training.hub import PULSE_SECONDS, Hello, Hub, encode, has_gone, keep_alive, listen
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.watchdog import Watchdog

_T = TypeVar("_T")

_SAY_EVERY = 10.0  # seconds between two lines on waiting for process 0
_RETRY_SECONDS = 0.3  # between two attempts to reach it
_GRACE_SECONDS = 3.0  # for this process to end by itself when the run is over, before it is ended
_SETTLE_SECONDS = 2.0  # for the news that a host has gone to overtake the errors that it causes here
_BLAME_SECONDS = 5 * PULSE_SECONDS  # past a deadline, for the hosts to find out which of them is to blame
_LAST_SECONDS = _BLAME_SECONDS + 2.0  # then, for all who are stuck to have ended before process 0
_HEARTBEAT_SECONDS = 24 * 3600  # in which JAX would abort all for a silent one, naming none; deadlines see to that
_SHUTDOWN_SECONDS = 10  # that JAX waits at the end for the others, who are there, or have gone


class Stopped(Exception):
    """All hosts stop here, in the middle of work that is left undone."""


class Hosts:
    """The processes of a run, seen from one of them; a context manager around what they do together.

    An error that leaves it ends all processes, each with the exit code of the error. It is also the only process of a
    run, if it is given no line to others.

    Args:
        line: to the others.
        watchdog: entered and left with it.
        interruption: tells it of signals, from now on.

    Attributes:
        process: the number of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        line: "Line | None" = None,
        watchdog: Watchdog | None = None,
        interruption: Interruption | None = None,
    ):
        self.process, self.processes = (line.process, line.processes) if line else (0, 1)
        self._line, self._watchdog, self._interruption = line, watchdog, interruption
        self._training = False
        if interruption:
            interruption.tell(self)

    def gather(self, value: _T) -> list[_T]:
        """What every process gives, JSON, in their order; all must call it."""
        return self._line.gather(value) if self._line else [value]

    def first(self, work: Callable[[], _T]) -> _T:
        """Has process 0 alone do something, while the others wait; its result, JSON, is that of all."""
        if self.process == 0:
            return self.gather(work())[0]
        with self._watchdog.suspended() if self._watchdog else contextlib.nullcontext():
            return self.gather(None)[0]  # type: ignore[return-value]

    def expect(self, doing: str, seconds: float) -> None:
        """Something begins that may take so many seconds, until the next call; all processes call it alike."""
        if self._watchdog:
            self._watchdog.expect(doing, seconds)

    def renew(self, counted: bool) -> None:
        """What is expected goes on, and has its time again; or no deadline, where none can be known."""
        if self._watchdog:
            self._watchdog.renew(counted)

    def between(self, doing: str, seconds: float) -> None:
        """To be called by all processes alike, between two parts of work that may be left undone.

        Raises:
            Stopped: if all stop here.
        """
        self.expect(doing, seconds)
        if self._training and self.due():
            raise Stopped

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside there is something to save, so a request to stop waits for :meth:`due`; outside all leave at once."""
        self._turn(True)
        if self._interruption:  # libtpu sees to signals itself when it finds its devices
            self._interruption.arm()
        if self._watchdog:
            self._watchdog.arm()
        yield
        self._turn(False)

    def due(self) -> bool:
        """Whether to stop here; to be asked by all processes alike, and answered alike, while they are training.

        It does not wait, unless it was just asked to stop: then until all have said how far they are.
        """
        return self._line.due() if self._line else self.stopping is not None

    @property
    def stopping(self) -> str | None:
        """Why to stop, where it was asked for; behind :meth:`training` the same on all hosts."""
        if self._line:
            return self._line.stopping
        return self._interruption.received if self._interruption else None

    def stop(self, reason: str) -> None:
        """Asks all to stop, after the same step or at once."""
        if self._line:
            self._line.send(stop=reason)
        elif not self._training and self._interruption:
            self._interruption.leave(reason)

    def _turn(self, training: bool) -> None:
        if self._line:
            self._line.turn(training)
        self._training = training

    def __enter__(self) -> "Hosts":
        if self._watchdog:
            self._watchdog.__enter__()
            if self._line:
                self._line.watch(self._watchdog)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._line:
                self._line.leave(error)
        finally:
            if self._watchdog:
                self._watchdog.__exit__(kind, error, trace)


def join(config: Config | FinetuneConfig, say: Callable[[str], None], interruption: Interruption) -> Hosts:
    """Waits until all processes of the run are there, and connects JAX's.

    To be called before JAX is asked for its devices. Where this is the only process, nothing is waited for.

    Args:
        config: the run; it says where this process is, or it is found.
        say: prints a line.
        interruption: what receives signals.

    Raises:
        UserError: if it cannot be found out which process this is, or the processes were started differently.
        StalledError: if one is missing after ``distributed.timeout`` seconds, naming it.
    """
    place = find_place(config.distributed)
    if place is None:
        return Hosts(None, Watchdog(_stacks(config, 0)), interruption)
    hello = Hello(process=place.process, processes=place.processes, host=platform.node(), settings=_settings(config))
    timeout = config.distributed.timeout
    _results_alone_on_stdout()
    hub = Hub(listen(place), place, hello, timeout, say) if place.process == 0 else None
    try:
        line = Line(place, hello, timeout, say, hub, interruption.leave)
    except GPT1Error:
        if hub:
            hub.close()
        raise
    # Behind whatever is registered later, and before what JAX has registered when it was imported.
    atexit.register(line.exit_if_failed)
    # Made before JAX is connected, so that from now on a signal to one host has all of them stop.
    hosts = Hosts(line, Watchdog(_stacks(config, place.process), _BLAME_SECONDS), interruption)
    try:
        _initialize_jax(place, line, timeout)
    except BaseException as error:
        line.leave(error)
        raise
    return hosts


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
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise StalledError(
            f"JAX's processes do not reach process 0 at {address}: {error}; allow all ports between the hosts"
        ) from error


class Line:
    """The connection of a process to process 0.

    Args:
        place: of this process.
        hello: what it says of itself.
        timeout: seconds to wait for the others.
        say: prints a line.
        hub: the other end, in process 0.
        on_leave: what has this process leave at once, given why, and what to do before it is ended by force.

    Attributes:
        process: the number of this process.
        processes: how many there are.
        port: of process 0 that is JAX's.
        stopping: why all were asked to stop.
        exit_code: what the process ends with, if an error ended its work with the others.
    """

    def __init__(
        self,
        place: Place,
        hello: Hello,
        timeout: float,
        say: Callable[[str], None],
        hub: Hub | None,
        on_leave: Callable[[str, Callable[[], None]], None],
    ):
        self.process, self.processes = place.process, place.processes
        self._hub = hub
        self._connection, self._lines, begin = _meet(place, hello, timeout, say)
        self.port: int = begin["begin"]
        self._names: list[str] = begin["hosts"]
        self._sending = threading.Lock()
        self._changed = threading.Condition()  # of all that follows
        self._values: list[Any] | None = None
        self._over: GPT1Error | None = None
        self.stopping: str | None = None
        # Whether there is something to save, now and from the next answer of all on: so they change together.
        self._training = self._training_next = False
        self._asked, self._last = 0, sys.maxsize  # how often it was asked whether to stop, and when the answer is yes
        self._held = False  # between being asked how far this process is, and knowing where to stop
        self._left = threading.Event()
        self._watchdog: Watchdog | None = None
        self._on_leave = on_leave
        self.exit_code: int | None = None
        threading.Thread(target=self._listen, name="gpt1-line", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Tells process 0 something; where it has gone, :meth:`_listen` finds out."""
        with contextlib.suppress(OSError), self._sending:
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

    def turn(self, training: bool) -> None:
        """Begins or ends the training, on all hosts between the same two messages of process 0."""
        self._training_next = training
        self.gather(None)

    def due(self) -> bool:
        """As :meth:`Hosts.due`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._over)
            self._asked += 1
            return self._asked >= self._last

    def watch(self, watchdog: Watchdog) -> None:
        """From now on tells process 0 how far this process is, so that it can say which one all wait for."""
        self._watchdog = watchdog
        threading.Thread(target=self._report, args=(watchdog,), name="gpt1-report", daemon=True).start()

    def leave(self, error: BaseException | None) -> None:
        """Ends the work with the others: in order, or because of an error, which ends them too.

        Raises:
            GPT1Error: if the error is the consequence of what has happened elsewhere, saying that.
        """
        if self.exit_code is not None:  # all leave at once, and know it
            self._left.set()
            if self._hub:
                self._close()
            return  # of another one the connection ends with the process, so that process 0 knows when it has gone
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
            gone = StalledError(has_gone(0, self._names[0]))
            # JAX, whose service has gone too, is about to abort this process with a trace of its own.
            self._end(gone, grace=0.0 if self.process else _GRACE_SECONDS)

    def _take(self, message: dict[str, Any]) -> None:
        with self._changed:
            match message:
                case {"values": values}:
                    self._values, self._training = values, self._training_next
                case {"stop": why}:
                    self.stopping, self._held = why, True
                    self.send(asked=self._asked if self._training else None)
                case {"last": int(last)}:
                    self._last, self._held = last, False
                case {"failed": what, "code": code}:
                    self._over = GPT1Error(what)
                    self._over.exit_code = code
            self._changed.notify_all()
        match message:
            case {"failed": _}:
                assert self._over
                self._end(self._over)
            case {"last": None}:
                self._leave_at_once()
            case {"stalled": why}:
                self._end_stalled(why)

    def _leave_at_once(self) -> None:
        assert self.stopping
        self._left.set()
        self.exit_code = Interrupted.exit_code
        self.send(leave=True)
        # JAX's service ends with process 0, and JAX then aborts who is still compiling, say.
        self._on_leave(self.stopping, self._hub.wait_for_others if self._hub else lambda: None)

    def _end_stalled(self, why: str) -> None:
        """Ends this process as a passed deadline does, with its stacks written."""
        self._left.set()
        self.exit_code = StalledError.exit_code  # also where the end of another one frees the main thread
        if self._watchdog and self._hub:
            # JAX's service ends with this process, and JAX then aborts who is stuck before its stacks are written.
            self._watchdog.dump(why)
            self._watchdog.end(why, _LAST_SECONDS)
            self._hub.wait_for_others(_LAST_SECONDS)
            self._watchdog.leave()
        elif self._watchdog:
            self._watchdog.end(why)

    def _report(self, watchdog: Watchdog) -> None:
        while not self._left.wait(PULSE_SECONDS):
            late = watchdog.late()
            self.send(turn=watchdog.turns, doing=watchdog.doing, late=late > 0)
            if late > _BLAME_SECONDS / 2:  # process 0 would have said who it is
                self._end_stalled(f"host 0 ({self._names[0]}) does not answer: no progress while {watchdog.doing}")

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


def _stacks(config: Config | FinetuneConfig, process: int) -> str:
    """Where the stacks of a process that is stuck are written: into the run's folder, or, for a bucket's, here."""
    folder = tempfile.gettempdir() if is_remote(config.run_dir) else os.fspath(config.run_dir)
    return os.path.join(folder, f"stalled-{process}.txt")


def _settings(config: Config | FinetuneConfig) -> dict[str, Any]:
    """What must be the same on all hosts, but for the keys that are of a host."""
    versions = {name: importlib.metadata.version(name) for name in ("gpt1-jax", "jax", "jaxlib")}
    return versions | config.model_dump(mode="json")
