"""Seconds by hand: bytes over the bandwidth of the links that the group has."""

import itertools

import pytest

from gpt1_jax.planning.network import link_seconds, slice_seconds
from gpt1_jax.planning.topologies import parse_slice

GB = 10**9


def chips(*lengths: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, lengths), *([[0]] if len(lengths) == 2 else [])))


@pytest.mark.parametrize(
    ("kind", "name", "group", "seconds"),
    [
        # Two dimensions, no rings: 2 links of 50 GB/s.
        ("all-gather", "v5e:4x4", chips(4, 4), 15 / 16 / 100),
        ("reduce-scatter", "v5e:4x4", chips(4, 4), 15 / 16 / 100),
        ("all-reduce", "v5e:4x4", chips(4, 4), 2 * 15 / 16 / 100),
        # One row of the slice: 1 link.
        ("all-reduce", "v5e:4x4", chips(1, 4), 2 * 3 / 4 / 50),
        # A pod closes to rings: 4 links.
        ("all-reduce", "v5e:16x16", chips(16, 16), 2 * 255 / 256 / 200),
        # Half of a ring is none.
        ("all-reduce", "v5e:16x16", chips(1, 8), 2 * 7 / 8 / 50),
        ("all-reduce", "v5p:4x4x4", chips(4, 4, 4), 2 * 63 / 64 / 600),
        ("collective-permute", "v5e:4x4", chips(4, 4), 1 / 50),
        # An array of 4 parts in each dimension, a quarter of it over each link, in both dimensions at once.
        ("all-to-all", "v5e:4x4", chips(4, 4), 15 / 16 / 100),
        ("all-reduce", "v5e:4x4", chips(1, 1), 0),
    ],
)
def test_links(kind, name, group, seconds):
    assert link_seconds(kind, GB, group, parse_slice(name)) == pytest.approx(seconds)


@pytest.mark.parametrize(("kind", "seconds"), [("all-reduce", 1.5), ("all-gather", 3), ("send", 1)])
def test_slices(kind, seconds):
    assert slice_seconds(kind, GB, parse_slice("v5e-16", 4)) == pytest.approx(seconds / 3.125)
