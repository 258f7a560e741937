import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, MeshConfig, ModelConfig, Recipe
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.zero_shot import (
    TaskFigures,
    ZeroShotEvaluator,
    best_threshold,
    check_zero_shot,
    word_perplexity,
)
from gpt1_jax.model.transformer import bind
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.run import Run

MODEL = ModelConfig(
    vocab_size=97, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32"
)
SEPARATOR = 3
ROWS = 24


class Numbers:
    """A text of numbers, each of them a token: the number with the space before it."""

    separator_id = SEPARATOR

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(number) for number in re.findall(r"\d+", text)], np.int32)


@pytest.fixture(scope="module")
def run(draw_params) -> Run:
    config = Config(model=MODEL, evaluation=EvaluationConfig(batch_size=16, sample_tokens=4))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Run(Path("runs/made"), config, 7, 0, None, Numbers(), mesh, draw_params(MODEL, 0.3))


@pytest.fixture(scope="module")
def evaluator(run: Run) -> ZeroShotEvaluator:
    return ZeroShotEvaluator(run)


@partial(jax.jit, static_argnums=2)
def _logits(params, tokens_BT, config):
    model = bind(config, params)
    return model.logits(model(tokens_BT)[0])


def log_probs(run: Run, context: str, text: str) -> np.ndarray:
    """Of every token of the text behind separator and context, one forward pass without a chunk or a padded batch."""
    read = [SEPARATOR, *Numbers().encode(context + text).tolist()]
    tokens = Numbers().encode(text).tolist()
    logits = np.asarray(_logits(run.params, np.array([read + [0] * (16 - len(read))]), MODEL), np.float64)[0]
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normal[np.arange(len(read) - len(tokens) - 1, len(read) - 1), tokens]


def likeliest(run: Run, context: str) -> int:
    read = [SEPARATOR, *Numbers().encode(context).tolist()]
    logits = _logits(run.params, np.array([read + [0] * (16 - len(read))]), MODEL)
    return int(np.asarray(logits)[0, len(read) - 1].argmax())


def words(rng: np.random.Generator, fewest: int = 1, most: int = 4) -> str:
    return " ".join(str(number) for number in rng.integers(4, 97, rng.integers(fewest, most + 1)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows that have the columns of every form."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tasks") / "rows.jsonl"
    rows = [
        {
            "text": words(rng),
            "other": words(rng),
            "gap": f"{words(rng)} _ {words(rng, 1, 3)}",
            "options": [words(rng, 1, 2) for _ in range(2)],
            "answers": [words(rng, 1, 3) for _ in range(3)],
            "two": int(rng.integers(2)),
            "three": int(rng.integers(3)),
        }
        for _ in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "files", "paths": (str(path),)}


def rows_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(table["paths"][0]).read_text().splitlines()]


def recipe(table: dict[str, Any], form: str, **task: Any) -> Recipe:
    settings = {"name": "asked", "evaluation": {"resamples": 50}}
    return Recipe.model_validate(settings | {"task": {"form": form, "validation": table} | task})


def check(found: list[TaskFigures], scores: list[list[float]], right: list[int]) -> None:
    (only,) = found
    assert (only.task, only.split, only.rows, only.unlabelled) == ("asked", "validation", len(scores), 0)
    np.testing.assert_allclose([answer.scores for answer in only.answers], scores, rtol=1e-5, atol=1e-5)
    assert [answer.right for answer in only.answers] == right
    said = [answer.said for answer in only.answers]
    assert said == np.argmax(scores, -1).tolist()
    accuracy = only.metrics["accuracy"]
    np.testing.assert_allclose(accuracy.value, 100 * np.mean(np.equal(said, right)))
    assert accuracy.low < accuracy.value < accuracy.high


def test_a_class_is_the_one_whose_answer_is_the_likelier(run, evaluator, table):
    asked = recipe(
        table,
        "classification",
        text="text",
        label="two",
        labels=("0", "1"),
        zero_shot={"by": "answers", "prompt": "{text} 8", "answers": (" 30 31", " 20 21")},
    )
    rows = rows_of(table)
    scores = [[log_probs(run, f"{row['text']} 8", answer).sum() for answer in (" 30 31", " 20 21")] for row in rows]
    check(evaluator(asked), scores, [row["two"] for row in rows])


def test_entailment_has_both_texts_in_its_prompt(run, evaluator, table):
    answers = (" 20", " 21", " 22")
    asked = recipe(
        table,
        "entailment",
        premise="text",
        hypothesis="other",
        label="three",
        labels=("0", "1", "2"),
        zero_shot={"by": "answers", "prompt": "{premise} 9 {hypothesis}? ", "answers": answers},
    )
    rows = rows_of(table)
    scores = [[log_probs(run, f"{row['text']} 9 {row['other']}", one).sum() for one in answers] for row in rows]
    check(evaluator(asked), scores, [row["three"] for row in rows])


def test_an_answer_of_several_is_chosen_by_the_mean_of_its_tokens(run, evaluator, table):
    asked = recipe(table, "multiple_choice", context="text", question="other", answers="answers", label="three")
    rows = rows_of(table)
    scores = [
        [log_probs(run, f"{row['text']} {row['other']}", f" {one}").mean() for one in row["answers"]] for row in rows
    ]
    check(evaluator(asked), scores, [row["three"] for row in rows])


def test_a_substitution_is_judged_by_what_follows_it(run, evaluator, table):
    asked = recipe(table, "substitution", text="gap", options="options", label="two")
    rows = rows_of(table)
    scores = []
    for row in rows:
        before, after = row["gap"].split("_")
        scores.append([log_probs(run, before + option, after).mean() for option in row["options"]])
    assert len(set(np.argmax(scores, -1))) == 2
    check(evaluator(asked), scores, [row["two"] for row in rows])


def test_a_sentence_is_judged_whole_and_a_tie_is_wrong(run, evaluator, tmp_path):
    pairs = [("10 11 12", "13 14"), ("13 14", "10 11 12"), ("15 16", "15 16"), ("17", "18"), ("18", "17")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs))
    asked = recipe({"kind": "files", "paths": (str(path),)}, "minimal_pair", good="good", bad="bad")
    scores = [[log_probs(run, "", bad).sum(), log_probs(run, "", good).sum()] for good, bad in pairs]
    check(evaluator(asked), scores, [1] * 5)
    (found,) = evaluator(asked)
    said = [answer.said for answer in found.answers]
    assert said[2] == 0 and said[0] != said[1] and said[3] != said[4]


def test_a_last_word_is_right_if_all_of_it_is_greedy(run, evaluator, table, tmp_path):
    texts = []
    for number, row in enumerate(rows_of(table)[:8]):
        one = likeliest(run, row["text"])
        two = likeliest(run, f"{row['text']} {one}")
        # A word of two tokens: greedy, greedy, wrong at its end, wrong at its beginning
        texts.append(f"{row['text']} {one}-{two}" if number % 4 < 2 else f"{row['text']} {one}-{(two + 1) % 97}")
        if number % 4 == 3:
            texts[-1] = f"{row['text']} {(one + 1) % 97}-{two}"
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (found,) = evaluator(recipe({"kind": "files", "paths": (str(path),)}, "last_word", text="text"))
    assert [answer.said for answer in found.answers] == [1, 1, 0, 0] * 2
    assert found.metrics["accuracy"].value == 50
    pairs = [text.rsplit(" ", 1) for text in texts]
    nats = [-log_probs(run, before, f" {word}").sum() for before, word in pairs]
    perplexity = found.metrics["perplexity"]
    np.testing.assert_allclose(perplexity.value, math.exp(np.mean(nats)), rtol=1e-5)
    assert perplexity.low < perplexity.value < perplexity.high


def test_a_threshold_is_taken_from_train_and_used_on_the_others(run, evaluator, table, tmp_path):
    rows = rows_of(table)
    means = [log_probs(run, "", row["text"]).mean() for row in rows]
    levels = np.sort(means)
    threshold = (levels[9] + levels[10]) / 2
    train = tmp_path / "train.jsonl"
    # Of those above the threshold all but one are accepted.
    wrong = int(np.argmax(means))
    labels = [int(mean > threshold) if number != wrong else 0 for number, mean in enumerate(means)]
    pairs = zip(rows, labels, strict=True)
    train.write_text("".join(json.dumps({"text": row["text"], "two": label}) + "\n" for row, label in pairs))
    asked = recipe(
        table,
        "classification",
        train={"kind": "files", "paths": (str(train),)},
        test=table | {"rows": 5},
        text="text",
        label="two",
        labels=("0", "1"),
        metrics=("f1", "accuracy"),
        zero_shot={"by": "log_probability"},
    )
    validation, test = evaluator(asked)
    np.testing.assert_allclose(validation.threshold, threshold, rtol=1e-5)
    assert (test.split, test.rows, test.threshold) == ("test", 5, validation.threshold)
    said = [int(mean > threshold) for mean in means]
    assert [answer.said for answer in validation.answers] == said
    assert list(validation.metrics) == ["f1", "accuracy"]
    right = [row["two"] for row in rows]
    both, either = np.sum(np.array(said) * right), np.sum(said) + np.sum(right)
    np.testing.assert_allclose(validation.metrics["f1"].value, 100 * 2 * both / either)


def test_the_best_threshold_by_hand():
    scores = [-4.0, -3.0, -2.0, -1.0]
    assert best_threshold("accuracy", scores, [0, 0, 1, 1]) == -2.5
    assert best_threshold("accuracy", scores, [0, 1, 0, 1]) == -3.5  # as good as -1.5
    assert best_threshold("accuracy", scores, [1, 1, 1, 1]) < -4
    assert best_threshold("accuracy", scores, [0, 0, 0, 0]) == -1
    assert best_threshold("accuracy", [-2.0] * 3, [0, 0, 1]) == -2
    assert best_threshold("matthews", [-5.0, -3.0, -3.0, -1.0], [0, 0, 0, 1]) == -2
    many = np.linspace(-9, -1, 5000)
    assert abs(best_threshold("accuracy", many, (many > -4).astype(int)) + 4) < 0.01


def test_the_perplexity_of_a_word_by_hand():
    assert word_perplexity([0.0, 2 * math.log(4)], 0, 0) == (pytest.approx(4), None, None)
    assert word_perplexity([math.log(3)], 1000, 0) == (pytest.approx(3), None, None)
    value, low, high = word_perplexity([0.0, 2 * math.log(4)] * 50, 1000, 0)
    # The mean has the deviation ln(4) / 10 of resampled halves.
    assert value == pytest.approx(4)
    assert low == pytest.approx(4 * math.exp(-0.196 * math.log(4)), rel=0.1)
    assert high == pytest.approx(4 * math.exp(0.196 * math.log(4)), rel=0.1)


def test_a_limit_is_of_the_rows_of_each_table(evaluator, table):
    asked = recipe(table, "substitution", text="gap", options="options", label="two", test=table | {"rows": 3})
    assert [result.rows for result in evaluator(asked, limit=5)] == [5, 3]
    (whole, _), (limited, _) = evaluator(asked), evaluator(asked, limit=5)
    assert limited.answers == whole.answers[:5]


@pytest.mark.parametrize(
    ("form", "task", "message"),
    [
        ("text_to_text", {"source": "text", "target": "other"}, "form=text_to_text cannot be asked without training"),
        ("chat", {}, "form=chat cannot be asked without training; fine-tune first"),
        (
            "similarity",
            {"first": "text", "second": "other", "label": "two", "labels": ("0", "1")},
            "form=similarity cannot be asked",
        ),
        ("classification", {"text": "text", "label": "two", "labels": ("0", "1")}, "add task.zero_shot"),
        (
            "classification",
            {"text": "text", "label": "two", "labels": ("0", "1"), "zero_shot": {"by": "log_probability"}},
            "its threshold from the rows of task.train; add that table",
        ),
        (
            "classification",
            {
                "text": "text",
                "label": "two",
                "metrics": ("pearson",),
                "zero_shot": {"by": "answers", "prompt": "{text}", "answers": ()},
            },
            "task.labels is empty",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(form, task, message):
    with pytest.raises(UserError, match=f"^asked: .*{re.escape(message)}"):
        check_zero_shot(recipe({"kind": "files", "paths": ("nowhere.csv",)}, form, **task))


def test_a_row_that_leaves_nothing_to_predict_is_named(evaluator, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "5 _ 6", "options": ["7", "8"], "two": 0}, {"text": "5 _", "options": ["7", "8"], "two": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = recipe(
        {"kind": "files", "paths": (str(path),)}, "substitution", text="text", options="options", label="two"
    )
    with pytest.raises(UserError, match=r"task.validation: row 2 leaves nothing to predict: .*'5 _'"):
        evaluator(asked)


@pytest.fixture
def recipes(table, tmp_path) -> list[Path]:
    """Two recipe files."""
    gap = f"{{form: substitution, validation: {json.dumps(table)}, text: gap, options: options, label: two}}"
    last = f"{{form: last_word, validation: {json.dumps(table)}, text: [text, other]}}"
    paths = [tmp_path / "gaps.yaml", tmp_path / "words.yaml"]
    for path, task in zip(paths, (gap, last), strict=True):
        path.write_text(f"name: {path.stem}\ntask: {task}\n")
    return paths


def test_the_command_asks_tasks(gpt1, run, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt1_jax.training.run.open_run", lambda path: run)
    said = tmp_path / "said.jsonl"
    tasks = [argument for path in recipes for argument in ("--task", path)]
    code, out, err = gpt1("evaluate", "runs/made", *tasks, "--limit", 4, "--predictions", said, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["run"], found["step"]) == ("runs/made", 7)
    gaps, words = found["tasks"]
    assert list(gaps) == ["task", "split", "form", "method", "rows", "unlabelled", "metrics", "threshold"]
    assert [(one["task"], one["split"], one["rows"]) for one in (gaps, words)] == [
        ("gaps", "validation", 4),
        ("words", "validation", 4),
    ]
    assert set(gaps["metrics"]["accuracy"]) == {"value", "low", "high"}
    assert set(words["metrics"]) == {"accuracy", "perplexity"}
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert [(line["task"], line["row"]) for line in lines] == [(n, e) for n in ("gaps", "words") for e in (1, 2, 3, 4)]
    right = [line["said"] == line["right"] for line in lines if line["task"] == "gaps"]
    assert gaps["metrics"]["accuracy"]["value"] == 25 * sum(right)
    code, out, _ = gpt1("evaluate", "runs/made", "--task", recipes[0])
    assert code == 0
    assert re.fullmatch(
        r"gaps, validation, 24 rows: accuracy [\d.]+ \([\d.]+ to [\d.]+\); by mean log-probability of a token behind "
        r"each word\n",
        out,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "a.yaml", "--split", "train"), "--split train and --task a.yaml exclude each other"),
        (("--task", "a.yaml", "--harness", "piqa"), "--task a.yaml and --harness piqa exclude each other"),
        (("--task", "a.yaml", "--stride", 4), "--stride 4 is of texts"),
        (("--limit", 4), "--limit 4 is of tasks"),
        (("--predictions", "said.jsonl"), "--predictions said.jsonl is of --task"),
        (("--task", "a.yaml", "--predictions", "no/said.jsonl"), "there is no folder no"),
        (("--task", "none.yaml"), "none.yaml: there is no such configuration file"),
    ],
)
def test_the_command_refuses_what_does_not_fit(gpt1, arguments, message):
    code, out, err = gpt1("evaluate", "runs/nowhere", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
