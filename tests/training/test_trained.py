"""Which parameters an update moves, and by how much: given gradients, so that nothing of the model is compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.model.transformer import abstract_params
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import TrainState
from gpt1_jax.training.step import update
from gpt1_jax.training.trained import merge, rate_scales, split

YAML = """
model: {vocab_size: 20, special_tokens: 3, num_classes: 2, context_length: 8, num_layers: 3, embed_dim: 8, num_heads: 2,
        mlp_dim: 12, dtype: float32}
train: {steps: 100}
optimizer: {warmup_steps: 0, learning_rate: 0.01, weight_decay: 0.1}
evaluation: {sample_tokens: 4}
finetune:
  task:
    form: classification
    text: t
    label: l
    labels: ["0", "1"]
    validation: {kind: files, paths: [x]}
"""
TABLE, POSITIONS, CLASSIFIER = "embedding.token_kernel", "embedding.position_kernel", "classifier_kernel"


def config_of(*overrides):
    return parse_config(YAML, "c", overrides)


def random_tree(config, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(0.5, 0.2, s.shape), jnp.float32), abstract_params(config.model)
    )


def by_name(tree):
    return {".".join(entry.key for entry in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def updated(config, count, params, scale=1.0):
    """The state after so many updates by random gradients."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, rate_scales(config))
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), params, optimizer.init(split(config, params)[0]), key)
    step = jax.jit(
        lambda state, grads: update(config, optimizer, state, (jnp.zeros(()), grads))[0],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    for number in range(count):
        state = step(state, split(config, random_tree(config, 10 + number, scale))[0])
    return state


def moved(config, count=3):
    """Which elements of each parameter are not the same bits after some updates."""
    params = random_tree(config, 0)
    after = by_name(updated(config, count, params).params)
    return {name: np.asarray(leaf) != np.asarray(after[name]) for name, leaf in by_name(params).items()}


SPECIAL_ROWS = np.arange(20)[:, None] >= 17
FROM_LAYER_1 = np.arange(3) >= 1


@pytest.mark.parametrize("rule", ["adamw", "authors", "lion", "adafactor", "muon"])
def test_frozen_layers_stay_to_the_bit_and_so_do_embeddings_but_of_special_tokens(rule):
    found = moved(config_of("finetune.train.frozen_layers=1", f"optimizer.rule={rule}"))
    np.testing.assert_array_equal(found.pop(TABLE), np.broadcast_to(SPECIAL_ROWS, (20, 8)))
    assert not found.pop(POSITIONS).any()
    assert found.pop(CLASSIFIER).all()
    for name, elements in found.items():
        assert name.startswith("blocks.")
        np.testing.assert_array_equal(elements.reshape(3, -1).all(1), FROM_LAYER_1, name)
        np.testing.assert_array_equal(elements.reshape(3, -1).any(1), FROM_LAYER_1, name)


@pytest.mark.parametrize("frozen", [0, 2])
def test_with_low_rank_updates_only_they_and_what_is_new_moves(frozen):
    found = moved(
        config_of("model.lora={rank: 2, targets: [query, mlp_out]}", f"finetune.train.frozen_layers={frozen}")
    )
    np.testing.assert_array_equal(found.pop(TABLE), np.broadcast_to(SPECIAL_ROWS, (20, 8)))
    assert found.pop(CLASSIFIER).all()
    added = {name: elements for name, elements in found.items() if "lora" in name}
    assert sorted(added) == [
        f"blocks.{module}.lora_{side}" for module in ("attention.query", "mlp_out") for side in ("in", "out")
    ]
    for name, elements in found.items():
        layers = np.arange(3) >= frozen if name in added else np.zeros(3, bool)
        if name == POSITIONS:
            assert not elements.any()
        else:
            np.testing.assert_array_equal(elements.reshape(3, -1).all(1), layers, name)
            np.testing.assert_array_equal(elements.reshape(3, -1).any(1), layers, name)


def test_all_layers_frozen_leave_the_classifier_and_the_special_tokens():
    config = config_of("finetune.train.frozen_layers=3")
    assert sorted(by_name(split(config, random_tree(config, 0))[0])) == [CLASSIFIER, TABLE]


def test_everything_moves_unless_told_otherwise():
    assert all(elements.all() for elements in moved(config_of()).values())
    assert rate_scales(config_of()) is None


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["finetune.train.frozen_layers=1", "model.tied_output=false"], True),
        (["model.lora={}", "model.tied_output=false"], None),
        (["finetune.train.frozen_layers=1", "model.special_tokens=0"], False),
    ],
)
def test_tables_whose_rows_are_partly_new(overrides, trained):
    config = config_of(*overrides)
    names = by_name(split(config, random_tree(config, 0))[0])
    if trained is False:  # no row is new
        assert TABLE not in names and POSITIONS not in names
    else:  # an output projection of its own is above all layers; beside low-rank updates only its new rows learn
        found = moved(config)["output_kernel"]
        np.testing.assert_array_equal(found, np.broadcast_to(True if trained else SPECIAL_ROWS, (20, 8)))


def test_there_are_no_moments_of_what_is_not_trained():
    config = config_of("model.lora={rank: 2}")
    params = random_tree(config, 0)
    trained, others = split(config, params)
    state = make_optimizer(config.optimizer, 100, rate_scales(config)).init(trained)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(trained))
    counts = [leaf for leaf in jax.tree.leaves(state) if not leaf.ndim]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) - len(counts) == 2 * sizes
    assert sizes == 20 * 8 + 8 * 2 + 2 * 3 * (8 * 2 + 2 * 8)
    whole = merge(trained, others)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True))


def test_pre_training_trains_all():
    config = config_of().model_copy(update={"finetune": None})
    params = random_tree(config, 0)
    trained, others = split(config, params)
    assert trained is params and not jax.tree.leaves(others)
    assert rate_scales(config) is None


def test_each_layer_has_its_share_of_the_rate():
    """Adam's first update is the rate times a sign, wherever the gradient is much larger than epsilon."""
    config = config_of("finetune.optimizer.layer_decay=0.5", "optimizer.weight_decay=0", "optimizer.epsilon=1e-12")
    params = random_tree(config, 0)
    after = by_name(updated(config, 1, params).params)
    for name, before in by_name(params).items():
        change = np.abs(np.asarray(after[name] - before))
        if name.startswith("blocks."):
            expected = 0.01 * np.array([0.25, 0.5, 1.0]).reshape(3, *[1] * (change.ndim - 1))
        else:
            expected = 0.01 * (0.125 if name.startswith("embedding") else 1.0)
        np.testing.assert_allclose(change, np.broadcast_to(expected, change.shape), rtol=2e-4, err_msg=name)


def test_gradients_of_frozen_rows_have_no_part_in_the_norm_nor_in_the_clipping():
    config = config_of("finetune.train.frozen_layers=1")
    params = random_tree(config, 0)
    optimizer = make_optimizer(config.optimizer, config.train.steps, rate_scales(config))
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), params, optimizer.init(split(config, params)[0]), key)
    grads = split(config, random_tree(config, 1))[0]
    huge = {**grads, "embedding": {**grads["embedding"]}}
    huge["embedding"]["token_kernel"] = jnp.where(SPECIAL_ROWS, grads["embedding"]["token_kernel"], 1e6)
    step = jax.jit(
        lambda given: update(config, optimizer, state, (jnp.zeros(()), given)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    found = [step(given) for given in (grads, huge)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    norm = math.sqrt(
        sum(
            float(jnp.square(leaf[1:] if name.startswith("blocks") else leaf[17:] if name == TABLE else leaf).sum())
            for name, leaf in by_name(grads).items()
        )
    )
    after, metrics = found[0]
    assert math.isclose(float(metrics["grad_norm"]), norm, rel_tol=1e-5) and norm > 1
    means = jax.tree.leaves_with_path(after.opt_state)
    (mean,) = [leaf for path, leaf in means if "classifier" in str(path) and "mu" in str(path)]
    np.testing.assert_allclose(mean, 0.1 * grads["classifier_kernel"] / norm, rtol=1e-5)
