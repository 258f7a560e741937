import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt1_jax.config import Recipe
from gpt1_jax.config_file import parse
from gpt1_jax.data.examples import (
    Choices,
    Conversation,
    Labelled,
    LastWordRow,
    MinimalPairRow,
    Pair,
    SubstitutionRow,
    read_examples,
)
from gpt1_jax.errors import UserError
from gpt1_jax.text.conversation import Message


@pytest.fixture
def read_all(tmp_path):
    def read(rows, **task):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task["validation"] = {"kind": "files", "paths": [str(path)]}
        return read_examples(parse(Recipe, json.dumps({"task": task}), "recipe").task, "validation")

    return read


@pytest.fixture
def read(read_all):
    """Gives the examples, and how many rows were left out."""
    return lambda rows, **task: read_all(rows, **task)[:2]


CLASSES = {"form": "classification", "text": "text", "label": "label", "labels": ["0", "1"]}
NUMBERS = {"form": "similarity", "first": "a", "second": "b", "label": "label", "metrics": ["pearson"]}
CHOICES = {"form": "multiple_choice", "context": "c", "answers": "answers", "label": "right"}


def test_texts_are_stripped_and_columns_joined(read):
    rows = [{"title": " A title \n", "body": "and a\ttext ", "label": 1}]
    assert read(rows, **{**CLASSES, "text": ["title", "body"]}) == ([Labelled(("A title and a\ttext",), 1)], 0)
    pairs = {"form": "entailment", "premise": "title", "hypothesis": "body", "label": "label", "labels": ["1", "0"]}
    assert read(rows, **pairs) == ([Labelled(("A title", "and a\ttext"), 0)], 0)


@pytest.mark.parametrize(
    ("labels", "held", "number"),
    [
        (["0", "1"], 1, 1),
        (["0", "1"], " 1 ", 1),
        (["1.0", "2.0"], 2.0, 1),
        (["false", "true"], True, 1),
        (["null", "x"], None, 0),
        (["True", "False"], "False", 1),
    ],
)
def test_labels_are_compared_as_json_writes_them(read, labels, held, number):
    assert read([{"text": "t", "label": held}], **{**CLASSES, "labels": labels}) == ([Labelled(("t",), number)], 0)


@pytest.mark.parametrize("held", [2, 1.0, True, None, "one", [1]])
def test_unknown_labels_are_named(read, held):
    with pytest.raises(UserError, match=r"task\.validation: .*rows\.jsonl:2: column 'label' holds .* none of task\.la"):
        read([{"text": "t", "label": 1}, {"text": "t", "label": held}], **CLASSES)


def test_rows_without_a_label_are_counted(read, read_all):
    rows = [{"text": f"{n}", "label": label} for n, label in enumerate([0, -1, 1, None, -1])]
    task = {**CLASSES, "unlabelled": ["-1", "null"]}
    assert read(rows, **task) == ([Labelled(("0",), 0), Labelled(("2",), 1)], 3)
    assert read_all(rows, **task).rows == [1, 3]
    with pytest.raises(UserError, match=r"task\.validation: the table has no examples: all of its 2 rows are among"):
        read(rows[-2:], **task)
    with pytest.raises(UserError, match=r"task\.validation: the table has no examples$"):
        read([], **task)


def test_without_labels_it_is_a_number(read):
    rows = [{"a": "x", "b": "y", "label": label} for label in (3, "4.75", 0.5, " 1e1 ")]
    assert [example.label for example in read(rows, **NUMBERS)[0]] == [3.0, 4.75, 0.5, 10.0]
    for label in ("many", "nan", float("inf"), True, None, [1]):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: column 'label' holds .*, which is no number"):
            read([{"a": "x", "b": "y", "label": label}], **NUMBERS)


@pytest.mark.parametrize("held", [3, None, ["x"], True])
def test_what_is_no_text_is_refused(read, held):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column 'text' holds .*, which is no text"):
        read([{"text": held, "label": 0}], **CLASSES)


def test_half_of_a_surrogate_pair_is_refused(read):
    message = r"holds '\\ud83d' at character 2, half of a surrogate pair"
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: column 'text' {message}"):
        read([{"text": "a \ud83d", "label": 0}], **CLASSES)
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: messages\.0: the content {message}"):
        read([{"messages": [{"role": "user", "content": "a \ud83d"}]}], form="chat")


def test_choices(read):
    row = {"c": "context", "q": "why?", "answers": ["a", " b ", "c"], "x": "first", "y": "second", "right": 2}
    assert read([row], **CHOICES) == ([Choices("context", "", ("a", "b", "c"), 2)], 0)
    named = {**CHOICES, "question": "q", "answers": ["x", "y"], "labels": ["1", "2"]}
    assert read([row], **named) == ([Choices("context", "why?", ("first", "second"), 1)], 0)
    assert read([row, {**row, "right": -1}], **CHOICES, unlabelled=["-1"])[1] == 1
    with pytest.raises(UserError, match=r"column 'right' holds '3', which is none of task\.labels=\['0', '1', '2'\]"):
        read([{**row, "right": 3}], **CHOICES)
    with pytest.raises(UserError, match=r"holds 'D', the label of answer 4, but there are 3"):
        read([{**row, "right": "D"}], **CHOICES, labels=["A", "B", "C", "D"])
    with pytest.raises(UserError, match=r"column 'answers' must hold a list of at least two texts"):
        read([{**row, "answers": ["a"]}], **CHOICES)


def test_pairs_and_texts(read):
    rows = [{"translation": {"de": "Hund", "en": "dog"}, "text": "One two three"}]
    translate = {"form": "text_to_text", "source": "translation.de", "target": "translation.en"}
    assert read(rows, **translate) == ([Pair("Hund", "dog")], 0)
    assert read(rows, form="last_word", text="text") == ([LastWordRow("One two three")], 0)
    with pytest.raises(UserError, match="'dog' has no word before its last one"):
        read(rows, form="last_word", text="translation.en")
    pair = {"form": "minimal_pair", "good": "text", "bad": "translation.de"}
    assert read(rows, **pair) == ([MinimalPairRow("One two three", "Hund")], 0)


def test_substitutions(read):
    task = {"form": "substitution", "text": "text", "options": ["a", "b"], "label": "right", "labels": ["1", "2"]}
    row = {"text": "It broke because _ was thin.", "a": "the ice", "b": "the boy", "right": 1}
    found = SubstitutionRow(row["text"], ("the ice", "the boy"), 0)
    assert read([row], **task) == ([found], 0)
    for text, times in (("No blank.", 0), ("_ and _", 2)):
        with pytest.raises(UserError, match=f"holds task.placeholder='_' {times} times"):
            read([{**row, "text": text}], **task)


ROLES = ("system", "user", "assistant")


@given(st.lists(st.sampled_from(ROLES), max_size=6))
def test_conversations_are_those_of_two_sides_in_turn(tmp_path_factory, roles):
    path = tmp_path_factory.getbasetemp() / "conversation.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": f" {role} "} for role in roles]}))
    recipe = {"task": {"form": "chat", "validation": {"kind": "files", "paths": [str(path)]}}}
    task = parse(Recipe, json.dumps(recipe), "recipe").task
    said = " ".join(roles).removeprefix("system ")
    if said and not said.replace("user assistant", "").strip():
        expected = Conversation(tuple(Message(role, role) for role in roles))
        assert read_examples(task, "validation") == ([expected], 0, [1])
    else:
        with pytest.raises(UserError, match=r"conversation\.jsonl:1: column 'messages' has messages of"):
            read_examples(task, "validation")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "column 'messages' holds no list of messages"),
        (
            [{"role": "user", "content": "x"}, {"role": "bot", "content": "x"}],
            r"messages\.1: the role is 'bot'; it must",
        ),
        ([{"from": "user", "value": "x"}], r"messages\.0: the role is 'null'"),
        (["hello"], r"messages\.0: the role is 'null'"),
        ([{"role": "user", "content": " "}], r"messages\.0: the content is ''; it must be text"),
        ([{"role": "user", "content": 3}], r"messages\.0: the content is '3'; it must be text"),
    ],
)
def test_messages_are_a_role_and_a_text(read, messages, message):
    with pytest.raises(UserError, match=message):
        read([{"messages": messages}], form="chat")
