import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.model.dropout import DropoutKey, dropout

KEY = DropoutKey(jax.random.key(0))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_share_scale_and_mean(rate):
    x = jnp.ones((500, 2001))
    y = np.asarray(dropout(x, rate, KEY))
    dropped = (y == 0).mean()
    assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=2e-4)


def test_no_key_and_no_rate_change_nothing():
    x = jnp.arange(5.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x


def test_keys_and_neighbours_are_independent():
    masks = [np.asarray(dropout(jnp.ones((300, 301)), 0.5, DropoutKey(jax.random.key(k)))) - 1 for k in range(2)]
    size = masks[0].size
    assert abs((masks[0] * masks[1]).sum()) < 5 * np.sqrt(size)
    for shift in (1, 2, 3, 4, 301, 602):
        flat = masks[0].ravel()
        assert abs((flat[shift:] * flat[:-shift]).sum()) < 5 * np.sqrt(size), shift


def test_bits_do_not_depend_on_the_layout():
    # A vmapped or sliced computation of the same key gives the same bits; layouts on devices are tested with the step.
    x = jnp.ones((4, 8))
    jitted = jax.jit(lambda x, key: dropout(x, 0.5, key))
    np.testing.assert_array_equal(
        jitted(x, DropoutKey(jax.random.key(7))), dropout(x, 0.5, DropoutKey(jax.random.key(7)))
    )


def test_gradient_passes_where_the_value_does():
    x, key = jnp.full((64,), 2.0), DropoutKey(jax.random.key(1))
    y, grad = dropout(x, 0.3, key), jax.grad(lambda x: dropout(x, 0.3, key).sum())(x)
    np.testing.assert_allclose(grad, y / 2, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_at_hand_have_the_masks_of_their_places_in_the_batch(rows):
    x = jnp.ones((6, 3, 40))
    whole = dropout(x, 0.5, KEY)
    for first in range(0, 6, rows):
        part = dropout(x[first : first + rows], 0.5, DropoutKey(KEY.key, first))
        np.testing.assert_array_equal(part, whole[first : first + rows])
