"""The commands: what they print, where, and the exit codes that scripts rely on."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

COMMANDS = ["prepare", "train", "evaluate", "generate", "export", "import", "report", "data", "checkpoint"]


def in_a_process(folder: Path, *arguments: str) -> Any:
    # TFDS asks protobuf in a way that protobuf 6.33 has deprecated.
    strict = ["-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning"]
    command = [sys.executable, *strict, "-m", "gpt1_jax", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@dataclass
class Pipeline:
    folder: Path
    run: Path
    prepare: Any
    prepare_again: Any
    train: Any


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, run_yaml: str) -> Pipeline:
    """The first commands of a new user, each in a process of its own."""
    folder = tmp_path_factory.mktemp("pipeline")
    settings = run_yaml.replace("mlp_dim: 64}", "mlp_dim: 64, dtype: float32, scan_layers: true}")
    corpus = "\n".join(f"  root: {folder}/prepared" if "root:" in line else line for line in settings.split("\n"))
    (folder / "config.yaml").write_text(f"name: run\n{corpus}")
    commands = (["prepare", "config.yaml"], ["prepare", "config.yaml", "--json"], ["train", "config.yaml", "--json"])
    results = [in_a_process(folder, *arguments) for arguments in commands]
    return Pipeline(folder, folder / "runs/run", *results)


@pytest.fixture
def trained(pipeline: Pipeline) -> Path:
    assert pipeline.train.code == 0, pipeline.train.err
    return pipeline.run


def test_prepare_says_what_it_read_and_kept(pipeline):
    assert pipeline.prepare.code == 0, pipeline.prepare.err
    lines = pipeline.prepare.out.splitlines()
    assert Path(lines[0]).is_dir()
    assert "200 documents read, 200 kept; dropped: none" in lines[1]
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["train", "validation"]
    assert "prepare: training the tokenizer" in pipeline.prepare.err


def test_prepare_in_json(pipeline):
    found = json.loads(pipeline.prepare_again.out)
    assert found["path"] == pipeline.prepare.out.splitlines()[0]
    assert found["path"].endswith(f"{found['name']}-{found['fingerprint']}")
    assert found["vocab_size"] == 320
    assert sum(split["documents"] for split in found["splits"].values()) == 200


def test_train_prints_one_json_object_and_the_rest_on_standard_error(pipeline, trained):
    found = json.loads(pipeline.train.out)
    assert pipeline.train.out.count("\n") == 1
    assert {"run", "step", "perplexity", "sample", "report"} <= set(found)
    assert found["step"] == 12 and found["run"] == "runs/run"
    assert "step      12/12" in pipeline.train.err
    for name in ("config.yaml", "metrics.jsonl", "report.html", "checkpoints/12"):
        assert (trained / name).exists(), name


def test_evaluate_in_json(trained, gpt1, monkeypatch):
    monkeypatch.chdir(trained.parent.parent)
    result = gpt1("evaluate", "runs/run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert list(found) == ["split", "documents", "tokens", "words", "bytes", "nats", "perplexity", "word_perplexity",
                           "bits_per_byte", "xz_bits_per_byte", "pseudo_perplexity", "limit_nats",
                           "excess_nats_per_document", "excess_percent"]  # fmt: skip
    assert found["split"] == "validation"
    assert math.isclose(found["perplexity"], math.exp(found["nats"] / found["tokens"]))
    assert math.isclose(found["word_perplexity"], math.exp(found["nats"] / found["words"]))
    assert math.isclose(found["bits_per_byte"], found["nats"] / math.log(2) / found["bytes"])
    assert 1 < found["perplexity"] < 320
    assert found["nats"] == json.loads((trained / "evaluation.json").read_text())["nats"]
    # More context for each token; the tokens are the same.
    closer = json.loads(gpt1("evaluate", "runs/run", "--stride", 8, "--json").out)
    assert closer["tokens"] == found["tokens"] and closer["nats"] != found["nats"]


def test_evaluate_texts(trained, gpt1, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat.\n")
    found = json.loads(gpt1("evaluate", trained, "--text", text, "--json").out)
    assert (found["split"], found["documents"], found["words"], found["bytes"]) == ("text", 1, 6, 24)
    both = gpt1("evaluate", trained, "--text", text, "--text", text)
    assert both.out.startswith("text: 2 documents\n")
    assert "(12 words)" in both.out and "(48 bytes;" in both.out


def test_generate_in_json_is_what_generate_prints(trained, gpt1):
    arguments = ["generate", trained, "The cat", "--temperature", 0, "--tokens", 6]
    found = json.loads(gpt1(*arguments, "--json").out)
    assert list(found) == ["prompt", "completion", "tokens", "seconds"]
    assert found["prompt"] == "The cat" and 0 < found["tokens"] <= 6 and found["seconds"] > 0
    again = json.loads(gpt1(*arguments, "--json").out)
    assert again["completion"] == found["completion"]
    assert gpt1(*arguments).out == f"The cat{found['completion']}\n"


def test_generate_draws_by_its_seed(trained, gpt1):
    def drawn(seed: int) -> str:
        return gpt1("generate", trained, "", "--tokens", 12, "--seed", seed, "--top-k", 50, "--top-p", 0.95).out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(trained, gpt1):
    result = gpt1("generate", trained, "The cat sat on the mat. " * 40, "--tokens", 4)
    assert result.code == 0
    assert "the context has room for 28: its beginning is cut off" in result.err
    assert result.out.startswith("The cat sat on the mat. " * 40)


def test_report(trained, gpt1, tmp_path):
    result = gpt1("report", trained, trained, "--out", tmp_path / "page.html")
    assert (result.code, result.out) == (0, f"{tmp_path / 'page.html'}\n")
    assert "<html" in (tmp_path / "page.html").read_text()


def refused(result: Any, *told: str) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in told:
        assert text in result.err, result.err


def test_a_users_mistake_ends_a_process_with_2_and_one_message(tmp_path):
    refused(in_a_process(tmp_path, "trian"), "trian")
    result = in_a_process(tmp_path, "train", "none.yaml")
    refused(result, "gpt1: none.yaml: there is no such configuration file")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.num_layer=3", "command line: model.num_layer=3: unknown key; did you mean 'model.num_layers'?"),
        ("train.steps=many", 'command line: train.steps="many": '),
        ("train.steps=true", "command line: train.steps=true: "),
        ("train.steps", "command line: 'train.steps': expected key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(config_file, gpt1, command, override, told):
    refused(gpt1(command, config_file, override), told)
    assert not (config_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mesh.data=3"], "do not multiply to the number of devices, 1"),
        (["mesh.data=1", "mesh.fsdp=2"], "mesh.fsdp=2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_any_work(config_file, gpt1, tmp_path, overrides, told):
    refused(gpt1("train", config_file, f"data.root={tmp_path}/prepared", *overrides), told)
    assert not (tmp_path / "prepared").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["evaluate"], ["generate", "The"], ["report"]])
def test_an_unknown_run_is_named(tmp_path, gpt1, arguments):
    command, *rest = arguments
    refused(gpt1(command, tmp_path / "none", *rest), f"{tmp_path / 'none'}", "no run here")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--temperature", "-1"], "temperature=-1.0: must be at least 0"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--top-k", "0"], "top_k=0: must be at least 1"),
        (["--top-p", "0"], "top_p=0.0: must be above 0"),
        (["--top-p", "1.5"], "top_p=1.5"),
        (["--tokens", "0"], "tokens"),
        (["--tokens", "32"], "tokens"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_sampling_values_are_named(trained, gpt1, arguments, told):
    refused(gpt1("generate", trained, "The", *arguments), told)


def test_bad_evaluations_are_named(trained, gpt1, tmp_path):
    refused(gpt1("evaluate", trained, "--stride", 33), "--stride 33 is longer than the context, 32 tokens")
    refused(gpt1("evaluate", trained, "--split", "test"), "test")
    refused(gpt1("evaluate", trained, "--text", tmp_path / "none.txt"), "none.txt")
    refused(gpt1("evaluate", trained, "--text", trained / "config.yaml", "--split", "train"), "exclude each other")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(gpt1, command):
    result = gpt1(command, "--help")
    assert result.code == 0
    assert "Examples:" in result.out and f"gpt1 {command} " in result.out


def test_help_lists_every_command_and_does_not_import_jax():
    code = (
        "import sys; from gpt1_jax.cli import app; app(['--help'], standalone_mode=False); "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
