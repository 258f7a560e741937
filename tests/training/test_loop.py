"""The loop: what the devices wait for, what stops it, what it refuses, what it leaves behind."""

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DivergedError, Interrupted, UserError
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer
from gpt1_jax.text.tokenizer import read_tokenizer
from gpt1_jax.training import loop
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.metrics import METRICS

# One layer, in a loop, without dropout: it compiles in no time.
QUICK = ["model.dtype=float32", "model.num_layers=1", "model.scan_layers=true", "model.dropout=0.0"]
QUICK += ["model.attention_dropout=0.0", "checkpoint.every=100", "evaluation.every=100"]


pytestmark = pytest.mark.usefixtures("compile_once")


class Runner:
    """Trains runs of a small configuration in one folder."""

    def __init__(self, yaml: str, runs_dir: Path, corpus: Corpus):
        self.yaml, self.runs_dir, self.corpus = yaml, runs_dir, corpus
        self.tokenizer = read_tokenizer(corpus.tokenizer_file)
        self.run_dir = runs_dir / "run"
        self.hosts = Hosts()

    def config(self, *overrides: str) -> Config:
        return parse_config(f"name: run\nruns_dir: {self.runs_dir}\n{self.yaml}", "c", [*QUICK, *overrides])

    def train(self, *overrides: str, evaluate: Any = None, **other: Any) -> None:
        config = self.config(*overrides)
        arguments = {"corpus": self.corpus, "tokenizer": self.tokenizer} | other
        evaluate = evaluate or (lambda params: {"validation_loss": 1.0})
        with Interruption() as interruption, Hosts(interruption=interruption) as hosts:
            self.hosts = hosts
            loop.train(config, mesh=make_mesh(config.mesh), evaluate=evaluate, hosts=hosts, **arguments)

    def interrupt(self, step: int, *overrides: str) -> None:
        """Trains to a step, where a signal arrives."""

        def evaluate(params: dict) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return {}

        with pytest.raises(Interrupted) as error:
            self.train(*overrides, f"evaluation.every={step}", evaluate=evaluate)
        assert f"SIGTERM: stopped after step {step}; its checkpoint is {self.run_dir}/checkpoints/{step};" in str(
            error.value
        )

    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in (self.run_dir / "checkpoints").iterdir())

    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / METRICS).read_text().splitlines()]


@pytest.fixture
def runner(run_yaml: str, tmp_path: Path, corpus: Corpus) -> Runner:
    return Runner(run_yaml, tmp_path, corpus)


Wrapped = Callable[[Callable, Any, jax.Array], tuple]


@pytest.fixture
def wrap_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrapped], None]:
    """Puts a function around the compiled step: it is given the step, the state and the batch."""

    def wrap(wrapped: Wrapped) -> None:
        compile_train_step = loop.compile_train_step

        def compile_and_wrap(*arguments: Any) -> Callable:
            step_fn = compile_train_step(*arguments)
            return lambda state, batch: wrapped(step_fn, state, batch)

        monkeypatch.setattr(loop, "compile_train_step", compile_and_wrap)

    return wrap


def test_implicit_transfers_are_refused_around_the_step(runner, wrap_step):
    def careless(step_fn: Callable, state: Any, batch: jax.Array) -> tuple:
        return step_fn(state, batch + np.ones(batch.shape, np.int32))

    wrap_step(careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        runner.train()


def test_metrics_are_read_when_two_later_steps_are_under_way(runner, wrap_step, monkeypatch):
    step_of, dispatched, reads = {}, 0, []

    def counted(step_fn: Callable, state: Any, batch: jax.Array) -> tuple:
        nonlocal dispatched
        state, metrics = step_fn(state, batch)
        dispatched += 1
        step_of[id(metrics["loss"])] = (dispatched, metrics)
        return state, metrics

    device_get = jax.device_get

    def watched(tree: Any) -> Any:
        if isinstance(tree, dict) and "loss" in tree:
            reads.append((step_of[id(tree["loss"])][0], dispatched))
        return device_get(tree)

    wrap_step(counted)
    monkeypatch.setattr(jax, "device_get", watched)
    runner.train()
    assert reads == [(step, min(step + 2, 12)) for step in range(1, 13)]
    assert [record["step"] for record in runner.records() if "loss" in record] == list(range(1, 13))


def test_an_absurd_learning_rate_diverges_and_is_named(runner):
    with pytest.raises(DivergedError, match=r"step \d+: loss nan.*lower optimizer.learning_rate=1e\+30") as error:
        runner.train("optimizer.learning_rate=1e30")
    assert "no sound checkpoint yet" in str(error.value)
    assert runner.saved() == []


def test_another_configuration_is_refused_by_its_keys(runner):
    runner.interrupt(2)
    with pytest.raises(UserError) as error:
        runner.train("seed=7", "optimizer.learning_rate=0.5", "train.log_every=3", "evaluation.every=5")
    message = str(error.value)
    with pytest.raises(UserError, match=r"  model\.attention_dropout: "):  # and model.attention is free
        runner.train("model.attention_dropout=0.25")
    assert "  seed: 0 there, 7 now\n" in message
    assert "  optimizer.learning_rate: 0.01 there, 0.5 now\n" in message
    assert "log_every" not in message and "evaluation" not in message
    assert runner.saved() == [2]
    runner.train("train.log_every=3", "checkpoint.every=5", "data.prefetch=1")
    assert runner.saved() == [5, 10, 12]


def test_another_tokenizer_or_corpus_is_refused(runner):
    runner.interrupt(2)

    class Other(SentencePieceTokenizer):
        def to_bytes(self) -> bytes:
            return super().to_bytes() + b"\0"

    before = (runner.run_dir / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        runner.train("train.log_every=3", tokenizer=Other(runner.corpus.tokenizer_file.read_bytes()))
    assert (runner.run_dir / "config.yaml").read_bytes() == before
    other = copy.copy(runner.corpus)
    other.manifest = runner.corpus.manifest.model_copy(update={"fingerprint": "0" * 16})
    with pytest.raises(UserError, match=f"fingerprint {runner.corpus.manifest.fingerprint}, this one has {'0' * 16}"):
        runner.train(corpus=other)
    assert runner.saved() == [2]
    runner.train(corpus=other, allow_changes=True)
    with Checkpoints(runner.run_dir) as checkpoints:
        assert checkpoints.read_files(12).corpus == "0" * 16


def test_with_another_batch_size_it_goes_on_at_the_right_example(runner, wrap_step):
    runner.interrupt(5)
    read = []

    def watched(step_fn: Callable, state: Any, batch: jax.Array) -> tuple:
        read.append(np.asarray(batch))
        return step_fn(state, batch)

    wrap_step(watched)
    with pytest.raises(UserError, match=r"train\.batch_size: 8 there, 3 now"):
        runner.train("train.batch_size=3")
    runner.train("train.batch_size=3", allow_changes=True)
    windows = RandomWindows(runner.corpus, 32, seed=0)
    np.testing.assert_array_equal(np.concatenate(read), windows.examples(np.arange(40, 40 + 7 * 3)))
    with Checkpoints(runner.run_dir) as checkpoints:
        assert checkpoints.read_files(5).examples == 40
        assert checkpoints.read_files(12).examples == 61
        assert parse_config(checkpoints.read_files(12).config, "c").train.batch_size == 3
    assert [record["tokens"] for record in runner.records() if record["step"] in (5, 6, 12)][-2:] == [61 * 32] * 2


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        (["checkpoint.every=2", "checkpoint.keep=2"], [10, 12]),
        (["checkpoint.every=2", "checkpoint.keep=2", "checkpoint.keep_every=4"], [4, 8, 10, 12]),
        (["checkpoint.every=5", "checkpoint.keep=1"], [12]),
        (["checkpoint.every=5", "checkpoint.keep=9"], [5, 10, 12]),
    ],
)
def test_the_checkpoints_kept(runner, overrides, left):
    runner.train(*overrides)
    assert runner.saved() == left


def test_a_damaged_checkpoint_is_passed_over_and_made_again(runner, capsys):
    def figures() -> list[tuple]:
        return [
            (record["step"], record["loss"], record["grad_norm"]) for record in runner.records() if "loss" in record
        ]

    runner.train("checkpoint.every=4")
    before, newest = figures(), runner.run_dir / "checkpoints" / "12"
    path = max(newest.glob("training/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    runner.train("checkpoint.every=4")
    assert f"{path.relative_to(newest)} has SHA-256" in capsys.readouterr().err
    assert sorted(path.name for path in newest.parent.iterdir()) == ["12", "4", "8", "damaged-12"]
    assert figures() == before
    with Checkpoints(runner.run_dir) as checkpoints:
        assert checkpoints.newest_sound() == 12


def test_evaluation_is_called_on_its_steps_and_after_the_last(runner):
    seen = []

    def evaluate(params: dict) -> dict[str, float]:
        seen.append(float(np.abs(np.asarray(params["embedding"]["token_kernel"])).sum()))
        return {"validation_loss": float(len(seen))}

    runner.train("evaluation.every=5", evaluate=evaluate)
    records = [record for record in runner.records() if "validation_loss" in record]
    assert records == [
        {"step": step, "tokens": step * 8 * 32, "validation_loss": number}
        for number, step in enumerate((5, 10, 12), start=1)
    ]
    assert len(set(seen)) == 3  # the weights of then
    assert all("loss" in record for record in runner.records() if "validation_loss" not in record)


@pytest.mark.parametrize("step", [5, 12])
def test_an_evaluation_that_a_signal_ends_is_made_up_for(runner, step):
    asked = []

    def evaluate(params: dict) -> dict[str, float]:
        asked.append(float(np.asarray(params["embedding"]["token_kernel"]).sum()))
        runner.hosts.between("evaluating", 60.0)
        if len(asked) == 1 + step // 12 * 2:
            os.kill(os.getpid(), signal.SIGINT)
        runner.hosts.between("evaluating", 60.0)
        return {"validation_loss": asked[-1]}

    with pytest.raises(Interrupted, match=f"SIGINT: stopped after step {step};"):
        runner.train("evaluation.every=5", evaluate=evaluate)
    assert runner.saved() == [step]
    assert step not in [record["step"] for record in runner.records() if "validation_loss" in record]
    runner.train("evaluation.every=5", evaluate=evaluate)
    figures = [(r["step"], r["validation_loss"]) for r in runner.records() if "validation_loss" in r]
    assert [step for step, _ in figures] == [5, 10, 12] and len(asked) == 4  # one of them twice, with the same weights
    assert len(set(asked)) == 3 and [loss for _, loss in figures] == list(dict.fromkeys(asked))
    assert [record["step"] for record in runner.records() if "loss" in record] == list(range(1, 13))


def test_the_first_the_last_and_every_nth_step_are_logged(runner):
    runner.train("train.log_every=5")
    records = [record for record in runner.records() if "loss" in record]
    assert [record["step"] for record in records] == [1, 5, 10, 12]
    keys = ["step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "tokens_per_second", "mfu"]
    assert all(sorted(record) == sorted(keys) for record in records)
    assert [record["tokens"] for record in records] == [step * 8 * 32 for step in (1, 5, 10, 12)]
    assert sorted(record["seconds"] for record in records) == [record["seconds"] for record in records]


def test_a_finished_run_is_left_as_it_is(runner):
    runner.train()
    before = {path: path.stat().st_mtime_ns for path in runner.run_dir.rglob("*")}
    runner.train(evaluate=lambda params: pytest.fail("evaluated again"))
    assert {path: path.stat().st_mtime_ns for path in runner.run_dir.rglob("*")} == before
