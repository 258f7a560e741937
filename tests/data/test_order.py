import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.data.order import PERIOD, Curriculum, Mixture, draw, make_key, permute, remaining
from gpt1_jax.errors import UserError

MILLION = 1_000_000
SEEDS = st.integers(0, 2**32 - 1)


def order(size, *key):
    return permute(np.arange(size), size, make_key(*key))


def test_keys_are_the_published_outputs_of_splitmix64():
    assert make_key(0).tolist() == [0xE220A8397B1DCDAF]
    assert make_key(1234567).tolist() == [6457827717110365317]


def test_keys_of_different_parts_differ():
    parts = list(itertools.product(range(4), range(4), range(4)))
    assert len({int(make_key(*p)[0]) for p in parts}) == len(parts)
    together = make_key(3, np.arange(4), np.arange(4)[:, None])
    assert together.tolist() == [[int(make_key(3, source, epoch)[0]) for source in range(4)] for epoch in range(4)]


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size, seed, epoch):
    assert np.array_equal(np.sort(order(size, seed, epoch)), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**62), seed=SEEDS, data=st.data())
def test_permutation_of_a_huge_range_stays_in_it_without_collisions(size, seed, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    place = permute(index, size, make_key(seed))
    assert place.dtype == np.int64
    assert place.min() >= 0 and place.max() < size
    assert len(set(place.tolist())) == len(index)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10**15), min_size=1, max_size=20), seed=SEEDS)
def test_indices_of_many_permutations_at_once_give_what_each_gives_alone(sizes, seed):
    index = [size // 2 for size in sizes]
    key = make_key(seed, np.arange(len(sizes)))
    alone = [int(permute(i, size, k)[0]) for i, size, k in zip(index, sizes, key, strict=True)]
    assert permute(index, sizes, key).tolist() == alone


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5))
def test_what_remains_is_all_but_what_is_left_out_part_after_part(parts):
    left_out = [(first, first + count) for first, count in parts]
    left = list(range(200))
    for first, stop in left_out:
        del left[first:stop]
    assert remaining(np.arange(100), left_out).tolist() == left[:100]


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize("size", [MILLION, 2**20, 999_983])
def test_order_of_a_million_is_uncorrelated_with_itself_at_any_lag(size):
    x = order(size, 1, 2) - (size - 1) / 2
    spectrum = np.abs(np.fft.rfft(x, 2 * size)) ** 2
    autocorrelation = np.fft.irfft(spectrum)[: 4096 + 1]
    autocorrelation /= autocorrelation[0]
    assert np.abs(autocorrelation[1:]).max() < 0.01
    assert abs(correlation(x, np.arange(size))) < 0.01


def test_epochs_seeds_and_sources_are_uncorrelated():
    orders = [order(MILLION, *key) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]]
    for a, b in itertools.combinations(orders, 2):
        assert abs(correlation(a, b)) < 0.01
        assert np.count_nonzero(a == b) < 20  # a Poisson variable of mean 1


@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_every_place_is_as_likely_as_any_other_in_a_small_permutation(size):
    keys = 20_000
    places = permute(np.arange(size)[:, None], size, make_key(5, np.arange(keys)))
    for row in places:
        counts = np.bincount(row, minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
        assert chi_square < 35  # at 9 degrees of freedom, exceeded once in 10,000


def test_all_permutations_of_three_occur():
    places = permute(np.arange(3)[:, None], 3, make_key(0, np.arange(600)))
    counts = Counter(map(tuple, places.T.tolist()))
    assert len(counts) == 6 and min(counts.values()) > 60


def test_draw_is_uniform_and_below_its_bound():
    drawn = draw(make_key(0, np.arange(100_000)), 10)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=10)
    assert counts.size == 10 and np.abs(counts - 10_000).max() < 500


def test_mixture_by_hand():
    mixture = Mixture([1.0, 3.0], [100, 100], ["a", "b"])
    assert mixture.quotas.tolist() == [PERIOD // 4, PERIOD * 3 // 4]
    source, drawn = mixture.locate(np.arange(8))
    # Source 1 belongs at 1/6, 3/6, 5/6 of each quarter and source 0 in its middle; a tie goes to the first.
    assert source.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert drawn.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]


def test_mixture_follows_weight_times_tokens():
    assert Mixture([2.0, 1.0, 0.0], [10, 60, 5], ["a", "b", "c"]).quotas.tolist() == [PERIOD // 4, PERIOD * 3 // 4, 0]


MIXTURES = st.lists(st.tuples(st.integers(1, 50), st.integers(100, 10_000)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(sources=MIXTURES)
def test_mixture_is_exact_and_even(sources):
    weights, tokens = zip(*sources, strict=True)
    mixture = Mixture(weights, tokens, ["x"] * len(sources))
    total = sum(w * t for w, t in sources)
    exact = np.array([float(Fraction(w * t * PERIOD, total)) for w, t in sources])
    assert mixture.quotas.sum() == PERIOD
    assert np.abs(mixture.quotas - exact).max() < 1
    source, drawn = mixture.locate(np.arange(2 * PERIOD))
    seen = np.cumsum(source[:, None] == np.arange(len(sources)), axis=0)
    # The n-th example of a source is its n-th, without gaps, over the end of a period.
    assert np.array_equal(drawn, seen[np.arange(2 * PERIOD), source] - 1)
    share = np.outer(np.arange(1, 2 * PERIOD + 1), mixture.quotas / PERIOD)
    assert np.abs(seen - share).max() <= len(sources)


def test_mixture_is_right_at_ten_to_the_fifteenth():
    mixture = Mixture([1.0, 1.0], [1, 3], ["a", "b"])
    far = 10**15 // PERIOD
    source, drawn = mixture.locate(far * PERIOD + np.arange(4))
    assert source.tolist() == [1, 0, 1, 1]
    before = [far * PERIOD // 4, far * PERIOD * 3 // 4]
    assert drawn.tolist() == [before[1], before[0], before[1] + 1, before[1] + 2]


def test_weight_too_small_is_named():
    with pytest.raises(UserError, match=r"data\.sources\.1\.weight=1e-09 is too small.*'b' \(100 tokens\).*raise"):
        Mixture([1.0, 1e-9], [100, 100], ["a", "b"])
    with pytest.raises(UserError, match="weight 0"):
        Mixture([0.0], [100], ["a"])


def test_what_a_mixture_has_drawn_is_what_it_has_located():
    mixture = Mixture([1.0, 2.5, 0.0, 1.0], [100, 70, 10, 33], ["x"] * 4)
    source, _ = mixture.locate(np.arange(2 * PERIOD + 50))
    for examples in (0, 1, 7, PERIOD - 1, PERIOD, PERIOD + 1, 2 * PERIOD + 50):
        assert mixture.drawn(examples).tolist() == np.bincount(source[:examples], minlength=4).tolist()
    assert mixture.drawn(PERIOD * 10**10).tolist() == (mixture.quotas * 10**10).tolist()


@settings(deadline=None, max_examples=20)
@given(sources=MIXTURES, far=st.integers(0, 10**15))
def test_a_curriculum_of_one_phase_is_its_mixture(sources, far):
    weights, tokens = zip(*sources, strict=True)
    names = ["x"] * len(sources)
    index = np.concatenate([np.arange(500), far + np.arange(500)])
    expected = Mixture(weights, tokens, names).locate(index)
    for schedule in (weights, [{0: weight} for weight in weights]):
        found = Curriculum(schedule, tokens, names).locate(index)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


SCHEDULES = st.dictionaries(st.integers(1, 3 * PERIOD // 2), st.sampled_from([0, 0.5, 1, 3]), max_size=3)


@settings(deadline=None, max_examples=15)
@given(sources=st.lists(st.tuples(SCHEDULES, st.integers(100, 1000)), min_size=1, max_size=4))
def test_each_source_goes_through_all_its_examples_across_the_phases(sources):
    # The first source is never without weight, so that there is something to draw in every phase.
    weights = [{0: 1.0} | {at: weight or (k == 0) for at, weight in w.items()} for k, (w, _) in enumerate(sources)]
    tokens = [count for _, count in sources]
    curriculum = Curriculum(weights, tokens, ["x"] * len(sources))
    count = 2 * PERIOD
    source, drawn = curriculum.locate(np.arange(count))
    for k in range(len(sources)):
        assert np.array_equal(drawn[source == k], np.arange((source == k).sum()))  # brute force: one after another
    # In each phase the sources are those of a mixture of its own, from its beginning.
    bounds = [*sorted({at for weight in weights for at in weight}), count]
    for phase, (begin, end) in enumerate(itertools.pairwise(bounds)):
        now = [weight[max(at for at in weight if at <= begin)] for weight in weights]
        alone = Mixture(now, tokens, ["x"] * len(sources))
        assert curriculum.quotas[phase].tolist() == alone.quotas.tolist()
        assert np.array_equal(source[begin:end], alone.locate(np.arange(end - begin))[0])
    shuffled = np.random.default_rng(0).permutation(count)[:1000]
    assert np.array_equal(curriculum.locate(shuffled), [source[shuffled], drawn[shuffled]])


def test_a_curriculum_by_hand():
    # Equal halves, then the second alone, then three quarters of the first.
    curriculum = Curriculum([{0: 1.0, 4: 0.0, 6: 3.0}, 1.0], [10, 10], ["a", "b"])
    source, drawn = curriculum.locate(np.arange(14))
    assert source.tolist() == [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert drawn.tolist() == [0, 0, 1, 1, 2, 3, 2, 3, 4, 4, 5, 6, 5, 7]
    far = 6 + 10**10 * PERIOD
    source, drawn = curriculum.locate(far + np.array([0, 2]))
    assert source.tolist() == [0, 1]
    assert drawn.tolist() == [2 + 10**10 * PERIOD * 3 // 4, 4 + 10**10 * PERIOD // 4]


def test_a_weight_that_is_too_small_in_one_phase_is_named():
    with pytest.raises(UserError, match=r"data\.sources\.1\.weight=1e-09 is too small"):
        Curriculum([1.0, {0: 1.0, 500: 1e-9}], [100, 100], ["a", "b"])
