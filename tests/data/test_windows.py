import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.order import PERIOD
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError, UserError


@pytest.fixture(scope="session")
def open_windows(write_corpus):
    def opened(folder, sources, context_length, seed=0, weights=None):
        return RandomWindows(Corpus(write_corpus(folder, sources)), context_length, seed, weights)

    return opened


def test_windows_are_runs_of_the_stream(open_windows, tmp_path):
    windows = open_windows(tmp_path, [[60, 43]], 10)  # a shard ends inside a window
    assert windows.windows_per_epoch.tolist() == [9]
    rows = windows.examples(np.arange(9))
    assert rows.dtype == np.int32 and rows.shape == (9, 11)
    assert np.array_equal(rows, rows[:, :1] + np.arange(11))
    assert np.array_equal(rows[:, 0], windows.starts(np.arange(9)))
    assert np.array_equal(windows.example(4), rows[4])


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(0, 200), context_length=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_has_each_window_once_and_no_target_twice(
    open_windows, tmp_path_factory, tokens, context_length, seed
):
    tokens = tokens + context_length + 1
    windows = open_windows(tmp_path_factory.mktemp("w"), [[tokens]], context_length, seed)
    count = int(windows.windows_per_epoch[0])
    for epoch in range(3):
        starts = np.sort(windows.starts(epoch * count + np.arange(count)))
        offset = starts[0]
        assert 0 <= offset < context_length
        assert starts.tolist() == [offset + i * context_length for i in range(count)]
        assert starts[-1] + context_length + 1 <= tokens
        left_out = tokens - (count * context_length + 1)
        assert left_out < 2 * context_length


def test_epochs_are_cut_and_shuffled_differently(open_windows, tmp_path):
    windows = open_windows(tmp_path, [[10_000]], 16)
    count = int(windows.windows_per_epoch[0])
    epochs = windows.starts(np.arange(40 * count)).reshape(40, count)
    assert len({int(offset) for offset in epochs.min(axis=1)}) > 10
    assert abs(np.corrcoef(epochs[0], epochs[1])[0, 1]) < 0.15  # four standard deviations at 624 windows


def test_seeds_differ_and_repeat(open_windows, tmp_path):
    first, again, other = (open_windows(tmp_path / n, [[5000]], 16, seed) for n, seed in [("a", 1), ("b", 1), ("c", 2)])
    index = np.arange(200)
    assert np.array_equal(first.examples(index), again.examples(index))
    assert np.count_nonzero(first.starts(index) == other.starts(index)) < 10


def test_the_order_is_fixed(open_windows, tmp_path):
    # A change of these values changes what every run that is continued goes on with.
    windows = open_windows(tmp_path, [[70], [130]], 10, seed=7, weights=[2.0, 1.0])
    assert windows.starts(np.arange(12)).tolist() == [51, 147, 11, 117, 1, 107, 31, 87, 41, 187, 21, 167]


@settings(deadline=None)
@given(indices=st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_an_example_depends_on_its_index_alone(mixed, indices):
    together = mixed.examples(indices)
    for index, row in zip(indices, together, strict=True):
        assert np.array_equal(mixed.example(index), row)
        assert np.array_equal(row, row[0] + np.arange(9))


@pytest.fixture(scope="module")
def mixed(open_windows, tmp_path_factory):
    return open_windows(tmp_path_factory.mktemp("mixed"), [[300, 100], [50], [1000]], 8, weights=[1.0, 4.0, 0.5])


def test_windows_stay_in_their_source_and_sources_keep_their_share(mixed):
    starts = mixed.starts(np.arange(PERIOD))
    source = np.searchsorted([400, 450, 1450], starts, side="right")
    assert np.array_equal(source, np.searchsorted([400, 450, 1450], starts + 8, side="right"))
    assert [np.bincount(source).tolist()] == mixed.quotas.tolist()
    assert mixed.quotas.tolist() == [[round(PERIOD * share / 1100) for share in (400, 200, 500)]]
    # Each source goes through its own epochs.
    for k, count in enumerate(mixed.windows_per_epoch.tolist()):
        own = starts[source == k][: 5 * count].reshape(5, count)
        assert all(len(set(epoch)) == count for epoch in own.tolist())


def test_source_shorter_than_two_windows_gives_one_at_a_random_place(open_windows, tmp_path):
    windows = open_windows(tmp_path, [[15]], 10)
    assert windows.windows_per_epoch.tolist() == [1]
    assert set(windows.starts(np.arange(200)).tolist()) == set(range(5))


def test_source_shorter_than_a_window_is_the_users_mistake(open_windows, tmp_path):
    with pytest.raises(UserError, match=r"'source1' has 10 tokens in the train split, fewer than the 11 .*lower train"):
        open_windows(tmp_path, [[50], [10]], 10)
    assert open_windows(tmp_path, [[50], [10]], 10, weights=[1.0, 0.0]).quotas.tolist() == [[PERIOD, 0]]


def test_a_source_goes_on_where_it_stood_when_the_weights_change(open_windows, tmp_path):
    sources, changed = [[300, 100], [150]], [1.0, {0: 1.0, 20: 0.0, 130: 5.0}]
    windows = open_windows(tmp_path, sources, 8, seed=3, weights=changed)
    plain = open_windows(tmp_path, sources, 8, seed=3, weights=[1.0, 1.0])
    index = np.arange(600)
    found, expected = windows.places(index), plain.places(index)
    assert np.array_equal(windows.starts(index[:20]), plain.starts(index[:20]))  # before the change
    assert not found.sources[20:130].any()
    for k in range(2):
        ours, theirs = found.sources == k, expected.sources == k
        count = min(ours.sum(), theirs.sum())
        assert count > 100
        assert np.array_equal(found.starts[ours][:count], expected.starts[theirs][:count])
        assert np.array_equal(found.epochs[ours][:count], expected.epochs[theirs][:count])
        per_epoch = int(windows.windows_per_epoch[k])
        assert np.array_equal(found.epochs[ours], np.arange(ours.sum()) // per_epoch)


def test_a_short_source_may_have_weight_0_in_every_phase_alone(open_windows, tmp_path):
    assert open_windows(tmp_path, [[50], [10]], 10, weights=[1.0, {0: 0.0, 9: 0.0}]).quotas[:, 1].tolist() == [0, 0]
    with pytest.raises(UserError, match="'source1' has 10 tokens"):
        open_windows(tmp_path, [[50], [10]], 10, weights=[1.0, {0: 0.0, 9: 1.0}])


def test_weights_of_another_configuration_are_the_users_mistake(open_windows, tmp_path):
    with pytest.raises(UserError, match=r"lists 1 sources, the corpus was prepared from 2 \(source0, source1\)"):
        open_windows(tmp_path, [[50], [50]], 10, weights=[1.0])


def test_missing_shard_is_found_at_once(write_corpus, tmp_path):
    folder = write_corpus(tmp_path, [[50, 50]])
    (folder / "train-00-00001.tokens").unlink()
    with pytest.raises(DamagedError, match="train-00-00001"):
        RandomWindows(Corpus(folder), 10, 0)
