"""A run that goes wrong: steps that are skipped, spikes that it goes back from, a device that errs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DivergedError, Interrupted, UserError
from gpt1_jax.text.tokenizer import read_tokenizer
from gpt1_jax.training import loop
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.history import order_at
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.metrics import METRICS
from gpt1_jax.training.rewinds import REWINDS

# One layer, in a loop, without dropout: it compiles in no time.
QUICK = ["model.dtype=float32", "model.num_layers=1", "model.scan_layers=true", "model.dropout=0.0"]
QUICK += ["model.attention_dropout=0.0", "train.steps=24", "checkpoint.every=4", "checkpoint.keep=9"]
QUICK += ["evaluation.every=100", "train.log_every=1"]
# The losses of so few steps still fall, so their deviation is large.
SPIKES = ["train.spikes={threshold: 8.0, window: 6, skip: 4}"]
OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")

pytestmark = pytest.mark.usefixtures("compile_once")


class Runner:
    """Trains runs of a small configuration."""

    def __init__(self, yaml: str, folder: Path, corpus: Corpus):
        self.yaml, self.folder, self.corpus = yaml, folder, corpus

    def config(self, name: str, *overrides: str) -> Config:
        return parse_config(f"runs_dir: {self.folder}\n{self.yaml}", "c", [*QUICK, f"name={name}", *overrides])

    def train(self, name: str, *overrides: str, evaluate: Callable = lambda params: {}) -> Path:
        config = self.config(name, *overrides)
        tokenizer = read_tokenizer(self.corpus.tokenizer_file)
        with Interruption() as interruption, Hosts(interruption=interruption) as hosts:
            loop.train(config, self.corpus, tokenizer, make_mesh(config.mesh), evaluate, hosts=hosts)
        return self.folder / name

    def interrupt(self, name: str, step: int, *overrides: str) -> None:
        def evaluate(params: dict) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return {}

        with pytest.raises(Interrupted, match=f"stopped after step {step};"):
            self.train(name, *overrides, f"evaluation.every={step}", evaluate=evaluate)


@pytest.fixture
def runner(run_yaml: str, tmp_path: Path, corpus: Corpus) -> Runner:
    return Runner(run_yaml, tmp_path, corpus)


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines]


def saved(run: Path) -> list[int]:
    with Checkpoints(run) as checkpoints:
        return checkpoints.steps()


def weights(run: Path) -> list[bytes]:
    from gpt1_jax.training.run import open_run

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(open_run(run).params)]


@pytest.fixture
def wrap_step(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Puts a function around the compiled step: it is given the step, its number, the state and the batch."""

    def wrap(wrapped: Callable) -> None:
        compile_train_step = loop.compile_train_step

        def compile_and_wrap(*arguments: Any) -> Callable:
            step_fn = compile_train_step(*arguments)

            def step(state: Any, batch: jax.Array) -> tuple:
                with jax.transfer_guard("allow"):
                    return wrapped(step_fn, int(state.step) + 1, state, batch)

            return step

        monkeypatch.setattr(loop, "compile_train_step", compile_and_wrap)

    return wrap


def test_skipped_steps_are_counted_in_a_row_and_end_the_run(runner, wrap_step, capsys):
    seen = {}

    def poisoned(step_fn: Callable, step: int, state: Any, batch: jax.Array) -> tuple:
        table = state.params["embedding"]["token_kernel"]
        if step == 3:  # for this step alone
            state.params["embedding"]["token_kernel"] = jnp.full_like(table, jnp.inf)
        if step == 7:
            state.params["embedding"]["token_kernel"] = table.at[:].set(jnp.nan)
        before = jax.tree.map(np.array, state)
        state, metrics = step_fn(state, batch)
        seen[step] = before, jax.tree.map(np.array, state)
        if step == 3:
            state.params["embedding"]["token_kernel"] = table
        return state, metrics

    wrap_step(poisoned)
    with pytest.raises(DivergedError) as error:
        runner.train("run", "train.max_skipped_steps=3")
    run = runner.folder / "run"
    assert "step 9: loss nan" in str(error.value) and "3 step(s) in a row" in str(error.value)
    assert f"the last sound checkpoint is {run}/checkpoints/4" in str(error.value)
    assert saved(run) == [4, 8]
    for step, (before, after) in seen.items():
        pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        changed = {jax.tree_util.keystr(path) for (path, a), b in pairs if a.tobytes() != b.tobytes()}
        assert (changed == {".step"}) == (step == 3 or step >= 7), (step, changed)
    assert [(r["step"], r.get("skipped")) for r in records(run)] == [
        *[(1, None), (2, None), (3, 1), (4, None), (5, None), (6, None)],
        *[(7, 1), (8, 2), (9, 3)],
    ]
    rates = {r["step"]: r["learning_rate"] for r in records(run) if "loss" in r}
    assert rates[1] == 0 and rates[2] == pytest.approx(0.005) and rates[4] == pytest.approx(0.01)  # 2 of warm-up
    assert "step 3: loss nan, gradient norm nan: skipped, 1 in a row" in capsys.readouterr().err
    # What goes on in a row of them counts on.
    with pytest.raises(DivergedError, match="step 9: loss nan"):
        runner.train("run", "train.max_skipped_steps=3")


@pytest.fixture
def poisoned_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples that an undisturbed run reads in step 13 are noise."""
    plain = RandomWindows.examples

    def examples(windows: RandomWindows, indices: Any) -> np.ndarray:
        noise = np.random.default_rng(0).integers(0, 320, (len(indices), 33), dtype=np.int32)
        return np.where(np.isin(indices, np.arange(96, 104))[:, None], noise, plain(windows, indices))

    monkeypatch.setattr(RandomWindows, "examples", examples)


def test_a_spike_is_left_out_and_what_was_decided_is_decided_again(runner, poisoned_batch, wrap_step, capsys):
    read = []

    def watched(step_fn: Callable, step: int, state: Any, batch: jax.Array) -> tuple:
        read.append((step, np.asarray(batch)))
        return step_fn(state, batch)

    wrap_step(watched)
    run = runner.train("whole", *SPIKES)
    assert "a spike; back to step 10" in capsys.readouterr().err
    (decision,) = [json.loads(line) for line in (run / REWINDS).read_text().splitlines()]
    assert {key: decision[key] for key in ("spike", "step", "first", "stop")} == {
        "spike": 13,
        "step": 10,
        "first": 80,
        "stop": 112,
    }
    assert decision["loss"] > decision["median"] + 8 * decision["deviation"]
    # From the checkpoint of step 8, the one of step 12 being gone; then without the batches of steps 11 to 14.
    steps = [step for step, _ in read]
    assert steps == [*range(1, 16), *range(9, 25)] and saved(run) == [4, 8, 12, 16, 20, 24]
    windows = RandomWindows(runner.corpus, 32, seed=0)
    for step, batch in read[15:]:
        first = 8 * (step - 1) + (32 if step > 10 else 0)
        np.testing.assert_array_equal(batch, windows.examples(np.arange(first, first + 8)))
        assert order_at(runner.config("whole").run_dir, step).examples_of(step) == list(range(first, first + 8))
    losses = [record["step"] for record in records(run) if "loss" in record]
    assert losses == list(range(1, 25))
    # Stopped among the steps that are undone, with the checkpoint damaged that it would go back to; and after that.
    runner.interrupt("stopped", 11, *SPIKES)
    (runner.folder / "stopped" / "checkpoints" / "8" / "run" / "tokenizer.model").write_bytes(b"")
    runner.interrupt("stopped", 16, *SPIKES)
    again = runner.train("stopped", *SPIKES)
    (same,) = [json.loads(line) for line in (again / REWINDS).read_text().splitlines()]
    assert {**same, "origin": 0} == {**decision, "origin": 0}
    assert (again / "checkpoints" / "damaged-8").is_dir() and saved(again) == [4, 8, 12, 16, 20, 24]
    assert weights(again) == weights(run)
    assert [r for r in records(again) if "loss" in r] == [r for r in records(run) if "loss" in r]


def test_too_many_spikes_end_the_run(runner, poisoned_batch):
    with pytest.raises(DivergedError, match=r"step 13: loss .* raise train\.spikes\.max_rewinds=0"):
        runner.train("run", "train.spikes={threshold: 8.0, window: 6, skip: 4, max_rewinds: 0}")
    assert saved(runner.folder / "run") == [4, 8, 12]


def test_without_a_checkpoint_that_is_old_enough_it_does_not_begin_again_unasked(runner, poisoned_batch):
    spikes = ["train.spikes={threshold: 8.0, window: 6, skip: 12}", "checkpoint.keep=3"]  # back to step 6
    runner.interrupt("run", 10, *spikes)
    runner.interrupt("run", 11, *spikes)
    with pytest.raises(DivergedError, match="no sound checkpoint of step 6 or before to go back to"):
        runner.train("run", *spikes)
    assert saved(runner.folder / "run") == [10, 11, 12]
    with pytest.raises(UserError, match=r"train\.spikes\.skip=12 goes back 6 steps, and checkpoint\.keep=3 with"):
        runner.config("run", *spikes, "checkpoint.every=2")


def test_what_another_configuration_left_out_is_forgotten_by_a_run_that_begins_anew(runner, poisoned_batch):
    early = ["checkpoint.every=100", *SPIKES]  # no checkpoint before the spike
    runner.interrupt("run", 12, "checkpoint.every=100")  # its decisions are none
    (runner.folder / "run" / "checkpoints" / "12").rename(runner.folder / "aside")
    run = runner.train("run", *early)
    assert len((run / REWINDS).read_text().splitlines()) == 1
    (run / "checkpoints" / "24").rename(runner.folder / "aside too")
    runner.train("run", "checkpoint.every=100")
    assert (run / REWINDS).read_text() == ""
    assert [record["loss"] > 6 for record in records(run) if "loss" in record] == [step == 13 for step in range(1, 25)]


def test_a_second_result_that_differs_stops_the_run(runner, wrap_step):
    made = []

    def perturbed(step_fn: Callable, step: int, state: Any, batch: jax.Array) -> tuple:
        made.append(step)
        state, metrics = step_fn(state, batch)
        if made.count(10) == 2:  # the second time, in one bit
            moments = state.opt_state[1][0].nu["blocks"]["mlp_in"]["kernel"]
            first = moments[0, 0, 0]
            changed = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(first, jnp.uint32) ^ 1, jnp.float32)
            state.opt_state[1][0].nu["blocks"]["mlp_in"]["kernel"] = moments.at[0, 0, 0].set(changed)
        return state, metrics

    wrap_step(perturbed)
    with pytest.raises(
        DivergedError, match=r"step 10, computed twice .* has given two results; they differ on process 0"
    ):
        runner.train("run", "train.double_check_every=5")
    assert made[:13] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11]
    assert saved(runner.folder / "run") == [4, 8]
