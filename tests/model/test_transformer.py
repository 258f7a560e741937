"""The model against a plain NumPy restatement of the paper, and its properties."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.dropout import DropoutKey
from gpt1_jax.model.layers import LayerNorm, RMSNorm, gelu, soft_cap
from gpt1_jax.model.rotary import rotate
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


def weights_of(config: ModelConfig) -> dict:
    """Weights with biases and gains that are not trivial, and larger than the initial ones."""
    params = init_params(config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([4 * x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def params(tiny_model: ModelConfig) -> dict:
    return weights_of(tiny_model)


@pytest.fixture(scope="module")
def tokens(tiny_model: ModelConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (3, tiny_model.context_length), 0, tiny_model.vocab_size)


@partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: dict, tokens: jax.Array, dropout_key: DropoutKey | None = None) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens, dropout_key=dropout_key)[0])


class Reference:
    """The model in float64, one sequence and one head at a time, from the equations of the papers."""

    def __init__(self, config: ModelConfig, params: dict):
        self.config = config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.stack([self.logits_of_row(row) for row in np.asarray(tokens)])

    def logits_of_row(self, row: np.ndarray) -> np.ndarray:
        config, p = self.config, self.params
        x = self.embedded(row)
        for layer in range(config.num_layers):
            w = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
            if config.norm_position == "pre":
                x = x + self.attention(self.norm(x, w["ln_1"]), w["attention"])
                x = x + self.mlp(self.norm(x, w["ln_2"]), w)
            else:
                n = self.norm(x + self.attention(x, w["attention"]), w["ln_1"])
                x = self.norm(n + self.mlp(n, w), w["ln_2"])
        x = self.norm(x, p["ln_f"]) if config.norm_position == "pre" else x
        logits = x @ (p["embedding"]["token_kernel"] if config.tied_output else p["output_kernel"]).T
        return logits if config.logit_cap is None else config.logit_cap * np.tanh(logits / config.logit_cap)

    def embedded(self, row: np.ndarray) -> np.ndarray:
        w = self.params["embedding"]
        x = np.stack([w["mask_kernel"] if t == self.config.mask_id else w["token_kernel"][t] for t in row])
        return x + w["position_kernel"][: len(row)] if self.config.positions == "learned" else x

    def norm(self, x: np.ndarray, w: dict) -> np.ndarray:
        if self.config.norm == "rms_norm":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale"]
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * w["scale"] + w.get("bias", 0)

    def linear(self, x: np.ndarray, w: dict) -> np.ndarray:
        return x @ w["kernel"] + w.get("bias", 0)

    def rotated(self, x: np.ndarray) -> np.ndarray:
        pairs = x[:, : x.shape[1] // 2] + 1j * x[:, x.shape[1] // 2 :]
        angles = np.arange(len(x))[:, None] / 10_000 ** (np.arange(pairs.shape[1]) / pairs.shape[1])
        pairs = pairs * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def attention(self, x: np.ndarray, w: dict) -> np.ndarray:
        config = self.config
        total = np.zeros_like(x) + w["out"].get("bias", 0)
        for head in range(config.num_heads):
            shared = head * config.kv_heads // config.num_heads
            q, k, v = (
                self.linear(x, jax.tree.map(lambda leaf: leaf[..., h, :], w[name]))  # noqa: B023
                for name, h in (("query", head), ("key", shared), ("value", shared))
            )
            if config.qk_norm:
                q, k = self.norm(q, w["query_norm"]), self.norm(k, w["key_norm"])
            if config.positions == "rotary":
                q, k = self.rotated(q), self.rotated(k)
            scores = q @ k.T / math.sqrt(config.head_dim)
            if config.objective != "masked":
                scores[np.triu_indices(len(x), 1)] = -np.inf
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            total = total + probs @ v @ w["out"]["kernel"][head]
        return total

    def mlp(self, x: np.ndarray, w: dict) -> np.ndarray:
        h = self.linear(x, w["mlp_in"])
        if self.config.activation == "swiglu":
            gate = self.linear(x, w["mlp_gate"])
            return self.linear(gate / (1 + np.exp(-gate)) * h, w["mlp_out"])
        return self.linear(0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))), w["mlp_out"])


def test_the_papers_model_has_116_534_784_parameters():
    config = ModelConfig(dtype="bfloat16")
    assert num_parameters(config) == 116_534_784
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))} == {jnp.dtype("float32")}


def test_logits_equal_the_papers_equations(tiny_model, params, tokens):
    expected = Reference(tiny_model, params).logits(tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(tiny_model, params, tokens), expected, rtol=2e-5, atol=2e-5)


def test_logits_of_every_variation_equal_its_equations(variation, tokens):
    params = weights_of(variation)
    if variation.objective == "masked":
        tokens = tokens.at[:, 3::5].set(variation.mask_id)
    expected = Reference(variation, params).logits(tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(variation, params, tokens), expected, rtol=3e-5, atol=3e-5)


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


def test_a_token_changes_nothing_before_it_unless_the_model_is_masked(variation, tokens):
    params = weights_of(variation)
    before = logits_of(variation, params, tokens)
    for position in (0, 7, 15):
        changed = tokens.at[:, position].add(1) % variation.vocab_size
        after = logits_of(variation, params, changed)
        if variation.objective == "masked":
            assert (np.asarray(before) != after).any(-1).all()
        else:
            np.testing.assert_array_equal(before[:, :position], after[:, :position])
            assert (np.asarray(before) != after).any(-1)[:, position:].all()


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
        return jnp.square(logits_of(config, params, tokens, dropout_key=DropoutKey(jax.random.key(3)))).mean()

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


def test_every_dimension_of_every_variation_has_a_logical_axis(variation):
    axes, shapes = parameter_axes(variation), abstract_params(variation)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    jax.tree.map(lambda a, s: pytest.fail(f"{a} {s}") if len(a) != s.ndim else None, axes, shapes, is_leaf=is_axes)


def test_the_logical_axes_are_those_of_the_rules(tiny_model):
    axes = parameter_axes(tiny_model)
    for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
        assert axes["blocks"]["attention"][name] == {
            "kernel": ("layers", "embed", heads, "head_dim"),
            "bias": ("layers", heads, "head_dim"),
        }
    assert axes["blocks"]["attention"]["out"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    assert axes["embedding"]["token_kernel"] == ("vocab", "embed")


def test_dropout_acts_on_embedding_probabilities_and_branches(tiny_model, params, tokens):
    key = DropoutKey(jax.random.key(4))
    quiet = logits_of(tiny_model, params, tokens)
    np.testing.assert_array_equal(quiet, logits_of(tiny_model, params, tokens, dropout_key=key))
    for rates in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        config = with_values(tiny_model, **rates)
        first = logits_of(config, params, tokens, dropout_key=key)
        assert not np.allclose(first, quiet)
        np.testing.assert_array_equal(first, logits_of(config, params, tokens, dropout_key=key))
        assert not np.allclose(first, logits_of(config, params, tokens, dropout_key=DropoutKey(jax.random.key(5))))
        np.testing.assert_array_equal(quiet, logits_of(config, params, tokens))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_scanned_and_rematerialised_variations_agree(variation, tokens, scan_layers):
    params = weights_of(variation)
    other = with_values(variation, scan_layers=scan_layers, remat="full")
    found, expected = logits_of(other, params, tokens), logits_of(variation, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 5, 1, 8))
    positions = jnp.arange(5)[None]
    scores = [
        jnp.einsum("btnh,bsnh->ts", rotate(q, positions + shift), rotate(k, positions + shift)) for shift in (0, 9)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores[0], jnp.einsum("btnh,bsnh->ts", q, k), atol=0.1)


def test_pre_norm_branches_start_smaller():
    config = ModelConfig(num_layers=8, vocab_size=100, norm_position="pre", dtype="float32")
    blocks = init_params(config, jax.random.key(0))["blocks"]
    for kernel in (blocks["attention"]["out"]["kernel"], blocks["mlp_out"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02 / math.sqrt(16), rtol=0.01)
    np.testing.assert_allclose(np.std(blocks["mlp_in"]["kernel"]), 0.02, rtol=0.01)


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


def test_rms_norm_and_soft_cap_by_hand():
    norm = RMSNorm(2)
    norm.scale[...] = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), [3 / math.sqrt(12.5), 8 / math.sqrt(12.5)], rtol=1e-5)
    np.testing.assert_allclose(soft_cap(jnp.array([0.0, 5.0, -1e9]), 5.0), [0, 5 * math.tanh(1), -5], rtol=1e-6)


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
    modern = with_values(config, num_kv_heads=1, activation="swiglu")
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 10 * 8
    assert flops_per_token(modern, 4) == 6 * matrices + 2 * 12 * 8 * 4
