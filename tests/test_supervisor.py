"""The supervisor: after which ends it starts again, when it gives up, and what it hands on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt1_jax import supervisor
from gpt1_jax.supervisor import keep_running

# Ends, start by start, as it is told: with a checkpoint at a step, and with an exit code or by a signal.
COMMAND = """
import os, pathlib, sys
starts = pathlib.Path("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("." * (number + 1))
step, code = eval(sys.argv[1])[number]
pathlib.Path("step").write_text(str(step))
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """Runs a command that ends so, and gives the exit code and how often it was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE", 0.0)
    (tmp_path / "step").write_text("-1")

    def run(restarts: int, *ends: tuple[int, int]) -> tuple[int, int]:
        command = [sys.executable, "-S", "-c", COMMAND, repr(ends)]
        code = keep_running(command, restarts, lambda: int(Path("step").read_text()))
        return code, len(Path("starts").read_text())

    return run


@pytest.mark.parametrize("code", [0, 2, 3, 4, 6])
def test_what_another_start_cannot_mend_is_the_end(ends, code):
    assert ends(3, (5, code)) == (code, 1)


def test_it_starts_again_until_it_is_done(ends):
    assert ends(1, (5, 1), (10, 5), (15, 75), (20, -signal.SIGKILL), (25, 0)) == (0, 5)


@pytest.mark.parametrize(("restarts", "starts"), [(0, 2), (1, 3)])
def test_it_gives_up_where_nothing_is_gained(ends, restarts, starts, capsys):
    assert ends(restarts, (5, 5), (5, 1), (5, 75), (5, 0)) == ([1, 75][restarts], starts)
    assert f"{restarts} restarts have not brought a newer checkpoint" in capsys.readouterr().err


def test_a_signal_is_handed_on_and_its_end_is_the_end():
    worker = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    )
    assert keep_running([sys.executable, "-S", "-c", worker], 5, lambda: 0) == 75


def test_one_that_had_not_begun_had_nothing_to_save():
    worker = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    assert keep_running([sys.executable, "-S", "-c", worker], 5, lambda: 0) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell a process that its parent has ended")
def test_killed_it_leaves_no_worker():
    worker = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    script = (
        "import sys; from gpt1_jax.supervisor import keep_running\n"
        "keep_running([sys.executable, '-S', '-c', sys.argv[1]], 5, lambda: 0)"
    )
    with subprocess.Popen([sys.executable, "-c", script, worker], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.kill()
        assert process.stdout.read() == ""  # its output ends with the worker
