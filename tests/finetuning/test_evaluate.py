"""Which recipes a fine-tuned run can be asked; nothing here computes anything."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from gpt1_jax.config import Recipe
from gpt1_jax.config_file import parse
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.evaluate import can_answer

TABLE = {"kind": "files", "paths": ["nowhere.jsonl"]}
CLASSES = {"form": "classification", "text": "text", "label": "label", "labels": ["bad", "good"], "validation": TABLE}
NUMBERS = {**CLASSES, "labels": [], "metrics": ["pearson"]}
CHOICES = {"form": "multiple_choice", "context": "c", "answers": "a", "label": "label", "validation": TABLE}
CHAT = {"form": "chat", "validation": TABLE}


def recipe(task):
    return parse(Recipe, json.dumps({"name": "asked", "task": task}), "recipe")


def run_of(task):
    finetune = None if task is None else SimpleNamespace(task=recipe(task).task)
    return SimpleNamespace(path="runs/made", config=SimpleNamespace(finetune=finetune, context_length=40))


@pytest.mark.parametrize(
    ("learned", "asked", "can"),
    [
        (CLASSES, CLASSES, True),
        (NUMBERS, NUMBERS, True),
        ({**CHOICES, "labels": ["1", "2"]}, {**CHOICES, "labels": ["A", "B"]}, True),
        (CHAT, CHAT, True),
        (None, CLASSES, False),
        (CHAT, CLASSES, False),
        (NUMBERS, CLASSES, False),
        (CLASSES, {**CLASSES, "labels": ["bad", "good", "fair"]}, False),
    ],
)
def test_a_run_can_answer_what_has_its_form_and_its_classes(learned, asked, can):
    assert can_answer(run_of(learned), recipe(asked)) == can


@pytest.mark.parametrize("labels", [["good", "bad"], ["0", "1"]])
def test_a_class_is_not_taken_for_another(labels):
    message = f"asked: task.labels={labels}, but runs/made was fine-tuned with ['bad', 'good']"
    with pytest.raises(UserError, match=re.escape(message)):
        can_answer(run_of(CLASSES), recipe({**CLASSES, "labels": labels}))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**CHAT, "answer_tokens": 33}, "task.answer_tokens=33 needs at least 41 tokens"),
        ({**CHAT, "answer_tokens": 8, "metrics": ["bleu"]}, "task.metrics=bleu needs the library 'sacrebleu'"),
    ],
)
def test_all_recipes_are_checked_before_one_is_asked(gpt1, tmp_path, monkeypatch, task, message):
    monkeypatch.setattr("gpt1_jax.training.run.open_run", lambda path: run_of(CHAT))
    monkeypatch.setattr("gpt1_jax.finetuning.evaluate.evaluate_finetuned", lambda *arguments: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    paths = [tmp_path / "sound.yaml", tmp_path / "amiss.yaml"]
    for path, asked in zip(paths, ({**CHAT, "answer_tokens": 8}, task), strict=True):
        path.write_text(json.dumps({"task": asked}))
    code, out, err = gpt1("evaluate", "runs/made", "--task", paths[0], "--task", paths[1])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
