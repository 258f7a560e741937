"""Two runs in one folder, and a finished run started again."""

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Row
from tests.running import RUN, Running, check_same, contents, is_logged, is_there

ROW = pytest.mark.fault("two runs in one folder, finished run")


@ROW
def test_a_second_start_ends_at_once_at_every_stage_of_the_first(uninterrupted, make_folder, row: Row):
    folder = make_folder("two")
    first = Running(folder)
    (job,) = first.jobs
    for moment in (
        (folder / RUN / "lock.json").exists,
        is_logged(folder, 1),
        is_there(folder, "saving", 8),
        is_logged(folder, 40),
    ):
        first.send(signal.SIGSTOP, moment)  # so that the second one finds it there, and cannot wait for its end
        ((code, out, err),) = Running(folder).finish()
        job.send_signal(signal.SIGCONT)
        assert (code, out) == (2, ""), err
        assert f"{RUN}: this run is being written by process {job.pid} on " in err
        row.tried()
    ((code, _, err),) = first.finish()
    assert code == 0, err
    check_same(folder, uninterrupted)


def race(folder: Path) -> list[str]:
    """Starts two at the same moment, of which one trains and one is refused; what both said."""
    both = [Running(folder), Running(folder)]
    ended = {running.jobs[0].pid: running.finish()[0] for running in both}
    winner, loser = sorted(ended, key=lambda pid: ended[pid].code)
    assert (ended[winner].code, ended[loser].code) == (0, 2), ended
    assert f"{RUN}: this run is being written by process {winner} on " in ended[loser].err
    return [each.err for each in ended.values()]


@ROW
def test_of_two_that_start_at_the_same_moment_one_wins(uninterrupted, make_folder, row: Row):
    folder = make_folder("race")
    race(folder)
    check_same(folder, uninterrupted)
    row.tried()


@ROW
def test_of_two_that_find_the_lock_of_a_killed_run_one_takes_over(uninterrupted, make_folder, row: Row):
    folder = make_folder("stale")
    killed = Running(folder).send(signal.SIGKILL, is_logged(folder, 9))
    assert [ended.code for ended in killed.finish()] == [-signal.SIGKILL]
    assert (folder / RUN / "lock.json").exists()
    said = race(folder)
    assert any(f"taken over from process {killed.jobs[0].pid} on " in each for each in said), said
    check_same(folder, uninterrupted)
    row.tried()


@ROW
def test_a_finished_run_is_left_as_it_is(uninterrupted, row: Row):
    before, said = contents(uninterrupted / "runs"), set()
    for options in ((), ("--restart", "2")):
        ((code, out, err),) = Running(uninterrupted, *options).finish()
        assert code == 0, err
        assert contents(uninterrupted / "runs") == before
        said.add(out)
        row.tried()
    assert len(said) == 1  # its figures, each time
