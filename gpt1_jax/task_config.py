"""Tasks: what a model learns by fine-tuning, or is asked without: where the examples are, which column is which.

The forms are those of the paper (section 3.3 and figure 1), text to text, conversations, and those that are only asked
without training. A recipe in data/tasks/ fills one of them in for one dataset.
"""

import string
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from gpt1_jax.section import Section

# A column's name, or several, whose texts are joined by a space; a dotted name is a field of a record in a column.
Column = Annotated[
    Annotated[str, Tag("a column")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("columns")],
    Discriminator(lambda value: "columns" if isinstance(value, list | tuple) else "a column"),
]


class TableFiles(Section):
    """Rows of .csv, .tsv, .jsonl and .parquet files, plain or .gz .zst .xz, local or remote through fsspec."""

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]  # globs
    header: bool = True  # the first row of .csv and .tsv names the columns; false: they are called "0", "1", ...
    quoted: bool | None = None  # whether quotation marks enclose cells; null: in .csv, and not in .tsv
    rows: PositiveInt | None = None  # so many of the first alone; null: all


class TableTfds(Section):
    """A split of a TensorFlow Datasets dataset."""

    kind: Literal["tfds"]
    dataset: str  # e.g. "glue/sst2", or a folder that holds a built dataset
    split: str
    data_dir: str | None = None
    rows: PositiveInt | None = None


class TableHuggingFace(Section):
    """A split of a dataset read with the ``datasets`` library (extra: huggingface)."""

    kind: Literal["huggingface"]
    dataset: str  # a hub name, or a builder such as "json"
    subset: str | None = None
    files: tuple[str, ...] = ()  # data files, for a builder such as "json"
    split: str
    rows: PositiveInt | None = None


class TableToy(Section):
    """Examples made by rules (docs/finetuning.md): no row is in both splits; needs no network.

    ``toy_language`` has the columns english and toy; ``toy_dialogue`` has messages.
    """

    kind: Literal["toy_language", "toy_dialogue"]
    split: Literal["train", "validation"]
    rows: Annotated[int, Field(gt=0, le=100_000)] = 2000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


Table = Annotated[TableFiles | TableTfds | TableHuggingFace | TableToy, Field(discriminator="kind")]

Metric = Literal[
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "exact_match",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
]
_OF_CLASSES: tuple[Metric, ...] = ("accuracy", "f1", "matthews")
_OF_NUMBERS: tuple[Metric, ...] = ("pearson", "spearman")
_OF_TEXTS: tuple[Metric, ...] = ("exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL")


class ByAnswers(Section):
    """Zero-shot: the class whose answer the model finds likelier behind the prompt (paper, figure 2: SST-2)."""

    by: Literal["answers"]
    prompt: str  # with the names of the form's texts in braces, e.g. "{text} very"
    answers: tuple[str, ...]  # of each of the labels, in their order, as they follow the prompt


class ByLogProbability(Section):
    """Zero-shot: accepted if the mean log-probability of a token is above a threshold (paper, figure 2: CoLA).

    The threshold is the one that is best on the rows of ``train``; the paper does not say how it chose its own.
    """

    by: Literal["log_probability"]


class Task(Section):
    """What all forms have.

    The first metric chooses the best epoch. ``test`` is only ever measured, with the weights that were chosen.
    """

    train: Table | None = None
    validation: Table
    test: Table | None = None

    @property
    def is_number(self) -> bool:
        """Whether an answer is a number, and no class, choice or text."""
        return False

    @property
    def tables(self) -> dict[str, Table]:
        """The tables that are given, by the name of their split."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: table for split, table in named.items() if table is not None}


class LabelledTask(Task):
    """A task whose answer is one of a few classes, or with no ``labels`` a number."""

    label: str  # column
    labels: tuple[str, ...] = ()  # the values of that column, in the order of the classes
    unlabelled: tuple[str, ...] = ()  # its values that stand for no label: such rows are left out, and counted
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("accuracy",)

    @property
    def is_number(self) -> bool:
        """Whether an answer is a number: there are no classes."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Outputs of the classifier for each sequence."""
        return len(self.labels) or 1

    @model_validator(mode="after")
    def _fits(self) -> "LabelledTask":
        allowed = _OF_CLASSES if self.labels else _OF_NUMBERS
        problems = _wrong_metrics(self.metrics, allowed, "classes" if self.labels else "numbers")
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            problems.append(f"task.labels={list(self.labels)}: give every class once, at least two")
        _refuse(problems)
        return self


class Classification(LabelledTask):
    """One text: ``_start_ text _classify_`` (paper, figure 1)."""

    form: Literal["classification"]
    text: Column
    zero_shot: Annotated[ByAnswers | ByLogProbability, Field(discriminator="by")] | None = None

    @model_validator(mode="after")
    def _zero_shot_fits(self) -> "Classification":
        _check_zero_shot(self.zero_shot, self.labels, ("text",))
        return self


class Entailment(LabelledTask):
    """A pair whose order matters: ``_start_ premise _delimiter_ hypothesis _classify_`` (paper, figure 1)."""

    form: Literal["entailment"]
    premise: Column
    hypothesis: Column
    zero_shot: ByAnswers | None = None

    @model_validator(mode="after")
    def _zero_shot_fits(self) -> "Entailment":
        _check_zero_shot(self.zero_shot, self.labels, ("premise", "hypothesis"))
        return self


class Similarity(LabelledTask):
    """A pair in both orders, whose two states are added before the linear layer (paper, section 3.3)."""

    form: Literal["similarity"]
    first: Column
    second: Column


class MultipleChoice(Task):
    """A sequence for each answer, ``_start_ context question _delimiter_ answer _classify_`` (paper, section 3.3)."""

    form: Literal["multiple_choice"]
    context: Column
    question: Column | None = None
    answers: Column  # one column for each answer, or one that holds the list of them
    label: str  # column: which answer is right
    labels: tuple[str, ...] = ()  # its values for the first, the second, ... answer; empty: 0, 1, ...
    unlabelled: tuple[str, ...] = ()
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("accuracy",)

    @model_validator(mode="after")
    def _fits(self) -> "MultipleChoice":
        _refuse(_wrong_metrics(self.metrics, ("accuracy",), "choices"))
        return self


class TextToText(Task):
    """``_start_ source _delimiter_ target`` and the separator, with the loss on the target: translation, summaries."""

    form: Literal["text_to_text"]
    source: Column
    target: Column
    target_tokens: PositiveInt = 128  # most tokens of a target, its end included; the source has the rest
    beams: PositiveInt = 1  # candidates kept at each token where targets are generated; 1: greedy
    length_penalty: Annotated[float, Field(ge=0)] = 0.6  # exponent of Wu et al. 2016; of beams alone
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("bleu", "chrf")

    @model_validator(mode="after")
    def _fits(self) -> "TextToText":
        _refuse(_wrong_metrics(self.metrics, _OF_TEXTS, "texts"))
        return self


class Chat(Task):
    """Conversations, with the loss on the answers: a column of messages, each with a role and a content.

    Roles are system (first, or not at all), then user and assistant in turn. Longer conversations than the context
    are cut by whole turns, the oldest first; a system message stays.
    """

    form: Literal["chat"]
    messages: str = "messages"  # column
    answer_tokens: PositiveInt = 64  # most tokens of an answer that is generated
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("exact_match",)

    @model_validator(mode="after")
    def _fits(self) -> "Chat":
        _refuse(_wrong_metrics(self.metrics, _OF_TEXTS, "texts"))
        return self


class Substitution(Task):
    """Zero-shot alone: which of several words stands in the place of a pronoun (paper, figure 2: Winograd).

    The one after whose substitution the rest of the text has the higher mean log-probability.
    """

    form: Literal["substitution"]
    text: Column
    placeholder: str = "_"  # what in the text is replaced
    options: Column  # one column for each, or one that holds the list of them
    label: str  # column: which of them is right
    labels: tuple[str, ...] = ()  # its values for the first, the second, ...; empty: 0, 1, ...


class LastWord(Task):
    """Zero-shot alone: whether greedy decoding gives the last word of a text (Paperno et al. 2016, LAMBADA)."""

    form: Literal["last_word"]
    text: Column


class MinimalPair(Task):
    """Zero-shot alone: whether the better of two sentences is the likelier (Warstadt et al. 2020, BLiMP)."""

    form: Literal["minimal_pair"]
    good: Column
    bad: Column


LearnableTask = Annotated[
    Classification | Entailment | Similarity | MultipleChoice | TextToText | Chat, Field(discriminator="form")
]
AnyTask = Annotated[
    Classification
    | Entailment
    | Similarity
    | MultipleChoice
    | TextToText
    | Chat
    | Substitution
    | LastWord
    | MinimalPair,
    Field(discriminator="form"),
]


def _wrong_metrics(metrics: tuple[Metric, ...], allowed: tuple[Metric, ...], what: str) -> list[str]:
    return [
        f"task.metrics={metric}: not a metric of {what}; choose from {', '.join(allowed)}"
        for metric in metrics
        if metric not in allowed
    ]


def _check_zero_shot(
    zero_shot: ByAnswers | ByLogProbability | None, labels: tuple[str, ...], names: tuple[str, ...]
) -> None:
    problems = []
    if isinstance(zero_shot, ByAnswers):
        if len(zero_shot.answers) != len(labels):
            problems.append(f"task.zero_shot.answers={list(zero_shot.answers)}: give one for each of task.labels")
        found = {name for _, name, _, _ in string.Formatter().parse(zero_shot.prompt) if name is not None}
        if found != set(names):
            problems.append(
                f"task.zero_shot.prompt={zero_shot.prompt!r}: it must hold {' and '.join(f'{{{n}}}' for n in names)}, "
                "and nothing else in braces"
            )
    elif zero_shot and len(labels) != 2:
        problems.append("task.zero_shot.by=log_probability needs two task.labels, the accepted one last")
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
