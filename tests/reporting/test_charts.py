import math

import numpy as np
import pytest

from gpt1_jax.reporting.charts import CHARTS, _limits, short, smoothed


def test_smoothing_is_the_mean_around_each_point():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(smoothed(values), [1.5, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(smoothed(np.full(500, 2.5)), 2.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00025, "0.00025"),
        (12.3456, "12.3"),
        (1500, "1.5K"),
        (2e7, "20M"),
        (3.14e9, "3.14B"),
        (-4e12, "-4T"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_limits_leave_a_lone_spike_out_and_nothing_else():
    curve = np.linspace(2, 4, 500)
    assert _limits(curve) == (2, 4)
    low, high = _limits(np.append(curve, [1000, np.nan, np.inf]))
    assert low == 2 and 4 <= high < 6
    assert _limits(np.array([np.nan])) == (0, 1)


def test_references_by_hand():
    heights = {(chart.file, line.label): line.height for chart in CHARTS for line in chart.references}
    final = {"limit_nats": 60.0, "tokens": 150, "bytes": 600, "xz_bits_per_byte": 1.5}
    assert {key: height(final) for key, height in heights.items()} == {
        ("loss", "limit"): 0.4,
        ("perplexity", "limit"): pytest.approx(math.exp(0.4)),
        ("bits_per_byte", "xz"): 1.5,
        ("bits_per_byte", "limit"): pytest.approx(0.1 / math.log(2)),
    }
    assert all(height(final) is None for final in ({}, {"limit_nats": None}) for height in heights.values())
