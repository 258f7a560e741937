"""A run that is interrupted, and goes on with other devices and other processes, again and again."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.faults.conftest import Row
from tests.running import RUN, Running, check_same_checkpoints, checkpoints_of, is_logged, last_step, records

# Processes, the devices of each, and how these are arranged.
PLACES = [
    (1, 8, "mesh.data=null"),
    (1, 1, "mesh.data=null"),
    (2, 2, "mesh.data=null"),
    (1, 4, "mesh.data=null"),
    (4, 1, "mesh.data=null"),
    (1, 2, "mesh.data=null"),
]


def wander(folder: Path, row: Row) -> None:
    """Trains a few steps in each place, and the rest in the last."""
    for number, (processes, devices, mesh) in enumerate(PLACES):
        running = Running(folder, mesh, processes=processes, devices=devices)
        last = number == len(PLACES) - 1
        if not last:
            running.send(signal.SIGTERM, is_logged(folder, last_step(folder) + 3), processes - 1)
        ended = running.finish()
        assert [code for code, _, _ in ended] == [0 if last else 75] * processes, ended
        assert f"{processes * devices} cpu device(s)" in ended[0].err
        row.tried()


def of_steps(folder: Path) -> list[dict]:
    return [record for record in records(folder) if "loss" in record]


def check_close(found: Path, expected: Path) -> None:
    """Checks that two runs have read the same, with the same losses and figures but for rounding."""
    ours, theirs = records(found), records(expected)
    for key in ("step", "tokens", "loss", "validation_loss"):
        values = [[record[key] for record in run if key in record] for run in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5 if "loss" in key else 0, err_msg=key)
    positions = [[position for _, *position in checkpoints_of(run).values()] for run in (found, expected)]
    assert positions[0] == positions[1]
    assert (found / RUN / "data.jsonl").read_bytes() == (expected / RUN / "data.jsonl").read_bytes()


@pytest.mark.fault("other devices and processes")
def test_the_bits_are_the_same_in_the_deterministic_mode(make_folder: Callable[..., Path], row: Row):
    """Those of all steps; an evaluation is added up in the order of the place where it is made."""
    groups = ("train: {", "train: {deterministic_groups: 8, ")
    folder, stayed = make_folder("wandered", groups), make_folder("stayed", groups)
    wander(folder, row)
    ((code, _, err),) = Running(stayed).finish()
    assert code == 0, err
    assert of_steps(folder) == of_steps(stayed)
    check_same_checkpoints(folder, stayed)
    check_close(folder, stayed)


@pytest.mark.fault("other devices and processes")
def test_the_losses_are_the_same_but_for_rounding(make_folder: Callable[..., Path], uninterrupted: Path, row: Row):
    folder = make_folder("wandered")
    wander(folder, row)
    assert of_steps(folder) != of_steps(uninterrupted)  # or the mode above would be for nothing
    check_close(folder, uninterrupted)
