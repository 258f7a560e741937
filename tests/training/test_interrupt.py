"""Signals: the first ends the process in order, wherever it is; a second one ends it at once."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import hashlib, sys, time
from gpt1_jax.errors import Interrupted
from gpt1_jax.training.interrupt import Interruption

class Loop:
    def stop(self, reason):
        print("asked", reason, flush=True)

try:
    with Interruption() as interruption:
        try:
            print("there", flush=True)
            exec(sys.argv[1])
        finally:
            print("left", flush=True)
except Interrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(work: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, work]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_to_save_it_leaves_where_it_is(number):
    process = start("time.sleep(600)")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out == f"left\n{number.name}: stopped, with nothing to save; run the same command again to go on\n"


def test_from_native_code_that_does_not_return_it_is_ended():
    process = start("hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")  # minutes
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and out == ""
    assert err.endswith("gpt1: SIGTERM: stopped, with nothing to save; run the same command again to go on\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_trains_is_asked_once_and_a_second_signal_ends_it_at_once(number):
    process = start("interruption.tell(Loop()); exec('while True: time.sleep(60)')")
    assert process.stdout is not None
    for _ in range(2):  # to the process and to its group, as launchers do
        process.send_signal(number)
    assert process.stdout.readline() == f"asked {number.name}\n"
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and out == ""
    assert err.endswith(f"gpt1: {number.name}, a second signal: ended at once\n")
