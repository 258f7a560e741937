"""Weights of small models, drawn without compiling anything."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.transformer import Params, abstract_params


def random_params(model: ModelConfig, std: float) -> Params:
    """Kernels of that deviation, biases and gains of a tenth of it around 0 and 1: or they alone would decide."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        name = path[-1].key
        values = rng.normal(0, std if "kernel" in name else std / 10, leaf.shape).astype(np.float32)
        return values + np.float32(name == "scale")

    return jax.tree.map_with_path(draw, abstract_params(model))


@pytest.fixture(scope="session")
def draw_params() -> Callable[[ModelConfig, float], Params]:
    """:func:`random_params`, on a device."""
    return lambda model, std: jax.device_put(random_params(model, std))
