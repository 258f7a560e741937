"""What `train` does before the first step and after the last, and the exit codes on the way."""

import errno
import json
import sys
from pathlib import Path

import pytest

from gpt1_jax import cli
from gpt1_jax.reporting import report
from gpt1_jax.training import loop


@pytest.fixture
def gpt1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns its exit code and what it printed."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpt1", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return command


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

    code, _, message = gpt1("train", config_file, "seed=1")
    assert code == 2 and "seed: 0 there, 1 now" in message
    run.rename(run.with_name("renamed"))
    assert gpt1("train", config_file, "name=renamed")[0] == 0

    run = run.with_name("renamed")
    code, _, message = gpt1("evaluate", run, "--text", config_file, "--split", "train")
    assert code == 2 and "--text and --split train exclude each other" in message
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
