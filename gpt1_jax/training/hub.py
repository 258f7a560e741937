"""Where the processes of a job meet: a server in process 0 that each of them, itself too, is connected to.

It tells who has come and who is missing, compares what they were started with, answers when all have said something,
and says when one has gone. A connection carries lines of JSON. Who speaks first says hello; what does not is a stranger
and is left alone.
"""

import asyncio
import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from gpt1_jax.config import differences
from gpt1_jax.errors import GPT1Error, StalledError, UserError
from gpt1_jax.training.cluster import Place

PULSE_SECONDS = 2.0  # between two reports of a process on how far it is
_SAY_EVERY = 10.0  # seconds between two lines on who is missing
_HELLO_SECONDS = 10.0  # until who connects has said hello
_LINGER_SECONDS = 10.0  # that process 0 stays for the others to go
_LONGEST = 2**20  # bytes of a line
# Keys that may be another on each host; with any other one, the hosts would wait for each other in different places.
_OF_A_HOST = ("distributed.", "logging.", "data.workers", "data.prefetch", "data.readers", "data.verify")


class Hello(pydantic.BaseModel):
    """What a process says first.

    Attributes:
        process: its number.
        processes: how many it was told there are.
        host: the name of its machine.
        settings: what has to be the same everywhere: versions and configuration.
    """

    process: int
    processes: int
    host: str
    settings: dict[str, Any]


@dataclass
class _Member:
    hello: Hello
    writer: asyncio.StreamWriter
    left: bool = False  # it said that it leaves
    gone: bool = False  # its connection has ended
    heard: float = math.inf  # when it last said how far it is
    turn: int = 0  # how often it had expected something then
    doing: str = "starting"  # what it expected


def listen(place: Place) -> socket.socket:
    """Opens the coordinator's port.

    Raises:
        UserError: if it is not free.
    """
    port = int(place.coordinator.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"distributed.coordinator={place.coordinator}: process 0 cannot listen on this port: {error.strerror}; end "
            "what has it, or choose another port"
        ) from None


class Hub:
    """The server; it runs in a thread.

    Args:
        listener: from :func:`listen`.
        place: of process 0.
        hello: of process 0; all others must have the same settings.
        timeout: seconds until all must be there.
        say: prints a line.
    """

    def __init__(self, listener: socket.socket, place: Place, hello: Hello, timeout: float, say: Callable[[str], None]):
        self._listener, self._place, self._hello, self._timeout, self._say = listener, place, hello, timeout, say
        self._members: dict[int, _Member] = {}
        self._values: dict[int, Any] = {}  # what was said since the last answer
        self._asked: dict[int, int | None] = {}  # how far each is in the training, when it was asked for
        self._over: dict[str, Any] | None = None  # why all must end
        self._began = self._stopping = False
        self._visits: dict[asyncio.Task, asyncio.StreamWriter] = {}
        self._changed, self._closing = asyncio.Event(), asyncio.Event()
        self._serving, self._empty = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gpt1-hub", daemon=True)
        self._thread.start()
        self._serving.wait()

    def close(self) -> None:
        """Ends the server when the others have gone, so that they hear why it is over, or after some seconds."""
        self.wait_for_others()
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def wait_for_others(self, seconds: float = _LINGER_SECONDS) -> None:
        """Returns when the others have gone, or after so many seconds."""
        self._empty.wait(seconds)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._welcome, sock=self._listener, limit=_LONGEST)
        self._serving.set()
        await self._wait_for_all()
        await self._closing.wait()
        server.close()
        for writer in self._visits.values():
            writer.close()
        await asyncio.gather(*self._visits, return_exceptions=True)

    async def _wait_for_all(self) -> None:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self._timeout
        while not self._over and len(self._members) < self._place.processes:
            if self._members:
                self._say(f"{self._joined()}; waiting for {self._missing()}")
            self._changed.clear()
            left = deadline - clock.time()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, _SAY_EVERY))
            if clock.time() >= deadline and len(self._members) < self._place.processes:
                self._end(
                    StalledError(
                        f"{self._joined()} in {self._timeout:g} seconds; missing: {self._missing()}; see that the "
                        f"same command runs there, with distributed.coordinator={self._place.coordinator}, and start "
                        "all again"
                    )
                )
        if not self._over:
            self._began = True
            self._say(self._joined())
            self._tell(begin=_free_port(), hosts=[self._name(process) for process in range(self._place.processes)])

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visit = asyncio.current_task()
        assert visit is not None
        self._visits[visit] = writer
        try:
            hello = Hello.model_validate_json(await asyncio.wait_for(reader.readline(), _HELLO_SECONDS))
        except (TimeoutError, OSError, ValueError):  # ValueError: too long, or not a hello
            hello = None
        if hello and self._admit(hello, writer):
            with contextlib.suppress(OSError, ValueError):
                async for line in reader:
                    self._take(hello.process, json.loads(line))
            self._lose(hello.process)
        writer.close()
        del self._visits[visit]

    def _admit(self, hello: Hello, writer: asyncio.StreamWriter) -> bool:
        """Whether a process joins; if not, it hears why."""
        if self._began:
            _write(writer, busy="the run that process 0 leads there is under way")
            return False
        if problem := self._problem(hello):
            self._end(UserError(problem))
        if self._over:
            _write(writer, **self._over)
            return False
        keep_alive(writer.get_extra_info("socket"))
        self._members[hello.process] = _Member(hello, writer)
        self._changed.set()
        return True

    def _problem(self, hello: Hello) -> str | None:
        """What speaks against a process that wants to join."""
        there, own = self._members.get(hello.process), self._hello
        name = f"process {hello.process} ({hello.host})"
        if hello.processes != own.processes:
            return (
                f"{name} was told distributed.processes={hello.processes}, process 0 ({own.host}) {own.processes}; "
                "give all the same"
            )
        if there:
            return (
                f"two processes have the number {hello.process}, on {there.hello.host} and on {hello.host}; give each "
                "another distributed.process"
            )
        changes = [c for c in differences(own.settings, hello.settings) if not c[0].startswith(_OF_A_HOST)]
        if changes:
            return (
                f"{name} was started otherwise than process 0 ({own.host}):\n"
                + "".join(f"  {key}: {ours} on process 0, {theirs} there\n" for key, ours, theirs in changes)
                + "start all with the same command and the same version"
            )
        return None

    def _take(self, process: int, message: Mapping[str, Any]) -> None:
        member = self._members[process]
        match message:
            case {"value": value}:
                self._values[process] = value
                if len(self._values) == self._place.processes:
                    values = [self._values[number] for number in range(self._place.processes)]
                    self._values = {}
                    self._tell(values=values)
            case {"stop": reason} if not self._stopping:
                self._stopping = True
                self._tell(stop=f"{reason} on host {process} ({self._name(process)})")
            case {"asked": asked}:
                self._asked[process] = asked
                if len(self._asked) == self._place.processes:
                    steps = [step for step in self._asked.values() if step is not None]
                    # They begin and end to train together, so all or none do. Who has gone furthest does already what
                    # comes after the place where it last asked.
                    self._tell(last=max(steps) + 1 if steps else None)
                    self._asked = {}
            case {"turn": turn, "doing": doing, "late": late}:
                member.heard, member.turn, member.doing = self._loop.time(), turn, doing
                if late:
                    self._stalled()
            case {"failed": what, "code": code}:
                member.left = True
                self._end(GPT1Error(f"host {process} ({self._name(process)}) has failed: {what}"), code)
            case {"leave": _}:
                member.left = True

    def _lose(self, process: int) -> None:
        """A connection has ended."""
        member = self._members[process]
        member.gone = True
        if not self._began:
            del self._members[process]
            self._changed.set()
        elif not member.left:
            member.left = True
            self._end(StalledError(has_gone(process, self._name(process))))
        # Who leaves before all are there comes again; it must find process 0 waiting for it in the end.
        ending = self._began or self._over or process == 0
        if ending and all(member.gone for number, member in self._members.items() if number):
            self._empty.set()

    def _end(self, error: GPT1Error, code: int | None = None) -> None:
        """Tells all why it is over; the first reason counts."""
        if not self._over:
            self._over = {"failed": str(error), "code": error.exit_code if code is None else code}
            self._changed.set()
            self._tell(**self._over)

    def _stalled(self) -> None:
        """Ends all, because a deadline has passed somewhere; says on whose account."""
        if self._over:
            return
        silent = [n for n, m in self._members.items() if m.heard < self._loop.time() - 3 * PULSE_SECONDS and not m.left]
        furthest = max(member.turn for member in self._members.values())
        behind = [n for n, member in self._members.items() if member.turn < furthest]
        if silent:
            why = f"{self._named(silent)}: no progress, and no answer"
        elif behind:
            why = f"{self._named(behind)}: no progress while {self._members[behind[0]].doing}; the others are further"
        else:
            doing = next(iter(self._members.values())).doing
            why = f"no progress while {doing}, on all hosts alike: their devices or what joins them is stuck"
        self._over = {"stalled": why}
        self._tell(stalled=why)

    def _named(self, processes: list[int]) -> str:
        return ", ".join(f"host {process} ({self._name(process)})" for process in sorted(processes))

    def _tell(self, **message: Any) -> None:
        for member in self._members.values():
            if not member.left:
                _write(member.writer, **message)

    def _joined(self) -> str:
        names = ", ".join(f"{process} ({self._name(process)})" for process in sorted(self._members))
        return f"{len(self._members)} of {self._place.processes} hosts joined: {names or 'none'}"

    def _missing(self) -> str:
        missing = [process for process in range(self._place.processes) if process not in self._members]
        known = self._place.names
        return ", ".join(f"{process} ({known[process]})" if process in known else str(process) for process in missing)

    def _name(self, process: int) -> str:
        return self._members[process].hello.host


def has_gone(process: int, host: str) -> str:
    """What to say of a process whose connection has ended."""
    return (
        f"host {process} ({host}) has gone: its process has ended, or its machine does not answer; see what it said "
        "last, and run the same command on all hosts again"
    )


def keep_alive(connection: socket.socket) -> None:
    """Has the system find out within half a minute that the machine at the other end does not answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def encode(**message: Any) -> bytes:
    """A line of JSON."""
    return json.dumps(message).encode() + b"\n"


def _write(writer: asyncio.StreamWriter, **message: Any) -> None:
    with contextlib.suppress(OSError):
        writer.write(encode(**message))


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]
