"""The optimizer against values computed by hand, and against the update rules restated in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt1_jax.config import OptimizerConfig
from gpt1_jax.training.optimizer import is_decayed, learning_rate_schedule, make_optimizer


def test_schedule_by_hand():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=4), steps=12)
    expected = {0: 0, 1: 0.125, 2: 0.25, 4: 0.5, 6: 0.5 * (1 + math.cos(math.pi / 4)) / 2, 8: 0.25, 12: 0}
    for count, rate in expected.items():
        np.testing.assert_allclose(schedule(count), rate, atol=1e-8)


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
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return {
        "embedding": {"token_kernel": jax.random.normal(next(keys), (5, 3))},
        "blocks": {
            "linear": {"kernel": jax.random.normal(next(keys), (2, 3, 3)), "bias": jnp.full((2, 3), 0.5)},
            "ln": {"scale": jnp.full((2, 3), 1.5), "bias": jnp.full((2, 3), 0.25)},
        },
    }


def test_decay_spares_biases_and_gains_even_when_stacked(params):
    assert is_decayed(params) == {
        "embedding": {"token_kernel": True},
        "blocks": {"linear": {"kernel": True, "bias": False}, "ln": {"scale": False, "bias": False}},
    }


def restated(config: OptimizerConfig, steps: int, params: dict, all_grads: list[dict]) -> dict:
    """The update rules of openai/finetune-transformer-lm (authors) and of Loshchilov & Hutter (adamw), float64."""
    decayed = jax.tree.leaves(is_decayed(params))
    p, structure = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, grads in enumerate(all_grads):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1, config.clip_norm / norm) for x in g]
        if t < config.warmup_steps:
            lr = config.learning_rate * t / config.warmup_steps
        else:
            share = (t - config.warmup_steps) / (steps - config.warmup_steps)
            lr = config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        c1, c2 = 1 - config.beta1 ** (t + 1), 1 - config.beta2 ** (t + 1)
        for i in range(len(p)):
            m[i] = config.beta1 * m[i] + (1 - config.beta1) * g[i]
            v[i] = config.beta2 * v[i] + (1 - config.beta2) * g[i] ** 2
            decay = config.weight_decay * p[i] if decayed[i] else 0
            if config.rule == "authors":
                p[i] = p[i] - lr * math.sqrt(c2) / c1 * (m[i] / (np.sqrt(v[i]) + config.epsilon) + decay)
            else:
                p[i] = p[i] - lr * (m[i] / c1 / (np.sqrt(v[i] / c2) + config.epsilon) + decay)
    return structure.unflatten(p)


@pytest.mark.parametrize("rule", ["adamw", "authors"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_eight_updates_equal_the_restated_rule(params, rule, epsilon):
    config = OptimizerConfig(
        rule=rule, learning_rate=1e-2, warmup_steps=3, weight_decay=0.1, epsilon=epsilon, clip_norm=2.0
    )
    steps = 10
    keys = jax.random.split(jax.random.key(1), 8)
    # From far below to far above the clipping norm.
    all_grads = [jax.tree.map(lambda p, k=k, s=s: s * jax.random.normal(k, p.shape), params)
                 for s, k in zip((0.01, 0.1, 1, 10, 100, 1, 0.5, 3), keys, strict=True)]  # fmt: skip
    optimizer = make_optimizer(config, steps)
    state, found = optimizer.init(params), params
    for grads in all_grads:
        updates, state = jax.jit(optimizer.update)(grads, state, found)
        found = optax.apply_updates(found, updates)
    expected = restated(config, steps, params, all_grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-7), found, expected)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, expected)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_the_two_rules_differ(params):
    grads = jax.tree.map(jnp.ones_like, params)
    results = []
    for rule in ("adamw", "authors"):
        optimizer = make_optimizer(OptimizerConfig(rule=rule, warmup_steps=0, learning_rate=0.1, weight_decay=0.5), 9)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        results.append(updates["embedding"]["token_kernel"])
    assert np.abs(results[0] - results[1]).max() > 1e-2


def test_first_update_by_hand():
    # After one step the bias-corrected moments are g and g^2: the update is -lr * (g / (|g| + eps) + decay * p).
    params = {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([1.0])}
    grads = {"kernel": jnp.array([[0.3, 0.0]]), "bias": jnp.array([-0.4])}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=0.5, weight_decay=0.1), 100)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.5 * (1 + 0.2), 0.5 * 0.4]], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [0.5], rtol=1e-5)
