"""The step: accumulation, donation, layouts, and the same training on one device and on eight, along every axis."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import TrainState, abstract_state, init_state
from gpt1_jax.training.step import compile_train_step, train_step

OVERRIDES = ["train.steps=20", "train.batch_size=8", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2"]


def config_of(model: ModelConfig, *overrides: str) -> Config:
    config = parse_config("evaluation: {sample_tokens: 8}\nmodel: {context_length: 16}", "c", [*OVERRIDES, *overrides])
    return config.model_copy(update={"model": model})


def tokens_of(config: Config, step: int) -> np.ndarray:
    shape = (config.train.batch_size, config.context_length + 1)
    return np.random.default_rng(step).integers(0, config.model.vocab_size, shape, dtype=np.int32)


def run(config: Config, steps: int) -> tuple[list[dict], TrainState]:
    """Losses and the final state of a few steps on all the devices there are."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh)
    history = []
    for step in range(steps):
        batch = jax.device_put(tokens_of(config, step), batch_sharding(mesh))
        state, metrics = step_fn(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, state


def test_training_learns_a_batch(tiny_model):
    config = config_of(tiny_model)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 20)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh)
    batch = jax.device_put(tokens_of(config, 0), batch_sharding(mesh))
    losses = []
    for _ in range(20):
        state, metrics = step_fn(state, batch)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(tiny_model.vocab_size)) < 0.1
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 20


def test_metrics_are_those_of_the_plain_loss(tiny_model):
    config = config_of(tiny_model)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 20)
    state, tokens = init_state(config, optimizer, mesh), jnp.asarray(tokens_of(config, 0))

    def plain(params: dict) -> jax.Array:
        from gpt1_jax.model.transformer import bind

        model = bind(config.model, params)
        log_probs = jax.nn.log_softmax(model.logits(model(tokens[:, :-1])[0]))
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    loss, grads = jax.jit(jax.value_and_grad(plain))(state.params)
    _, metrics = jax.jit(lambda s, t: train_step(config, optimizer, s, t))(state, tokens)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert float(metrics["learning_rate"]) == 0


def test_accumulation_gives_the_same_losses_and_weights(tiny_model):
    whole, whole_state = run(config_of(tiny_model), 4)
    parts, parts_state = run(config_of(tiny_model, "train.accumulation=4"), 4)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole_state.params), jax.tree.leaves(parts_state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(tiny_model):
    noisy = tiny_model.model_copy(update={"dropout": 0.5})
    config = config_of(noisy, "optimizer.learning_rate=1e-9")
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 20)
    step_fn = compile_train_step(config, optimizer, mesh)
    state, batch = init_state(config, optimizer, mesh), jax.device_put(tokens_of(config, 0), batch_sharding(mesh))
    state, first = step_fn(state, batch)
    state, second = step_fn(state, batch)
    assert abs(float(first["loss"]) - float(second["loss"])) > 1e-4
    again = run(config, 1)[0][0]["loss"]
    assert again == float(first["loss"])
    assert run(config.model_copy(update={"seed": 1}), 1)[0][0]["loss"] != again


def test_the_state_is_donated(tiny_model):
    config = config_of(tiny_model)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 20)
    step_fn = compile_train_step(config, optimizer, mesh)
    state = init_state(config, optimizer, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = step_fn.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= 0.99 * size
    step_fn(state, jax.device_put(tokens_of(config, 0), batch_sharding(mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_the_papers_state_is_built_without_allocating_it():
    config = config_of(ModelConfig(dtype="float32"))
    before = sum(array.nbytes for array in jax.live_arrays())
    state = abstract_state(config, make_optimizer(config.optimizer, 20), make_mesh(config.mesh))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 116_534_784
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))


# Unoptimised code compiles in a third of the time, and is one more reason to differ, which the losses must not do.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
SEPARATOR = 3
OBJECTIVES = ["causal", "masked", "prefix"]
MESHES = [
    ["mesh.data=8"],
    ["mesh.fsdp=2", "mesh.tensor=2"],
    ["mesh.data=1", "mesh.fsdp=8"],
    ["mesh.slices=2", "mesh.data=4"],
    ["mesh.slices=2", "mesh.data=2", "mesh.fsdp=2"],
    ["mesh.data=1", "mesh.sequence=8"],
    ["mesh.data=2", "mesh.sequence=2", "mesh.tensor=2"],
    ["mesh.slices=2", "mesh.data=1", "mesh.fsdp=2", "mesh.sequence=2"],
    ["mesh.data=8", "mesh.shard_optimizer=true"],
    ["mesh.data=4", "mesh.fsdp=2", "mesh.shard_optimizer=true"],
    ["mesh.data=2", "mesh.fsdp=4", "train.accumulation=2", "train.batch_size=16"],
]
SPREAD = ["mesh.fsdp=2", "mesh.tensor=2"]  # over eight: the batch, the parameters and the heads, each in two


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory: pytest.TempPathFactory, variations: dict[str, ModelConfig]) -> dict:
    """This file as a script in a process with eight virtual devices."""
    folder = tmp_path_factory.mktemp("eight")
    models = {name: model.model_dump(mode="json") for name, model in variations.items()}
    (folder / "models.json").write_text(json.dumps(models))
    environment = os.environ | {"XLA_FLAGS": _FLAGS}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return json.loads((folder / "out.json").read_text())


def model_of_the_meshes() -> ModelConfig:
    sizes = {"vocab_size": 96, "context_length": 16, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48}
    return ModelConfig(**sizes, dropout=0.1, attention_dropout=0.1, dtype="float32")


@cache
def on_one_device(*overrides: str) -> tuple[list[dict], TrainState]:
    return run(config_of(model_of_the_meshes(), *overrides), 20)


@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
def test_one_device_and_eight_give_the_same_losses(on_eight_devices, mesh):
    expected, state = on_one_device(*(override for override in mesh if override.startswith("train.")))
    found = on_eight_devices[" ".join(mesh)]
    for a, b in zip(expected, found["history"], strict=True):
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=2e-5)
    checksum = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params)]
    np.testing.assert_allclose(found["params"], checksum, rtol=1e-4, atol=1e-4)


def test_gradients_added_up_in_bfloat16_are_those_but_for_its_rounding(on_eight_devices):
    exact, rounded = (on_eight_devices[name]["history"] for name in ("mesh.data=8", "bfloat16 sums"))
    first, first_rounded = exact[0], rounded[0]
    assert first_rounded["loss"] == first["loss"]  # of the forward pass, which has no such sum
    assert 0 < abs(first_rounded["grad_norm"] / first["grad_norm"] - 1) < 2.0**-8
    for a, b in zip(exact, rounded, strict=True):
        assert abs(b["loss"] / a["loss"] - 1) < 1e-2


def test_the_state_is_spread_over_eight_devices(on_eight_devices):
    spread = on_eight_devices[" ".join(SPREAD)]
    # Of every matrix a device holds a quarter: half by fsdp, half by tensor.
    assert spread["query"] == [2, 32, 4, 8] and spread["query_shard"] == [2, 16, 2, 8]
    assert spread["moment_shard"] == spread["query_shard"]


def test_the_optimizers_state_is_spread_over_data_if_asked(on_eight_devices):
    spread = on_eight_devices["mesh.data=8 mesh.shard_optimizer=true"]
    assert spread["query_shard"] == [2, 32, 4, 8] and spread["moment_shard"] == [2, 4, 4, 8]
    spread = on_eight_devices["mesh.data=4 mesh.fsdp=2 mesh.shard_optimizer=true"]
    assert spread["query_shard"] == [2, 16, 4, 8] and spread["moment_shard"] == [2, 16, 4, 2]


def skewed_run(model: ModelConfig, *overrides: str) -> list[float]:
    """Losses of a few steps on text that has only eight of the tokens, which any model soon learns."""
    config = config_of(model, *overrides)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, config.train.steps)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh, SEPARATOR)
    losses = []
    for step in range(8):
        state, metrics = step_fn(state, jax.device_put(tokens_of(config, step) % 8, batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return losses


def test_every_variation_learns_the_same_on_one_device_and_on_eight(on_eight_devices, variation_name, variation):
    losses = skewed_run(variation)
    assert losses[0] > 3.5 and losses[-1] < losses[0] - 0.8
    np.testing.assert_allclose(on_eight_devices[variation_name], losses, rtol=2e-5)


def looped() -> ModelConfig:
    return model_of_the_meshes().model_copy(update={"scan_layers": True, "remat": "full"})


def test_layers_in_a_loop_train_the_same_on_one_device_and_on_eight(on_eight_devices):
    np.testing.assert_allclose(on_eight_devices["looped"], skewed_run(looped()), rtol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_windows_train_the_same_on_one_device_and_on_eight(on_eight_devices, objective):
    model = model_of_the_meshes().model_copy(update={"objective": objective})
    losses = skewed_run(model, "data.windows=packed")
    np.testing.assert_allclose(on_eight_devices[f"packed {objective}"], losses, rtol=2e-5)
    contiguous = skewed_run(model)
    assert max(abs(a - b) for a, b in zip(losses, contiguous, strict=True)) > 1e-3


def test_packed_windows_train_the_same_in_parts_in_a_loop_and_recomputed(tiny_model):
    expected = skewed_run(tiny_model, "data.windows=packed")
    looped = tiny_model.model_copy(update={"scan_layers": True, "remat": "full"})
    np.testing.assert_allclose(skewed_run(looped, "data.windows=packed", "train.accumulation=4"), expected, rtol=2e-5)


def main(folder: Path) -> None:
    results: dict[str, object] = {}
    for objective in OBJECTIVES:
        model = model_of_the_meshes().model_copy(update={"objective": objective})
        results[f"packed {objective}"] = skewed_run(model, "data.windows=packed", *SPREAD)
    config = config_of(model_of_the_meshes(), "mesh.data=8", "train.gradient_dtype=bfloat16")
    results["bfloat16 sums"] = {"history": run(config, 20)[0]}
    results["looped"] = skewed_run(looped(), *SPREAD)
    for name, model in json.loads((folder / "models.json").read_text()).items():
        # In a loop, which compiles sooner, and is one more reason to differ.
        results[name] = skewed_run(ModelConfig.model_validate({**model, "scan_layers": True}), *SPREAD)
    for mesh_overrides in MESHES:
        history, state = run(config_of(model_of_the_meshes(), *mesh_overrides), 20)
        kernel = lambda tree: tree["blocks"]["attention"]["query"]["kernel"]  # noqa: E731
        moment = kernel(state.opt_state[1][0].mu)
        results[" ".join(mesh_overrides)] = {
            "history": history,
            "params": [float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(state.params)],
            "query": list(kernel(state.params).shape),
            "query_shard": list(kernel(state.params).addressable_shards[0].data.shape),
            "moment_shard": list(moment.addressable_shards[0].data.shape),
        }
    (folder / "out.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
