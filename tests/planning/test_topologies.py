import pytest

from gpt1_jax.errors import UserError
from gpt1_jax.planning.topologies import CHIPS, Slice, cloud_name, parse_slice, table
from gpt1_jax.training.hardware import PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "canonical", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
        ("v4-32", "v4:2x2x4", 16),  # named after cores, two a chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p:4x8x12", "v5p:4x8x12", 384),  # of whole cubes
    ],
)
def test_names(name, canonical, chips):
    found = parse_slice(name)
    assert (found.name, found.chips) == (canonical, chips)
    assert parse_slice(name, 3).chips == 3 * chips


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:4x5", "no slice of this shape; nearest are v5e:2x4 = v5e-8, v5e:4x4 = v5e-16, v5e:4x8 = v5e-32"),
        ("v5p-100", "no slice of this size .*TensorCores, two a chip.*v5p-128"),
        ("v5p:4x4x6", "no slice of this shape"),
        ("v5e:4x4x4", "no slice of this shape"),
        ("v4:16x16x20", "no slice of this shape"),  # more than a pod has
        ("v6-8", "did you mean 'v6e-8'"),
        ("v5e", "gpt1 plan --list"),
        ("nonsense", "gpt1 plan --list"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_near(name, says):
    with pytest.raises(UserError, match=says):
        parse_slice(name)


def test_slices_are_counted_from_one():
    with pytest.raises(UserError, match="--slices 0"):
        parse_slice("v5e-16", 0)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_slice_in_the_table_is_found_under_both_of_its_names(chip):
    for shape in chip.shapes:
        for name in (f"{chip.name}:{shape}", cloud_name(chip, shape)):
            assert parse_slice(name).name == f"{chip.name}:{shape}"
            assert name in table().split()


def test_the_clock_is_that_at_which_the_matrix_units_reach_the_peak():
    flops = {"v4": 8 * 2 * 128**2, "v5e": 4 * 2 * 128**2, "v5p": 8 * 2 * 128**2, "v6e": 4 * 2 * 256**2}
    for name, chip in CHIPS.items():
        assert chip.clock * flops[name] == pytest.approx(PEAK_FLOPS[chip.device_kind], rel=0.003)


def test_rings():
    assert [parse_slice("v5e:8x16").wraps(axis) for axis in (0, 1)] == [False, True]
    assert parse_slice("v5p:4x4x8").wraps(0)
    assert not any(Slice(CHIPS["v4"], (2, 4, 4)).wraps(axis) for axis in range(3))
