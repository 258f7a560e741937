"""Stage one: sources to cleaned documents, part by part, with what the next stages ask of each document.

Of part PPPPPP the folder holds, each written as a whole::

    PPPPPP-CCCC.jsonl           the documents of chunk CCCC, in order: text, identity, source
    PPPPPP-CCCC.columns.npy     of each document: digest, split, bytes, words
    PPPPPP-CCCC.signatures.npy  of each document: its MinHash signature, where near-duplicates are looked for
    PPPPPP.json                 what was read and dropped; written last, so a part that has it is complete
"""

import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pydantic
from etils import epath

from gpt1_jax.config import CleaningConfig, DataConfig
from gpt1_jax.data.manifest import SPLITS, Split
from gpt1_jax.data.storage import local_copy, write_atomically
from gpt1_jax.errors import RefusedError
from gpt1_jax.text.cleaning import clean
from gpt1_jax.text.contamination import Contamination, load_contamination
from gpt1_jax.text.document import CONTAMINATED, FILTERS, Document, Skipped, TextSource, printable
from gpt1_jax.text.near_duplicates import signature

_BATCH_CHARS = 1_000_000  # cleaned in one go
_CHUNK_BYTES = 16_000_000  # of documents in one file, and so in memory
COLUMNS = np.dtype([("digest", "<u8", 2), ("split", "u1"), ("bytes", "<u8"), ("words", "<u8")])


@dataclass(frozen=True)
class Part:
    """A stretch of a source that is read in one go."""

    number: int  # over all sources
    source: int
    reader: TextSource


class PartCounts(pydantic.BaseModel):
    """What a part gave.

    Attributes:
        source: its index.
        read: inputs, whatever became of them.
        dropped: how many of them, by reason.
        cut: of how many documents something was cut off, by what it was.
        examples: of each reason, the first input that it dropped.
        chunks: documents in each.
    """

    source: int
    read: int = 0
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    examples: dict[str, str] = {}
    chunks: list[int] = []


class _Key(NamedTuple):
    """What a batch must know of its part; the reader itself stays where it reads."""

    number: int
    source: int
    name: str


class _Batch(NamedTuple):
    part: _Key
    items: list[Document | Skipped]
    ends_part: bool


class _Cleaned(NamedTuple):
    """A batch, ready to be written."""

    part: _Key
    lines: list[bytes]
    columns: np.ndarray
    signatures: np.ndarray
    skipped: list[Skipped]
    cut: Counter[str]
    ends_part: bool


# A map that keeps the order: the built-in one, or one over processes.
Map = Callable[[Callable[[_Batch], _Cleaned], Iterable[_Batch]], Iterator[_Cleaned]]


def collect_parts(
    parts: Iterable[Part], config: DataConfig, folder: epath.Path, map_batches: Map, on_read: Callable[[int], None]
) -> None:
    """Reads and cleans parts into files of the folder.

    Args:
        parts: in order.
        config: how to clean them.
        folder: of the files.
        map_batches: what cleans the batches.
        on_read: told how many more inputs have been read.

    Raises:
        RefusedError: if input is invalid and ``on_invalid`` is error.
    """
    writer: _PartWriter | None = None
    for cleaned in map_batches(functools.partial(_clean_batch, config=config), _batches(parts)):
        writer = writer or _PartWriter(cleaned.part, config, folder)
        writer.add(cleaned)
        on_read(len(cleaned.lines) + len(cleaned.skipped))
        if cleaned.ends_part:
            writer.close()
            writer = None


def counts_of(part: int, folder: epath.Path) -> PartCounts:
    """What a complete part gave."""
    return PartCounts.model_validate_json((folder / f"{part:06}.json").read_text(encoding="utf-8"))


def is_complete(part: int, names: set[str]) -> bool:
    """Whether the folder, of which ``names`` are the files, has all of a part."""
    return f"{part:06}.json" in names


def chunk_name(part: int, chunk: int) -> str:
    """The name that the files of a chunk begin with."""
    return f"{part:06}-{chunk:04}"


def read_array(path: epath.Path) -> np.ndarray:
    """An array that was written with :func:`write_array`."""
    return np.load(local_copy(path))


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """Writes an array as a whole."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document, by the SHA-256 of its text alone.

    So it stays where it is when others are added, and equal texts are never on both sides.
    """
    return _split_of(hashlib.sha256(text.encode()).digest(), validation_fraction)


def _split_of(digest: bytes, validation_fraction: float) -> Split:
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if draw < validation_fraction else "train"


class _PartWriter:
    """Counts, and writes chunks of documents."""

    def __init__(self, part: _Key, config: DataConfig, folder: epath.Path) -> None:
        self._part, self._folder = part, folder
        self._stops = config.cleaning.on_invalid == "error"
        self._with_signatures = config.cleaning.near_duplicates is not None
        self._counts = PartCounts(source=part.source)
        self._clear()

    def _clear(self) -> None:
        self._lines: list[bytes] = []
        self._columns: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._size = 0

    def add(self, cleaned: _Cleaned) -> None:
        counts = self._counts
        for skipped in cleaned.skipped:
            message = printable(f"{skipped.identity}: {skipped.detail}")
            if skipped.reason not in FILTERS and self._stops:
                raise RefusedError(
                    f"{message} ({skipped.reason}); mend it, or have such input counted and skipped with "
                    "data.cleaning.on_invalid=skip"
                )
            counts.dropped[skipped.reason] += 1
            counts.examples.setdefault(skipped.reason, message)
        counts.cut.update(cleaned.cut)
        counts.read += len(cleaned.lines) + len(cleaned.skipped)
        self._lines += cleaned.lines
        self._columns.append(cleaned.columns)
        self._signatures.append(cleaned.signatures)
        self._size += sum(map(len, cleaned.lines))
        if self._size >= _CHUNK_BYTES:
            self._write_chunk()

    def close(self) -> None:
        if self._lines:
            self._write_chunk()
        note = self._counts.model_dump_json().encode()
        write_atomically(self._folder / f"{self._part.number:06}.json", note)

    def _write_chunk(self) -> None:
        name = chunk_name(self._part.number, len(self._counts.chunks))
        write_atomically(self._folder / f"{name}.jsonl", b"".join(self._lines))
        write_array(self._folder / f"{name}.columns.npy", np.concatenate(self._columns))
        if self._with_signatures:
            write_array(self._folder / f"{name}.signatures.npy", np.concatenate(self._signatures))
        self._counts.chunks.append(len(self._lines))
        self._clear()


def _batches(parts: Iterable[Part]) -> Iterator[_Batch]:
    """The inputs in batches of about a million characters, each of one part."""
    for part in parts:
        items: list[Document | Skipped] = []
        size = 0
        key = _Key(part.number, part.source, part.reader.name)
        for item in part.reader.read():
            if size >= _BATCH_CHARS:
                yield _Batch(key, items, ends_part=False)
                items, size = [], 0
            items.append(item)
            size += len(item.text) if isinstance(item, Document) else len(item.detail)
        yield _Batch(key, items, ends_part=True)


def _clean_batch(batch: _Batch, config: DataConfig) -> _Cleaned:
    kept: list[Document] = []
    skipped: list[Skipped] = []
    for item in batch.items:
        result = _clean(item, config, batch.part.source) if isinstance(item, Document) else item
        (kept if isinstance(result, Document) else skipped).append(result)  # pyrefly: ignore[bad-argument-type]
    near = config.cleaning.near_duplicates
    signatures = [signature(document.text, near) for document in kept] if near else []
    columns = np.array([_columns(document.text, config.validation_fraction) for document in kept], COLUMNS)
    lines = [_line(document, batch.part.name) for document in kept]
    stacked = np.stack(signatures) if signatures else np.empty((0, near.permutations if near else 0), np.uint32)
    cut = Counter(document.cut for document in kept if document.cut)
    return _Cleaned(batch.part, lines, columns, stacked, skipped, cut, batch.ends_part)


def _clean(document: Document, config: DataConfig, source: int) -> Document | Skipped:
    cleaning = config.cleaning
    result = clean(document, cleaning, config.sources[source].quality)
    contamination = _contamination(cleaning)
    if isinstance(result, Document) and contamination and (found := contamination.find(result.text)):
        return Skipped(document.identity, CONTAMINATED, f"it shares '{found}' with the evaluation texts")
    return result


def forget_contamination() -> None:
    """Forgets the evaluation texts, which another preparation in this process may find changed."""
    _contamination.cache_clear()


@functools.lru_cache(maxsize=1)
def _contamination(cleaning: CleaningConfig) -> Contamination | None:
    return load_contamination(cleaning.decontaminate, cleaning.max_chars) if cleaning.decontaminate else None


def _columns(text: str, validation_fraction: float) -> tuple:
    encoded = text.encode()
    digest = hashlib.sha256(encoded).digest()
    split = SPLITS.index(_split_of(digest, validation_fraction))
    return np.frombuffer(digest[:16], "<u8"), split, len(encoded), len(text.split())


def _line(document: Document, source: str) -> bytes:
    record = {"text": document.text, "identity": printable(document.identity), "source": source}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def make_parts(sources: Sequence[TextSource]) -> list[Part]:
    """The parts of all sources, in order."""
    readers = [(index, reader) for index, source in enumerate(sources) for reader in source.split()]
    return [Part(number, source, reader) for number, (source, reader) in enumerate(readers)]
