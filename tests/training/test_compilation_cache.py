"""Compiled functions that outlive the process: found again, no condition of any result, and shared by all hosts."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config, TrainConfig
from gpt1_jax.training import compilation_cache as module
from gpt1_jax.training.compilation_cache import compilation_cache


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(module, "_MIN_SECONDS", 0.0)
    return Config(runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def found() -> Iterator[list[str]]:
    """Grows with each function that is found."""
    events: list[str] = []

    def note(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            events.append(event)

    jax.monitoring.register_event_listener(note)
    yield events
    jax.monitoring.unregister_event_listener(note)


def compute(config: Config) -> bytes:
    """As a new process would."""
    jax.clear_caches()
    with compilation_cache(config):
        return jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0))(
            np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)
        ).tobytes()


def entries(config: Config) -> list[Path]:
    return sorted(Path(config.runs_dir, ".compilation_cache").glob("cpu-*/jit__lambda-*"))


def test_what_is_compiled_is_found_with_the_same_bits(config, found):
    without = compute(config.model_copy(update={"train": TrainConfig(compilation_cache=None)}))
    assert not Path(config.runs_dir).exists()
    assert compute(config) == without and found == []
    (entry,) = entries(config)
    content = entry.read_bytes()
    assert compute(config) == without and len(found) == 1
    assert entry.read_bytes() == content
    jax.clear_caches()
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert entries(config) == [entry]  # outside nothing is kept


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: content[:999] + b"x" + content[1000:]]
)
def test_a_damaged_entry_is_named_and_replaced(config, found, damage):
    expected = compute(config)
    (entry,) = entries(config)
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=f"{entry}: this compiled function is damaged"):
        assert compute(config) == expected
    assert entry.read_bytes() != damage(content) and found == []
    assert compute(config) == expected and len(found) == 1


def test_another_processor_has_other_entries(config, found, monkeypatch):
    compute(config)
    monkeypatch.setattr(module.platform, "machine", lambda: "another")
    compute(config)
    assert len(entries(config)) == 2 and found == []


def test_storage_that_cannot_be_written_is_a_warning(config, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.warns(UserWarning, match="Error writing persistent compilation cache entry.*No space left"):
        compute(config)


def test_it_may_be_anywhere(config, tmp_path):
    there = TrainConfig(compilation_cache=str(tmp_path / "there"))
    compute(config.model_copy(update={"train": there}))
    assert list((tmp_path / "there").glob("cpu-*/jit__lambda-*")) and not entries(config)
