"""Checkpoints: every bit comes back, on any mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import CheckpointConfig, Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import TrainState, abstract_state, init_state
from gpt1_jax.training.step import compile_train_step

MODEL = (
    "{vocab_size: 4096, context_length: 16, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 48, dtype: float32}"
)
YAML = f"""
model: {MODEL}
train: {{steps: 20, batch_size: 8}}
optimizer: {{warmup_steps: 2}}
evaluation: {{sample_tokens: 8}}
"""
FILES = RunFiles(
    config=parse_config(YAML, "c").to_yaml(),
    tokenizer=b"\0a model\xff",
    examples=24,
    data="e" * 16,
    corpus="f" * 16,
    skipped=2,
    losses=(5.5, 0.1),
)


def config_of(*overrides: str) -> Config:
    return parse_config(YAML, "c", overrides)


def on_host(state: TrainState) -> list[np.ndarray]:
    # Copies made by the device: a view of a leaf's memory would keep the next step from overwriting it.
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.tree.map(jnp.copy, state))]


def equal(found: TrainState, expected: list[np.ndarray]) -> bool:
    leaves = jax.tree.leaves(found)
    pairs = zip(leaves, expected, strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes() for a, b in pairs)


def trained(config: Config, mesh: jax.sharding.Mesh, steps: int) -> TrainState:
    """A state whose every leaf is other than its initial value."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh)
    for step in range(steps):
        state, _ = step_fn(state, batch_of(config, mesh, step))
    return state


def batch_of(config: Config, mesh: jax.sharding.Mesh, step: int) -> jax.Array:
    tokens = np.random.default_rng(step).integers(0, 4096, (8, 17), dtype=np.int32)
    return jax.device_put(tokens, batch_sharding(mesh))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, at step 3."""
    run_dir, config = tmp_path_factory.mktemp("saved"), config_of()
    with Checkpoints(run_dir, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, trained(config, make_mesh(config.mesh), 3), FILES)
    return run_dir


def test_every_leaf_comes_back_though_the_state_is_donated_while_it_is_written(tmp_path):
    config = config_of()
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 20)
    step_fn = compile_train_step(config, optimizer, mesh)
    state = trained(config, mesh, 3)
    expected, layouts = on_host(state), [leaf.sharding for leaf in jax.tree.leaves(state)]
    batches = [batch_of(config, mesh, step) for step in range(3, 8)]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state, FILES)
        for batch in batches:
            state, _ = step_fn(state, batch)
        jax.block_until_ready(state)
    assert not equal(state, expected)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_state(3, abstract_state(config, optimizer, mesh))
    assert equal(found, expected)
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == layouts
    assert int(found.step) == 3


def test_what_is_not_an_array_can_be_read_by_people_and_by_the_loader(saved):
    folder = saved / "checkpoints" / "3" / "run"
    assert parse_config((folder / "config.yaml").read_text(), "c") == config_of()
    assert (folder / "tokenizer.model").read_bytes() == FILES.tokenizer
    position = {"examples": 24, "data": "e" * 16, "corpus": "f" * 16, "skipped": 2, "losses": [5.5, 0.1]}
    assert json.loads((folder / "position.json").read_text()) == position
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.read_files(3) == FILES


def test_the_weights_alone_can_be_read(saved):
    config = config_of()
    abstract = abstract_state(config, make_optimizer(config.optimizer, 20), make_mesh(config.mesh))
    with Checkpoints(saved) as checkpoints:
        params = checkpoints.restore_params(3, abstract.params)
        whole = checkpoints.restore_state(3, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, whole.params)


def test_reading_makes_and_changes_nothing(saved, tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists()


MESHES = {"data 8": (8, 1, 1), "data 2 fsdp 2 tensor 2": (2, 2, 2), "one device": (1, 1, 1)}


def test_a_checkpoint_of_one_mesh_is_restored_on_others(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "data 8": {"equal": True, "devices": 8, "shard": [4096, 32]},
        "data 2 fsdp 2 tensor 2": {"equal": True, "devices": 8, "shard": [2048, 16]},
        "one device": {"equal": True, "devices": 1, "shard": [4096, 32]},
    }
    # And in this process, which has other devices than the one that wrote it.
    config = config_of()
    with Checkpoints(tmp_path) as checkpoints:
        abstract = abstract_state(config, make_optimizer(config.optimizer, 20), make_mesh(config.mesh))
        found = checkpoints.restore_state(3, abstract)
    with np.load(tmp_path / "expected.npz") as expected:
        assert equal(found, [expected[f"arr_{index}"] for index in range(len(expected))])


def restore_on_meshes(run_dir: Path) -> None:
    config = config_of()
    optimizer = make_optimizer(config.optimizer, 20)
    meshes = {
        name: make_mesh(
            config.mesh.model_copy(update=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
            jax.devices()[: sizes[0] * sizes[1] * sizes[2]],
        )
        for name, sizes in MESHES.items()
    }
    state = trained(config, meshes["data 8"], 3)
    expected = on_host(state)
    np.savez(run_dir / "expected.npz", *expected)
    results = {}
    with Checkpoints(run_dir, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state, FILES)
        checkpoints.wait()
        for name, mesh in meshes.items():
            found = checkpoints.restore_state(3, abstract_state(config, optimizer, mesh))
            table = found.params["embedding"]["token_kernel"]
            results[name] = {
                "equal": equal(found, expected),
                "devices": len(table.sharding.device_set),
                "shard": list(table.addressable_shards[0].data.shape),
            }
    (run_dir / "out.json").write_text(json.dumps(results))


if __name__ == "__main__":
    restore_on_meshes(Path(sys.argv[1]))
