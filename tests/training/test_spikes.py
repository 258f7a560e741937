"""Which losses are spikes, by hand."""

import math

import pytest

from gpt1_jax.config import SpikeConfig
from gpt1_jax.training.spikes import Spike, SpikeRule

RULE = SpikeConfig(threshold=4.0, window=5)
LOSSES = [3.0, 3.2, 2.9, 9.0, 3.1]  # median 3.1, distances 0.1, 0.1, 0.2, 5.9, 0: their median 0.1


def test_the_limit_by_hand():
    rule = SpikeRule(RULE, LOSSES)
    rule.judge(6, 3.49)
    with pytest.raises(Spike, match=r"step 6: loss 3\.51") as error:
        SpikeRule(RULE, LOSSES).judge(6, 3.51)
    assert error.value.step == 6 and error.value.median == 3.1
    assert math.isclose(error.value.deviation, 0.1)


def test_nothing_is_a_spike_before_the_window_is_full():
    rule = SpikeRule(RULE)
    for step, loss in enumerate([1.0, 1.0, 1.0, 1.0, 50.0], start=1):
        rule.judge(step, loss)
    assert list(rule.losses) == [1.0, 1.0, 1.0, 1.0, 50.0]
    with pytest.raises(Spike):
        rule.judge(6, 1.1)  # the one before it has no weight


def test_where_it_goes_on_it_judges_as_if_it_had_not_stopped():
    whole = SpikeRule(RULE)
    for step in range(1, 30):
        whole.judge(step, 3 + 0.1 * math.sin(step))
    again = SpikeRule(RULE, tuple(whole.losses))
    assert again.losses == whole.losses and len(again.losses) == 5
    for loss in (2.0, 3.0, 3.1):
        again.judge(30, loss)
        whole.judge(30, loss)
        assert again.losses == whole.losses


def test_without_a_rule_nothing_is_a_spike_and_nothing_is_kept():
    rule = SpikeRule(None, LOSSES)
    rule.judge(6, 1e9)
    assert not rule.losses
