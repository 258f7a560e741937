"""SIGKILL, SIGTERM and Ctrl-C at random moments: the run goes on with the bits that it would have had."""

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Row
from tests.running import RUN, Running, after, check_same, is_logged, is_there, last_step

STEPS, EVERY = 60, 4  # of the configuration


def complete(folder: Path) -> list[int]:
    """Steps of the checkpoints that are not being written or deleted, 0 for none before them."""
    return [0, *sorted(int(path.name) for path in (folder / RUN / "checkpoints").glob("[0-9]*"))]


def signalled(running: Running, number: signal.Signals, moment: Callable[[], object]) -> bool:
    """Sends a signal when the moment has come; False if the process has ended before."""
    (job,) = running.jobs
    while not moment():
        if job.poll() is not None:
            return False
        time.sleep(0.0005)
    job.send_signal(number)
    return True


def check_kept(folder: Path, before: list[int], logged: int) -> None:
    """What a killed run has kept: all but what came after the last checkpoint that was due, or is being written."""
    (folder / RUN).mkdir(parents=True, exist_ok=True)
    written = [int(path.name.removeprefix("saving-")) for path in (folder / RUN / "checkpoints").glob("saving-*")]
    newest = complete(folder)[-1]
    assert newest >= before[-1]
    assert newest >= min([logged, *written]) - EVERY


@pytest.mark.fault("SIGKILL at random moments")
@pytest.mark.parametrize("seed", range(4))
def test_killed(seed, uninterrupted, make_folder, row: Row):
    """Each run is killed up to five times: anywhere, at a step, while it saves, while it deletes."""
    draw = random.Random(seed)
    while row.tries < 10:
        folder = make_folder("killed")
        for _ in range(5):
            before = complete(folder)
            step = before[-1] + draw.randint(1, 3 * EVERY)
            moments = {
                "anywhere": after(draw.uniform(0, 8)),
                "step": is_logged(folder, step),
                "saving": is_there(folder, "saving", step),
                "deleting": is_there(folder, "deleting", step - 4 * EVERY),
            }
            running = Running(folder)
            killed = signalled(running, signal.SIGKILL, moments[draw.choice(list(moments))])
            ((code, _, err),) = running.finish()
            if not killed:
                assert code == 0, err
                break
            if code == 0:  # it ended in this moment
                break
            assert code == -signal.SIGKILL, err
            check_kept(folder, before, last_step(folder))
            row.tried()
        ((code, _, err),) = Running(folder).finish()
        assert code == 0, err
        check_same(folder, uninterrupted)
        assert all(path.name.isdecimal() for path in (folder / RUN / "checkpoints").iterdir())


@pytest.mark.fault("SIGTERM at random moments")
@pytest.mark.parametrize("seed", range(2))
def test_terminated(seed, uninterrupted, make_folder, row: Row):
    """Exit code 75 wherever it comes, with one checkpoint more at most."""
    draw = random.Random(seed)
    while row.tries < 5:
        folder = make_folder("terminated")
        for _ in range(3):
            before = complete(folder)
            running = Running(folder)
            step = before[-1] + draw.randint(1, 3 * EVERY)
            moment = draw.choice((after(draw.uniform(0.5, 8)), is_logged(folder, step)))
            number = draw.choice((signal.SIGTERM, signal.SIGINT))
            ended = not signalled(running, number, moment)
            ((code, _, err),) = running.finish()
            if ended or code == 0:
                assert code == 0, err
                break
            if code == -number:  # Python was still reading the command: there was nobody yet who could answer
                assert complete(folder) == before and not (folder / RUN / "lock.json").exists()
                continue
            assert code == 75, err
            said = re.search(rf"{number.name}: stopped after step (\d+); its checkpoint is (\S+);", err)
            assert said or f"{number.name}: stopped, with nothing to save; run the same command again" in err
            if said:
                assert complete(folder)[-1] == int(said[1]) and Path(said[2]) == folder / RUN / "checkpoints" / said[1]
            row.tried()
        ((code, _, err),) = Running(folder).finish()
        assert code == 0, err
        check_same(folder, uninterrupted)
