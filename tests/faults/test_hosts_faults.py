"""One of two hosts is killed, told to stop, stopped or stuck: both end, and the run goes on with its bits."""

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt1_jax.errors import StalledError
from tests.faults.conftest import Row
from tests.running import RUN, Running, after, check_nothing_left, check_same, is_logged, last_step

# Seconds: the deadline, twelve until all have ended, and fifteen for one that has to be killed; with room for others.
DEADLINES = [f"deadlines.{key}=20" for key in ("step", "save", "evaluation")]
MOST = 90
# The command, one process of which gets stuck behind a step that it has dispatched.
STUCK = """
import itertools, os
import jax
from gpt1_jax.cli import main
from gpt1_jax.training.recorder import Recorder

def stuck_in_python():
    while True:
        pass

def stuck_in_native_code():
    sum(itertools.repeat(0))  # with Python's lock held

def stuck(recorder, step, metrics):
    if (step, jax.process_index()) == (int(os.environ["STUCK_AT"]), int(os.environ["STUCK_PROCESS"])):
        globals()[os.environ["STUCK"]]()
    add(recorder, step, metrics)

add, Recorder.add = Recorder.add, stuck
main()
"""


@pytest.fixture(scope="module")
def two(make_folder: Callable[..., Path]) -> Path:
    """A run of two processes that nothing happened to."""
    folder = make_folder("two")
    ended = Running(folder, processes=2).finish()
    assert [code for code, _, _ in ended] == [0, 0], ended
    return folder


def check_stacks(folder: Path, process: int, stuck: str) -> None:
    """Checks, and removes, what each process has written of its threads."""
    for each in (0, 1):
        file = folder / RUN / f"stalled-{each}.txt"
        stacks = file.read_text()
        assert " in main\n" in stacks and (each != process or stuck in stacks), stacks
        file.unlink()


def go_on(folder: Path, expected: Path) -> None:
    ended = Running(folder, processes=2).finish()
    assert [code for code, _, _ in ended] == [0, 0], ended
    check_same(folder, expected)


@pytest.mark.fault("a host killed, stopped or stuck")
def test_one_is_killed(two, make_folder, row: Row):
    """Each of them once, so also the coordinator; the other one sees to it that nothing waits."""
    folder = make_folder("killed")
    for process in (1, 0):
        running = Running(folder, processes=2).send(signal.SIGKILL, is_logged(folder, last_step(folder) + 9), process)
        ended = running.finish(MOST)
        other = ended[1 - process]
        assert (ended[process].code, other.code) == (-signal.SIGKILL, StalledError.exit_code), ended
        assert re.search(rf"gpt1: host {process} \(.*\) has gone: its process has ended", other.err)
        check_nothing_left(folder)
        row.tried()
    go_on(folder, two)


@pytest.mark.fault("SIGTERM at random moments")
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
def test_told_to_stop(told, two, make_folder, row: Row):
    """One of them or both, in start-up and while they train: both stop, behind the same step or with nothing done."""
    folder, draw = make_folder("told"), random.Random(sum(told))
    for _ in range(3):
        running = Running(folder, processes=2).wait((folder / RUN / "lock.json").exists)
        ended = running.send(signal.SIGTERM, after(draw.uniform(0, 6)), *told).finish(MOST)
        assert [code for code, _, _ in ended] == [75, 75], ended
        stops = {
            re.search(r"gpt1: SIGTERM on host \d .*: (stopped after step \d+|.*nothing to save)", e.err)[1]
            for e in ended
        }
        assert len(stops) == 1, ended
        check_nothing_left(folder)
        row.tried()
    go_on(folder, two)


@pytest.mark.fault("a host killed, stopped or stuck")
@pytest.mark.parametrize("how", ["stopped", "stuck_in_python", "stuck_in_native_code"])
def test_one_makes_no_progress(how, two, make_folder, row: Row):
    """Each of them once; both write their stacks, and the other one says whose fault it is."""
    folder = make_folder(how)
    for process in (1, 0):
        step = last_step(folder) + 9
        if how == "stopped":
            running = Running(folder, *DEADLINES, processes=2).send(signal.SIGSTOP, is_logged(folder, step), process)
        else:
            where = {"STUCK": how, "STUCK_AT": str(step), "STUCK_PROCESS": str(process)}
            running = Running(folder, *DEADLINES, processes=2, program=("-c", STUCK), environment=where)
            running.wait(is_logged(folder, step - 3))  # what comes after is not read yet
        ended = running.finish(MOST)
        assert [code for code, _, _ in ended] == [StalledError.exit_code] * 2, ended
        assert re.search(rf"gpt1: host {process} \(.*\)", ended[1 - process].err), ended
        check_stacks(folder, process, "" if how == "stopped" else how)
        check_nothing_left(folder)
        row.tried()
    go_on(folder, two)
