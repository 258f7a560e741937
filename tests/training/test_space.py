"""Room is looked for before the first step, and what is asked for is what a run comes to hold."""

import shutil
from types import SimpleNamespace

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.config_file import load_config
from gpt1_jax.errors import StorageError
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.space import check_checkpoint_room, most_added
from gpt1_jax.training.state import abstract_state

numbers = st.integers(1, 12)


@hypothesis.given(every=numbers, keep=numbers, keep_every=st.none() | numbers, begin=st.integers(0, 40), steps=numbers)
@hypothesis.settings(deadline=None)
def test_what_is_asked_for_is_what_a_run_comes_to_hold(every, keep, keep_every, begin, steps):
    config, steps = CheckpointConfig(every=every, keep=keep, keep_every=keep_every), begin + steps

    def run(there: list[int], first: int, last: int) -> tuple[list[int], int]:
        """The checkpoints at its end, and how many there were at most at once."""
        most = len(there)
        for step in range(first + 1, last + 1):
            if step % every == 0 or step == last:
                there = [*there, step]
                most = max(most, len(there))
                there = [s for s in there if s in there[-keep:] or (keep_every and s % keep_every == 0)]
        return there, most

    there, _ = run([], 0, begin)
    _, most = run(there, begin, steps)
    asked = most_added(config, there, begin, steps)
    # Those of the newest that stay for good are counted with both.
    assert most - len(there) <= asked <= most - len(there) + (keep if keep_every else 0)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """Sets how much room every disk has."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_run_that_cannot_fit_ends_with_the_figures(config_file, full):
    config, _ = resolve(load_config(config_file))
    config.run_dir.mkdir(parents=True)
    state = abstract_state(config, make_optimizer(config.optimizer, 12), make_mesh(config.mesh))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 12 * parameters < size < 12 * parameters + 100  # the weights, two moments, counters
    full(3 * size)
    check_checkpoint_room(config, state, 0)
    full(3 * size - 1)
    with pytest.raises(StorageError) as error:
        check_checkpoint_room(config, state, 0)
    assert error.value.exit_code == 6
    assert str(error.value).startswith(
        f"{config.run_dir}: {3 * size - 1:,} bytes are free there, and {3 * size:,} are needed: 3 more checkpoints of "
        f"at least {size:,} bytes, by checkpoint.keep=3, the one that is being written among them; make room"
    )
    for step in (4, 8):
        (config.run_dir / "checkpoints" / str(step)).mkdir(parents=True)
    full(size)
    check_checkpoint_room(config, state, 8)


def test_a_preparation_and_a_run_that_cannot_fit_end_before_they_write(config_file, corpus, tmp_path, gpt1, full):
    full(1000)
    prepared = gpt1("prepare", config_file, f"data.root={tmp_path / 'prepared'}")
    assert prepared.code == StorageError.exit_code
    assert "1,000 bytes are free there, and " in prepared.err
    assert " bytes of text, as documents and as tokens; make room" in prepared.err
    trained = gpt1("train", config_file)
    assert trained.code == StorageError.exit_code
    assert "1,000 bytes are free there, and " in trained.err and " more checkpoints of at least " in trained.err
    assert {path.name for path in (tmp_path / "runs" / "run").iterdir()} <= {"config.yaml", "checkpoints"}
    assert not list((tmp_path / "runs" / "run").glob("checkpoints/*"))
