"""Examples of a task: the texts and the label that its columns hold, checked."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar, overload

from gpt1_jax.data.tables import Row, read_table, value
from gpt1_jax.errors import UserError, nearest
from gpt1_jax.task_config import (
    AnyTask,
    Chat,
    Classification,
    Column,
    Entailment,
    LabelledTask,
    LastWord,
    MinimalPair,
    MultipleChoice,
    Similarity,
    Substitution,
    TextToText,
)
from gpt1_jax.text.conversation import ROLES, Message


class Labelled(NamedTuple):
    """One text, or the two of a pair, and the number of their class; of a task without labels, a number."""

    texts: tuple[str, ...]
    label: int | float


class Choices(NamedTuple):
    """Answers, and the number of the right one; ``question`` is empty if the task has none."""

    context: str
    question: str
    answers: tuple[str, ...]
    label: int


class Pair(NamedTuple):
    """A text, and what is to be made of it."""

    source: str
    target: str


class Conversation(NamedTuple):
    """Perhaps a system message, then user and assistant in turn, the last word the assistant's."""

    messages: tuple[Message, ...]


class SubstitutionRow(NamedTuple):
    """A text that holds the task's placeholder once, what may stand there, and the number of the right one."""

    text: str
    options: tuple[str, ...]
    label: int


class LastWordRow(NamedTuple):
    """A text of at least two words."""

    text: str


class MinimalPairRow(NamedTuple):
    """A sentence, and the worse one."""

    good: str
    bad: str


Example = Labelled | Choices | Pair | Conversation | SubstitutionRow | LastWordRow | MinimalPairRow
_E = TypeVar("_E", bound=Example)


class Examples(NamedTuple, Generic[_E]):
    """The examples of a split.

    Attributes:
        examples: in the order of the table.
        unlabelled: how many rows were left out as unlabelled.
        rows: the number of each example's row in the table, counted from 1, those left out too.
    """

    examples: list[_E]
    unlabelled: int
    rows: list[int]


class ExampleStream:
    """The examples of a split in the order of the table, read as they are asked for, so that no more are in memory.

    Surrounding white space is no part of a text, and several columns are joined by a space. A label is compared with
    ``task.labels`` as it is if it is text, and else as JSON writes it: ``1``, ``1.0``, ``true``, ``null``.

    Args:
        task: what the columns are.
        split: ``train``, ``validation`` or ``test``, one that the task has.

    Attributes:
        unlabelled: how many of the rows read so far were left out as unlabelled.
    """

    def __init__(self, task: AnyTask, split: str):
        self._task, self._split = task, split
        self.unlabelled = 0

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """Each example with the number of its row in the table, counted from 1, those left out too.

        Raises:
            UserError: if a row has no such text or an unknown label, or if no example is left.
        """
        key, number, self.unlabelled = f"task.{self._split}", 0, 0
        for number, row in enumerate(read_table(self._task.tables[self._split], key, _columns(self._task)), 1):
            example = _example(self._task, row)
            if example is None:
                self.unlabelled += 1
            else:
                yield number, example
        if number == self.unlabelled:
            left_out = f": all of its {number:,} rows are among task.unlabelled" if number else ""
            raise UserError(f"{key}: the table has no examples{left_out}")


@overload
def read_examples(task: Classification | Entailment | Similarity, split: str) -> Examples[Labelled]: ...
@overload
def read_examples(task: MultipleChoice, split: str) -> Examples[Choices]: ...
@overload
def read_examples(task: TextToText, split: str) -> Examples[Pair]: ...
@overload
def read_examples(task: Chat, split: str) -> Examples[Conversation]: ...
@overload
def read_examples(task: Substitution, split: str) -> Examples[SubstitutionRow]: ...
@overload
def read_examples(task: LastWord, split: str) -> Examples[LastWordRow]: ...
@overload
def read_examples(task: MinimalPair, split: str) -> Examples[MinimalPairRow]: ...
def read_examples(task: AnyTask, split: str) -> Examples:
    """All examples of a split, as :class:`ExampleStream` gives them."""
    stream = ExampleStream(task, split)
    rows, examples = zip(*stream, strict=True)
    return Examples(list(examples), stream.unlabelled, list(rows))


def _columns(task: AnyTask) -> list[str]:
    """The names of the columns that a form reads."""
    match task:
        case Classification():
            columns = [task.text, task.label]
        case Entailment():
            columns = [task.premise, task.hypothesis, task.label]
        case Similarity():
            columns = [task.first, task.second, task.label]
        case MultipleChoice():
            columns = [task.context, task.question or (), task.answers, task.label]
        case TextToText():
            columns = [task.source, task.target]
        case Chat():
            columns = [task.messages]
        case Substitution():
            columns = [task.text, task.options, task.label]
        case LastWord():
            columns = [task.text]
        case MinimalPair():
            columns = [task.good, task.bad]
    return [name for column in columns for name in _names(column)]


def _example(task: AnyTask, row: Row) -> Example | None:
    """A row as an example; None if it has no label."""
    match task:
        case Classification():
            return _labelled(row, task, task.text)
        case Entailment():
            return _labelled(row, task, task.premise, task.hypothesis)
        case Similarity():
            return _labelled(row, task, task.first, task.second)
        case MultipleChoice():
            return _choices(row, task)
        case TextToText():
            return Pair(_text(row, task.source), _text(row, task.target))
        case Chat():
            return _conversation(row, task.messages)
        case Substitution():
            return _substitution(row, task)
        case LastWord():
            return _last_word(row, task)
        case MinimalPair():
            return MinimalPairRow(_text(row, task.good), _text(row, task.bad))


def _names(column: Column | tuple[()]) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else column


def _text(row: Row, column: Column | tuple[()]) -> str:
    """The text of a column, or those of several joined by a space."""
    return " ".join(_stripped(value(row, name), row, name) for name in _names(column))


def _texts(row: Row, column: Column) -> tuple[str, ...]:
    """Texts that one column holds as a list, or several hold, at least two of them."""
    names = _names(column)
    found = [(name, value(row, name)) for name in names]
    if len(found) == 1 and isinstance(found[0][1], list):
        found = [(names[0], item) for item in found[0][1]]
    if len(found) < 2:
        raise UserError(f"{row.where}: column '{names[0]}' must hold a list of at least two texts, or name two columns")
    return tuple(_stripped(item, row, name) for name, item in found)


def _stripped(found: object, row: Row, name: str) -> str:
    if not isinstance(found, str):
        raise UserError(f"{row.where}: column '{name}' holds {_shown(found)}, which is no text")
    _check_text(found, f"{row.where}: column '{name}'")
    return found.strip()


def _check_text(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell, and which UTF-8 and so no tokenizer has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is no "
            "text; write the whole character, or leave the row out"
        ) from None


def _shown(found: object) -> str:
    """A label as text: itself, or what JSON writes."""
    return found.strip() if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)


def _labelled(row: Row, task: LabelledTask, *columns: Column) -> Labelled | None:
    found = value(row, task.label)
    if _shown(found) in task.unlabelled:
        return None
    label = _class(row, task.label, task.labels) if task.labels else _number(row, task.label)
    return Labelled(tuple(_text(row, column) for column in columns), label)


def _class(row: Row, column: str, labels: tuple[str, ...]) -> int:
    shown = _shown(value(row, column))
    if shown not in labels:
        raise UserError(
            f"{row.where}: column '{column}' holds {shown!r}, which is none of task.labels={list(labels)}; a "
            f"value that stands for no label belongs in task.unlabelled{nearest(shown, labels)}"
        )
    return labels.index(shown)


def _number(row: Row, column: str) -> float:
    found = value(row, column)
    try:
        number = float(found) if isinstance(found, str | int | float) and not isinstance(found, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{row.where}: column '{column}' holds {_shown(found)!r}, which is no number; a task of classes names "
            "them in task.labels"
        )
    return number


def _choices(row: Row, task: MultipleChoice) -> Choices | None:
    if _shown(value(row, task.label)) in task.unlabelled:
        return None
    answers = _texts(row, task.answers)
    label = _chosen(row, task.label, task.labels, answers)
    return Choices(_text(row, task.context), _text(row, task.question or ()), answers, label)


def _chosen(row: Row, column: str, labels: tuple[str, ...], answers: tuple[str, ...]) -> int:
    """Which of the answers is right: the number of its label, or with no labels the label itself."""
    label = _class(row, column, labels or tuple(map(str, range(len(answers)))))
    if label >= len(answers):
        raise UserError(
            f"{row.where}: column '{column}' holds {_shown(value(row, column))!r}, the label of answer {label + 1}, "
            f"but there are {len(answers)}"
        )
    return label


def _conversation(row: Row, column: str) -> Conversation:
    found = value(row, column)
    if not isinstance(found, list):
        raise UserError(f"{row.where}: column '{column}' holds no list of messages")
    messages = [_message(item, f"{row.where}: {column}.{number}") for number, item in enumerate(found)]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{row.where}: column '{column}' has messages of {', '.join(roles) or 'nobody'}; they must be of "
            "system (or not), then of user and assistant in turn, the last of assistant"
        )
    return Conversation(tuple(messages))


def _message(item: object, where: str) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: the role is {_shown(role)!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where}: the content is {_shown(content)!r}; it must be text")
    _check_text(content, f"{where}: the content")
    return Message(role, content.strip())


def _substitution(row: Row, task: Substitution) -> SubstitutionRow:
    text, options = _text(row, task.text), _texts(row, task.options)
    if text.count(task.placeholder) != 1:
        raise UserError(
            f"{row.where}: {text!r} holds task.placeholder={task.placeholder!r} {text.count(task.placeholder)} times; "
            "it must hold it once"
        )
    return SubstitutionRow(text, options, _chosen(row, task.label, task.labels, options))


def _last_word(row: Row, task: LastWord) -> LastWordRow:
    text = _text(row, task.text)
    if len(text.split()) < 2:
        raise UserError(f"{row.where}: {text!r} has no word before its last one")
    return LastWordRow(text)
