"""``gpt1 train`` in processes of their own, for the tests that do something to them; and what a run left, as bits."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import psutil

from gpt1_jax.config_file import parse_config
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state

RUN = "runs/run"  # in the folder that the processes run in
# A configuration without data, dropout on: small, and with everything that a run does on the way.
SETTINGS = (
    "name: run\n"
    "model: {vocab_size: 320, context_length: 32, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 64,\n"
    "        dtype: float32, scan_layers: true}\n"
    "optimizer: {warmup_steps: 5, learning_rate: 1e-2}\n"
    "train: {steps: 60, batch_size: 8, log_every: 1}\n"
    "checkpoint: {every: 4, keep: 2, keep_every: 20}\n"
    "evaluation: {every: 10, batch_size: 8, max_tokens: 600, sample_tokens: 8}\n"
)
# Warnings are errors; TFDS asks protobuf in a way that protobuf 6.33 has deprecated.
_STRICT = ("-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning")
_OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for a signal, and what it said."""

    code: int
    out: str
    err: str


class Running:
    """``gpt1 train config.yaml``, or another command, in one process, or in several that know of each other.

    Args:
        folder: in which they run.
        overrides: of the configuration, and options.
        processes: how many.
        devices: that each of them has.
        program: what Python runs, if it is not the command itself.
        environment: variables beside those of this process.
        command: of ``gpt1``.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        processes: int = 1,
        devices: int = 1,
        program: Sequence[str] = ("-m", "gpt1_jax"),
        environment: dict[str, str] | None = None,
        command: str = "train",
    ):
        self.folder = folder
        port = free_port()
        variables = os.environ | {
            # Code that is hardly optimised, which is sooner compiled.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
        }
        self.jobs = []
        for process in range(processes):
            keys = [f"distributed.coordinator=localhost:{port}", f"distributed.processes={processes}"]
            keys = [*keys, f"distributed.process={process}"] if processes > 1 else []
            self.jobs.append(
                subprocess.Popen(
                    [sys.executable, *_STRICT, *program, command, "config.yaml", "--json", *keys, *overrides],
                    cwd=folder,
                    env=variables | (environment or {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait(self, moment: Callable[[], object]) -> "Running":
        """Waits until a moment has come."""
        deadline = time.monotonic() + 300
        while not moment():
            assert time.monotonic() < deadline and all(job.poll() is None for job in self.jobs), self.finish()
            time.sleep(0.001)
        return self

    def send(self, number: signal.Signals, moment: Callable[[], object], *processes: int) -> "Running":
        """Sends a signal to some processes, or to the only one, when a moment has come."""
        self.wait(moment)
        for process in processes or (0,):
            self.jobs[process].send_signal(number)
        return self

    def finish(self, seconds: float = 600) -> list[Ended]:
        """Waits for all, and for what they have started: it has the other ends of their output, too."""
        try:
            with ThreadPoolExecutor() as pool:
                said = list(pool.map(lambda job: job.communicate(timeout=seconds), self.jobs))
        finally:
            for job in self.jobs:
                job.kill()  # which is in vain, unless time is up
        return [Ended(job.returncode, out, err) for job, (out, err) in zip(self.jobs, said, strict=True)]


def check_nothing_left(folder: Path) -> None:
    """Checks that no process has the folder as its own, as all have that a command starts."""
    deadline = time.monotonic() + 20
    while left := [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def records(folder: Path) -> list[dict]:
    """What metrics.jsonl has, but for the times."""
    path = folder / RUN / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in _OF_THE_CLOCK} for line in lines]


def last_step(folder: Path) -> int:
    """The last step that is logged, 0 if none is."""
    found = records(folder)
    return found[-1]["step"] if found else 0


def after(seconds: float) -> Callable[[], bool]:
    """The moment so many seconds from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def is_logged(folder: Path, step: int) -> Callable[[], bool]:
    """The moment at which a step is logged."""
    return lambda: last_step(folder) >= step


def is_there(folder: Path, prefix: str, after: int = 0) -> Callable[[], bool]:
    """The moment at which ``saving-STEP`` or ``deleting-STEP`` is seen, of a step after another."""

    def seen() -> bool:
        names = [path.name for path in (folder / RUN / "checkpoints").glob(f"{prefix}-*")]
        return any(int(name.removeprefix(f"{prefix}-")) > after for name in names)

    return seen


def checkpoints_of(folder: Path) -> dict[int, tuple]:
    """Of every checkpoint: the bits of every leaf of the state by name, and the position in the data."""
    found = {}
    with Checkpoints(folder / RUN) as checkpoints:
        for step in checkpoints.steps():
            files = checkpoints.read_files(step)
            config = parse_config(files.config, "checkpoint")
            optimizer = make_optimizer(config.optimizer, config.train.steps)
            state = checkpoints.restore_state(step, abstract_state(config, optimizer, make_mesh(config.mesh)))
            leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
            found[step] = ({name: (x.dtype, x.tobytes()) for name, x in leaves.items()}, files.examples, files.corpus)
    return found


def contents(folder: Path) -> dict[str, tuple]:
    """Of all that is in a folder: when it was changed, and of files the bytes, None of folders."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def check_same(found: Path, expected: Path) -> None:
    """Checks that two runs have the same losses, checkpoints, figures and samples, bit for bit."""
    assert records(found) == records(expected)
    check_same_checkpoints(found, expected)
    for name in ("evaluation.json", "samples.jsonl"):
        assert (found / RUN / name).read_bytes() == (expected / RUN / name).read_bytes()


def check_same_checkpoints(found: Path, expected: Path) -> None:
    """Checks that two runs have the same weights, optimizer states and positions in the data, bit for bit."""
    ours, theirs = checkpoints_of(found), checkpoints_of(expected)
    assert list(ours) == list(theirs)
    for step, (leaves, *position) in theirs.items():
        assert ours[step][1:] == tuple(position)
        assert [name for name in leaves if ours[step][0][name] != leaves[name]] == []
