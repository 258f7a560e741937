"""The wall clock is moved a day during a run: it plays no part in the figures, the checkpoints or the lock."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from etils import epath

from gpt1_jax.errors import UserError
from gpt1_jax.training import lock
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.lock import sole_writer
from tests.faults.conftest import Row
from tests.running import RUN, Running, check_same, is_logged

DAY = 24 * 3600
# The command, its clock moved behind step 20; then it waits until it has been looked at. Its lock is renewed often,
# and says that the process is on another machine, of which the file's time is all that can be seen.
MOVED = """
import datetime, os, pathlib, time
from gpt1_jax.cli import main
from gpt1_jax.training import lock
from gpt1_jax.training.recorder import Recorder

class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=seconds)

def move():
    time.time, time.time_ns = lambda: clock() + seconds, lambda: clock_ns() + seconds * 10**9
    os.utime = touch
    datetime.datetime = Moved
    pathlib.Path("moved").touch()
    while not pathlib.Path("seen").exists():
        clock_sleep(0.05)

def touch(path, *times, **more):
    utime(path, *(times if times or more else [(time.time(), time.time())]), **more)

def move_behind(recorder, step, metrics):
    add(recorder, step, metrics)
    if step == 20:
        move()

seconds = int(os.environ["SECONDS"])
clock, clock_ns, utime, clock_sleep = time.time, time.time_ns, os.utime, time.sleep
add, Recorder.add = Recorder.add, move_behind
lock._RENEW_SECONDS, lock._machine = 1.0, lambda: "another"
main()
"""


def check_rates(folder: Path) -> None:
    """Checks that the seconds of the log grow, and so that no rate is negative."""
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all(line["tokens_per_second"] > 0 for line in steps)
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < DAY / 2


def check_held(folder: Path) -> None:
    """Checks that the run is not taken over."""
    with pytest.raises(UserError, match="this run is being written by process"):
        with sole_writer(epath.Path(folder / RUN), Hosts(), print):
            pass


def newest(folder: Path) -> int | None:
    with Checkpoints(folder / RUN) as checkpoints:
        return checkpoints.latest()


@pytest.mark.fault("wall clock moved")
@pytest.mark.parametrize("days", [1, -1])
def test_moved_by_a_day(days, make_folder: Callable[..., Path], uninterrupted: Path, row: Row):
    folder = make_folder("moved")
    running = Running(folder, program=("-c", MOVED), environment={"SECONDS": str(days * DAY)})
    running.wait((folder / "moved").exists)
    before = newest(folder)
    deadline = time.monotonic() + 60
    while abs((folder / RUN / lock.LOCK).stat().st_mtime - time.time() - days * DAY) > DAY / 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    check_held(folder)
    (folder / "seen").touch()
    ((code, _, err),) = running.send(signal.SIGTERM, is_logged(folder, 28)).finish()
    assert code == 75, err
    check_rates(folder)
    after = newest(folder)
    assert before is not None and after is not None and before <= 20 < after
    # What was written since the clock was moved has its time; the system's own clock stayed as it was.
    for path in (folder / RUN / "checkpoints" / str(after)).rglob("*"):
        os.utime(path, (time.time() + days * DAY,) * 2)
    assert newest(folder) == after
    ((code, _, err),) = Running(folder).finish()
    assert code == 0 and f"steps {after} to 60" in err, err
    check_rates(folder)
    check_same(folder, uninterrupted)
    row.tried()
