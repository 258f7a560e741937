"""Sources of text: what a corpus is read from, how often each is drawn, and which of its documents are kept."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, NonNegativeInt, PositiveInt, Tag
from pydantic_core import PydanticCustomError

from gpt1_jax.section import PositiveFloat, Section


def _step(key: Any) -> Any:
    """A step as the key of a mapping, which in JSON is a word; one spelling only, so that no two are the same step."""
    if isinstance(key, str):
        if not re.fullmatch(r"0|[1-9]\d*", key):
            raise PydanticCustomError("step", "the keys of a schedule are steps, whole numbers from 0")
        return int(key)
    return key


# How many times as often a source is drawn as its size alone would make it; or from each of some steps on. It acts when
# batches are drawn, so it never changes the prepared files.
_Step = Annotated[NonNegativeInt, BeforeValidator(_step)]
_Schedule = dict[_Step, Annotated[float, Field(ge=0)]]
Weight = Annotated[
    Annotated[PositiveFloat, Tag("a number")] | Annotated[_Schedule, Tag("a schedule")],
    Discriminator(lambda value: "a schedule" if isinstance(value, dict) else "a number"),
]


def weight_at(weight: float | Mapping[int, float], step: int) -> float:
    """A weight, or what its schedule says at a step."""
    if not isinstance(weight, Mapping):
        return weight
    return weight[max(begin for begin in weight if begin <= step)]


class Quality(Section):
    """Which documents of a source are good enough, each rule off unless asked for (docs/data.md, Quality)."""

    languages: tuple[str, ...] = ()  # ISO 639-1 codes, e.g. en; empty: any language
    min_language_probability: Annotated[float, Field(gt=0, le=1)] = 0.65  # that it is in one of them
    symbols: bool = False  # the rules of Gopher's authors on words, symbols and lines; for English web pages
    repetition: bool = False  # their rules on repeated lines, paragraphs and n-grams
    gutenberg: bool = False  # cut off the licence around the books of Project Gutenberg


class PythonDocs(Section):
    """Documentation strings of the standard library and of the project's run-time dependencies; needs no network."""

    kind: Literal["python_docs"]
    quality: Quality = Quality()
    weight: Weight = 1.0


class Stories(Section):
    """Small tales drawn from a grammar whose entropy is known exactly; needs no network (docs/data.md)."""

    kind: Literal["stories"]
    documents: PositiveInt = 100_000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    quality: Quality = Quality()
    weight: Weight = 1.0


class Files(Section):
    """Files matched by globs: .txt .md .jsonl .parquet, plain or .gz .zst .xz, local or remote through fsspec."""

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    text_field: str = "text"  # column or key that holds the text in .jsonl and .parquet
    identity_field: str | None = None  # that names a document there, e.g. url; null: its file and line
    quality: Quality = Quality()
    weight: Weight = 1.0


class Tfds(Section):
    """A split of a TensorFlow Datasets dataset, read through ``as_data_source`` without TensorFlow."""

    kind: Literal["tfds"]
    dataset: str  # e.g. "wikipedia/20230601.en", or a folder that holds a built dataset
    split: str = "train"
    text_field: str = "text"
    identity_field: str | None = None  # that names a document, e.g. title; null: its number
    data_dir: str | None = None
    quality: Quality = Quality()
    weight: Weight = 1.0


class HuggingFace(Section):
    """A split of a dataset read with the ``datasets`` library (extra: huggingface)."""

    kind: Literal["huggingface"]
    dataset: str  # a hub name, or a builder such as "json"
    subset: str | None = None
    files: tuple[str, ...] = ()  # data files, for a builder such as "json"
    split: str = "train"
    text_field: str = "text"
    identity_field: str | None = None  # that names a document, e.g. url; null: its number
    quality: Quality = Quality()
    weight: Weight = 1.0


Source = Annotated[PythonDocs | Stories | Files | Tfds | HuggingFace, Field(discriminator="kind")]
