import json
import time
from pathlib import Path

import pytest

from gpt1_jax.config import Config
from gpt1_jax.errors import DamagedError
from gpt1_jax.training.metrics import METRICS, MetricsLog, Stopwatch, read_records


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(name="run", runs_dir=str(tmp_path))
    config.run_dir.mkdir()
    return config.model_copy(update={"logging": config.logging.model_copy(update={"tensorboard": False})})


def records(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / METRICS).read_text().splitlines()]


def test_records_after_the_checkpoint_are_dropped_and_the_clock_goes_on(config):
    with MetricsLog(config, 0) as log:
        for step in range(1, 8):
            log.write({"step": step, "tokens": 10 * step, "seconds": 0.5 * step, "mfu": None})
        log.write({"step": 4, "tokens": 40, "validation_loss": 2.5})
    with (config.run_dir / METRICS).open("a") as file:
        file.write('{"step": 8, "tok')  # killed while it wrote
    with MetricsLog(config, 4) as log:
        assert log.seconds == 2.0
        log.write({"step": 5, "tokens": 50, "seconds": 2.25})
    assert [(record["step"], record.get("seconds")) for record in records(config)] == [
        *((step, 0.5 * step) for step in range(1, 5)),
        (4, None),
        (5, 2.25),
    ]


def test_a_record_is_on_the_disk_as_soon_as_it_is_written(config):
    with MetricsLog(config, 0) as log:
        log.write({"step": 1, "tokens": 8, "loss": 0.1 + 0.2})
        assert records(config) == [{"step": 1, "tokens": 8, "loss": 0.1 + 0.2}]


def test_a_damaged_line_is_named(config):
    path = config.run_dir / METRICS
    path.write_text('{"step": 1, "tokens": 8}\nnot json\n')
    with pytest.raises(DamagedError, match=rf"{METRICS}:2: not a line of JSON"):
        read_records(path, "step")
    path.write_text('{"step": 1, "tokens": 8}\n{"tokens": 16}\n')
    with pytest.raises(DamagedError, match=rf"{METRICS}:2: the record lacks step"):
        read_records(path, "step", "tokens")


def test_no_file_has_no_records(tmp_path):
    assert read_records(tmp_path / METRICS, "step") == []


def test_numbers_are_mirrored_to_tensorboard(config):
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"tensorboard": True})})
    with MetricsLog(config, 0) as log:
        log.write({"step": 1, "tokens": 8, "loss": 0.5, "mfu": None})
    (events,) = (config.run_dir / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"tokens" in content and b"mfu" not in content


def test_the_stopwatch_starts_where_it_is_told_and_leaves_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(3.0)
    now = 105.0
    assert watch.seconds() == 8.0
    watch.leave_out(2.0)
    assert watch.seconds() == 6.0
