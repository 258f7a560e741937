"""Sums in a fixed order: the same bits on any number of devices and processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.data.loader import global_batch
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.mesh import check_mesh, make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import init_state
from gpt1_jax.training.step import compile_train_step

CONFIG = """
evaluation: {sample_tokens: 8}
model: {vocab_size: 96, context_length: 16, num_layers: 1, embed_dim: 32, num_heads: 4, mlp_dim: 64, dtype: DTYPE}
train: {steps: 20, batch_size: 16, deterministic_groups: 8}
optimizer: {warmup_steps: 2, learning_rate: 1.0e-2}
"""
STEPS = 8
JOBS = [(1, 8), (2, 2), (4, 1)]  # processes, and devices of each


class Noise:
    """Examples that are a function of their number."""

    context_length = 16

    def examples(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng(index).integers(0, 8, 17, np.int32) for index in indices])


def losses(dtype: str, devices: list[jax.Device]) -> list[list[str]]:
    """Loss and norm of the gradient of each step, to the last bit."""
    config = parse_config(CONFIG.replace("DTYPE", dtype), "c")
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh)
    found = []
    for step in range(STEPS):
        state, metrics = step_fn(state, global_batch(Noise(), 16 * step, 16, batch_sharding(mesh)))
        found.append([float(metrics[name]).hex() for name in ("loss", "grad_norm")])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Of every job, by dtype, processes and devices."""
    folder = tmp_path_factory.mktemp("jobs")
    for processes, devices in JOBS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        commands = [[sys.executable, __file__, str(folder), address, str(processes), str(i)] for i in range(processes)]
        running = [subprocess.Popen(command, env=flags) for command in commands]
        assert [process.wait(timeout=300) for process in running] == [0] * processes
    return {name: value for path in folder.iterdir() for name, value in json.loads(path.read_text()).items()}


@pytest.mark.parametrize(
    ("dtype", "jobs"), [("float32", ("1 x 4", "1 x 2", "2 x 2", "4 x 1")), ("bfloat16", ("1 x 4", "1 x 2"))]
)
def test_losses_are_the_same_bits(found, dtype, jobs):
    expected = found[f"{dtype} 1 x 8"]
    assert float.fromhex(expected[-1][0]) < float.fromhex(expected[0][0])
    assert len({loss for loss, _ in expected}) == STEPS
    for job in jobs:
        assert found[f"{dtype} {job}"] == expected, job


def test_a_single_device_has_them_in_float32(found):
    assert found["float32 1 x 1"] == found["float32 1 x 8"]


def main(folder: Path, address: str, processes: int, process: int) -> None:
    jobs = {}
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
        counts = [jax.local_device_count()]
    else:
        counts = [1, 2, 4, 8]
    for dtype in ("float32", "bfloat16") if processes == 1 else ("float32",):
        for count in counts:
            devices = jax.devices() if processes > 1 else jax.devices()[:count]
            jobs[f"{dtype} {processes} x {count}"] = losses(dtype, devices)
    if process == 0:
        (folder / f"{processes}.json").write_text(json.dumps(jobs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
