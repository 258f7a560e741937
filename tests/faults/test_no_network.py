"""Every command does its work without a network, and without anything that an earlier one left in the home folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Row

OFFLINE = str(Path(__file__).with_name("offline.py"))
EXAMPLES = "data/tasks/examples"
COMMANDS = [
    "prepare config.yaml",
    "train config.yaml",
    "train config.yaml",  # which is finished
    "evaluate runs/run --json",
    "evaluate runs/run --text corpus.txt",
    f"evaluate runs/run --task {EXAMPLES}/last_words.yaml",
    "generate runs/run The --tokens 4",
    "generate runs/run The --beams 2 --tokens 4",
    "export runs/run exported",
    "export runs/run functions --format stablehlo",
    "import exported runs/imported",
    "evaluate runs/imported --text corpus.txt",
    f"finetune {EXAMPLES}/moods.yaml base=runs/run train.epochs=1",
    "report runs/run",
    "checkpoint list runs/run",
    "checkpoint verify runs/run",
    "data show runs/run --step 3",
]
PLAN = "plan config.yaml --topology cpu:8 --no-search"  # whose process has other devices


def can_unshare() -> bool:
    """Whether a process may have a network of its own, in which there is nothing."""
    found = shutil.which("unshare")
    return bool(found) and subprocess.run([found, "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.fault("no network")
def test_every_command_works(tmp_path: Path, run_yaml: str, row: Row):
    corpus = "\n".join(f"  root: {tmp_path}/prepared" if "root:" in line else line for line in run_yaml.split("\n"))
    exportable = corpus.replace("mlp_dim: 64", "mlp_dim: 128")  # as the paper's, four times the width
    (tmp_path / "config.yaml").write_text(f"name: run\n{exportable}")
    (tmp_path / "corpus.txt").write_text("The cat sat on the mat.\n")
    shutil.copytree(EXAMPLES, tmp_path / EXAMPLES)
    (tmp_path / "home").mkdir()
    environment = {
        "HOME": str(tmp_path / "home"),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    alone = [shutil.which("unshare"), "--net"] if can_unshare() else []
    for commands in (COMMANDS, [PLAN]):
        arguments = json.dumps([command.split() for command in commands])
        done = subprocess.run(
            [*alone, sys.executable, OFFLINE, *([] if alone else ["pretend"]), arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        for command in commands:
            assert f"0: {command}\n" in done.stderr
            row.tried()
