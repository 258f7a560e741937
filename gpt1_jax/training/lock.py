"""One writer of a run at a time: a file in its folder that says who it is, and that shows that it goes on.

Whoever comes first makes the file, and removes it at the end. A process of this machine that has ended without doing so
is found out at once: the file has its number and when it started, so that another process that was given the same
number later is not taken for it. A process elsewhere renews the file every few seconds, and has ended when it no longer
does. No clock is compared with another one: who wants the run watches the file.

Locks of the operating system are not enough. They fall with the process, but not every network file system passes them
on to other machines, and no bucket has them.
"""

import contextlib
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pydantic
from etils import epath

from gpt1_jax.data.storage import create_file, is_remote, locked, make_folder, storage_errors, write_atomically
from gpt1_jax.errors import StalledError, UserError
from gpt1_jax.training.hosts import Hosts

LOCK = "lock.json"
_RENEW_SECONDS = 10.0  # between two renewals
_SILENT_SECONDS = 60.0  # without one, after which a process elsewhere has ended


class _Holder(pydantic.BaseModel, frozen=True):
    """Who writes into a run.

    Attributes:
        identity: of this hold on the run, and of no other one.
        host: where the process is, for people.
        process: its number.
        since: when it took the run, for people.
        machine: what process numbers mean something in, if that is known: a boot of a system, and a container in it.
        started: ticks of the machine's clock until the process started.
        renewals: how often it has renewed the file, where the file's own time does not tell.
    """

    identity: str
    host: str
    process: int
    since: str
    machine: str | None
    started: int | None
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class _Seen(NamedTuple):
    """The lock's file at a moment.

    Attributes:
        holder: whom it names; None: nobody, for it is only just being written, or was never finished.
        mark: another after every renewal.
    """

    holder: _Holder | None
    mark: tuple[bytes, int]


@contextlib.contextmanager
def sole_writer(run_dir: epath.Path, hosts: Hosts, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a run: while it is entered, no other start of a command writes into the run's folder.

    Args:
        run_dir: the run's folder, local or in a bucket; it is made, and so it is known that it can be written to.
        hosts: the processes that write it together; process 0 holds it for all.
        say: prints a line, if the run is taken over from a process that has ended.

    Raises:
        UserError: if another process holds it, naming that one.
        StorageError: if the folder cannot be written to.
    """
    lock = Lock(run_dir, say)
    try:
        hosts.first(lock.take)
        yield
    finally:
        lock.release()


class Lock:
    """What :func:`sole_writer` holds.

    Args:
        run_dir: the run's folder.
        say: prints a line.
    """

    def __init__(self, run_dir: epath.Path, say: Callable[[str], None]):
        self._path, self._say = run_dir / LOCK, say
        self._me = _Holder(
            identity=uuid.uuid4().hex,
            host=platform.node(),
            process=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            machine=_machine(),
            started=found.started if (found := _process(os.getpid())) else None,
        )
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Makes the file, and renews it from then on.

        Raises:
            UserError: if another process holds the run.
            StorageError: if the folder cannot be written to.
        """
        with storage_errors(self._path):
            make_folder(self._path.parent)
            while not self._create():
                self._remove_stale()
        self._thread = threading.Thread(target=self._renew, name="gpt1-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file, if it was taken."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        try:
            with storage_errors(self._path):
                if self._is_mine(self._look()):
                    self._path.unlink()
        except Exception as error:  # what has ended the work, if anything has, is worth more
            self._say(f"{error}; {LOCK} is left behind, and the next start removes it")

    def _create(self) -> bool:
        return create_file(self._path, self._me.model_dump_json().encode()) or self._is_mine(self._look())

    def _is_mine(self, seen: _Seen | None) -> bool:
        return bool(seen and seen.holder and seen.holder.identity == self._me.identity)

    def _look(self) -> _Seen | None:
        try:
            if is_remote(self._path):
                content, changed = self._path.read_bytes(), 0
            else:  # opened, for a network file system then asks the server, which it need not for the time alone
                with open(self._path, "rb") as file:
                    content, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            holder = _Holder.model_validate_json(content)
        except ValueError:
            holder = None
        return _Seen(holder, (content, changed))

    def _remove_stale(self) -> None:
        """Removes the file of a process that has ended, or does nothing if it has gone by itself.

        Raises:
            UserError: if the process goes on.
        """
        seen = self._look()
        if seen is None:
            return
        holder = seen.holder
        if holder and holder.machine and holder.machine == self._me.machine:
            gone, why = not _goes_on(holder), "which has ended"
        else:
            now = self._watch(seen)
            if now is None or (now != seen and not holder):  # it has gone by itself, or has now a name
                return
            gone, why = now == seen, f"which has not renewed {LOCK} for {_SILENT_SECONDS:g} seconds"
        if not gone:
            raise UserError(
                f"{self._path.parent}: this run is being written by {holder}; wait until it has ended, or start "
                "another run with name=NEW"
            )
        # One at a time, or a slower one would remove what a faster one has made in its place.
        with locked(self._path.with_name(f".{LOCK}.removal"), lambda: None):
            if self._look() != seen:
                return
            self._path.unlink(missing_ok=True)
        self._say(f"{self._path.parent}: taken over from {holder or 'a process without a name'}, {why}")

    def _watch(self, seen: _Seen) -> _Seen | None:
        """The file when it is no longer as it was seen, or has not changed for long enough; None if it has gone."""
        who = seen.holder or "a process without a name"
        self._say(f"{self._path.parent}: written by {who}; waiting up to {_SILENT_SECONDS:g} seconds for a sign of it")
        deadline = time.monotonic() + _SILENT_SECONDS
        while (now := self._look()) == seen and time.monotonic() < deadline:
            time.sleep(min(1.0, _SILENT_SECONDS / 10))
        return now

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(_RENEW_SECONDS):
            renewals += 1
            # What storage does not do now it may do the next time; the run's own writes will say so if it lasts.
            with contextlib.suppress(Exception):
                seen = self._look()
                if seen is None and self._create():
                    continue
                if seen and seen.holder and not self._is_mine(seen):
                    self._end(seen.holder)
                if is_remote(self._path):
                    renewed = self._me.model_copy(update={"renewals": renewals})
                    write_atomically(self._path, renewed.model_dump_json().encode())
                else:
                    os.utime(self._path)

    def _end(self, holder: _Holder) -> None:
        """Ends this process before it writes anything more: it stood still for so long that another took the run."""
        lost = StalledError(
            f"{self._path.parent}: taken over by {holder}, while this process stood still for over "
            f"{_SILENT_SECONDS:g} seconds"
        )
        print(f"gpt1: {lost}", file=sys.stderr, flush=True)
        os._exit(lost.exit_code)


class _Process(NamedTuple):
    state: str
    started: int


def _process(number: int) -> _Process | None:
    """What Linux says of a process; None: nothing, here or to this user."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(fields[0], int(fields[19]))


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: every process is as one elsewhere
        return None


def _goes_on(holder: _Holder) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    found = _process(holder.process)
    return found is None or (found.started == holder.started and found.state not in "ZX")
