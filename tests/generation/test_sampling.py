import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.errors import UserError
from gpt1_jax.generation.sampling import GREEDY, Sampling, candidates, sample

# Probabilities 0.15, 0.5, 0.05, 0.3 of four tokens.
LOGITS = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))


def kept(top_k: int | None = None, top_p: float = 1.0) -> list[int]:
    logits, tokens = candidates(LOGITS, Sampling(top_k=top_k, top_p=top_p))
    return tokens[jnp.isfinite(logits)].tolist()


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def test_top_k_keeps_the_likeliest_in_order():
    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 3, 0]
    assert kept(top_k=99) == [1, 3, 0, 2]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.49) == [1]
    assert kept(top_p=0.51) == [1, 3]
    assert kept(top_p=0.79) == [1, 3]
    assert kept(top_p=0.81) == [1, 3, 0]
    assert kept(top_p=0.96) == [1, 3, 0, 2]


def test_top_p_is_taken_of_what_top_k_leaves():
    # 0.5 and 0.3 become 0.625 and 0.375.
    assert kept(top_k=2, top_p=0.62) == [1]
    assert kept(top_k=2, top_p=0.63) == [1, 3]


def test_equal_logits_leave_the_lowest_id():
    logits, tokens = candidates(jnp.zeros((1, 5)), Sampling(top_k=1, top_p=0.1))
    assert tokens.tolist() == [[0]] and jnp.isfinite(logits).all()


def test_greedy_is_top_k_1_is_tiny_temperature():
    logits = jax.random.normal(jax.random.key(3), (64, 97)) * 5
    best = np.argmax(logits, axis=-1)
    for sampling in [GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-30)]:
        np.testing.assert_array_equal(sample(logits, keys(64), sampling), best)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.15, 0.5, 0.05, 0.3]),
        # Probabilities to the power 1 / temperature: squares over their sum, 0.365.
        (Sampling(temperature=0.5), [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        (Sampling(top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(top_p=0.9), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    ],
)
def test_frequencies_are_the_probabilities(sampling, expected):
    count = 20_000
    drawn = sample(jnp.tile(LOGITS, (count, 1)), keys(count), sampling)
    frequencies = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / count**0.5)  # four standard deviations
    assert (frequencies[np.array(expected) == 0] == 0).all()


def test_the_setting_that_keeps_all_draws_the_same_tokens():
    logits = jax.random.normal(jax.random.key(1), (256, 97))
    np.testing.assert_array_equal(
        sample(logits, keys(256), Sampling()), sample(logits, keys(256), Sampling(top_k=97, top_p=1.0))
    )


def test_rows_draw_by_their_own_keys():
    logits = jnp.zeros((8, 97))
    together = sample(logits, keys(8), Sampling())
    alone = [sample(logits[:1], keys(8)[i : i + 1], Sampling())[0] for i in range(8)]
    assert together.tolist() == [int(token) for token in alone]
    assert len(set(together.tolist())) > 1


def test_every_bad_setting_is_named():
    with pytest.raises(UserError) as error:
        Sampling(temperature=-1, top_k=0, top_p=1.5)
    for text in ["temperature=-1", "top_k=0", "top_p=1.5"]:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_k": -3}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)
