"""``gpt1 data show`` against what the loop has really read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.prepare import prepare
from gpt1_jax.text.tokenizer import read_tokenizer
from gpt1_jax.training import loop
from gpt1_jax.training.history import HISTORY
from gpt1_jax.training.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_once")
QUICK = ["model.dtype=float32", "model.num_layers=1", "model.scan_layers=true", "checkpoint.every=100"]
QUICK += ["evaluation.every=100", "data.windows=packed"]


class Trained:
    """A run on two sources and what each of its steps has read."""

    def __init__(self, yaml: str, folder: Path, patch: pytest.MonkeyPatch):
        self.yaml, self.folder, self.patch = yaml, folder, patch
        self.run = folder / "runs/run"
        self.read: dict[int, np.ndarray] = {}

    def config(self, *overrides: str) -> Config:
        return parse_config(f"name: run\nruns_dir: {self.folder}/runs\n{self.yaml}", "c", [*QUICK, *overrides])

    def train(self, *overrides: str) -> None:
        config = self.config(*overrides)
        corpus = Corpus(prepare(config))
        compile_train_step = loop.compile_train_step

        def compile_and_watch(*arguments: Any) -> Callable:
            step_fn = compile_train_step(*arguments)

            def watched(state: Any, batch: jax.Array) -> tuple:
                with jax.transfer_guard("allow"):
                    self.read[int(state.step) + 1] = np.asarray(batch)
                return step_fn(state, batch)

            return watched

        with self.patch.context() as patch:
            patch.setattr(loop, "compile_train_step", compile_and_watch)
            tokenizer = read_tokenizer(corpus.tokenizer_file)
            loop.train(config, corpus, tokenizer, make_mesh(config.mesh), lambda params: {}, allow_changes=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_yaml: str, compile_once: None) -> Trained:
    """Trained to step 5, gone on with to step 8, and with another batch size, seed and weights to step 12."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": f"More of it. {k} " * 9}) + "\n" for k in range(90)))
    weight = "{0: 1.0, 3: 0.0, 6: 9.0}"
    more = f"    - {{kind: files, paths: ['{folder}/more.jsonl'], weight: {weight}}}\n"
    yaml = run_yaml.replace("*.txt']\n", f"*.txt']\n{more}").replace("  root:", f"  root: {folder}/prepared\n  # was")
    run = Trained(yaml, folder, pytest.MonkeyPatch())
    run.train("train.steps=5")
    run.train("train.steps=8")
    run.yaml = yaml.replace(weight, "2")
    run.train("train.steps=12", "train.batch_size=4", "seed=7")
    return run


@pytest.mark.parametrize("step", range(1, 13))
def test_what_is_shown_is_what_was_read(trained, gpt1, step):
    result = gpt1("data", "show", trained.run, "--step", step, "--json")
    assert result.code == 0 and not result.err
    shown = json.loads(result.out)
    assert shown["step"] == step
    rows = [[token for part in row["documents"] for token in part["ids"]] for row in shown["rows"]]
    assert rows == trained.read[step].tolist()
    assert [row["example"] for row in shown["rows"]] == (
        list(range(8 * step - 8, 8 * step)) if step <= 8 else list(range(64 + 4 * (step - 9), 64 + 4 * (step - 8)))
    )
    if 4 <= step <= 6:  # the second source has no weight
        assert len({row["source"] for row in shown["rows"]}) == 1


def test_the_page_has_each_row_with_its_documents_and_their_text(trained, gpt1):
    shown = json.loads(gpt1("data", "show", trained.run, "--step", 9, "--json").out)
    page = gpt1("data", "show", trained.run, "--step", 9).out
    assert page.count("==== example ") == 4
    assert page.count("---- ") == sum(len(row["documents"]) for row in shown["rows"])
    for row in shown["rows"]:
        assert f"example {row['example']}, source {row['source']}, epoch {row['epoch']} " in page
        for part in row["documents"]:
            first, stop = part["tokens"]
            head = f"{part['identity']} (train {part['position']}), tokens {first} to {stop} of {part['of']}"
            assert f"{head}\n{part['text']}\n" in page


def test_what_cannot_be_shown_is_refused(trained, gpt1, tmp_path):
    def refused(*arguments: object) -> str:
        result = gpt1("data", "show", *arguments)
        assert result.code == 2 and not result.out
        return result.err

    assert f"--step 13: {trained.run} has 12 steps" in refused(trained.run, "--step", 13)
    assert "no run here (config.yaml is missing)" in refused(tmp_path, "--step", 1)
    copy = tmp_path / "run"
    copy.mkdir()
    settings = (trained.run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(settings)
    assert "no step of this run has read any data" in refused(copy, "--step", 1)
    (copy / HISTORY).write_text((trained.run / HISTORY).read_text())
    (copy / "config.yaml").write_text(settings.replace("/prepared", "/elsewhere"))
    assert "the corpus of" in refused(copy, "--step", 1)
    lines = (trained.run / HISTORY).read_text().splitlines(keepends=True)
    (copy / HISTORY).write_text("".join(lines[1:]))
    assert "what was read is known from step 9 on" in refused(copy, "--step", 8)
    (copy / HISTORY).write_text(lines[0].replace('"seed"', '"sead"'))
    result = gpt1("data", "show", copy, "--step", 1)
    assert result.code == 3 and "data.jsonl: not what training writes" in result.err


def test_the_order_is_noted_where_it_changes_and_only_there(trained):
    noted = [json.loads(line) for line in (trained.run / HISTORY).read_text().splitlines()]
    assert [(line["step"], line["examples"], line["batch_size"], line["seed"]) for line in noted] == [
        (0, 0, 8, 0),
        (8, 64, 4, 7),
    ]
