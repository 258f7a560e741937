"""A gradient that is not finite, a spike of the loss, a device that computes wrongly: in the step of real runs."""

import json
import math
import platform
import re
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Row
from tests.running import RUN, Ended, Running, check_same, checkpoints_of, is_logged, is_there, records

FAULTY = str(Path(__file__).with_name("faulty.py"))
ROW = pytest.mark.fault("NaN, spike, wrong arithmetic")
SHORT = ("steps: 60", "steps: 24")


def faulty(folder: Path, kind: str, settings: dict, *overrides: str, **options: int) -> Running:
    return Running(folder, *overrides, program=(FAULTY, kind, json.dumps(settings)), **options)


def end(running: Running, code: int = 0) -> str:
    """Waits for one process; what it said on standard error."""
    (ended,) = running.finish()
    assert ended.code == code, ended.err
    return ended.err


@ROW
def test_a_gradient_that_is_not_finite_changes_nothing(make_folder, row: Row):
    bad = {5: math.nan, 11: math.inf, 17: -math.inf}
    folder = make_folder("nan", SHORT, ("every: 4, keep: 2, keep_every: 20", "every: 1, keep: 99"))
    said = end(faulty(folder, "nan", {"steps": list(bad.items())}))
    found = checkpoints_of(folder)
    assert list(found) == list(range(1, 25))
    for step in range(2, 25):
        (before, examples, _), (after, examples_after, _) = found[step - 1], found[step]
        changed = {name for name in after if after[name] != before[name]}
        assert examples_after == examples + 8
        if step in bad:
            assert changed == {".step"}
            assert f"step {step}: loss" in said
            row.tried()
        else:
            assert {".step", ".params['blocks']['mlp_in']['kernel']"} < changed
    logged = [record for record in records(folder) if "validation_loss" not in record]
    assert {record["step"]: record["skipped"] for record in logged if "skipped" in record} == dict.fromkeys(bad, 1)
    assert [record["step"] for record in logged if "loss" in record] == [n for n in range(1, 25) if n not in bad]


@ROW
def test_too_many_in_a_row_end_the_run_which_goes_on_from_before_them(make_folder, row: Row):
    folder, sound = make_folder("row", SHORT), make_folder("sound", SHORT)
    never = {"steps": [(10**6 + number, math.nan) for number in range(3)]}  # the same program, without the fault
    end(faulty(sound, "nan", never))
    in_a_row = {"steps": [(number, math.nan) for number in (9, 10, 11)]}
    said = end(faulty(folder, "nan", in_a_row, "train.max_skipped_steps=3"), 4)
    assert "step 11: loss" in said and "3 step(s) in a row" in said
    assert f"the last sound checkpoint is {folder / RUN}/checkpoints/8" in said
    end(faulty(folder, "nan", never))
    found, expected = checkpoints_of(folder), checkpoints_of(sound)
    assert found == expected
    row.tried()


SPIKES = "train.spikes={threshold: 12.0, window: 12, skip: 8, max_rewinds: 2}"
AT = 30  # the step whose examples are noise


def rewinds(folder: Path) -> list[dict]:
    path = folder / RUN / "rewinds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "origin"} for line in lines]


@ROW
def test_a_spike_is_gone_back_from_and_killed_or_begun_again_it_ends_in_the_same_bits(
    uninterrupted, make_folder, row: Row
):
    noisy = {"steps": [AT]}
    whole = make_folder("whole")
    said = end(faulty(whole, "noise", noisy, SPIKES))
    assert f"step {AT}: loss" in said and f"a spike; back to step {AT - 5}" in said
    (decided,) = rewinds(whole)
    # Four batches before the noise, and four from its own on; the examples are those of an undisturbed run so far.
    assert {key: decided[key] for key in ("spike", "step", "first", "stop")} == {
        "spike": AT,
        "step": AT - 5,
        "first": 8 * (AT - 5),
        "stop": 8 * (AT + 3),
    }
    losses = {record["step"]: record["loss"] for record in records(whole) if "loss" in record}
    undisturbed = {record["step"]: record["loss"] for record in records(uninterrupted) if "loss" in record}
    assert list(losses) == list(undisturbed)
    assert [losses[n] for n in range(1, AT - 4)] == [undisturbed[n] for n in range(1, AT - 4)]
    assert losses[AT - 4] != undisturbed[AT - 4]
    assert decided["loss"] > max(list(losses.values())[AT - 12 :])
    row.tried()

    # Killed before it, when the checkpoints after it are removed or just after, and on the way again; and begun anew.
    killed = make_folder("killed")
    for moment in (
        is_logged(killed, AT - 2),
        lambda: bool(rewinds(killed)),
        is_there(killed, "saving", AT),
    ):
        running = faulty(killed, "noise", noisy, SPIKES).send(signal.SIGKILL, moment)
        assert [ended.code for ended in running.finish()] == [-signal.SIGKILL]
    end(faulty(killed, "noise", noisy, SPIKES))
    again = make_folder("again")
    end(faulty(again, "noise", noisy, SPIKES))
    for folder in (killed, again):
        assert rewinds(folder) == [decided]
        check_same(folder, whole)
        row.tried()


def blamed(ended: Ended, step: int, process: int) -> int:
    """The device that a run names in the end, which is one of a process of this host."""
    assert ended.code == 4, ended.err
    assert f"step {step}, computed twice from the same weights and batch, has given two results" in ended.err
    host = f"they differ on process {process} on {re.escape(platform.node())}"
    where = re.search(rf"{host}: cpu (\d+); take that host out", ended.err)
    assert where, ended.err
    return int(where[1])


@ROW
def test_a_device_that_computes_wrongly_is_named_and_the_run_goes_on_without_it(make_folder, row: Row):
    plain, folder = (make_folder(name, SHORT) for name in ("plain", "checked"))
    end(Running(plain, devices=2))
    every = "train.double_check_every=5"
    for step, time, device, leaf in ((10, 0, 1, ".params['embedding']['token"), (15, 1, 0, ".nu['embedding']['token")):
        fault = {"number": step, "time": time, "process": 0, "device": device, "leaf": leaf}
        (ended,) = faulty(folder, "flip", fault, every, devices=2).finish()
        assert blamed(ended, step, 0) == device
        row.tried()
    # Sound again it goes on, and its bits are those of a run that nothing was checked in.
    said = end(Running(folder, every, devices=2))
    assert "steps 12 to 24" in said
    check_same(folder, plain)


@ROW
def test_of_two_hosts_the_one_that_computes_wrongly_is_named_by_both(make_folder, row: Row):
    folder = make_folder("hosts", SHORT)
    fault = {"number": 10, "time": 1, "process": 1, "device": 0, "leaf": ".mu['embedding']['position"}
    for ended in faulty(folder, "flip", fault, "train.double_check_every=5", processes=2).finish():
        blamed(ended, 10, 1)
    row.tried()
