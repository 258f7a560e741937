"""One device and eight give the same losses, whatever is trained and however it is spread."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.loader import global_batch
from gpt1_jax.finetuning.dataset import Dataset
from gpt1_jax.finetuning.forms import Encoded
from gpt1_jax.finetuning.loss import finetune_step
from gpt1_jax.finetuning.order import EpochOrder
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.mesh import check_mesh, make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state, init_state
from gpt1_jax.training.step import compile_step
from gpt1_jax.training.trained import rate_scales

# All dropout on, so that a mask that depends on the devices would show.
YAML = """
model: {vocab_size: 40, special_tokens: 3, num_classes: 1, context_length: 16, num_layers: 2, embed_dim: 16,
        num_heads: 4, mlp_dim: 32, dtype: float32, scan_layers: true, dropout: 0.1, classifier_dropout: 0.3}
train: {steps: 20, batch_size: 16}
optimizer: {warmup_steps: 2, learning_rate: 0.01}
evaluation: {sample_tokens: 4}
finetune:
  task: {form: multiple_choice, context: c, answers: a, label: l, validation: {kind: files, paths: [x]}}
"""
STEPS = 6
LORA = "model.lora={rank: 4, targets: [query, out, mlp_in, mlp_out]}"
MESHES = [
    ["mesh.data=8"],
    ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", LORA],
    ["mesh.data=4", "mesh.fsdp=2", "train.accumulation=2", "finetune.train.frozen_layers=1"],
]


def dataset() -> Dataset:
    """Of two or three answers each."""
    rng = np.random.default_rng(0)

    def example(answers: int) -> Encoded:
        sequences = [rng.integers(0, 40, rng.integers(3, 16), np.int32) for _ in range(answers)]
        learned = [np.arange(len(tokens)) > 0 for tokens in sequences]
        return Encoded(tuple(sequences), tuple(learned), float(rng.integers(answers)), False)

    return Dataset([example(2 + number % 2) for number in range(40)])


def losses(config: Config, devices: list[jax.Device]) -> list[float]:
    """Of a few updates."""
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, rate_scales(config))
    order = EpochOrder(dataset(), 16, 0, 16)
    state, compiled, found = init_state(config, optimizer, mesh), None, []
    for step in range(STEPS):
        batch = global_batch(order, 16 * step, 16, batch_sharding(mesh))
        if compiled is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
            abstract = abstract_state(config, optimizer, mesh)
            compiled = compile_step(partial(finetune_step, config, optimizer), abstract, shapes, mesh)
        state, metrics = compiled(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """This file as a script in a process with eight virtual devices, where unoptimised code compiles sooner."""
    out = tmp_path_factory.mktemp("eight") / "out.json"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    subprocess.run([sys.executable, __file__, str(out)], check=True, env=os.environ | {"XLA_FLAGS": flags})
    return json.loads(out.read_text())


@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
def test_one_device_and_eight_give_the_same_losses(found, mesh):
    on_one, on_eight = found[" ".join(mesh)]
    np.testing.assert_allclose(on_eight, on_one, rtol=2e-5)
    assert len(set(on_one)) == STEPS


def main() -> None:
    """Writes the losses of every mesh, on one of the devices and on all of them."""
    both = {}
    for mesh in MESHES:
        alone = parse_config(YAML, "c", [key for key in mesh if not key.startswith("mesh.")])
        both[" ".join(mesh)] = losses(alone, jax.devices()[:1]), losses(parse_config(YAML, "c", mesh), jax.devices())
    Path(sys.argv[1]).write_text(json.dumps(both))


if __name__ == "__main__":
    main()
