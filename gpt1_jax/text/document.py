"""What a source of text yields: documents, and what could not become one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# Reasons of the filters. Every other reason is invalid input, which `data.cleaning.on_invalid` rules.
TOO_SHORT, TOO_LONG, DUPLICATE, NEAR_DUPLICATE = "too_short", "too_long", "duplicate", "near_duplicate"
GUTENBERG = "gutenberg"  # what was cut off
LANGUAGE, SYMBOLS, REPETITION, CONTAMINATED = "language", "symbols", "repetition", "contaminated"
FILTERS = frozenset({TOO_SHORT, TOO_LONG, DUPLICATE, NEAR_DUPLICATE, LANGUAGE, SYMBOLS, REPETITION, CONTAMINATED})


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from, such as ``books/emma.txt`` or ``posts.jsonl:17``; and what was cut off."""

    text: str
    identity: str
    cut: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Input that is no document: why, in one word for the counts, and in a sentence for a message."""

    identity: str
    reason: str
    detail: str


class TextSource(Protocol):
    """A source of text. Reading it twice gives the same documents in the same order, in bounded memory.

    It can be pickled, so that other processes and machines may read it.
    """

    name: str  # in the manifest, e.g. "files:books/*.txt"
    label: str  # in the corpus's folder, e.g. "books"
    network: str | None  # what it fetches, and from where; None: it needs no network

    def settings(self) -> dict[str, Any]:
        """Everything that changes what is read, for the corpus's fingerprint; cheap, and early to find mistakes.

        Raises:
            UserError: if the source is not there.
        """
        ...

    def read(self) -> Iterator[Document | Skipped]:
        """The documents, in a fixed order."""
        ...

    def split(self) -> Sequence["TextSource"]:
        """Smaller sources that give the same documents one after the other, to be read side by side.

        What has to be done once before reading, such as a download, is done here.
        """
        ...


def printable(text: str) -> str:
    """The text with what is no Unicode in it, such as bytes of a file's name, written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def parts(rows: range) -> list[range]:
    """Rows in parts that are read in one go: of ten thousand, or more where that would be thousands of parts."""
    size = max(10_000, len(rows) // 4096)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def named(item: Document | Skipped, record: Mapping[str, Any], key: str | None) -> Document | Skipped:
    """The document under the name that a field of its record gives it; without one, under the name that it has."""
    name = record.get(key) if key else None
    if isinstance(name, bytes):
        name = name.decode("utf-8", "replace")
    return Document(item.text, str(name)) if name not in (None, "") and isinstance(item, Document) else item


def to_document(value: Any, identity: str, field: str) -> Document | Skipped:
    """The document in the value of a record's text field, which may be missing (None), bytes or of another type."""
    if value is None:
        return Skipped(identity, "missing_field", f"it has no field '{field}' (text_field)")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return Skipped(identity, "invalid_utf8", str(error))
    if not isinstance(value, str):
        return Skipped(identity, "not_text", f"field '{field}' holds a {type(value).__name__}, not text")
    if not value:
        return Skipped(identity, "empty", f"field '{field}' is empty")
    return Document(value, identity)
