"""What `train` does before the first step and after the last, and the exit codes on the way."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from gpt1_jax.reporting import report
from gpt1_jax.training import loop


@pytest.fixture(autouse=True)
def _the_trained_process_keeps_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt1_jax.training.hardware.keep_freed_memory", lambda: None)


def stop(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in [folder, *folder.rglob("*")]}


def test_an_attempt_without_a_checkpoint_binds_nothing(gpt1, config_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_train_step", stop)
        assert gpt1("train", config_file, "model.num_layers=1")[0] == 130
    run = config_file.parent / "runs/run"
    assert "num_layers: 1" in (run / "config.yaml").read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(report, "draw", stop)
        assert gpt1("train", config_file)[0] == 130  # refused no more; killed at its end, before the report
    assert "num_layers: 2" in (run / "config.yaml").read_text(encoding="utf-8")
    assert not (run / "evaluation.json").exists()

    code, out, _ = gpt1("train", config_file, "--json")
    assert code == 0
    shown, final = json.loads(out), json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert shown["step"] == final["step"] == 12
    assert f"{final['word_perplexity']:,.2f}" in (run / "report.html").read_text(encoding="utf-8")

    before = state(config_file.parent)
    assert json.loads(gpt1("train", config_file, "--json")[1]) == shown
    assert state(config_file.parent) == before  # a finished run is shown, and nothing written

    (run / "checkpoints" / "12" / "run" / "tokenizer.model").write_bytes(b"")
    code, _, message = gpt1("train", config_file)
    assert code == 0 and "checkpoints/12: the checkpoint is damaged:\n  run/tokenizer.model has 0 bytes" in message
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8")) == final  # made again
    assert (run / "checkpoints" / "12").is_dir() and (run / "checkpoints" / "damaged-12").is_dir()

    code, _, message = gpt1("train", config_file, "seed=1")
    assert code == 2 and "seed: 0 there, 1 now" in message
    run.rename(run.with_name("renamed"))
    assert gpt1("train", config_file, "name=renamed")[0] == 0

    run = run.with_name("renamed")
    code, _, message = gpt1("evaluate", run, "--text", config_file, "--split", "train")
    assert code == 2 and "--split train exclude each other" in message
    assert json.loads(gpt1("evaluate", run, "--split", "train", "--json")[1])["split"] == "train"
    assert gpt1("generate", run, "The", "--tokens", 4)[0] == 0

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{]", *lines[2:]]), encoding="utf-8")
    for arguments in (("train", config_file, "name=renamed", "train.steps=14", "--allow-changes"), ("report", run)):
        code, _, message = gpt1(*arguments)
        assert code == 3 and "metrics.jsonl:2: not a line of JSON" in message


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOSPC])
def test_storage_that_refuses_a_write_is_no_traceback(gpt1, config_file, monkeypatch, error):
    def refused(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(error, "refused", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_config", refused)
        code, _, message = gpt1("train", config_file)
    assert code == 6
    assert message.splitlines()[-1].startswith("gpt1: ") and "Traceback" not in message


def test_a_file_in_the_place_of_the_runs_folder_is_no_traceback(gpt1, config_file):
    (config_file.parent / "file").touch()
    code, _, message = gpt1("train", config_file, f"runs_dir={config_file.parent / 'file'}")
    assert code == 6 and "Traceback" not in message


def test_a_masked_run_has_a_pseudo_perplexity_and_nothing_that_pretends_to_more(gpt1, config_file):
    overrides = ("name=masked", "model.objective=masked", "train.steps=4", "evaluation.every=4", "evaluation.stride=16")
    code, out, _ = gpt1("train", config_file, *overrides)
    run = config_file.parent / "runs/masked"
    assert code == 0 and "pseudo-perplexity" in out and "gpt1 generate" not in out and "Sample" not in out
    final = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert final["perplexity"] is final["word_perplexity"] is final["bits_per_byte"] is final["limit_nats"] is None
    np.testing.assert_allclose(final["pseudo_perplexity"], np.exp(final["nats"] / final["tokens"]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (evaluation,) = [record for record in records if "validation_loss" in record]
    assert "validation_pseudo_perplexity" in evaluation
    assert not {"validation_perplexity", "validation_bits_per_byte"} & set(evaluation)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{final['pseudo_perplexity']:,.2f}" in page and "Validation perplexity, per token" not in page

    code, out, _ = gpt1("evaluate", run, "--text", config_file, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["perplexity"] is None and shown["pseudo_perplexity"] > 1
    assert "pseudo-perplexity" in gpt1("evaluate", run, "--text", config_file)[1]

    code, _, message = gpt1("generate", run, "The")
    assert code == 2 and "model.objective=masked" in message and "Traceback" not in message

    before = state(config_file.parent)
    assert gpt1("train", config_file, *overrides)[0] == 0
    assert state(config_file.parent) == before  # finished, though it has no samples


def test_a_run_of_a_prefix_model_is_generated_from(gpt1, config_file):
    overrides = ("name=prefix", "model.objective=prefix", "train.steps=4", "evaluation.every=4")
    code, out, _ = gpt1("train", config_file, *overrides)
    run = config_file.parent / "runs/prefix"
    assert code == 0 and "perplexity" in out and "pseudo" not in out
    first, second = (json.loads(gpt1("generate", run, "The cat sat on", "--tokens", 8, "--json")[1]) for _ in range(2))
    assert first["completion"] == second["completion"] and first["tokens"] > 0
