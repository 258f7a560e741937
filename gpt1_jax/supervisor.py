"""``gpt1 train --restart N``: the same command in a process of its own, started again where that may help."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from etils import epath

from gpt1_jax.config_file import load_config
from gpt1_jax.console import say
from gpt1_jax.data.storage import names_in
from gpt1_jax.errors import GPT1Error, Interrupted, StalledError

_AGAIN = (GPT1Error.exit_code, StalledError.exit_code, Interrupted.exit_code)
_LONGEST_PAUSE = 60.0  # seconds between two starts
# 1 is PR_SET_PDEATHSIG: the signal that a process gets when its parent ends.
_TIE = "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); os.execv(sys.argv[1], sys.argv[1:])"


def supervise(config: epath.Path, overrides: Sequence[str], options: Sequence[str], restarts: int) -> int:
    """Runs ``gpt1 train`` until it is done, or nothing is to be hoped from another start.

    It is started again after exit codes 1, 5 and 75, and when it was killed, and not where this process was told to
    stop. A signal is handed on.

    Args:
        config: the file.
        overrides: of it.
        options: of the command.
        restarts: how many there may be in a row between which the run gets no newer checkpoint.

    Returns:
        The exit code of the last one.

    Raises:
        UserError: if the configuration is amiss.
    """
    folder = load_config(config, overrides).run_dir / "checkpoints"
    command = [sys.executable, "-m", "gpt1_jax", "train", os.fspath(config), *overrides, *options]

    def newest() -> int:
        return max((int(name) for name in names_in(folder) if name.isdecimal()), default=-1)

    return keep_running(command, restarts, newest)


def keep_running(command: Sequence[str], restarts: int, progress: Callable[[], int]) -> int:
    """Runs a command, and again; as :func:`supervise`."""
    with _Signals() as signals:
        reached, left = progress(), restarts
        while True:
            code = signals.run(command)
            if signals.received or (code not in _AGAIN and code < 128):
                return code
            before, reached = reached, progress()
            left = restarts if reached > before else left - 1
            if left < 0:
                say(f"gpt1: ended with exit code {code}, and {restarts} restarts have not brought a newer checkpoint")
                return code
            say(f"gpt1: ended with exit code {code}; starting again, {left} more times without a newer checkpoint")
            signals.pause(min(_LONGEST_PAUSE, 2.0 ** (restarts - left)))
            if signals.received:
                return code


class _Signals:
    """While it is entered, SIGTERM and SIGINT are handed on to the command that runs."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen | None = None

    def run(self, command: Sequence[str]) -> int:
        """Runs a command; its exit code, 128 and the number of the signal that ended it if one did."""
        self._process = subprocess.Popen(_tied(command))
        if self.received:  # while it was started
            self._process.send_signal(self.received[0])
        code = self._process.wait()
        if self.received == [-code]:  # before it had begun, so there was nothing to save
            return Interrupted.exit_code
        return code if code >= 0 else 128 - code

    def pause(self, seconds: float) -> None:
        """Waits, but not beyond a signal."""
        until = time.monotonic() + seconds
        while not self.received and time.monotonic() < until:
            time.sleep(0.1)

    def __enter__(self) -> "_Signals":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._hand_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._process:
            self._process.send_signal(number)


def _tied(command: Sequence[str]) -> list[str]:
    """The command as a process that is killed when its parent is, on Linux; elsewhere it would go on alone.

    The process asks for that itself before it becomes the command: between fork and exec no Python is safe where there
    are threads.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIE, *command]
