"""The order of examples: epochs are permutations, padding is little, and no host changes anything."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gpt1_jax.data.loader import Batches, global_batch
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.order import EpochOrder
from gpt1_jax.model.sharding import batch_sharding


@pytest.fixture(scope="module")
def numbered(dataset_of):
    """Makes so many examples that say their number: example n is ``[n, 0, ...]``, n % 13 + 2 tokens."""
    return lambda size: dataset_of([[[n] + [0] * (n % 13 + 1)] for n in range(size)])


def batches(order, batch_size, steps):
    return [order.examples(np.arange(step * batch_size, (step + 1) * batch_size)) for step in steps]


def numbers(order, batch_size, steps):
    return [batch.tokens_BKT[:, 0, 0].tolist() for batch in batches(order, batch_size, steps)]


def flat(lists):
    return [item for inner in lists for item in inner]


@pytest.mark.parametrize(("size", "batch_size"), [(64, 8), (67, 8), (15, 8), (1000, 3)])
def test_every_epoch_is_a_permutation_without_its_remainder(numbered, size, batch_size):
    order = EpochOrder(numbered(size), batch_size, seed=0, context_length=16)
    steps = size // batch_size
    assert order.steps_per_epoch == steps
    epochs = [flat(numbers(order, batch_size, range(e * steps, (e + 1) * steps))) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * batch_size and set(epoch) <= set(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    if size % batch_size:
        assert len({frozenset(range(size)) - frozenset(epoch) for epoch in epochs}) > 1  # not always the same ones


def test_seeds_differ_and_equal_seeds_do_not(numbered):
    dataset = numbered(64)
    found = [flat(numbers(EpochOrder(dataset, 8, seed, 16), 8, range(8))) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len({tuple(order) for order in found}) == 3


def test_position_alone_decides(numbered):
    """A run that goes on in its third epoch reads what it would have read."""
    dataset = numbered(67)
    order, later = EpochOrder(dataset, 8, 5, 16), EpochOrder(dataset, 8, 5, 16)
    assert numbers(order, 8, range(40))[18:] == numbers(later, 8, range(18, 40))
    assert numbers(later, 8, reversed(range(40))) == numbers(order, 8, range(40))[::-1]


def test_any_part_of_a_batch_is_that_part(random_dataset):
    order = EpochOrder(random_dataset(50, (2, 3)), 8, 0, 16)
    (whole,) = batches(order, 8, [9])
    for first, last in ((0, 2), (2, 4), (4, 8), (7, 8)):
        for all_rows, rows in zip(whole, order.examples(np.arange(72 + first, 72 + last)), strict=True):
            np.testing.assert_array_equal(all_rows[first:last], rows)


def test_the_loader_gives_the_same_batches(random_dataset):
    order = EpochOrder(random_dataset(50), 8, 0, 16)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("slices", "data", "fsdp"))
    with Batches(order, 8, batch_sharding(mesh), position=16) as loader:
        for step in range(2, 9):
            position, batch = next(loader)
            assert position == step * 8
            for expected, array in zip(*batches(order, 8, [step]), batch, strict=True):
                np.testing.assert_array_equal(expected, array)
    (whole,) = batches(order, 8, [3])
    jax.tree.map(np.testing.assert_array_equal, whole, global_batch(order, 24, 8, batch_sharding(mesh)))


def test_little_is_padding_and_batches_are_in_no_order_of_length(random_dataset):
    dataset = random_dataset(4000, longest=500, typical=40)
    order = EpochOrder(dataset, 8, 0, 512)
    found = batches(order, 8, range(order.steps_per_epoch))
    widths = np.array([batch.tokens_BKT.shape[2] for batch in found])
    lengths = np.array([batch.last_BK.max() + 1 for batch in found])
    tokens = dataset.tokens_N.sum()
    in_one_width = dataset.lengths_N.max() * len(dataset)
    assert tokens / (8 * widths.sum()) > 0.65 and tokens / in_one_width < 0.4
    # Correlation of a batch's length with its place, and with that of the batch before it: random ones are near 0.
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.15
    assert abs(np.corrcoef(lengths[1:], lengths[:-1])[0, 1]) < 0.15


def test_tokens_are_counted_exactly(random_dataset):
    order = EpochOrder(random_dataset(37, (2, 3)), 5, 3, 16)
    counted = 0
    assert order.tokens(0) == 0
    for step in range(40):  # more epochs than are held at once
        (batch,) = batches(order, 5, [step])
        counted += int((batch.last_BK + 1).sum())
        assert order.tokens(5 * (step + 1)) == counted


def test_fewer_examples_than_a_batch_are_refused(numbered):
    assert EpochOrder(numbered(8), 8, 0, 16).steps_per_epoch == 1
    with pytest.raises(UserError, match=r"train.batch_size=8: task.train has 7 examples, fewer than a batch; lower it"):
        EpochOrder(numbered(7), 8, 0, 16)
