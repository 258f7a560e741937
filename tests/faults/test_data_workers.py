"""What prepares or reads data is killed, or hangs: the command ends in time, and the next one goes on."""

import json
import os
import random
import signal
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import psutil
import pytest

from gpt1_jax.data.manifest import MANIFEST, sha256_of
from gpt1_jax.errors import GPT1Error, StalledError
from gpt1_jax.pool import Pool
from tests.faults.conftest import Row
from tests.running import RUN, SETTINGS, Running, check_nothing_left, check_same

ROW = "killed or hung data worker"
SECONDS = 40  # of the deadlines: room for a worker to start on a busy machine
MOST = 150  # until a command has ended behind it
STAGES = {"reading": "*/.work/text/000000.json", "encoding": "*/.work/*.range.ends.npy"}  # what shows that it goes on
# The command; a thread of it waits for ever for a read in the middle of the training.
HUNG = """
import itertools, os, threading
from gpt1_jax.cli import main
from gpt1_jax.data import corpus

reads = itertools.count()

def never_answered(descriptor, view, offset):
    if threading.current_thread() is not threading.main_thread() and next(reads) == 40:  # of step 6
        os.read(os.pipe()[0], 1)
    return read(descriptor, view, offset)

read, corpus._read_local = corpus._read_local, never_answered
main()
"""


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_of(path) for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of a few megabytes, so that each stage has work for a while."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = "the of and to in is was he for it with as his on be at by had not are but from or have an they".split()
    for source in range(3):
        stories = (" ".join(draw.choices(words, k=400)) for _ in range(1500))
        lines = [json.dumps({"text": f"Story {number}: {text}."}) for number, text in enumerate(stories)]
        (folder / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def make_sources(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes folders to prepare those sources in."""
    sources = "".join(f"    - {{kind: files, paths: ['{texts}/{source}.jsonl']}}\n" for source in range(3))
    data = f"data:\n  root: prepared\n  validation_fraction: 0.1\n  workers: 2\n  sources:\n{sources}"

    def make() -> Path:
        folder = tmp_path_factory.mktemp("sources")
        (folder / "config.yaml").write_text(data + SETTINGS.replace("steps: 60", "steps: 6"))
        return folder

    return make


@pytest.fixture(scope="module")
def prepared(make_sources: Callable[[], Path]) -> dict[str, str]:
    """The corpus, as nothing has happened to it."""
    folder = make_sources()
    ((code, _, err),) = Running(folder, command="prepare").finish()
    assert code == 0, err
    return contents(folder / "prepared")


def workers_of(process: int) -> list[psutil.Process]:
    children = [each for each in psutil.Process(process).children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in children if "--multiprocessing-fork" in each.cmdline()]


@pytest.mark.fault(ROW)
@pytest.mark.parametrize(
    ("command", "stage", "number", "code", "said"),
    [
        ("prepare", "reading", signal.SIGKILL, GPT1Error.exit_code, "a worker process was killed"),
        ("prepare", "encoding", signal.SIGKILL, GPT1Error.exit_code, "a worker process was killed"),
        ("prepare", "encoding", signal.SIGSTOP, StalledError.exit_code, "a worker process has not answered for 40 s"),
        ("train", "reading", signal.SIGSTOP, StalledError.exit_code, "a worker process has not answered for 40 s"),
    ],
)
def test_a_worker_of_the_preparation(command, stage, number, code, said, make_sources, prepared, row: Row):
    folder = make_sources()
    root = folder / "prepared"
    running = Running(folder, f"deadlines.start={SECONDS}", command=command)
    running.wait(lambda: list(root.glob(STAGES[stage])))
    workers = workers_of(running.jobs[0].pid)
    for worker in workers[-1:] if number == signal.SIGKILL else workers:  # one that has nothing to do is not missed
        worker.send_signal(number)
    (ended,) = running.finish(MOST)
    assert ended.code == code and f"gpt1: {said}" in ended.err, ended
    assert not list(root.rglob(MANIFEST))
    check_nothing_left(folder)
    (ended,) = Running(folder, command=command).finish()
    assert ended.code == 0, ended.err
    assert contents(root) == prepared
    row.tried()


def half_answered(number: int) -> int:
    """Has its process killed when half of an answer is written."""

    def send(answer: connection.Connection, content: memoryview) -> None:
        os.write(answer.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if number == 5:
        connection.Connection._send = send
    return number


@pytest.mark.fault(ROW)
def test_a_worker_that_is_killed_while_it_answers(row: Row):
    """Whoever reads the answer waits for the rest of it, and does not see that the process has ended."""
    with pytest.raises(StalledError, match="a worker process has not answered"), Pool(2, seconds=SECONDS) as pool:
        list(pool.map(half_answered, range(20)))
    assert not workers_of(os.getpid())
    row.tried()


@pytest.mark.fault(ROW)
def test_workers_that_stop_while_more_is_on_its_way_to_them(row: Row):
    """More than a pipe holds: whoever sends it must not wait for ever, nor whoever waits for the sender."""
    for _ in range(3):
        with pytest.raises(StalledError), Pool(2, seconds=15) as pool:
            answers = pool.map(len, (bytes(60_000) for _ in range(1000)))
            next(answers)
            for worker in workers_of(os.getpid()):
                worker.send_signal(signal.SIGSTOP)
            list(answers)
        assert not workers_of(os.getpid())
        row.tried()


@pytest.mark.fault(ROW)
def test_a_worker_with_nothing_to_do(row: Row):
    """One that is stopped is not waited for at the end."""
    with Pool(2, seconds=SECONDS) as pool:
        assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))
        workers = workers_of(os.getpid())
        workers[0].send_signal(signal.SIGSTOP)
    assert workers and not any(worker.is_running() for worker in workers)
    row.tried()


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("readers", [0, 2])
def test_a_thread_that_reads_for_the_training(readers, make_folder, uninterrupted, row: Row):
    folder = make_folder("hung")
    deadlines = [f"deadlines.{key}=20" for key in ("step", "evaluation", "save")]
    running = Running(folder, f"data.readers={readers}", *deadlines, program=("-c", HUNG))
    ((code, _, err),) = running.finish(MOST)
    assert code == StalledError.exit_code, err
    assert "gpt1: no progress in 20 seconds, while reading the batch of step 6; the stacks" in err
    stacks = (folder / RUN / "stalled-0.txt").read_text()
    assert " in never_answered\n" in stacks and " in global_batch\n" in stacks
    check_nothing_left(folder)
    ((code, _, err),) = Running(folder, f"data.readers={readers}").finish()
    assert code == 0, err
    check_same(folder, uninterrupted)
    row.tried()
