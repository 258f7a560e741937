"""From sources to cleaned, distinct documents with their split, in files that the next stage reads."""

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pydantic

from gpt1_jax.config import CleaningConfig, DataConfig
from gpt1_jax.data.manifest import SourceCounts, Split
from gpt1_jax.data.storage import write_atomically
from gpt1_jax.errors import UserError
from gpt1_jax.pool import ordered_map
from gpt1_jax.text.cleaning import clean
from gpt1_jax.text.document import DUPLICATE, FILTERS, Document, Skipped, TextSource

SPLITS: tuple[Split, ...] = ("train", "validation")
# Called with what is being done, how many units of it are done, and of how many if that is known.
Progress = Callable[[str, int, int | None], None]
_BATCH_CHARS = 1_000_000  # cleaned in one go
_COUNTS = "collected.json"


class Collected(pydantic.BaseModel):
    """What was collected: by source, and the documents of each split by source."""

    sources: tuple[SourceCounts, ...]
    documents: dict[Split, list[int]]
    bytes: dict[Split, int]  # UTF-8
    words: dict[Split, int]


def collect(
    sources: Sequence[TextSource], config: DataConfig, folder: Path, workers: int, progress: Progress
) -> Collected:
    """Reads and cleans every source, once; a second call finds the result in ``folder``.

    Raises:
        UserError: if nothing is left, a split is empty, or input is invalid and ``on_invalid`` is error.
    """
    done = folder / _COUNTS
    if done.exists():
        return Collected.model_validate_json(done.read_text(encoding="utf-8"))
    collector = _Collector(config, folder)
    clean_batch = functools.partial(_clean_batch, config=config.cleaning)
    try:
        for source in sources:
            counts = collector.start(source.name)
            for results in ordered_map(clean_batch, _batches(source.read(), collector.skip), workers):
                for result in results:
                    collector.add(result)
                progress(f"reading {source.name}", counts.read, None)
    finally:
        collector.close()
    collected = collector.collected()
    _check(collected, config, collector.examples)
    write_atomically(done, collected.model_dump_json().encode())
    return collected


def collected_documents(folder: Path, split: Split) -> Iterator[dict[str, str]]:
    """The collected documents of a split, in order: text, identity and source."""
    with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document, by the SHA-256 of its text alone.

    So it stays where it is when others are added, and equal texts are never on both sides.
    """
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < validation_fraction else "train"


@dataclass
class _Counts:
    """One source so far."""

    dropped: Counter[str] = field(default_factory=Counter)
    kept: Counter[Split] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return self.dropped.total() + self.kept.total()


class _Collector:
    """Counts, removes duplicates, and writes each document to the file of its split."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config = config
        self._files = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLITS}
        self._seen: set[bytes] = set()
        self._bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._words: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._sources: list[tuple[str, _Counts]] = []
        self.examples: dict[str, str] = {}  # of each reason, the first input that it dropped

    def start(self, name: str) -> _Counts:
        """Begins a source; what follows is counted as its own."""
        self._sources.append((name, _Counts()))
        return self._sources[-1][1]

    def skip(self, skipped: Skipped) -> None:
        """Counts what is no document, or is dropped.

        Raises:
            UserError: if it is invalid input, and ``on_invalid`` is error.
        """
        message = f"{skipped.identity}: {skipped.detail}"
        if skipped.reason not in FILTERS and self._config.cleaning.on_invalid == "error":
            raise UserError(
                f"{message} ({skipped.reason}); mend it, or have such input counted and skipped with "
                "data.cleaning.on_invalid=skip"
            )
        self._sources[-1][1].dropped[skipped.reason] += 1
        self.examples.setdefault(skipped.reason, message)

    def add(self, result: Document | Skipped) -> None:
        """Counts a cleaned document and writes it, unless its text has been seen."""
        if isinstance(result, Skipped):
            self.skip(result)
            return
        encoded = result.text.encode()
        if self._config.cleaning.deduplicate:
            digest = hashlib.sha256(encoded).digest()[:16]
            if digest in self._seen:
                self.skip(Skipped(result.identity, DUPLICATE, "its text has been seen before"))
                return
            self._seen.add(digest)
        name, counts = self._sources[-1]
        split = split_of(result.text, self._config.validation_fraction)
        counts.kept[split] += 1
        self._bytes[split] += len(encoded)
        self._words[split] += len(result.text.split())
        record = {"text": result.text, "identity": result.identity, "source": name}
        self._files[split].write(json.dumps(record, ensure_ascii=False) + "\n")

    def collected(self) -> Collected:
        """The counts of all sources."""
        return Collected(
            sources=tuple(
                SourceCounts(
                    name=name, read=counts.read, kept=counts.kept.total(), dropped=dict(sorted(counts.dropped.items()))
                )
                for name, counts in self._sources
            ),
            documents={split: [counts.kept[split] for _, counts in self._sources] for split in SPLITS},
            bytes=self._bytes,
            words=self._words,
        )

    def close(self) -> None:
        """Flushes the files to the disk and closes them."""
        with contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.enter_context(file)
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())


def _batches(items: Iterable[Document | Skipped], skip: Callable[[Skipped], None]) -> Iterator[list[Document]]:
    """Documents in batches of about a million characters; what is no document goes to ``skip``."""
    batch: list[Document] = []
    size = 0
    for item in items:
        if isinstance(item, Skipped):
            skip(item)
            continue
        batch.append(item)
        size += len(item.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_batch(batch: list[Document], config: CleaningConfig) -> list[Document | Skipped]:
    return [clean(document, config) for document in batch]


def _check(collected: Collected, config: DataConfig, examples: dict[str, str]) -> None:
    """Refuses a corpus without documents, or with an empty split."""
    totals = {split: sum(collected.documents[split]) for split in SPLITS}
    if not any(totals.values()):
        read = sum(source.read for source in collected.sources)
        lines = [f"  {reason}, e.g. {message}" for reason, message in examples.items()]
        raise UserError("\n".join([f"data.sources: of {read:,} inputs read, no document is left; dropped:", *lines]))
    empty = next((split for split in SPLITS if not totals[split]), None)
    if empty:
        change = "raise" if empty == "validation" else "lower"
        raise UserError(
            f"the {empty} split is empty: each of the {sum(totals.values()):,} documents is drawn for validation with "
            f"probability data.validation_fraction={config.validation_fraction}; {change} it, or add documents"
        )
