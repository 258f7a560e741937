"""Sums in a fixed order: the same bits on any number of devices; of processes, see tests/faults/test_elsewhere.py."""

import itertools
import json
import os
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
    """By dtype and number of devices, from a process that has eight."""
    path = tmp_path_factory.mktemp("found") / "losses.json"
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path], env=flags, timeout=300, check=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_are_the_same_bits(found, dtype):
    expected = found[f"{dtype} 8"]
    assert float.fromhex(expected[-1][0]) < float.fromhex(expected[0][0])
    assert len({loss for loss, _ in expected}) == STEPS
    assert found[f"{dtype} 4"] == found[f"{dtype} 2"] == expected


def test_a_single_device_has_them_in_float32(found):
    assert found["float32 1"] == found["float32 8"]


if __name__ == "__main__":
    several = itertools.product(("float32", "bfloat16"), (2, 4, 8))
    runs = {f"{dtype} {count}": losses(dtype, jax.devices()[:count]) for dtype, count in [*several, ("float32", 1)]}
    Path(sys.argv[1]).write_text(json.dumps(runs))
