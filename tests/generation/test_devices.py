"""What is generated is the same on one device and on eight, and the eight share the prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, MeshConfig, ModelConfig
from gpt1_jax.generation import decode
from gpt1_jax.generation.beam import beam_search
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.prefill import pad
from gpt1_jax.generation.sampling import Sampling
from gpt1_jax.model.sharding import tree_shardings
from gpt1_jax.model.transformer import Params, init_params, parameter_axes
from gpt1_jax.training.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=40, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32"
)
CONFIG = Config(model=MODEL, evaluation=EvaluationConfig(sample_tokens=8))
END = 39
MESHES = {
    "one": MeshConfig(),
    "data": MeshConfig(data=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
ROWS = {"one": 16, "data": 2, "all": 4}  # of sixteen, on each device


def placed(mesh: MeshConfig, count: int) -> Params:
    """Weights with which every token matters."""
    params = jax.tree.map(lambda leaf: leaf * 10, init_params(MODEL, jax.random.key(0)))
    made = make_mesh(mesh, jax.devices()[:count])
    return jax.device_put(params, tree_shardings(made, parameter_axes(MODEL), params))


def written(params: Params) -> dict[str, Any]:
    prompts = [np.random.default_rng(n).integers(0, 38, n % 9).astype(np.int32) for n in range(13)]
    shared = {"max_tokens": 6, "separator_id": END}
    drawn = generate(CONFIG, params, prompts, sampling=Sampling(0.8), seed=3, **shared)
    searched = beam_search(CONFIG, params, prompts, beams=3, length_penalty=0.6, **shared)
    alone = generate(CONFIG, params, prompts[:1], sampling=Sampling(0.8), seed=3, **shared)  # fewer than devices
    rows = pad(prompts, 8, END, params)
    state = decode._begin(params, *rows, 0, config=MODEL, slots_of_new=16)
    keys = state.cached.cache.k_LBSKH
    return {
        "drawn": [found.tokens.tolist() for found in drawn],
        "searched": [found.tokens.tolist() for found in searched],
        "alone": alone[0].tokens.tolist(),
        "rows": keys.sharding.shard_shape(keys.shape)[1],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """This file as a script in a process with eight virtual devices."""
    out = tmp_path_factory.mktemp("eight") / "out.json"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    subprocess.run([sys.executable, __file__, str(out)], check=True, env=os.environ | {"XLA_FLAGS": flags})
    return json.loads(out.read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_the_texts_are_those_of_one_device(found, mesh):
    for way in ("drawn", "searched", "alone"):
        assert found[mesh][way] == found["one"][way]
    assert found["one"]["drawn"][0] == found["one"]["alone"] and len(found["one"]["drawn"]) == 13
    assert len({token for row in found["one"]["searched"] for token in row}) > 3


@pytest.mark.parametrize("mesh", MESHES)
def test_the_devices_share_the_prompts(found, mesh):
    assert found[mesh]["rows"] == ROWS[mesh]


def main() -> None:
    """Writes what every mesh makes."""
    found = {name: written(placed(mesh, 1 if name == "one" else 8)) for name, mesh in MESHES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
