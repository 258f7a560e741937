"""The recipes in data/tasks/: each says what it is, its command reads it, and its columns are those of its dataset."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from gpt1_jax.config import FinetuneConfig, Recipe
from gpt1_jax.config_file import load
from gpt1_jax.data.examples import Choices, Labelled, LastWordRow, Pair, SubstitutionRow, read_examples
from gpt1_jax.task_config import TableFiles, TableHuggingFace, TableTfds

FOLDER = Path("data/tasks")
RECIPES = sorted(FOLDER.rglob("*.yaml"))
WITHOUT_NETWORK = [*sorted(FOLDER.glob("examples/*.yaml")), *sorted(FOLDER.glob("toy_*.yaml"))]
PAPER = {  # table 1 of the paper, and the metrics of its tables 2 to 4
    "mnli": ["accuracy"],
    "snli": ["accuracy"],
    "scitail": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "race": ["accuracy"],
    "story_cloze": ["accuracy"],
    "cola": ["matthews", "accuracy"],
    "sst2": ["accuracy"],
    "mrpc": ["f1", "accuracy"],
    "stsb": ["pearson", "spearman"],
    "qqp": ["f1", "accuracy"],
}


def ids(path: Path) -> str:
    return path.stem


def header_of(path: Path) -> str:
    return "".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_every_recipe_says_what_it_is_and_its_command_reads_it(path: Path):
    header = header_of(path)
    assert re.findall(r"^ (\w+)  ", header, re.MULTILINE) == ["Source", "Licence", "Size", "Needs", "Command"]
    recipe = load(Recipe, path)
    assert recipe.name == path.stem
    words = shlex.split(header.partition(" Command ")[2].replace("\\\n", " "))
    if recipe.task.train is None:
        assert words == ["gpt1", "evaluate", "runs/gpt1", "--task", str(path)]
    else:
        assert words == ["gpt1", "finetune", str(path), "base=runs/gpt1"]
        assert load(FinetuneConfig, words[2], words[3:]).base == "runs/gpt1"


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_every_recipe_says_what_it_needs(path: Path):
    needs = header_of(path).partition(" Needs ")[2].partition(" Command ")[0]
    task = load(Recipe, path).task
    tables = task.tables.values()
    from_hub = any(
        isinstance(table, TableHuggingFace)
        or (isinstance(table, TableFiles) and any("hf://" in name for name in table.paths))
        for table in tables
    )
    network = from_hub or any(isinstance(table, TableTfds) for table in tables)
    assert ("huggingface" in needs) == from_hub
    assert needs.lstrip().startswith("network") == network
    metrics = getattr(task, "metrics", ())
    assert ("tasks" in needs) == bool(set(metrics) - {"accuracy", "exact_match"})


def test_the_readme_names_every_recipe():
    named = re.findall(
        r"^\| `tasks/([\w/]+\.yaml)` \|", Path("data/README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(str(path.relative_to(FOLDER)) for path in RECIPES)


def test_the_paper_s_datasets_and_metrics():
    assert {name: list(load(Recipe, FOLDER / f"{name}.yaml").task.metrics) for name in PAPER} == PAPER


@pytest.mark.parametrize("path", WITHOUT_NETWORK, ids=ids)
def test_what_needs_no_network_is_read(path: Path):
    task = load(Recipe, path).task
    found = {split: read_examples(task, split) for split in task.tables}
    assert all(split.unlabelled == 0 for split in found.values())
    sizes = [len(split.examples) for split in found.values()]
    size = header_of(path).partition(" Size ")[2].partition("\n")[0]
    assert [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", size)] == sizes
    questions = [
        example[:-1] if len(example) > 1 else example for split in found.values() for example in split.examples
    ]
    assert len(set(questions)) == sum(sizes)
    for split in found.values():
        labels = [example.label for example in split.examples if hasattr(example, "label")]
        assert all(labels.count(label) == len(labels) / len(set(labels)) for label in labels)


# A row of each dataset of the hub, by the columns of its public card, and the example that it is.
ROWS = {
    "sst2": ({"sentence": "a fine film ", "label": 1, "idx": 0}, Labelled(("a fine film",), 1)),
    "cola": ({"sentence": "Them saw it.", "label": 0, "idx": 0}, Labelled(("Them saw it.",), 0)),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, Labelled(("a", "b"), 2)),
    "scitail": ({"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}, Labelled(("a", "b"), 1)),
    "qnli": ({"question": "a?", "sentence": "b", "label": 0, "idx": 0}, Labelled(("a?", "b"), 0)),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, Labelled(("a", "b"), 1)),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, Labelled(("a", "b"), 1)),
    "qqp": ({"question1": "a?", "question2": "b?", "label": 0, "idx": 0}, Labelled(("a?", "b?"), 0)),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}, Labelled(("a", "b"), 3.8)),
    "race": (
        {"example_id": "high1.txt", "article": "a", "answer": "C", "question": "b?", "options": ["1", "2", "3", "4"]},
        Choices("a", "b?", ("1", "2", "3", "4"), 2),
    ),
    "wmt14_de_en": ({"translation": {"de": "Hund", "en": "dog"}}, Pair("Hund", "dog")),
    "wmt16_ro_en": ({"translation": {"ro": "câine", "en": "dog"}}, Pair("câine", "dog")),
    "cnn_dailymail": ({"article": "a", "highlights": "b", "id": "1"}, Pair("a", "b")),
    "lambada": ({"text": "a b c"}, LastWordRow("a b c")),
    "winogrande": (
        {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
        SubstitutionRow("a _ b", ("x", "y"), 1),
    ),
}


def test_there_is_a_row_of_each_dataset_of_the_hub():
    tables = {path.stem: load(Recipe, path).task.validation for path in RECIPES}
    assert set(ROWS) == {name for name, table in tables.items() if isinstance(table, TableHuggingFace)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_becomes_an_example(monkeypatch, name):
    row, example = ROWS[name]
    asked = []

    class Dataset(list):
        column_names = tuple(row)

    def load_dataset(dataset, subset, *, data_files, split):
        asked.append((dataset, subset, split))
        return Dataset([row])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load(Recipe, FOLDER / f"{name}.yaml").task
    assert [read_examples(task, split) for split in task.tables] == [([example], 0, [1])] * len(task.tables)
    assert asked == [(table.dataset, table.subset, table.split) for table in task.tables.values()]


def test_snli_has_the_columns_and_classes_that_its_recipe_names():
    import tensorflow_datasets as tfds

    task = load(Recipe, FOLDER / "snli.yaml").task
    features = tfds.builder(task.validation.dataset, file_format="array_record").info.features
    assert {task.premise, task.hypothesis, task.label} == set(features)
    assert features[task.label].names == ["entailment", "neutral", "contradiction"]


def test_story_cloze_reads_a_file_of_its_form(tmp_path):
    path = tmp_path / "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"
    columns = [f"InputSentence{n}" for n in range(1, 5)] + [f"RandomFifthSentenceQuiz{n}" for n in (1, 2)]
    path.write_text(
        f'InputStoryid,{",".join(columns)},AnswerRightEnding\nid,One.,"Two, too.",Three.,Four.,Yes.,No.,2\n'
    )
    table = f"{{kind: files, paths: ['{tmp_path}/*val__spring2016*.csv']}}"
    task = load(Recipe, FOLDER / "story_cloze.yaml", [f"task.validation={table}"]).task
    expected = Choices("One. Two, too. Three. Four.", "", ("Yes.", "No."), 1)
    assert read_examples(task, "validation") == ([expected], 0, [1])
