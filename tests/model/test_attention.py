"""Causal attention in blocks against plain attention with a mask; and the bfloat16 paths of the products on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.model import causal_attention as blocked
from gpt1_jax.model.attention import dot_product_attention
from gpt1_jax.model.causal_attention import causal_attention
from gpt1_jax.model.cross_entropy import cross_entropy
from gpt1_jax.model.dropout import DropoutKey, dropout, seed_of
from gpt1_jax.model.products import affine, product
from gpt1_jax.model.segments import document_starts, same_document

BLOCK = 8
LENGTHS = [1, 5, 8, 16, 19]  # below a block, one block, two, and not a multiple
BFLOAT16 = 2.0**-8  # its relative rounding


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_QUERIES", BLOCK)


def operands(length: int, batch: int = 2, heads: int = 3) -> list[jax.Array]:
    """Queries, keys, values and a cotangent, [B, T, N, H]."""
    return [jax.random.normal(key, (batch, length, heads, 4)) for key in jax.random.split(jax.random.key(0), 4)]


def with_gradients(
    dtype: str, length: int, rate: float, masked: bool, batch: int = 2, packed: bool = False
) -> list[np.ndarray]:
    """The attended values and the gradients of queries, keys and values, float32."""
    *inputs, cotangent = (x.astype(dtype) for x in operands(length, batch))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length)) if masked else None
    starts = None
    if packed:
        starts = document_starts(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 0)
        if mask is not None:
            starts, mask = None, mask & same_document(starts)
    key = DropoutKey(jax.random.key(7)) if rate else None

    def attend(*inputs: jax.Array) -> jax.Array:
        return dot_product_attention(*inputs, mask_BTS=mask, starts_BT=starts, dropout_rate=rate, dropout_key=key)

    @jax.jit
    def both(cotangent: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        value, pull = jax.vjp(attend, *inputs)
        return value, *pull(cotangent)

    results = both(cotangent, *inputs)
    assert all(result.dtype == dtype for result in results)
    return [np.asarray(result, np.float32) for result in results]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_equal_the_explicit_mask(length, rate, packed):
    found = with_gradients("float32", length, rate, masked=False, packed=packed)
    expected = with_gradients("float32", length, rate, masked=True, packed=packed)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("length", "rate", "batch"), [(1, 0.0, 2), (8, 0.0, 2), (19, 0.0, 2), (5, 0.3, 1), (19, 0.3, 1), (19, 0.3, 3)]
)
def test_bfloat16_is_within_its_rounding_of_float32(length, rate, batch):
    found = with_gradients("bfloat16", length, rate, masked=False, batch=batch)
    expected = with_gradients("float32", length, rate, masked=True, batch=batch)
    for a, b in zip(found, expected, strict=True):
        # A gradient of scores is a difference of sums of four products, each rounded, of operands of size 1.
        assert np.abs(a - b).max() <= BFLOAT16 * max(8, 4 * np.abs(b).max())


def test_the_first_query_sees_itself_alone_and_the_last_sees_all():
    q, k, v, _ = operands(19)
    found = dot_product_attention(jnp.zeros_like(q), k, v)  # equal scores: the mean of what is seen
    np.testing.assert_allclose(found[:, 0], v[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found[:, -1], v.mean(1), rtol=1e-5, atol=1e-6)


def test_large_scores_stay_finite():
    q, k, v, _ = operands(19)
    value, grads = jax.value_and_grad(lambda q: dot_product_attention(q, 1e4 * k, v).sum())(1e4 * q)
    assert np.isfinite(value) and np.isfinite(grads).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_blocks_dropout_is_that_of_the_whole(length):
    # Equal scores and one-hot values: the output is the matrix of probabilities itself, dropped and scaled.
    batch, heads, rate, key = 2, 3, 0.4, DropoutKey(jax.random.key(3))
    zeros = jnp.zeros((batch, heads, length, length))
    one_hot = jnp.broadcast_to(jnp.eye(length), zeros.shape)
    found = causal_attention(zeros, zeros, one_hot, seed_of(key), rate)
    probs = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None]
    expected = dropout(jnp.broadcast_to(probs, zeros.shape), rate, key)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found) == 0, np.asarray(expected) == 0)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (5,)), ((6,), (2, 3)), ((2, 3), (5,))])
def test_affine_in_bfloat16(batch, inputs, outputs):
    keys = jax.random.split(jax.random.key(1), 4)
    x, g = (jax.random.normal(key, (batch, 10, *size)) for key, size in zip(keys, (inputs, outputs), strict=False))
    kernel, bias = jax.random.normal(keys[2], (*inputs, *outputs)), jax.random.normal(keys[3], outputs)
    axes = tuple("abc"[: kernel.ndim])
    expected, pull = jax.vjp(lambda x, w, b: jnp.tensordot(x, w, len(inputs)) + b, x, kernel, bias)
    found, pull_found = jax.vjp(jax.jit(lambda *operands: affine(*operands, axes)), x.astype("bfloat16"), kernel, bias)
    assert found.dtype == "bfloat16"
    grads = jax.jit(pull_found)(g.astype("bfloat16"))
    assert [grad.dtype for grad in grads] == ["bfloat16", "float32", "float32"]
    for a, b in zip([found, *grads], [expected, *pull(g)], strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() <= 4 * BFLOAT16 * np.abs(b).max()


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (5,)), ((6,), (2, 3)), ((2, 3), (5,))])
def test_the_products_of_other_platforms_equal_those_of_the_cpu(inputs, outputs, monkeypatch):
    keys = jax.random.split(jax.random.key(1), 4)
    x, g = (jax.random.normal(key, (2, 10, *size)) for key, size in zip(keys, (inputs, outputs), strict=False))
    kernel, bias = jax.random.normal(keys[2], (*inputs, *outputs)), jax.random.normal(keys[3], outputs)
    axes = tuple("abc"[: kernel.ndim])

    def results() -> list[jax.Array]:
        y, pull = jax.vjp(lambda *operands: affine(*operands, axes), x, kernel, bias)
        return [y, *pull(g)]

    expected = results()
    choose = lambda *operands, default, tpu=None, cpu=None: (tpu or default)(*operands)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    for a, b in zip(results(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_product_in_bfloat16_sums_in_float32(batch):
    x, y = jax.random.normal(jax.random.key(1), (batch, 10, 6)), jax.random.normal(jax.random.key(2), (7, 6))
    g = jax.random.normal(jax.random.key(3), (batch, 10, 7))
    expected, pull = jax.vjp(lambda x, y: jnp.einsum("btd,vd->btv", x, y), x, y)
    found, pull_found = jax.vjp(jax.jit(lambda x, y: product("BTD,VD->BTV", x, y)), x.astype("bfloat16"), y)
    grads = jax.jit(pull_found)(g)
    assert [a.dtype for a in (found, *grads)] == ["float32", "bfloat16", "float32"]
    for a, b in zip([found, *grads], [expected, *pull(g)], strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() <= 4 * BFLOAT16 * np.abs(b).max()


@pytest.mark.parametrize("chunk", [4, 10])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_cross_entropy_in_bfloat16(batch, chunk):
    keys = jax.random.split(jax.random.key(4), 4)
    x, table = jax.random.normal(keys[0], (batch, 10, 8)), jax.random.normal(keys[1], (29, 8))
    targets, weights = jax.random.randint(keys[2], (batch, 10), 0, 29), jax.random.uniform(keys[3], (batch, 10))
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda x, table: cross_entropy(x, table, targets, weights, chunk), argnums=(0, 1))
    )
    expected, expected_grads = value_and_grad(x, table)
    found, grads = value_and_grad(x.astype("bfloat16"), table)
    assert [a.dtype for a in (found, *grads)] == ["float32", "bfloat16", "float32"]
    np.testing.assert_allclose(found, expected, rtol=4 * BFLOAT16)
    for a, b in zip(grads, expected_grads, strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() <= 4 * BFLOAT16 * np.abs(b).max()
