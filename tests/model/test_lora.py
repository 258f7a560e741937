"""Low-rank updates: nothing at first, then what their product added to the matrices would do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import LoraConfig, ModelConfig
from gpt1_jax.model.lora import merged
from gpt1_jax.model.transformer import abstract_params, bind, init_params

ALL = ("query", "key", "value", "out", "mlp_in", "mlp_out", "mlp_gate")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 16)), jnp.int32)


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def logits(config, params):
    model = bind(config, params)
    return model.logits(model(TOKENS)[0])


def without(params):
    """The parameters but for the updates."""
    if not isinstance(params, dict):
        return params
    return {name: without(leaf) for name, leaf in params.items() if not name.startswith("lora")}


@pytest.fixture(scope="module", params=["gpt1", "modern"])
def pair(request, tiny_model, variations):
    """A model, and the same with updates of all its matrices."""
    plain = tiny_model if request.param == "gpt1" else variations["modern"]
    plain = plain.model_copy(update={"scan_layers": True})
    targets = ALL if plain.activation == "swiglu" else ALL[:-1]
    return plain, plain.model_copy(update={"lora": LoraConfig(rank=3, alpha=6.0, targets=targets)})


@pytest.fixture(scope="module")
def trained(pair):
    """Parameters whose updates are no longer zero, and as large as the matrices."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, shape.shape), jnp.float32)

    return jax.tree.map_with_path(leaf, abstract_params(pair[1]))


def test_at_first_the_logits_are_those_without(pair):
    plain, lora = pair
    params = jax.jit(init_params, static_argnums=0)(lora, jax.random.key(0))
    np.testing.assert_array_equal(logits(lora, params), logits(plain, without(params)))


def test_merged_is_the_same_model(pair, trained):
    plain, lora = pair
    found = merged(lora, trained)
    assert jax.tree.structure(found) == jax.tree.structure(abstract_params(plain))
    with_updates = logits(lora, trained)
    np.testing.assert_allclose(logits(plain, found), with_updates, rtol=0, atol=2e-6)
    assert np.abs(with_updates - logits(plain, without(trained))).max() > 0.05  # they matter


def test_merged_by_hand(pair, trained):
    _, lora = pair
    found = merged(lora, trained)["blocks"]
    for layer in range(2):
        query, out = (trained["blocks"]["attention"][name] for name in ("query", "out"))
        expected = query["kernel"][layer] + 2.0 * np.einsum(
            "dr,rnh->dnh", query["lora_in"][layer], query["lora_out"][layer]
        )
        np.testing.assert_allclose(found["attention"]["query"]["kernel"][layer], expected, rtol=1e-5, atol=1e-6)
        expected = out["kernel"][layer] + 2.0 * np.einsum("nhr,rd->nhd", out["lora_in"][layer], out["lora_out"][layer])
        np.testing.assert_allclose(found["attention"]["out"]["kernel"][layer], expected, rtol=1e-5, atol=1e-6)


def test_layers_in_a_loop_and_in_a_row_are_the_same(pair, trained):
    _, lora = pair
    in_a_row = lora.model_copy(update={"scan_layers": False})
    np.testing.assert_allclose(logits(in_a_row, trained), logits(lora, trained), rtol=1e-5, atol=1e-6)


def test_only_the_targets_have_updates(tiny_model):
    model = tiny_model.model_copy(update={"lora": LoraConfig(rank=5)})
    shapes = {
        ".".join(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(abstract_params(model))
        if "lora" in path[-1].key
    }
    assert shapes == {
        f"blocks.attention.{name}.lora_{side}": shape
        for name in ("query", "value")
        for side, shape in (("in", (2, 32, 5)), ("out", (2, 5, 4, 8)))
    }


def test_without_updates_nothing_is_merged(tiny_model: ModelConfig):
    params = {"kernel": jnp.ones(3)}
    assert merged(tiny_model, params) is params
