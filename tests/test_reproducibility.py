"""One run, one result: killed, interrupted and started again, a run gives the bits of the one that never was."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state

STEPS, SAVE_EVERY = 60, 4
OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")
SETTINGS = (
    "model: {vocab_size: 320, context_length: 32, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 64,\n"
    "        dtype: float32, scan_layers: true}\n"
    "optimizer: {warmup_steps: 5, learning_rate: 1e-2}\n"
    f"train: {{steps: {STEPS}, batch_size: 8, log_every: 1}}\n"
    f"checkpoint: {{every: {SAVE_EVERY}, keep: 2, keep_every: 20}}\n"
    "evaluation: {every: 10, batch_size: 8, max_tokens: 600, sample_tokens: 8}\n"
)


def start(folder: Path) -> subprocess.Popen:
    # TFDS asks protobuf in a way that protobuf 6.33 has deprecated.
    strict = ["-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning"]
    command = [sys.executable, *strict, "-m", "gpt1_jax", "train", "config.yaml"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, exit_code: int = 0) -> str:
    """Waits for the process; returns what it said on standard error."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == exit_code, errors
    return errors


def stop_when(process: subprocess.Popen, number: signal.Signals, moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if moment():
            process.send_signal(number)
            return
        time.sleep(0.001)
    pytest.fail(f"the process ended before the moment came: {process.communicate()}")


def last_step(folder: Path) -> int:
    path = folder / "runs/run/metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saving_after(folder: Path, step: int) -> bool:
    """Whether a checkpoint of a later step is being written."""
    names = [path.name for path in (folder / "runs/run/checkpoints").glob("*.orbax-checkpoint-tmp*")]
    return any(int(name.split(".")[0]) > step for name in names)


def metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in OF_THE_CLOCK} for record in records]


def checkpoints_of(folder: Path) -> dict[int, tuple]:
    """Of every checkpoint: the bits of every leaf, by its name, and the position in the data."""
    found = {}
    run_dir = folder / "runs/run"
    with Checkpoints(run_dir) as checkpoints:
        for step in sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir()):
            files = checkpoints.read_files(step)
            config = parse_config(files.config, "checkpoint")
            optimizer = make_optimizer(config.optimizer, config.train.steps)
            state = checkpoints.restore_state(step, abstract_state(config, optimizer, make_mesh(config.mesh)))
            leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
            found[step] = ({name: (x.dtype, x.tobytes()) for name, x in leaves.items()}, files.examples, files.corpus)
    return found


def check_equal(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    ours, theirs = checkpoints_of(found), checkpoints_of(expected)
    assert list(ours) == list(theirs) == [20, 40, 56, 60]
    for step, (leaves, *position) in theirs.items():
        assert ours[step][1:] == tuple(position) and position[0] == 8 * step
        assert [name for name in leaves if ours[step][0][name] != leaves[name]] == []
    for name in ("evaluation.json", "samples.jsonl"):
        assert (found / "runs/run" / name).read_bytes() == (expected / "runs/run" / name).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, corpus_yaml: str) -> Path:
    """A folder to train in, dropout on."""
    (tmp_path / "config.yaml").write_text(f"name: run\n{corpus_yaml}{SETTINGS}")
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus_yaml: str) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "config.yaml").write_text(f"name: run\n{corpus_yaml}{SETTINGS}")
    finish(start(folder))
    return folder


def test_killed_three_times_it_ends_with_the_same_bits(uninterrupted, folder):
    draw = random.Random(0)
    first, second, third = draw.randint(2, 15), draw.randint(18, 32), draw.randint(36, 54)
    moments: list[Callable[[], bool]] = [
        lambda: last_step(folder) >= first,
        lambda: saving_after(folder, second),
        lambda: last_step(folder) >= third,
    ]
    reached = 0
    for moment in moments:
        process = start(folder)
        stop_when(process, signal.SIGKILL, moment)
        finish(process, -signal.SIGKILL)
        assert reached < last_step(folder) < STEPS
        reached = last_step(folder)
    finish(start(folder))
    check_equal(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_saves_says_so_and_goes_on(uninterrupted, folder, number):
    process = start(folder)
    stop_when(process, number, lambda: last_step(folder) >= 13)
    errors = finish(process, 75)
    said = re.search(rf"{number.name}: stopped after step (\d+); its checkpoint is (\S+);", errors)
    assert said, errors
    step = int(said[1])
    assert 13 <= step < STEPS
    with Checkpoints(folder / "runs/run") as checkpoints:
        assert checkpoints.latest() == step
        assert checkpoints.path(step) == folder / said[2]
    assert "Traceback" not in errors
    assert f"steps {step} to {STEPS}" in finish(start(folder))
    check_equal(folder, uninterrupted)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    def contents() -> dict[str, tuple]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in sorted((uninterrupted / "runs").rglob("*"))
        }

    before = contents()
    finish(start(uninterrupted))
    assert contents() == before
