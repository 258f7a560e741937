"""``gpt1 export`` and ``gpt1 import``, and the commands on what they make."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt1_jax.data.corpus import Corpus


@pytest.fixture(scope="module")
def run_dir(make_run, write_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    write_run(make_run(path, std=0.1, dropout=0.0, attention_dropout=0.0))
    return path


@pytest.fixture
def exported(run_dir, gpt1, tmp_path) -> Path:
    code, out, err = gpt1("export", run_dir, tmp_path / "model")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'model'}: step 0 of {run_dir}, weights in 1 file(s)")
    return tmp_path / "model"


def test_an_imported_run_is_evaluated_continued_and_exported(exported, run_dir, gpt1, tmp_path):
    code, out, _ = gpt1("import", exported, tmp_path / "again", "model.dtype=float32")
    assert code == 0 and out.startswith(f"{tmp_path / 'again'} is imported: 3 layers of width 48, 320 tokens.")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. A dog ran over the hill, far away.\n" * 5)
    for arguments in (
        ("evaluate", "--text", text, "--json"),
        ("generate", "The cat", "--temperature", 0, "--tokens", 9),
    ):
        command, *rest = arguments
        first, again = gpt1(command, run_dir, *rest), gpt1(command, tmp_path / "again", *rest)
        assert first == again and first[0] == 0, first
    code, out, _ = gpt1("export", tmp_path / "again", tmp_path / "shards", "--max-shard-size", "100kb")
    assert code == 0 and "weights in 5 file(s)" in out
    code, out, _ = gpt1("export", tmp_path / "again", tmp_path / "hlo", "--format", "stablehlo", "--dtype", "bfloat16")
    assert code == 0 and "forward and decode" in out


def test_an_imported_run_has_no_corpus_until_it_is_trained_on(exported, gpt1, tmp_path, corpus: Corpus, run_yaml):
    again = tmp_path / "again"
    assert gpt1("import", exported, again, "model.dtype=float32", "evaluation.prompts=[The cat]")[0] == 0
    code, out, err = gpt1("evaluate", again)
    assert (code, out) == (2, "")
    assert "this run was imported, so it has no corpus yet" in err and f"gpt1 train {again}/config.yaml" in err
    sources = next(line for line in run_yaml.splitlines() if "paths:" in line).strip()
    code, out, err = gpt1(
        "train",
        again / "config.yaml",
        f"data.root={tmp_path / 'prepared'}",
        f"data.sources=[{{kind: files, {sources}}}]",
        "data.validation_fraction=0.1",
        "data.workers=1",
        *("train.steps=3", "train.batch_size=8", "optimizer.warmup_steps=1", "optimizer.learning_rate=1e-3"),
        *("model.scan_layers=true", "logging.tensorboard=false", "checkpoint.keep=1", "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["step"] == 3 and found["sample"]["prompt"] == "The cat"
    assert (again / "report.html").exists()
    code, out, _ = gpt1("evaluate", again, "--json")
    assert code == 0 and json.loads(out)["nats"] == found["nats"]
    assert gpt1("export", again, tmp_path / "trained")[0] == 0
    assert f"{found['perplexity']:,.2f}" in (tmp_path / "trained" / "README.md").read_text()


def test_mistakes_are_named_before_any_work(exported, run_dir, gpt1, tmp_path):
    def refused(*arguments: object) -> str:
        code, out, err = gpt1(*arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        return err

    assert "model: exists already" in refused("export", run_dir, exported)
    assert "first: exists already" in refused("import", exported, run_dir)
    assert "no run here" in refused("export", tmp_path / "none", tmp_path / "out")
    assert "there is no such folder" in refused("import", tmp_path / "none", tmp_path / "out")
    assert "--max-shard-size 5TB: expected a size" in refused(
        "export", run_dir, tmp_path / "out", "--max-shard-size", "5TB"
    )
    assert "--dtype float32: weights go" in refused("export", run_dir, tmp_path / "out", "--dtype", "float32")
    stablehlo = ("--format", "stablehlo", "--max-shard-size", "1GB")
    assert "--max-shard-size 1GB: --format stablehlo writes one file" in refused(
        "export", run_dir, tmp_path / "out", *stablehlo
    )
    assert "onnx" in refused("export", run_dir, tmp_path / "out", "--format", "onnx")
    assert not (tmp_path / "out").exists()


def test_a_killed_export_leaves_nothing_under_its_name(run_dir, gpt1, tmp_path):
    code = (
        "import os, signal; from gpt1_jax import cli; from gpt1_jax.interop import huggingface\n"
        "huggingface.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cli.app(['export', '{run_dir}', '{tmp_path / 'model'}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / ".model.partial" / "model.safetensors").exists()
    assert not (tmp_path / "model").exists()
    assert gpt1("export", run_dir, tmp_path / "model")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damage_has_its_own_exit_code(exported, gpt1, tmp_path):
    (exported / "model.safetensors").write_bytes(b"")
    code, out, err = gpt1("import", exported, tmp_path / "again")
    assert (code, out) == (3, "") and "model.safetensors: not a sound safetensors file" in err
    assert not (tmp_path / "again").exists()
