"""TPU slices that are not there, for tests that compile for them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt1_jax.planning.devices import Target


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What the compiler's library is told of the machine stays in the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def v5e() -> Target:
    """Four chips."""
    pytest.importorskip("libtpu")
    from gpt1_jax.planning.devices import open_target

    return open_target("v5e:2x2")


@pytest.fixture
def configs() -> list[Path]:
    """Every shipped configuration."""
    return sorted(Path("configs").glob("*.yaml"))
