"""What a run notes of the order of its data, attempt after attempt."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.training.history import HISTORY, DataOrder, RemainingWindows, data_order, note_order, order_at


@pytest.fixture
def run(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path)


@pytest.fixture
def config(run_yaml: str) -> Config:
    return parse_config(run_yaml, "c")


def lines(run: epath.Path) -> int:
    return len((run / HISTORY).read_text().splitlines())


def test_what_an_attempt_without_a_checkpoint_noted_is_replaced(run, config, corpus):
    for step, seed in [(0, 1), (0, 2), (4, 2), (4, 3), (6, 3), (4, 5)]:
        note_order(run, data_order(config.model_copy(update={"seed": seed}), corpus, step, 8 * step))
    assert lines(run) == 2
    assert [order_at(run, step).seed for step in (1, 4, 5, 6, 9)] == [2, 2, 5, 5, 5]
    assert order_at(run, 6).examples_of(6) == list(range(40, 48))


def test_going_on_unchanged_writes_nothing(run, config, corpus):
    note_order(run, data_order(config, corpus, 0, 0))
    before = (run / HISTORY).stat().mtime, (run / HISTORY).read_bytes()
    for step in (4, 9, 0):
        note_order(run, data_order(config, corpus, step, 8 * step))
    assert ((run / HISTORY).stat().mtime, (run / HISTORY).read_bytes()) == before


def test_steps_are_turned_into_examples(corpus):
    order = DataOrder(
        step=10, examples=50, corpus="0", seed=4, context_length=16, batch_size=3, weights=({0: 1.0, 7: 2.0},)
    )
    assert order.examples_of(11) == [50, 51, 52] and order.examples_of(13) == [56, 57, 58]
    expected = RandomWindows(corpus, 16, 4, [{0: 1.0, 21: 2.0}])
    index = np.arange(60)
    np.testing.assert_array_equal(order.windows(corpus).starts(index), expected.starts(index))
    assert DataOrder.model_validate_json(order.model_dump_json()) == order


def test_what_is_left_out_is_read_by_no_step(run, config, corpus):
    note_order(run, data_order(config, corpus, 0, 0))
    order = data_order(config, corpus, 4, 32, [(40, 56), (48, 52)])
    note_order(run, order)
    assert order_at(run, 9) == order and lines(run) == 2
    # 0 to 39, 56 to 63, 68 on: the second part is counted in what the first leaves
    assert [order.examples_of(step)[0] for step in (5, 6, 7, 8)] == [32, 56, 68, 76]
    windows = RandomWindows(corpus, config.context_length, config.seed)
    read = RemainingWindows(order, corpus).examples(np.arange(38, 50))
    np.testing.assert_array_equal(read, windows.examples([38, 39, *range(56, 64), 68, 69]))


def test_what_is_not_known_is_refused(run, config, corpus):
    with pytest.raises(UserError, match=r"data\.jsonl is missing"):
        order_at(run, 1)
    note_order(run, data_order(config, corpus, 3, 24))  # trained so far by what noted nothing
    with pytest.raises(UserError, match="--step 3: what was read is known from step 4 on"):
        order_at(run, 3)
    assert order_at(run, 4).examples_of(4)[0] == 24
    (run / HISTORY).write_text('{"step": 0}\n')
    with pytest.raises(DamagedError, match=r"data\.jsonl: not what training writes"):
        order_at(run, 1)


def test_a_schedule_counts_steps_of_one_batch_size(corpus, run_yaml):
    scheduled = parse_config(run_yaml.replace("kind: files", "kind: files\n      weight: {0: 1, 9: 2}"), "test")
    assert data_order(scheduled, corpus, 4, 4 * scheduled.train.batch_size).step == 4
    with pytest.raises(UserError, match=r"train\.batch_size=8: 16 examples were read in the 4 steps so far"):
        data_order(scheduled, corpus, 4, 16)
