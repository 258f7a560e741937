"""Batches in numbers made by hand."""

import numpy as np
import pytest

from gpt1_jax.finetuning.dataset import Dataset, width_for
from gpt1_jax.finetuning.forms import Encoded


@pytest.fixture(scope="module")
def two(dataset_of):
    """An example of two sequences, and one of three."""
    return dataset_of([[[5, 6, 7], [8, 9]], [[1, 2], [3, 4], [5, 6, 7, 8, 9]]], labels=[1.0, 2.0])


def test_what_is_kept(two):
    assert (len(two), two.choices, two.truncated) == (2, 3, 0)
    assert two.labels_N.tolist() == [1.0, 2.0] and two.labels_N.dtype == np.float32
    assert two.lengths_N.tolist() == [3, 5] and two.tokens_N.tolist() == [5, 9]
    assert [s.tolist() for s in two.sequences(0)] == [[5, 6, 7], [8, 9]]
    assert [s.tolist() for s in two.sequences(1)] == [[1, 2], [3, 4], [5, 6, 7, 8, 9]]


def test_a_batch_by_hand(two):
    batch = two.batch([1, -1, 0], width=6, size=3)
    assert batch.tokens_BKT.tolist() == [
        [[1, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0]],
        [[0] * 6] * 3,
        [[5, 6, 7, 0, 0, 0], [8, 9, 0, 0, 0, 0], [0] * 6],
    ]
    third = 1 / 9  # of three sequences, of three examples
    np.testing.assert_allclose(
        batch.weights_BKT,
        [
            [[0, third, 0, 0, 0, 0], [0, third, 0, 0, 0, 0], [0, *[third / 4] * 4, 0]],
            [[0] * 6] * 3,
            [[0, 1 / 12, 1 / 12, 0, 0, 0], [0, 1 / 6, 0, 0, 0, 0], [0] * 6],
        ],
        rtol=1e-6,
    )
    assert batch.last_BK.tolist() == [[1, 1, 4], [-1, -1, -1], [2, 1, -1]]
    assert batch.labels_B.tolist() == [2.0, 0.0, 1.0]
    np.testing.assert_allclose(batch.shares_B, [1 / 3, 0, 1 / 3], rtol=1e-6)
    dtypes = [np.int32, np.float32, np.int32, np.float32, np.float32]
    assert [array.dtype for array in batch] == dtypes


@pytest.mark.parametrize("choices", [(1,), (2,), (2, 5, 3)])
def test_weights_and_shares_of_a_batch_sum_to_one(random_dataset, choices):
    dataset = random_dataset(40, choices)
    batch = dataset.batch(np.arange(32), width=16, size=32)
    assert abs(batch.weights_BKT.astype(np.float64).sum() - 1) < 1e-6
    assert abs(batch.shares_B.astype(np.float64).sum() - 1) < 1e-6
    np.testing.assert_allclose(batch.weights_BKT.sum((1, 2)), 1 / 32, rtol=1e-5)  # each example alike, however long
    assert (batch.weights_BKT[:, :, 0] == 0).all()  # nothing is before the first token


def test_of_an_example_with_nothing_to_learn_the_weights_are_zero():
    filled = Encoded((np.array([1, 2, 3], np.int32),), (np.zeros(3, bool),), 0.0, True)
    batch = Dataset([filled]).batch([0], width=16, size=1)
    assert not batch.weights_BKT.any() and batch.tokens_BKT[0, 0, :3].tolist() == [1, 2, 3]


def test_rows_do_not_depend_on_what_stands_beside_them(random_dataset):
    dataset = random_dataset(20, (2, 3))
    whole = dataset.batch(np.arange(20), 16, 20)
    for part in (np.arange(5, 10), np.array([19, 3])):
        for all_rows, rows in zip(whole, dataset.batch(part, 16, 20), strict=True):
            np.testing.assert_array_equal(all_rows[part], rows)


def test_the_fingerprint_is_of_everything(dataset_of):
    same = [dataset_of([[[1, 2], [3]]], [1.0]).fingerprint for _ in range(2)]
    others = [
        dataset_of([[[1, 2], [4]]], [1.0]),
        dataset_of([[[1, 2], [3]]], [0.0]),
        dataset_of([[[1], [2, 3]]], [1.0]),
        dataset_of([[[1, 2]], [[3]]], [1.0, 1.0]),
        Dataset([Encoded((np.array([1, 2], np.int32), np.array([3], np.int32)), (np.ones(2, bool),) * 2, 1.0, False)]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *(other.fingerprint for other in others)}) == 6


def test_widths_are_few_and_near():
    widths = [width_for(length, 512) for length in range(1, 513)]
    assert sorted(set(widths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(width >= length for length, width in enumerate(widths, 1))
    assert all(width < 1.5 * length + 1 for length, width in enumerate(widths[16:], 17))
    assert [width_for(length, 400) for length in (384, 385, 400)] == [384, 400, 400]  # the context is the widest
    assert width_for(3, 8) == 8
