"""Runs with random weights: every bias and gain counts, and no likeliest token is a matter of rounding."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import CheckpointConfig, Config, ModelConfig, TrainConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.model.transformer import Params, abstract_params
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.run import Run, write_config

ODD = {"num_layers": 3, "embed_dim": 48, "num_heads": 3, "mlp_dim": 192, "context_length": 40, "vocab_size": 320}


def random_params(model: ModelConfig, seed: int, std: float) -> Params:
    """Kernels and biases of that deviation, gains that much around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        values = rng.normal(0, std, leaf.shape).astype(np.float32)
        return values + np.float32(path[-1].key == "scale")

    return jax.tree.map_with_path(draw, abstract_params(model))


MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> SentencePieceTokenizer:
    """Of 320 pieces."""
    return SentencePieceTokenizer(corpus.tokenizer_file.read_bytes())


@pytest.fixture(scope="session")
def make_run(tokenizer: SentencePieceTokenizer) -> MakeRun:
    """Makes a run in memory: of an odd size, or of that which the arguments of the model's configuration say."""

    def make(path: Path = Path("runs/made"), seed: int = 0, std: float = 0.2, **model: Any) -> Run:
        sizes = ModelConfig(**(ODD | {"dtype": "float32"} | model))
        # The training context is shorter than the model's: both must come back.
        train = TrainConfig(context_length=sizes.context_length - 8)
        config = parse_config("evaluation: {sample_tokens: 4}", "test").model_copy(
            update={"name": path.name, "runs_dir": str(path.parent), "model": sizes, "train": train}
        )
        mesh = make_mesh(config.mesh)
        params = jax.device_put(random_params(sizes, seed, std))
        return Run(path, config, 7, 56, "f" * 16, tokenizer, mesh, params)

    return make


@pytest.fixture(scope="session")
def write_run() -> Callable[[Run], Run]:
    """Writes a run to its path, as an import would; gives it back."""

    def write(run: Run) -> Run:
        config = Config.model_validate(run.config)
        write_config(config)
        with Checkpoints(run.path, CheckpointConfig()) as checkpoints:
            files = RunFiles(config.to_yaml(), run.tokenizer.to_bytes(), examples=0, data=None, corpus=None)
            checkpoints.save_imported(run.params, files)
        return dataclasses.replace(run, step=0, examples=0, corpus=None)

    return write
