"""The step: accumulation, donation, layouts, and the same losses on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state, init_state
from gpt1_jax.training.step import compile_train_step, train_step

SEPARATOR = 3
OVERRIDES = ["train.steps=20", "train.batch_size=8", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2"]


def config_of(model: ModelConfig, *overrides: str) -> Config:
    config = parse_config("evaluation: {sample_tokens: 8}\nmodel: {context_length: 16}", "c", [*OVERRIDES, *overrides])
    return config.model_copy(update={"model": model})


def tokens_of(config: Config, step: int) -> np.ndarray:
    shape = (config.train.batch_size, config.context_length + 1)
    return np.random.default_rng(step).integers(0, config.model.vocab_size, shape, dtype=np.int32)


def run(config: Config, steps: int) -> tuple[list[dict], dict]:
    """Losses and final weights of a few steps on all the devices there are."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state, step_fn = init_state(config, optimizer, mesh), compile_train_step(config, optimizer, mesh, SEPARATOR)
    history = []
    for step in range(steps):
        batch = jax.device_put(tokens_of(config, step), batch_sharding(mesh))
        state, metrics = step_fn(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, state.params


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
    whole, whole_params = run(config_of(tiny_model), 4)
    parts, parts_params = run(config_of(tiny_model, "train.accumulation=4"), 4)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole_params, parts_params)


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


def test_packed_windows_train_the_same_in_parts_in_a_loop_and_recomputed(tiny_model):
    expected, _ = run(config_of(tiny_model, "data.windows=packed"), 8)
    looped = tiny_model.model_copy(update={"scan_layers": True, "remat": "full"})
    found, _ = run(config_of(looped, "data.windows=packed", "train.accumulation=4"), 8)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=1e-4)
