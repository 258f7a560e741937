"""What the recorder writes of a step, by hand, under a clock that the test moves."""

import json
import math
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.config_file import parse, parse_config
from gpt1_jax.errors import DivergedError
from gpt1_jax.model.transformer import flops_per_token
from gpt1_jax.training.metrics import METRICS, MetricsLog
from gpt1_jax.training.progress import Progress, duration
from gpt1_jax.training.recorder import Recorder

YAML = """
train: {steps: 100, batch_size: 4, log_every: 2, max_skipped_steps: 2}
model: {context_length: 8, dtype: float32}
evaluation: {sample_tokens: 2}
optimizer: {warmup_steps: 0}
logging: {tensorboard: false, progress: plain, peak_flops: 1e12}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = parse_config(f"runs_dir: {tmp_path}\n{YAML}", "c")
    config.run_dir.mkdir()
    return config


def metrics(loss: float, norm: float = 1.0) -> dict:
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    figures = {"loss": loss, "grad_norm": norm, "learning_rate": 0.5}
    return {**{name: jnp.float32(value) for name, value in figures.items()}, "skipped": jnp.bool_(skipped)}


def lengths(config: Config) -> tuple:
    return lambda examples: examples * 8, flops_per_token(config.model, 8)


def records(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / METRICS).read_text().splitlines()]


def test_figures_by_hand(config, clock, capsys):
    with MetricsLog(config, 10) as log, Progress(config, 10) as progress:
        # 1000 examples were read before, by other batches
        recorder = Recorder(config, 10, 1000, log, progress, *lengths(config))
        for step in range(11, 15):
            clock.now += 0.25
            recorder.add(step, metrics(step))
        assert [record["step"] for record in records(config)] == [12]
        with recorder.paused():
            clock.now += 60
        clock.now += 0.25
        recorder.drain()
        recorder.evaluation(14, {"validation_loss": 2.0})
    first, second, evaluation = records(config)
    tokens = 4 * 8
    assert first == {
        "step": 12, "loss": 12.0, "grad_norm": 1.0, "learning_rate": 0.5, "tokens": (1000 + 2 * 4) * 8, "seconds": 1.0,
        "tokens_per_second": 2 * tokens, "mfu": 2 * tokens * flops_per_token(config.model, 8) / 1e12,
    }  # fmt: skip
    assert second["seconds"] == 1.25
    assert second["tokens_per_second"] == 2 * tokens / 0.25
    assert evaluation == {"step": 14, "tokens": (1000 + 4 * 4) * 8, "validation_loss": 2.0}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"step      12/100 · loss 12.0000 · 64 tokens/s · MFU {first['mfu']:.1%} · 0:44 left"
    assert lines[2] == "step      14/100 · validation loss 2.0000"


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("inf"))])
def test_skipped_steps_are_all_logged_and_so_many_in_a_row_are_an_error(config, loss, norm, capsys):
    with MetricsLog(config, 0) as log, Progress(config, 0) as progress:
        recorder = Recorder(config, 0, 0, log, progress, *lengths(config))
        for step, figures in enumerate([(3.0,), (loss, norm), (3.0,), (3.0,), (loss, norm), (loss, norm)], start=1):
            recorder.add(step, metrics(*figures))
        with pytest.raises(DivergedError, match=rf"step 6: loss {loss}, gradient norm {norm}: .* 2 step.s. in a row"):
            recorder.drain()
    assert [(record["step"], record.get("skipped"), "loss" in record) for record in records(config)] == [
        *[(1, None, True), (2, 1, False), (4, None, True), (5, 1, False), (6, 2, False)]
    ]
    assert records(config)[1] == {"step": 2, "tokens": 64, "skipped": 1}
    assert f"step 5: loss {loss}, gradient norm {norm}: skipped, 1 in a row\n" in capsys.readouterr().err


def test_a_row_of_skipped_steps_goes_on_where_the_run_does(config):
    with MetricsLog(config, 7) as log, Progress(config, 7) as progress:
        recorder = Recorder(config, 7, 28, log, progress, *lengths(config), skipped=1)
        recorder.add(8, metrics(math.nan))
        with pytest.raises(DivergedError, match=r"step 8: .* 2 step.s. in a row"):
            recorder.drain()


@pytest.mark.parametrize(("finetuned", "key"), [(False, "warmup_steps"), (True, "warmup_fraction")])
def test_the_advice_on_divergence_names_a_key_of_the_command(config, finetuned, key):
    if finetuned:
        task = {"form": "chat", "validation": {"kind": "toy_dialogue", "split": "validation"}}
        config = config.model_copy(update={"finetune": parse(FinetuneConfig, json.dumps({"task": task}), "task.yaml")})
    with MetricsLog(config, 0) as log, Progress(config, 0) as progress:
        recorder = Recorder(config, 0, 0, log, progress, *lengths(config))
        recorder.add(1, metrics(math.nan))
        recorder.add(2, metrics(math.nan))
        with pytest.raises(DivergedError, match=rf"or raise optimizer\.{key}$"):
            recorder.drain()


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 245, 3845)] == ["0:00", "1:00", "4:05", "1:04:05"]
