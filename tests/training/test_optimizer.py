"""The optimizer against values computed by hand, and against the update rules restated in NumPy."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt1_jax.config import CheckpointConfig, OptimizerConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import is_decayed, learning_rate_schedule, make_optimizer, scale_by_muon_or_adam
from gpt1_jax.training.state import TrainState, abstract_state, init_state
from gpt1_jax.training.step import compile_train_step

RULES = ["adamw", "authors", "lion", "adafactor", "muon"]
SCHEDULES = ["cosine", "linear", "constant", "warmup_stable_decay", "inverse_square_root"]


def schedule_of(steps: int, **keys: Any) -> list[float]:
    """The rate at 0, 1, ..., steps."""
    schedule = learning_rate_schedule(OptimizerConfig(**{"learning_rate": 0.5, **keys}), steps)
    return [float(schedule(count)) for count in range(steps + 1)]


def test_schedule_by_hand():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=4), steps=12)
    expected = {0: 0, 1: 0.125, 2: 0.25, 4: 0.5, 6: 0.5 * (1 + math.cos(math.pi / 4)) / 2, 8: 0.25, 12: 0}
    for count, rate in expected.items():
        np.testing.assert_allclose(schedule(count), rate, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "after_warmup"),
    [
        ("linear", {5: 0.4375, 8: 0.25, 11: 0.0625, 12: 0}),
        ("constant", {5: 0.5, 11: 0.5, 12: 0.5}),
        ("warmup_stable_decay", {5: 0.5, 9: 0.5, 10: 1 / 3, 11: 1 / 6, 12: 0}),
        ("inverse_square_root", {9: 0.5 * 2 / 3, 12: 0.5 / math.sqrt(3)}),
    ],
)
def test_the_other_schedules_by_hand(name, after_warmup):
    rates = schedule_of(12, schedule=name, warmup_steps=4, decay_fraction=0.25)
    for count, rate in {0: 0, 1: 0.125, 2: 0.25, 4: 0.5, **after_warmup}.items():
        np.testing.assert_allclose(rates[count], rate, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_0_or_without_warmup_at_the_peak(name):
    assert schedule_of(10, schedule=name, warmup_steps=3)[0] == 0
    assert schedule_of(10, schedule=name, warmup_steps=0)[0] == 0.5
    assert schedule_of(4, schedule=name, warmup_steps=4)[:4] == [0, 0.125, 0.25, 0.375]


def test_the_inverse_square_root_without_warmup():
    np.testing.assert_allclose(
        schedule_of(4, schedule="inverse_square_root", warmup_steps=0),
        [0.5, 0.5, 0.5 / math.sqrt(2), 0.5 / 3**0.5, 0.25],
    )


@pytest.mark.parametrize("fraction", [2 / 3, 0.9, 1.0])
def test_a_descent_longer_than_what_the_warmup_leaves_begins_at_its_end(fraction):
    found = schedule_of(12, schedule="warmup_stable_decay", warmup_steps=4, decay_fraction=fraction)
    np.testing.assert_allclose(found, schedule_of(12, schedule="linear", warmup_steps=4), rtol=1e-6, atol=1e-8)


def test_schedule_without_warmup_starts_at_the_peak_and_warmup_may_be_the_whole_run():
    assert float(learning_rate_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0), 10)(0)) == 0.5
    rates = [float(learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 4)(t)) for t in range(4)]
    assert rates == [0, 0.25, 0.5, 0.75]


def test_schedule_of_the_paper():
    schedule = learning_rate_schedule(OptimizerConfig(), 100_000)
    np.testing.assert_allclose(schedule(1000), 1.25e-4)
    np.testing.assert_allclose(schedule(2000), 2.5e-4)
    np.testing.assert_allclose(schedule(51_000), 1.25e-4, rtol=1e-6)


@pytest.fixture
def params() -> dict:
    """Every kind of parameter of the model: two layers, sizes all different, 3 heads of 2."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    return {
        "embedding": {"token_kernel": normal(7, 4), "mask_kernel": normal(4), "output_kernel": normal(7, 4)},
        "blocks": {
            "attention": {
                "query": {"kernel": normal(2, 4, 3, 2), "bias": jnp.full((2, 3, 2), 0.5)},
                "out": {"kernel": normal(2, 3, 2, 4), "bias": jnp.full((2, 4), 0.5)},
            },
            "mlp_in": {"kernel": normal(2, 4, 5)},
            "mlp_out": {"kernel": normal(2, 5, 4)},
            "ln": {"scale": jnp.full((2, 4), 1.5), "bias": jnp.full((2, 4), 0.25)},
        },
    }


def test_decay_spares_biases_and_gains_even_when_stacked(params):
    assert is_decayed(params) == {
        "embedding": {"token_kernel": True, "mask_kernel": True, "output_kernel": True},
        "blocks": {
            "attention": {"query": {"kernel": True, "bias": False}, "out": {"kernel": True, "bias": False}},
            "mlp_in": {"kernel": True},
            "mlp_out": {"kernel": True},
            "ln": {"scale": False, "bias": False},
        },
    }


def gradients_of(params: dict, seed: int) -> list[dict]:
    """Eight, from far below to far above the clipping norm."""
    rng = np.random.default_rng(seed)
    normal = lambda p, scale: jnp.asarray(scale * rng.standard_normal(p.shape, np.float32))  # noqa: E731
    return [jax.tree.map(functools.partial(normal, scale=s), params) for s in (0.01, 0.1, 1, 10, 100, 1, 0.5, 3)]


def pieces(path: tuple, leaf: Any) -> list[np.ndarray]:
    """A parameter as the matrices and vectors of the papers, float64: one for each layer, its heads joined."""
    leaf, names = np.asarray(leaf, np.float64), [entry.key for entry in path]
    if names[0] != "blocks":
        return [leaf]
    if names[-1] != "kernel":
        return [layer.reshape(-1) for layer in leaf]
    return [
        layer.reshape(-1, layer.shape[-1]) if names[-2] == "out" else layer.reshape(len(layer), -1) for layer in leaf
    ]


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024, the listing ``newtonschulz5``."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def restated_direction(config: OptimizerConfig, t: int, g: np.ndarray, hidden: bool, memory: dict) -> np.ndarray:
    """What the rate multiplies, for the matrix or vector g at update t = 1, 2, ...: the equations of the papers."""
    b1, b2 = config.beta1, config.beta2
    recall = lambda name, shape: memory.get(name, np.zeros(shape))  # noqa: E731
    if config.rule == "lion":  # Chen et al. 2023, algorithm 2
        m = recall("m", g.shape)
        memory["m"] = b2 * m + (1 - b2) * g
        return np.sign(b1 * m + (1 - b1) * g)
    if config.rule == "adafactor":  # Shazeer & Stern 2018, algorithms 4 (matrices) and 5 (vectors)
        b, square = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            memory["r"] = b * recall("r", len(g)) + (1 - b) * square.sum(1)
            memory["c"] = b * recall("c", g.shape[1]) + (1 - b) * square.sum(0)
            v = np.outer(memory["r"], memory["c"]) / memory["r"].sum()
        else:
            v = memory["v"] = b * recall("v", g.shape) + (1 - b) * square
        u = g / np.sqrt(v)
        return u / max(1, math.sqrt((u**2).mean()))
    if config.rule == "muon" and hidden:  # Jordan et al. 2024; Liu et al. 2025, section 2.2; momenta bias-corrected
        m = memory["m"] = 0.95 * recall("m", g.shape) + 0.05 * g
        n = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        return 0.2 * math.sqrt(max(g.shape)) * newton_schulz(n)
    m = memory["m"] = b1 * recall("m", g.shape) + (1 - b1) * g
    v = memory["v"] = b2 * recall("v", g.shape) + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t
    if config.rule == "authors":  # openai/finetune-transformer-lm
        return math.sqrt(c2) / c1 * m / (np.sqrt(v) + config.epsilon)
    return m / c1 / (np.sqrt(v / c2) + config.epsilon)  # Loshchilov & Hutter 2019


def restated(config: OptimizerConfig, steps: int, params: dict, all_grads: list[dict]) -> dict:
    """The parameters after those updates, float64: clipping, the rule, decoupled weight decay, cosine."""
    decayed = jax.tree.leaves(is_decayed(params))
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    p = [pieces(path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    memory: list[list[dict]] = [[{} for _ in layers] for layers in p]
    for t, grads in enumerate(all_grads):
        g = [pieces(path, leaf) for path, leaf in jax.tree.leaves_with_path(grads)]
        norm = math.sqrt(sum((x**2).sum() for layers in g for x in layers))
        if t < config.warmup_steps:
            lr = config.learning_rate * t / config.warmup_steps
        else:
            share = (t - config.warmup_steps) / (steps - config.warmup_steps)
            lr = config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        correction = math.sqrt(1 - config.beta2 ** (t + 1)) / (1 - config.beta1 ** (t + 1))
        decay = config.weight_decay * (correction if config.rule == "authors" else 1)
        for i, path in enumerate(paths):
            hidden = path[0].key == "blocks" and path[-1].key == "kernel"
            for layer, clipped in enumerate(min(1, config.clip_norm / norm) * x for x in g[i]):
                u = restated_direction(config, t + 1, clipped, hidden, memory[i][layer])
                p[i][layer] = p[i][layer] - lr * (u + (decay * p[i][layer] if decayed[i] else 0))
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(np.stack(x).reshape(leaf.shape) for x, leaf in zip(p, leaves, strict=True))


@functools.cache
def compiled(config: OptimizerConfig, steps: int) -> tuple[Callable, Callable]:
    optimizer = make_optimizer(config, steps)

    def update(grads: dict, state: Any, params: dict) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), jax.jit(update)


def updated(config: OptimizerConfig, steps: int, params: Any, all_grads: list[dict]) -> Any:
    init, update = compiled(config, steps)
    state = init(params)
    for grads in all_grads:
        params, state = update(grads, state, params)
    return params


def config_of(rule: Any, epsilon: float = 1e-8) -> OptimizerConfig:
    keys = {"learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.1, "clip_norm": 2.0}
    return OptimizerConfig(rule=rule, epsilon=epsilon, **keys)


@pytest.mark.parametrize(
    ("rule", "seed", "epsilon"),
    [
        *((rule, seed, 1e-8) for rule in RULES for seed in (1, 2)),
        *((rule, 3, 1e-2) for rule in ("adamw", "authors", "muon")),
    ],
)
def test_eight_updates_equal_the_restated_rule(params, rule, seed, epsilon):
    config = config_of(rule, epsilon)
    all_grads = gradients_of(params, seed)
    found, expected = updated(config, 10, params, all_grads), restated(config, 10, params, all_grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-7), found, expected)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, expected)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_stacked_layers_are_updated_as_if_each_stood_alone(params, rule):
    config = OptimizerConfig(rule=rule, learning_rate=1e-2, warmup_steps=0, weight_decay=0.1, clip_norm=1e9)
    # The second layer's gradients a thousand times the first's: statistics of both together would show.
    factors = np.array([1, 1000], np.float32)
    scaled = lambda leaf: leaf * factors.reshape(2, *[1] * (leaf.ndim - 1))  # noqa: E731
    all_grads = [{"blocks": jax.tree.map(scaled, grads["blocks"])} for grads in gradients_of(params, 4)]
    together = updated(config, 10, {"blocks": params["blocks"]}, all_grads)
    for layer in range(2):
        alone = functools.partial(jax.tree.map, lambda leaf, at=layer: np.asarray(leaf)[at : at + 1])
        found = updated(config, 10, alone({"blocks": params["blocks"]}), [alone(grads) for grads in all_grads])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-7), found, alone(together))


def test_muon_makes_the_singular_values_of_every_layers_matrix_near_1(params):
    rule = scale_by_muon_or_adam(0.9, 0.999, 1e-8)
    directions, _ = jax.jit(rule.update)(gradients_of(params, 5)[0], rule.init(params), params)
    matrices = [
        matrix
        for path, leaf in jax.tree.leaves_with_path(directions)
        if path[0].key == "blocks" and path[-1].key == "kernel"
        for matrix in pieces(path, leaf)
    ]
    assert [matrix.shape for matrix in matrices] == 2 * [(6, 4)] + 2 * [(4, 6)] + 2 * [(4, 5)] + 2 * [(5, 4)]
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(max(matrix.shape)))
        assert 0.5 < values.min() and values.max() < 1.5  # so far, Jordan et al. say, do five steps bring them


def test_muon_leaves_embeddings_and_vectors_to_adam(params):
    rule, adam = scale_by_muon_or_adam(0.8, 0.99, 1e-3), optax.scale_by_adam(0.8, 0.99, 1e-3)
    grads = gradients_of(params, 6)[2]
    found, expected = (jax.jit(each.update)(grads, each.init(params), params)[0] for each in (rule, adam))
    same = jax.tree.map(np.allclose, found, expected)
    hidden = jax.tree.map_with_path(lambda p, _: p[0].key == "blocks" and p[-1].key == "kernel", params)
    assert same == jax.tree.map(lambda is_hidden: not is_hidden, hidden)


def test_adafactor_keeps_of_a_matrix_its_rows_and_columns_alone():
    params = {
        "blocks": {"mlp_in": {"kernel": np.zeros((3, 100, 200))}},
        "embedding": {"token_kernel": np.zeros((300, 70))},
    }
    state = jax.eval_shape(make_optimizer(OptimizerConfig(rule="adafactor"), 10).init, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 3) == 3 * (100 + 200) + 300 + 70


@pytest.mark.parametrize("rule", RULES)
def test_the_first_update_of_a_warmup_changes_nothing(params, rule):
    found = updated(config_of(rule), 10, params, gradients_of(params, 7)[:1])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, params)))


def test_the_two_rules_differ(params):
    grads = jax.tree.map(jnp.ones_like, params)
    results = []
    for rule in ("adamw", "authors"):
        optimizer = make_optimizer(OptimizerConfig(rule=rule, warmup_steps=0, learning_rate=0.1, weight_decay=0.5), 9)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        results.append(updates["embedding"]["token_kernel"])
    assert np.abs(results[0] - results[1]).max() > 1e-2


def test_first_update_by_hand():
    # After one step the bias-corrected moments are g and g^2: the update is -lr * (g / (|g| + eps) + decay * p).
    params = {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([1.0])}
    grads = {"kernel": jnp.array([[0.3, 0.0]]), "bias": jnp.array([-0.4])}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=0.5, weight_decay=0.1), 100)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.5 * (1 + 0.2), 0.5 * 0.4]], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [0.5], rtol=1e-5)


YAML = """
model:
  {vocab_size: 96, context_length: 16, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 48, dtype: float32,
  dropout: 0.0, attention_dropout: 0.0, scan_layers: true}
train: {steps: 20, batch_size: 8}
optimizer: {warmup_steps: 2}
evaluation: {sample_tokens: 8}
"""
RATES = {"adamw": 1e-2, "authors": 1e-2, "lion": 3e-3, "adafactor": 1e-2, "muon": 1e-2}
MESHES = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


class Run:
    """A tiny model under one rule, compiled for as many devices as the mesh has."""

    def __init__(self, rule: str, mesh: str):
        sizes = MESHES[mesh]
        keys = [f"optimizer.rule={rule}", f"optimizer.learning_rate={RATES[rule]}"]
        self.config = parse_config(YAML, "test", [*keys, *(f"mesh.{axis}={size}" for axis, size in sizes.items())])
        self.mesh = make_mesh(self.config.mesh, jax.devices()[: math.prod(sizes.values())])
        self.optimizer = make_optimizer(self.config.optimizer, self.config.train.steps)
        self.step = compile_train_step(self.config, self.optimizer, self.mesh)
        self.start = init_state(self.config, self.optimizer, self.mesh)

    def train(self, state: TrainState, steps: int) -> tuple[TrainState, list[float]]:
        state, losses = jax.tree.map(jnp.copy, state), []
        for _ in range(steps):
            tokens = np.random.default_rng(int(state.step) % 2).integers(0, 96, (8, 17), dtype=np.int32)
            state, metrics = self.step(state, jax.device_put(tokens, batch_sharding(self.mesh)))
            losses.append(float(metrics["loss"]))
        return state, losses

    def donated(self) -> float:
        """The part of the state whose memory a step takes for its result."""
        memory = self.step.memory_analysis()
        assert memory is not None
        parts = (leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.start))
        return memory.alias_size_in_bytes / sum(parts)

    def saved_and_restored(self, folder: Path) -> dict[str, bool]:
        """Whether a checkpoint is the state bit for bit, its layout, and the same state again after more steps."""
        saved, _ = self.train(self.start, 3)
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            checkpoints.save(3, saved, RunFiles(config="", tokenizer=b"", examples=24, data="", corpus=""))
            checkpoints.wait()
            found = checkpoints.restore_state(3, abstract_state(self.config, self.optimizer, self.mesh))
        bits = lambda state: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]  # noqa: E731
        layouts = lambda state: jax.tree.map(lambda leaf: leaf.sharding, state)  # noqa: E731
        return {
            "bits": bits(found) == bits(saved),
            "layouts": layouts(found) == layouts(saved),
            "continued": bits(self.train(found, 3)[0]) == bits(self.train(saved, 3)[0]),
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """This file as a script in a process with eight virtual devices."""
    folder = tmp_path_factory.mktemp("trained")
    # Code that is optimized less is compiled three times as fast.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=os.environ | {"XLA_FLAGS": flags})
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns(trained, rule):
    losses = trained[rule]["one"]
    assert losses[0] == pytest.approx(math.log(96), abs=0.1)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("rule", RULES)
def test_one_device_and_eight_give_the_same_losses_under_every_rule(trained, rule):
    np.testing.assert_allclose(trained[rule]["eight"], trained[rule]["one"], rtol=2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_state_of_every_rule_is_donated(trained, rule):
    assert min(trained[rule]["donated"]) >= 0.99


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_holds_the_state_of_every_rule(trained, rule):
    assert trained[rule]["checkpoint"] == {"bits": True, "layouts": True, "continued": True}


QUERY = "['blocks']['attention']['query']['kernel']"  # [2, 32, 4, 8]: of 8 devices each holds a quarter
QUERY_SHARDS = {
    "adamw": {"params": [2, 16, 2, 8], "mu": [2, 16, 2, 8], "nu": [2, 16, 2, 8]},
    "authors": {"params": [2, 16, 2, 8], "mu": [2, 16, 2, 8], "nu": [2, 16, 2, 8]},
    "lion": {"params": [2, 16, 2, 8], "mu": [2, 16, 2, 8]},
    "adafactor": {"params": [2, 16, 2, 8], "v_row": [2, 32], "v_col": [2, 32], "v": [2, 1]},
    "muon": {"params": [2, 16, 2, 8], "mu": [2, 16, 2, 8]},
}


@pytest.mark.parametrize("rule", RULES)
def test_what_has_a_parameters_shape_lies_where_the_parameter_lies(trained, rule):
    shards = {path: shape for path, shape in trained[rule]["shards"].items() if path.endswith(QUERY)}
    assert {path.removesuffix(QUERY).rpartition(".")[2]: shape for path, shape in shards.items()} == QUERY_SHARDS[rule]


def main(folder: Path) -> None:
    results = {}
    for rule in RULES:
        one, eight = Run(rule, "one"), Run(rule, "eight")
        leaves = jax.tree.leaves_with_path(eight.start)
        results[rule] = {
            "one": one.train(one.start, 12)[1],
            "eight": eight.train(eight.start, 12)[1],
            "donated": [one.donated(), eight.donated()],
            "checkpoint": eight.saved_and_restored(folder / rule),
            "shards": {jax.tree_util.keystr(path): leaf.addressable_shards[0].data.shape for path, leaf in leaves},
        }
    (folder / "out.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
