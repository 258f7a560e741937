"""The watchdog: what ends a process that makes no progress, wherever it is stuck, and what it leaves."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt1_jax.errors import StalledError

SCRIPT = """
import ctypes, os, signal, sys, threading, time
from gpt1_jax.training.watchdog import Watchdog

WHY = "no progress in 0.2 seconds, while making step 7"

def waits_for_ever():
    threading.Event().wait()

threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog("run/stalled-3.txt") as watchdog:
    watchdog.expect("making step 7", float(sys.argv[1]))
    exec(sys.argv[2])
"""


def start(folder: Path, seconds: float, work: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(seconds), f"print('there', flush=True); {work}"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize(
    "work",
    [
        "exec('while True: pass')",
        "ctypes.PyDLL(None).sleep(600)",  # with Python's lock held
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "watchdog.expect('another', 600); watchdog.end(WHY); waits_for_ever()",
    ],
    ids=["loop", "native", "stopped", "told"],
)
def test_it_ends_with_its_stacks_written(tmp_path, work):
    _, said = (process := start(tmp_path, 0.2, work)).communicate(timeout=60)
    assert process.returncode == StalledError.exit_code, said
    why = "no progress in 0.2 seconds, while making step 7"
    file = tmp_path / "run" / "stalled-3.txt"
    assert said.startswith(f"gpt1: {why}; the stacks of its threads are in {file}; run the same command again")
    head, _, stacks = file.read_text().partition("\n\n")
    assert head.endswith(f": {why}")
    # Of all threads; one that was stopped may have gone on for a moment.
    assert "waits_for_ever" in stacks and re.search(r'File "<string>", line 1[13] in <module>', stacks)


def test_progress_in_time_is_let_be(tmp_path):
    work = "[(time.sleep(1.0), watchdog.expect('more', 3.0)) for _ in range(4)]; watchdog.renew(counted=False)"
    process = start(tmp_path, 3.0, work)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0
    assert not (tmp_path / "run").exists()


def test_who_waits_for_another_has_no_deadline(tmp_path):
    work = "with watchdog.suspended(): time.sleep(2.5)"
    process = start(tmp_path, 1.0, f"exec({work!r}); print('then', flush=True); waits_for_ever()")
    said, told = process.communicate(timeout=60)
    assert said == "then\n" and "in 1 seconds, while making step 7" in told
    assert process.returncode == StalledError.exit_code


def test_killed_it_leaves_no_watcher(tmp_path):
    process = start(tmp_path, 600, "waits_for_ever()")
    process.send_signal(signal.SIGKILL)
    # The watcher has the other end of standard error, too, so this waits for it.
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGKILL
