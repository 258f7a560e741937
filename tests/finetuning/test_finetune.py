"""Fine-tuning as a whole, on a base of one layer: results, resumption, and the mistakes of a user."""

import json
import os
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gpt1_jax.config import FinetuneConfig
from gpt1_jax.config_file import parse, parse_config
from gpt1_jax.errors import DamagedError, Interrupted, UserError
from gpt1_jax.finetuning import finetune as module
from gpt1_jax.finetuning.finetune import best_epoch, finetune, summarize
from gpt1_jax.text.conversation import chat_template
from gpt1_jax.text.tokenizer import read_tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.compilation_cache import compilation_cache
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.run import open_run, write_config
from gpt1_jax.training.state import init_state

WORDS = [("The cat sat.", "A dog ran over."), ("Birds sing when", "The mat, far away"), ("the hill begins", "day on")]
CHATS = [
    [{"role": "user", "content": a}, {"role": "assistant", "content": b}] * turns
    for turns, (a, b) in zip((1, 2, 1), WORDS, strict=True)
]


def rows(form):
    """Twelve rows, the label of each to be seen in its text."""
    made = []
    for number in range(12):
        a, b = WORDS[number % 3]
        made.append(
            {
                "classification": {"text": a if number % 2 else b, "label": str(number % 2)},
                "similarity": {"a": a, "b": b if number % 2 else a, "label": 1 + number % 2 * 2.5},
                "multiple_choice": {"c": a, "answers": [b, "cat", "dog"][: 2 + number % 2], "label": number % 2},
                "text_to_text": {"a": a, "b": b},
                "chat": {"messages": CHATS[number % 3]},
            }[form]
        )
    return made


class Workshop:
    """A folder with a base, whose tables are beside it."""

    def __init__(self, folder: Path, corpus, run_yaml: str):
        self.folder, self.said = folder, []
        overrides = ["model.num_layers=1", "model.dtype=float32", "logging.tensorboard=false"]
        config, _ = resolve(parse_config(f"name: base\nruns_dir: {folder}\n{run_yaml}", "c", overrides))
        tokenizer, fingerprint = read_tokenizer(corpus.tokenizer_file), corpus.manifest.fingerprint
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = init_state(config, optimizer, make_mesh(config.mesh))
        for name in ("base", "imported"):
            config = config.model_copy(update={"name": name})
            write_config(config)
            with Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
                if name == "base":
                    files = RunFiles(config.to_yaml(), tokenizer.to_bytes(), 96, data=fingerprint, corpus=fingerprint)
                    checkpoints.save(12, state, files)
                else:
                    files = RunFiles(config.to_yaml(), tokenizer.to_bytes(), 0, data=None, corpus=None)
                    checkpoints.save_imported(state.params, files)

    def config(self, form: str, task: dict, *overrides: str) -> FinetuneConfig:
        made = rows(form)
        for split, some in (("train", made[:9]), ("validation", made[6:]), ("test", made[:4])):
            path = self.folder / f"{form}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        tables = {
            split: {"kind": "files", "paths": [f"{self.folder}/{form}-{split}.jsonl"]}
            for split in ("train", "validation", "test")
        }
        settings = ["model.dtype=float32", "train.batch_size=4", "train.epochs=1", "train.log_every=1"]
        settings += ["optimizer.learning_rate=3e-3", "logging.tensorboard=false", f"runs_dir={self.folder}"]
        settings += [f"base={self.folder}/base", f"name={form}", "evaluation.batch_size=8", "evaluation.max_tokens=99"]
        text = json.dumps({"task": {**task, **tables}})
        return parse(FinetuneConfig, text, "task.yaml", [*settings, *overrides])

    def finetune(self, form: str, task: dict, *overrides: str, allow_changes: bool = False) -> list[dict]:
        config = self.config(form, task, *overrides)
        self.said = []
        with compilation_cache(config):  # the same functions are compiled once
            with Interruption() as interruption, Hosts(interruption=interruption) as hosts:
                return finetune(config, hosts, self.said.append, allow_changes)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, corpus, run_yaml):
    return Workshop(tmp_path_factory.mktemp("workshop"), corpus, run_yaml)


CLASSES = {"form": "classification", "text": "text", "label": "label", "labels": ["0", "1"]}
CLASSES["metrics"] = ["accuracy", "f1"]
TWO_EPOCHS = ["train.epochs=2"]


@pytest.fixture(scope="module")
def classified(workshop):
    """Two seeds of two epochs of two updates."""
    return workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1]")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path, step):
    return open_run(path, step=step).params


def test_results_of_several_seeds(workshop, classified):
    folder = workshop.folder / "classification"
    for seed, found in enumerate(classified):
        run = folder / f"seed-{seed}"
        assert found == json.loads((run / "results.json").read_text())
        assert list(found) == [
            *("run", "task", "base", "base_step", "seed", "step", "epoch", "epochs"),
            *("examples", "truncated", "unlabelled"),
            *("figures", "perplexity"),
        ]
        assert (found["run"], found["base"], found["seed"]) == (str(run), f"{workshop.folder}/base", seed)
        assert found["examples"] == {"train": 9, "validation": 6, "test": 4}
        assert [(epoch["epoch"], epoch["step"]) for epoch in found["epochs"]] == [(1, 2), (2, 4)]
        assert found["step"] == 2 * found["epoch"] and open_run(run).step == found["step"]
        for split in ("validation", "test"):
            answers = lines(run / f"predictions-{split}.jsonl")
            assert [sorted(answer) for answer in answers] == [["prediction", "reference", "row", "scores"]] * len(
                answers
            )
            right = [answer["prediction"] == answer["reference"] for answer in answers]
            accuracy = found["figures"][split]["accuracy"]
            assert accuracy["value"] == pytest.approx(100 * np.mean(right))
            assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
            assert all(answer["prediction"] == int(np.argmax(answer["scores"])) for answer in answers)
        best = found["epochs"][found["epoch"] - 1]["validation_accuracy"]
        assert best == max(epoch["validation_accuracy"] for epoch in found["epochs"])
        assert best == pytest.approx(found["figures"]["validation"]["accuracy"]["value"])
        before, after = found["perplexity"]["before"], found["perplexity"]["after"]
        assert found["perplexity"]["tokens"] == 99 and before != after
        assert 300 < before < 340  # of 320 tokens, by weights that were drawn
    assert classified[0]["perplexity"]["before"] == classified[1]["perplexity"]["before"]
    summary = json.loads((folder / "results.json").read_text())
    assert summary["runs"] == classified and summary["summary"] == summarize(classified)
    values = [found["figures"]["test"]["f1"]["value"] for found in classified]
    expected = {"mean": statistics.fmean(values), "median": statistics.median(values)}
    assert summary["summary"]["test"]["f1"] == {**expected, "low": min(values), "high": max(values)}


def test_what_is_done_is_read_and_not_made_again(workshop, classified, monkeypatch):
    def never(*arguments):
        pytest.fail("made again")

    for name in ("_text", "_run"):
        monkeypatch.setattr(module, name, never)
    assert workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1]") == classified
    assert any("seed-1: done already, and not measured again" in line for line in workshop.said)
    summary = workshop.folder / "classification" / "results.json"
    before = summary.read_bytes()
    monkeypatch.setattr(module, "_text", lambda *arguments: None)
    monkeypatch.setattr(module, "_run", lambda job, config: {**classified[1], "seed": config.seed})
    third = workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1, 2]")  # the one that is missing
    assert third[:2] == classified and third[2]["seed"] == 2
    assert json.loads(summary.read_text())["runs"] == third
    summary.write_bytes(before)


def test_killed_in_its_second_epoch_it_ends_as_if_it_had_not_been(workshop, classified, monkeypatch):
    compile_step, made = module.compile_step, []

    def killed(*arguments):
        compiled = compile_step(*arguments)

        def step(state, batch):
            made.append(1)
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(state, batch)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(module, "compile_step", killed)
        with pytest.raises(Interrupted, match="SIGTERM: stopped after step 3"):
            workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "name=killed")
    (found,) = workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "name=killed")
    run, whole = workshop.folder / "killed", workshop.folder / "classification" / "seed-0"
    assert {**found, "run": 0, "task": 0} == {**classified[0], "run": 0, "task": 0}
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [2, 4]  # of both epochs, and no other
    for step in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, weights(run, step), weights(whole, step))
    for name in ("predictions-validation.jsonl", "predictions-test.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    timed = ("seconds", "tokens_per_second", "mfu")
    figures = [
        [{key: value for key, value in line.items() if key not in timed} for line in lines(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert figures[0] == figures[1]


def test_a_fine_tuned_run_is_a_base(workshop, classified):
    best = workshop.folder / "classification" / "seed-1"
    (found,) = workshop.finetune("similarity", SIMILARITY, f"base={best}", "name=second")
    assert found["base"] == str(best)
    run = open_run(workshop.folder / "second")
    assert (run.config.model.num_classes, run.config.model.special_tokens) == (1, 3)
    assert run.tokenizer.special_tokens == ("_start_", "_delimiter_", "_classify_")
    assert run.corpus == open_run(best).corpus is not None


def test_changes_are_refused_and_then_allowed(workshop, classified):
    base = ["name=killed", "train.epochs=2"]
    with pytest.raises(UserError, match=r"finetune.train.auxiliary: 0.5 there, 0.25 now"):
        workshop.finetune("classification", CLASSES, *base, "train.auxiliary=0.25")
    with pytest.raises(UserError, match="epochs of 2 updates of 4 examples, and cannot go on with 4 of 2"):
        workshop.finetune("classification", CLASSES, *base, "train.batch_size=2", allow_changes=True)
    (found,) = workshop.finetune(
        "classification", CLASSES, "name=killed", "train.epochs=3", "evaluation.resamples=0", allow_changes=True
    )
    assert [epoch["step"] for epoch in found["epochs"]] == [2, 4, 6]
    assert found["figures"]["test"]["accuracy"]["low"] is None
    assert found == json.loads((workshop.folder / "killed" / "results.json").read_text())


def test_a_name_stands_for_one_run_or_for_several(workshop, classified):
    with pytest.raises(UserError, match=r"seeds=\[0\]: .*/classification holds the runs of several seeds"):
        workshop.finetune("classification", CLASSES, *TWO_EPOCHS)
    with pytest.raises(UserError, match=r"seeds=\[0, 1\]: .*/base holds a single run; start others with name=NEW"):
        workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1]", "name=base")
    with pytest.raises(UserError, match="holds a run that was not fine-tuned"):
        workshop.finetune("classification", CLASSES, "name=base", allow_changes=True)


def test_damaged_results_are_named(workshop, classified):
    path = workshop.folder / "classification" / "seed-1" / "results.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DamagedError, match=r"results\.json: not what fine-tuning writes"):
        workshop.finetune("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1]")
    path.write_bytes(whole)


def test_an_epoch_whose_metrics_the_log_lacks_is_measured_again(tmp_path, monkeypatch):
    logged = [
        {"step": 2, "validation_f1": 1.0},  # made with other metrics
        {"step": 3, "loss": 0.5},
        {"step": 4, "validation_f1": 2.0, "validation_accuracy": 3.0, "validation_matthews": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    config = SimpleNamespace(run_dir=tmp_path, checkpoint=SimpleNamespace(every=2), train=SimpleNamespace(steps=6))
    task = SimpleNamespace(metrics=("accuracy", "f1"))
    job = SimpleNamespace(config=SimpleNamespace(task=task), mesh="mesh", hosts=Hosts())
    monkeypatch.setattr(module, "open_run", lambda *given: SimpleNamespace(params=given))

    def evaluate(params):
        assert params == (tmp_path, "mesh", params[2], job.hosts)
        return {"validation_accuracy": 10.0 + params[2], "validation_f1": 20.0 + params[2]}

    assert module._epochs(job, config, evaluate) == [
        {"epoch": 1, "step": 2, "validation_accuracy": 12.0, "validation_f1": 22.0},
        {"epoch": 2, "step": 4, "validation_accuracy": 3.0, "validation_f1": 2.0},
        {"epoch": 3, "step": 6, "validation_accuracy": 16.0, "validation_f1": 26.0},
    ]


@pytest.mark.parametrize(
    ("values", "best"), [([50.0, 75.0, 75.0, 60.0], 2), ([-100.0, -3.0], 2), ([-100.0, -100.0], 1), ([9.0], 1)]
)
def test_the_best_epoch_is_the_first_of_equals(values, best):
    epochs = [{"epoch": n, "validation_f1": -n, "validation_accuracy": value} for n, value in enumerate(values, 1)]
    assert best_epoch(epochs, "accuracy")["epoch"] == best


SIMILARITY = {"form": "similarity", "first": "a", "second": "b", "label": "label", "metrics": ["pearson", "spearman"]}
CHOICES = {"form": "multiple_choice", "context": "c", "answers": "answers", "label": "label"}
TEXTS: dict[str, object] = {"form": "text_to_text", "source": "a", "target": "b", "target_tokens": 6, "beams": 2}
TEXTS["metrics"] = ["exact_match", "chrf"]
CHAT = {"form": "chat", "answer_tokens": 5}


def test_multiple_choice_from_a_base_without_a_corpus(workshop):
    (found,) = workshop.finetune("multiple_choice", CHOICES, f"base={workshop.folder}/imported")
    assert found["perplexity"] is None
    assert sum("perplexity before and after is not measured" in line for line in workshop.said) == 1
    answers = lines(workshop.folder / "multiple_choice" / "predictions-validation.jsonl")
    assert [len(answer["scores"]) for answer in answers] == [2, 3] * 3  # as many as there are answers
    assert [answer["reference"] for answer in answers] == [0, 1] * 3


def test_text_to_text_and_the_perplexity_of_given_texts(workshop, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat.\n" * 3)
    (found,) = workshop.finetune("text_to_text", TEXTS, f"evaluation.texts=[{tmp_path}/a.txt]")
    assert found["perplexity"]["of"] == f"{tmp_path}/a.txt" and 10 < found["perplexity"]["tokens"] < 99
    answers = lines(workshop.folder / "text_to_text" / "predictions-test.jsonl")
    assert [answer["reference"] for answer in answers] == [row["b"] for row in rows("text_to_text")[:4]]
    assert all(isinstance(answer["prediction"], str) and "scores" not in answer for answer in answers)
    assert sorted(found["figures"]["test"]) == ["chrf", "exact_match"]


def test_chat_is_asked_for_every_answer(workshop):
    (found,) = workshop.finetune("chat", CHAT)
    answers = lines(workshop.folder / "chat" / "predictions-test.jsonl")
    expected = [m["content"] for row in rows("chat")[:4] for m in row["messages"] if m["role"] == "assistant"]
    assert [answer["reference"] for answer in answers] == expected and len(expected) == 5
    assert [(answer["row"], answer["turn"]) for answer in answers] == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert found["examples"]["test"] == 4
    run = open_run(workshop.folder / "chat")
    assert run.config.model.num_classes is None and run.tokenizer.special_tokens[-1] == "<|end|>"
    stored = workshop.folder / "chat" / "checkpoints" / str(run.step) / "run" / "chat_template.jinja"
    assert stored.read_text() == run.chat_template == chat_template(run.tokenizer)


def test_a_system_message_without_room_is_found_before_training(workshop, monkeypatch):
    monkeypatch.setattr(module, "learn", lambda *arguments: pytest.fail("trained"))
    long = [{"role": "system", "content": "cat " * 99}, *CHATS[0]]
    config = workshop.config("chat", CHAT, "name=long")
    path = workshop.folder / "chat-validation.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}) + "\n" + json.dumps({"messages": long}) + "\n")
    with pytest.raises(UserError, match=r"task.validation: row 2: the system's message leaves no room"):
        finetune(config, Hosts(), print)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base=null"], "base: not given: which run to begin with"),
        (["base=nowhere"], "nowhere: no run here"),
        (["task.train=null"], "task.train: not given: there is nothing to learn from"),
        (["train.batch_size=16"], "train.batch_size=16: task.train has 9 examples, fewer than a batch; lower it"),
        (["train.batch_size=16", "train.accumulation=3"], "train.accumulation=3 does not divide train.batch_size=16"),
        (["task.labels=['0', '2']"], "column 'label' holds '1', which is none of task.labels=['0', '2']"),
        (["task.text=txet"], "did you mean 'text'"),
        (["task.metrics=[pearson]"], "task.metrics=pearson: not a metric of classes"),
        (["train.frozen_layers=2"], "train.frozen_layers=2: the model of"),
        (["mesh.data=3"], "mesh.data=3"),
        (["evaluation.texts=[nothing.txt]"], "nothing.txt: this text file cannot be read"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(workshop, gpt1, tmp_path, overrides, message):
    config = workshop.config("classification", CLASSES)
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    result = gpt1("finetune", path, f"runs_dir={tmp_path}/runs", *overrides, "--json")
    assert (result.code, result.out) == (2, "")
    assert message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_json_alone_and_tables_else(workshop, classified, gpt1, tmp_path):
    path = tmp_path / "task.yaml"
    config = workshop.config("classification", CLASSES, *TWO_EPOCHS, "seeds=[0, 1]")
    path.write_text(json.dumps(config.model_dump(mode="json")))
    result = gpt1("finetune", path, "--json")
    assert result.code == 0
    summary = {"task": "classification", "runs": classified, "summary": summarize(classified)}
    assert json.loads(result.out) == json.loads(json.dumps(summary))
    printed = gpt1("finetune", path)
    assert printed.code == 0
    for expected in ("test: 4 examples, 0 truncated", "accuracy", "median", "perplexity per token of validation split"):
        assert expected in printed.out
    helped = gpt1("finetune", "--help")
    assert helped.code == 0 and "gpt1 finetune data/tasks/sst2.yaml" in helped.out
