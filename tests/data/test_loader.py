import gc
import itertools
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches, global_batch
from gpt1_jax.data.order import remaining
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError
from gpt1_jax.training.history import DataOrder, RemainingWindows

SOURCES = [[300, 100], [500]]
WEIGHTS = [1.0, 2.0]
SCHEDULE, END = {0: 2.0, 41: 0.0, 55: 5.0}, 80  # of the second source; examples that are read
SCRIPT = Path(__file__).with_name("read_batches.py")


@pytest.fixture(scope="module")
def folder(write_corpus, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), SOURCES)


@pytest.fixture
def windows(folder):
    return RandomWindows(Corpus(folder), 8, seed=3, weights=WEIGHTS)


@pytest.fixture
def device():
    return SingleDeviceSharding(jax.devices()[0])


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gpt1-loader"]


def test_batches_are_consecutive_examples(windows, device):
    with Batches(windows, 4, device, position=6) as batches:
        for expected in (6, 10, 14):
            position, batch = next(batches)
            assert position == expected
            assert batch.dtype == np.int32 and batch.shape == (4, 9)
            assert np.array_equal(batch, windows.examples(np.arange(position, position + 4)))


def test_position_survives_a_change_of_batch_size(windows, device):
    def rows(batch_size, position, count):
        with Batches(windows, batch_size, device, position) as batches:
            return np.concatenate([next(batches)[1] for _ in range(count)])

    whole = rows(24, 0, 2)
    assert np.array_equal(np.concatenate([rows(6, 0, 3), rows(15, 18, 2)]), whole)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    begin=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    parts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 50)), max_size=3),
)
def test_wherever_a_run_begins_and_whatever_its_batches_it_reads_one_sequence(folder, device, begin, sizes, parts):
    left_out = [(first, first + count) for first, count in parts]
    order = DataOrder(
        step=0, examples=0, corpus="", seed=3, context_length=8, batch_size=4, weights=WEIGHTS, left_out=left_out
    )
    corpus = Corpus(folder)
    windows, rows = RemainingWindows(order, corpus), []
    for before, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
        rows.append(global_batch(windows, begin + before, size, device))
    expected = order.windows(corpus).examples(remaining(begin + np.arange(sum(sizes)), left_out))
    assert np.array_equal(np.concatenate(rows), expected)


def test_position_beyond_ten_to_the_fifteenth(windows, device):
    far = 10**15 + 7
    batch = global_batch(windows, far, 4, device)
    assert np.array_equal(batch, windows.examples(far + np.arange(4)))


def read_batches(processes, **settings):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, json.dumps(settings | {"processes": processes, "process": process, "port": port})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), outputs
    return [json.loads(out) for out, _ in outputs]


def starts_by_hand(tokens):
    start, starts = 0, []
    for position, token in enumerate(tokens):
        start = position if token % 5 == 0 else start
        starts.append(start)
    return starts


@pytest.mark.parametrize(
    "devices, data_axis, processes, readers, position",
    [
        (1, 1, 1, 0, 0),
        (1, 1, 1, 4, 48),
        (8, 8, 1, 0, 32),
        (8, 2, 1, 4, 0),
        (4, 8, 2, 0, 0),
        (4, 4, 2, 4, 32),
        (2, 8, 4, 4, 16),
    ],
)
def test_any_batch_is_the_same_on_any_devices_and_processes(folder, devices, data_axis, processes, readers, position):
    rows = RandomWindows(Corpus(folder), 8, 3, [1.0, SCHEDULE]).examples(np.arange(END)).tolist()
    expected = {str(g): [rows[g], starts_by_hand(rows[g])] for g in range(position, END)}
    held = {}
    settings = {"folder": str(folder), "schedule": SCHEDULE, "end": END, "devices": devices, "data_axis": data_axis}
    for process in read_batches(processes, **settings, readers=readers, position=position):
        assert process["held"].items() <= expected.items()
        # Each of its rows was read once, however many devices hold it (the last reads are batches made ahead).
        assert [g for g in process["read"] if g < END] == sorted(int(g) for g in process["held"])
        assert len(process["held"]) == (END - position) // processes
        held |= process["held"]
    assert held == expected


def test_transfers_are_explicit(windows, device):
    jax.config.update("jax_transfer_guard", "disallow")  # for all threads
    try:
        with Batches(windows, 4, device) as batches, jax.transfer_guard("disallow"):
            assert next(batches)[0] == 0
    finally:
        jax.config.update("jax_transfer_guard", "allow")


class Faulty:
    """Fails at the third batch of four; counts how many were asked for."""

    context_length = 2

    def __init__(self, error=None):
        self.asked = threading.Semaphore(0)
        self._error = error

    def examples(self, indices):
        self.asked.release()
        if self._error and indices[0] >= 8:
            raise self._error
        return np.repeat(indices[:, None], 3, axis=1).astype(np.int32)


def test_error_in_the_thread_is_raised_in_its_turn_and_stays(device):
    with Batches(Faulty(DamagedError("shard 3 has gone")), 4, device) as batches:
        assert [next(batches)[0] for _ in range(2)] == [0, 4]
        for _ in range(2):
            with pytest.raises(DamagedError, match="shard 3 has gone"):
                next(batches)
    assert not loader_threads()


def test_no_more_batches_are_made_than_asked(device):
    source = Faulty()
    with Batches(source, 4, device, prefetch=2) as batches:
        for _ in range(2):
            assert source.asked.acquire(timeout=30)
        assert not source.asked.acquire(timeout=0.2)
        next(batches)
        assert source.asked.acquire(timeout=30)
        assert not source.asked.acquire(timeout=0.2)


def test_closing_stops_the_thread_and_is_final(device):
    batches = Batches(Faulty(), 4, device)
    next(batches)
    assert loader_threads()
    batches.close()
    batches.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_closing_wakes_who_waits(device):
    class Stuck(Faulty):
        go = threading.Event()

        def examples(self, indices):
            assert self.go.wait(30)
            return super().examples(indices)

    source = Stuck()
    batches = Batches(source, 4, device, prefetch=1)
    raised = []

    def wait():
        try:
            for _ in batches:
                pass
        except RuntimeError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    source.go.set()
    batches.close()
    waiting.join(30)
    assert not waiting.is_alive() and raised == ["the loader is closed"]


def test_forgotten_loader_stops_when_collected(device):
    batches = Batches(Faulty(), 4, device)
    next(batches)
    del batches
    gc.collect()
    assert not loader_threads()


def test_loader_left_open_at_exit_is_silent(folder):
    code = f"""
import jax
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches
from gpt1_jax.data.windows import RandomWindows
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
batches = Batches(RandomWindows(Corpus({str(folder)!r}), 8, 0), 4, sharding)
next(batches)
print("done")
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
