"""What each objective lets a model read, see and predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.objective import Task, make_task, prefix_mask

B, T, VOCAB = 400, 50, 97
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, T + 1), dtype=np.int32)


def task_of(objective: str, seed: int = 0) -> Task:
    config = ModelConfig(vocab_size=VOCAB, context_length=T, objective=objective, dtype="float32")
    return make_task(config, jnp.asarray(TOKENS), jax.random.key(seed))


@pytest.mark.parametrize("objective", ["causal", "masked", "prefix"])
def test_the_weights_are_equal_and_sum_to_one(objective):
    weights = np.asarray(task_of(objective).weights_BT)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert len(np.unique(weights[weights > 0])) == 1


def test_causal_predicts_every_next_token():
    task = task_of("causal")
    np.testing.assert_array_equal(task.inputs_BT, TOKENS[:, :-1])
    np.testing.assert_array_equal(task.targets_BT, TOKENS[:, 1:])
    assert task.mask_BTS is None and (np.asarray(task.weights_BT) > 0).all()


def test_masked_predicts_15_percent_of_which_80_are_hidden_and_10_replaced():
    task = task_of("masked")
    inputs, targets, chosen = (np.asarray(x) for x in (task.inputs_BT, task.targets_BT, task.weights_BT > 0))
    np.testing.assert_array_equal(targets, TOKENS[:, 1:])
    np.testing.assert_array_equal(inputs[~chosen], targets[~chosen])  # what is not predicted is read as it is
    count = chosen.sum()
    assert abs(chosen.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / chosen.size)
    for share, found in (
        (0.8, inputs[chosen] == VOCAB),
        (0.1 + 0.1 / VOCAB, inputs[chosen] == targets[chosen]),
        (0.1 * (1 - 1 / VOCAB), (inputs[chosen] != VOCAB) & (inputs[chosen] != targets[chosen])),
    ):
        assert abs(found.mean() - share) < 4 * np.sqrt(share * (1 - share) / count)
    assert (inputs[~chosen] < VOCAB).all()


def test_masked_draws_anew_for_every_key_and_row():
    first, again, other = (np.asarray(task_of("masked", seed).inputs_BT) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    hidden = first == VOCAB
    assert len(np.unique(hidden, axis=0)) == B


def test_prefix_predicts_what_the_prefix_does_not_show():
    task = task_of("prefix")
    mask, predicted = np.asarray(task.mask_BTS), np.asarray(task.weights_BT) > 0
    np.testing.assert_array_equal(task.inputs_BT, TOKENS[:, :-1])
    lengths = set()
    for row in range(B):
        prefix = int(mask[row, 0].sum())  # the first query sees the prefix, or itself alone
        lengths.add(prefix)
        for query in range(T):
            np.testing.assert_array_equal(np.flatnonzero(mask[row, query]), np.arange(max(prefix, query + 1)))
            # Position t predicts token t + 1, which must lie behind the prefix.
            assert predicted[row, query] == (query + 1 >= prefix)
    assert min(lengths) == 1 and max(lengths) == T - 1 and len(lengths) > T // 2


def test_no_prediction_sees_its_own_answer():
    """Of any objective: with another target at one place, what its own prediction reads and sees stays the same."""
    for objective in ("masked", "prefix"):
        task = task_of(objective)
        predicted = np.asarray(task.weights_BT) > 0
        if objective == "prefix":
            seen = np.asarray(task.mask_BTS)[:, :, 1:][:, np.arange(T - 1), np.arange(T - 1)]
            assert not (seen & predicted[:, :-1]).any()  # the key at t + 1 is the answer of query t
        else:
            read_as_is = (np.asarray(task.inputs_BT) == np.asarray(task.targets_BT)) & predicted
            assert read_as_is.sum() / predicted.sum() < 0.2


def test_prefix_mask_by_hand():
    expected = [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(prefix_mask(jnp.array([2]), 3)[0], np.array(expected, bool))
