"""Fine-tuning by several processes together: the results are those of one process with as many devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.text.tokenizer import read_tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.run import write_config
from gpt1_jax.training.state import init_state

RECIPE = """
task:
  form: text_to_text
  train: {kind: files, paths: [train.jsonl]}
  validation: {kind: files, paths: [validation.jsonl]}
  source: a
  target: b
  target_tokens: 6
  beams: 2
  metrics: [exact_match, chrf]
base: base
runs_dir: .
train: {epochs: 2, batch_size: 4, log_every: 1, compilation_cache: null}
optimizer: {learning_rate: 3.0e-3}
evaluation: {batch_size: 4, max_tokens: 99}
logging: {tensorboard: false}
"""
PLACES = ["The cat", "A dog ran", "Birds sing", "The hill begins", "The mat, far away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus, run_yaml) -> Path:
    """With a base, a recipe, and tables of five and of eight pairs."""
    folder = tmp_path_factory.mktemp("processes")
    settings = ["model.num_layers=1", "model.dtype=float32", f"runs_dir={folder}", "name=base"]
    config, _ = resolve(parse_config(run_yaml, "c", settings))
    write_config(config)
    state = init_state(config, make_optimizer(config.optimizer, config.train.steps), make_mesh(config.mesh))
    fingerprint = corpus.manifest.fingerprint
    tokenizer = read_tokenizer(corpus.tokenizer_file).to_bytes()
    with Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        checkpoints.save(12, state, RunFiles(config.to_yaml(), tokenizer, 96, data=fingerprint, corpus=fingerprint))
    for split, count in (("train", 8), ("validation", 5)):
        pairs = [{"a": PLACES[number % 5], "b": PLACES[number * 2 % 5]} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def finetuned(folder: Path, name: str, processes: int, devices: int) -> dict:
    """What a run of so many processes, with so many devices each, leaves."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "gpt1_jax", "finetune", "recipe.yaml", f"name={name}"]
    jobs = []
    for process in range(processes):
        keys = [f"distributed.coordinator=localhost:{port}", f"distributed.processes={processes}"]
        keys = [*keys, f"distributed.process={process}"] if processes > 1 else []
        jobs.append(subprocess.Popen([*command, *keys], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [job.communicate(timeout=200)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * processes, said
    run = folder / name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "results": {key: results[key] for key in ("epochs", "figures", "perplexity", "step")},
        "predictions": (run / "predictions-validation.jsonl").read_text(),
        "step": max(int(step.name) for step in (run / "checkpoints").iterdir()),
    }


def test_two_processes_do_what_one_does(folder):
    one, two = finetuned(folder, "one", 1, 4), finetuned(folder, "two", 2, 2)
    assert len(one["losses"]) == one["step"] == 4
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["results"]["figures"] == two["results"]["figures"] and one["predictions"] == two["predictions"]
    assert one["results"]["perplexity"]["after"] == pytest.approx(two["results"]["perplexity"]["after"], rel=1e-5)
    assert (one["step"], one["results"]["step"]) == (two["step"], two["results"]["step"])
