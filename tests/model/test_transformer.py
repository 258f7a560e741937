"""The model against a plain NumPy restatement of the paper, and its properties."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.layers import LayerNorm, gelu
from gpt1_jax.model.transformer import (
    abstract_params,
    bind,
    flops_per_token,
    init_params,
    num_parameters,
    parameter_axes,
)


def with_values(config: ModelConfig, **values: object) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | values)


@pytest.fixture(scope="module")
def params(tiny_model: ModelConfig) -> dict:
    """Weights with biases and gains that are not trivial, and larger than the initial ones."""
    params = init_params(tiny_model, jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([4 * x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def tokens(tiny_model: ModelConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (3, tiny_model.context_length), 0, tiny_model.vocab_size)


@partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: dict, tokens: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens, dropout_key=dropout_key)[0])


def reference_logits(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """GPT-1 in float64, one sequence and one head at a time, from the paper's equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * w["scale"] + w["bias"]

    def attention(x, w):
        total = w["out"]["bias"].copy()
        for head in range(config.num_heads):
            q, k, v = (x @ w[name]["kernel"][:, head] + w[name]["bias"][head] for name in ("query", "key", "value"))
            scores = q @ k.T / math.sqrt(config.head_dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            total = total + probs @ v @ w["out"]["kernel"][head]
        return total

    def mlp(x, w):
        h = x @ w["mlp_in"]["kernel"] + w["mlp_in"]["bias"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return h @ w["mlp_out"]["kernel"] + w["mlp_out"]["bias"]

    rows = []
    for row in np.asarray(tokens):
        x = p["embedding"]["token_kernel"][row] + p["embedding"]["position_kernel"][: len(row)]
        for layer in range(config.num_layers):
            w = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
            n = norm(x + attention(x, w["attention"]), w["ln_1"])
            x = norm(n + mlp(n, w), w["ln_2"])
        rows.append(x @ p["embedding"]["token_kernel"].T)
    return np.stack(rows)


def test_the_papers_model_has_116_534_784_parameters():
    config = ModelConfig(dtype="bfloat16")
    assert num_parameters(config) == 116_534_784
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))} == {jnp.dtype("float32")}


def test_logits_equal_the_papers_equations(tiny_model, params, tokens):
    expected = reference_logits(tiny_model, params, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(tiny_model, params, tokens), expected, rtol=2e-5, atol=2e-5)


def test_initial_values_are_the_papers():
    config = ModelConfig(num_layers=3, vocab_size=1000, dtype="float32")
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    flat = {".".join(str(k.key) for k in path): np.asarray(v) for path, v in jax.tree.leaves_with_path(params)}
    for name, value in flat.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("scale"):
            assert (value == 1).all(), name
        else:
            assert abs(value.mean()) < 1e-4 and abs(value.std() - 0.02) < 1e-4, name
    # Layers are drawn apart from each other.
    kernel = flat["blocks.mlp_in.kernel"]
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.01


@pytest.mark.slow
def test_the_papers_model_starts_at_a_loss_of_10_77():
    model = ModelConfig(dtype="float32")
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(5), (1, 512), 0, model.vocab_size)
    logits = logits_of(model, params, tokens)
    targets = jax.random.randint(jax.random.key(6), (1, 512), 0, model.vocab_size)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()
    assert abs(float(nats) - 10.77) < 0.1


def test_a_token_changes_nothing_before_it(tiny_model, params, tokens):
    before = logits_of(tiny_model, params, tokens)
    for position in (0, 7, 15):
        changed = tokens.at[:, position].add(1) % tiny_model.vocab_size
        after = logits_of(tiny_model, params, changed)
        np.testing.assert_array_equal(before[:, :position], after[:, :position])
        assert not np.allclose(before[:, position:], after[:, position:])


def test_gradients_do_not_reach_back_in_time(tiny_model, params, tokens):
    def loss(params: dict) -> jax.Array:
        return logits_of(tiny_model, params, tokens)[:, 4].sum()

    reached = jax.grad(loss)(params)["embedding"]["position_kernel"]
    assert np.abs(reached[:5]).min() > 0
    assert not np.asarray(reached[5:]).any()


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_unrolled_and_rematerialised_agree(tiny_model, params, tokens, scan_layers, remat):
    plain = with_values(tiny_model, dropout=0.1, attention_dropout=0.1)
    other = with_values(plain, scan_layers=scan_layers, remat=remat)

    def loss(config: ModelConfig, params: dict) -> jax.Array:
        return jnp.square(logits_of(config, params, tokens, dropout_key=jax.random.key(3))).mean()

    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: loss(plain, p)))(params)
    found, grads = jax.jit(jax.value_and_grad(lambda p: loss(other, p)))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)


def test_bfloat16_computes_near_float32_and_returns_float32_logits(tiny_model, params, tokens):
    found = logits_of(with_values(tiny_model, dtype="bfloat16"), params, tokens)
    expected = logits_of(tiny_model, params, tokens)
    assert found.dtype == jnp.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.03


def test_every_dimension_has_a_logical_axis(tiny_model):
    axes, shapes = parameter_axes(tiny_model), abstract_params(tiny_model)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    jax.tree.map(lambda a, s: pytest.fail(f"{a} {s}") if len(a) != s.ndim else None, axes, shapes, is_leaf=is_axes)
    for name in ("query", "key", "value"):
        assert axes["blocks"]["attention"][name] == {
            "kernel": ("layers", "embed", "heads", "head_dim"),
            "bias": ("layers", "heads", "head_dim"),
        }
    assert axes["blocks"]["attention"]["out"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    assert axes["embedding"]["token_kernel"] == ("vocab", "embed")


def test_dropout_acts_on_embedding_probabilities_and_branches(tiny_model, params, tokens):
    key = jax.random.key(4)
    quiet = logits_of(tiny_model, params, tokens)
    np.testing.assert_array_equal(quiet, logits_of(tiny_model, params, tokens, dropout_key=key))
    for rates in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        config = with_values(tiny_model, **rates)
        first = logits_of(config, params, tokens, dropout_key=key)
        assert not np.allclose(first, quiet)
        np.testing.assert_array_equal(first, logits_of(config, params, tokens, dropout_key=key))
        assert not np.allclose(first, logits_of(config, params, tokens, dropout_key=jax.random.key(5)))
        np.testing.assert_array_equal(quiet, logits_of(config, params, tokens))


def test_layer_norm_by_hand():
    norm = LayerNorm(4)
    norm.scale[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
    norm.bias[...] = jnp.array([0.0, 0.0, 3.0, 0.0])
    # Mean 2.5, variance 1.25.
    root = math.sqrt(1.25 + 1e-5)
    expected = [-1.5 / root, 2 * -0.5 / root, 0.5 / root + 3, 1.5 / root]
    np.testing.assert_allclose(norm(jnp.array([1.0, 2.0, 3.0, 4.0])), expected, rtol=1e-6)


def test_layer_norm_keeps_its_precision_far_from_zero():
    x = np.random.default_rng(0).normal(size=(5, 64)) + 1000
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(LayerNorm(64)(jnp.asarray(x, jnp.float32)), expected, atol=2e-3)


def test_gelu_is_the_tanh_form():
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    expected = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-7)
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert np.abs(expected - exact).max() > 1e-4  # so the test tells the two forms apart


def test_flops_by_hand():
    config = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16, vocab_size=10, dtype="float32")
    matrices = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 10 * 8
    assert flops_per_token(config, 4) == 6 * matrices + 2 * 12 * 8 * 4
