import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.model.cross_entropy import cross_entropy, token_nats

B, T, D, V = 3, 10, 8, 29


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, D))
    table = jax.random.normal(keys[1], (V, D))
    return x, table, jax.random.randint(keys[2], (B, T), 0, V), jax.random.uniform(keys[3], (B, T))


def plain(
    x: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, cap: float | None = None
) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", x, table)
    log_probs = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
    return -(jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * weights).sum()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 99])
def test_value_and_gradients_equal_the_plain_loss(inputs, chunk, cap):
    x, table, targets, weights = inputs
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1, 3))(x, table, targets, weights, cap)
    loss = lambda x, table, weights: 3 * cross_entropy(x, table, targets, weights, chunk, cap)  # noqa: E731
    found, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, table, weights)
    np.testing.assert_allclose(found, 3 * expected, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, 3 * expected_grad, rtol=1e-5, atol=1e-5)


def test_value_without_gradient_is_the_same(inputs):
    x, table, targets, weights = inputs
    np.testing.assert_allclose(cross_entropy(x, table, targets, weights, 4), plain(*inputs), rtol=1e-6)


def test_by_hand():
    # One position, two tokens: logits 0 and ln 3, so the probabilities are 1/4 and 3/4.
    x, table = jnp.ones((1, 1, 1)), jnp.array([[0.0], [np.log(3.0)]])
    for target, probability in ((0, 0.25), (1, 0.75)):
        nats = token_nats(x, table, jnp.array([[target]]), 1)
        np.testing.assert_allclose(nats, [[-np.log(probability)]], rtol=1e-6)


def test_the_logits_of_a_whole_batch_never_exist():
    # The largest array that the compiled gradient holds is a chunk of logits, not all of them.
    batch, length, width, vocab, chunk = 4, 64, 16, 4000, 8
    x, table = jnp.zeros((batch, length, width)), jnp.zeros((vocab, width))
    targets, weights = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length))
    grad = jax.jit(jax.grad(lambda x, w: cross_entropy(x, w, targets, weights, chunk), argnums=(0, 1)))
    memory = grad.lower(x, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < batch * length * vocab * 4


def test_large_logits_stay_finite():
    x, table = jnp.full((1, 1, 1), 1e4), jnp.array([[1.0], [-1.0]])
    loss, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(x, table, jnp.array([[1]]), jnp.ones((1, 1)), 1)
    np.testing.assert_allclose(loss, 2e4)
    assert all(np.isfinite(grad).all() for grad in grads)
