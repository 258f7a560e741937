"""One writer of a run: the second is refused, a dead one makes way, a stale file is told from a live one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from gpt1_jax.errors import StalledError, StorageError, UserError
from gpt1_jax.training import lock
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.lock import LOCK, Lock, sole_writer

HOLD = """
import os, sys
from etils import epath
from gpt1_jax.training import lock
lock._RENEW_SECONDS = 0.1
if len(sys.argv) > 2:
    lock._SILENT_SECONDS = 1.0
    lock._machine = lambda: "another"
lock.Lock(epath.Path(sys.argv[1]), print).take()
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path / "run")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 1.0)


@contextlib.contextmanager
def holder(run_dir: epath.Path, *elsewhere: str) -> Iterator[subprocess.Popen]:
    """Another process that holds a run, as one of this machine or as one elsewhere."""
    command = [sys.executable, "-c", HOLD, str(run_dir), *elsewhere]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def holds(run_dir: epath.Path) -> int:
    return json.loads((run_dir / LOCK).read_text())["process"]


def take(run_dir: epath.Path) -> list[str]:
    """Holds the run for a moment; what was said."""
    lines: list[str] = []
    with sole_writer(run_dir, Hosts(), lines.append):
        assert holds(run_dir) == os.getpid()
    assert list(run_dir.iterdir()) == []
    return lines


def forge(run_dir: epath.Path, **values: object) -> None:
    """Writes the lock of a process that has not removed it."""
    mine = Lock(run_dir, print)._me.model_dump() | {"identity": "other", "host": "elsewhere"}
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK).write_text(json.dumps(mine | values))


def test_it_leaves_nothing_also_after_an_error(run_dir):
    assert take(run_dir) == []
    with pytest.raises(ZeroDivisionError), sole_writer(run_dir, Hosts(), print):
        raise ZeroDivisionError
    assert list(run_dir.iterdir()) == []


def test_a_process_of_this_machine_holds_it_until_it_has_ended(run_dir):
    with holder(run_dir) as process:
        for number in (signal.SIGCONT, signal.SIGSTOP):  # one that is stopped may go on
            process.send_signal(number)
            with pytest.raises(UserError, match=rf"being written by process {process.pid} on .*; wait until") as error:
                take(run_dir)
            assert error.value.exit_code == 2
            assert holds(run_dir) == process.pid
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie is a process that has ended
        (line,) = take(run_dir)
        assert f"taken over from process {process.pid} on " in line
        assert line.endswith(", which has ended")


def test_a_number_that_another_process_has_now_is_told_apart(run_dir):
    forge(run_dir, started=1)
    (line,) = take(run_dir)
    assert line.endswith(", which has ended")


def test_a_process_elsewhere_holds_it_as_long_as_it_renews_and_never_again(run_dir):
    with holder(run_dir, "elsewhere") as process:
        with pytest.raises(UserError, match=f"process {process.pid} "):
            take(run_dir)
        process.send_signal(signal.SIGSTOP)
        lines: list[str] = []
        with sole_writer(run_dir, Hosts(), lines.append):
            waiting, line = lines
            assert waiting.endswith("waiting up to 1 seconds for a sign of it")
            assert f"taken over from process {process.pid} on " in line
            assert line.endswith(", which has not renewed lock.json for 1 seconds")
            process.send_signal(signal.SIGCONT)
            assert process.wait(60) == StalledError.exit_code
            assert holds(run_dir) == os.getpid()


@pytest.mark.parametrize("content", ["", "{}", "\0" * 100])
def test_what_was_never_finished_makes_way(run_dir, content):
    run_dir.mkdir()
    (run_dir / LOCK).write_text(content)
    assert "taken over from a process without a name" in take(run_dir)[-1]


def test_a_file_that_was_removed_by_hand_is_made_again(run_dir):
    with sole_writer(run_dir, Hosts(), print):
        (run_dir / LOCK).unlink()
        deadline = time.monotonic() + 30
        while (not (run_dir / LOCK).exists() or not (run_dir / LOCK).read_bytes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert holds(run_dir) == os.getpid()
    assert list(run_dir.iterdir()) == []


def test_of_many_at_once_one_has_it_also_where_a_stale_one_lies(run_dir):
    forge(run_dir, started=1)
    held, refused = [], []
    start = threading.Barrier(8)

    def race() -> None:
        one = Lock(run_dir, lambda line: None)
        start.wait()
        try:
            one.take()
        except UserError:
            refused.append(one)
        else:
            held.append(one)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()
    assert list(run_dir.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run"):
        take(epath.Path(tmp_path / "file" / "run"))


def test_a_second_train_ends_before_it_writes(config_file, gpt1, monkeypatch):
    monkeypatch.setattr("gpt1_jax.training.hardware.keep_freed_memory", lambda: None)
    run_dir = epath.Path(config_file.parent / "runs" / "run")
    with sole_writer(run_dir, Hosts(), print):
        ended = gpt1("train", config_file)
        assert (ended.code, ended.out) == (2, "")
        assert f"gpt1: {run_dir}: this run is being written by process {os.getpid()} on " in ended.err
    assert list(run_dir.iterdir()) == []
