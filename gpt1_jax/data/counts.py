"""What was collected, counted: by source, and of each split the documents of every chunk."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pydantic
from etils import epath

from gpt1_jax.data.collect import counts_of, read_array
from gpt1_jax.data.documents import is_kept
from gpt1_jax.data.duplicates import REASONS, Chunk, dropped_file
from gpt1_jax.data.manifest import SPLITS, SourceCounts, Split
from gpt1_jax.errors import RefusedError


class Collected(pydantic.BaseModel):
    """The counts.

    Attributes:
        sources: what each gave, and what of it was dropped.
        documents: of each split, by source.
        bytes: of each split, UTF-8, by source.
        words: of each split.
        chunks: every file of documents.
        kept: of each split, the documents that it has of each chunk, and their bytes.
        examples: of each reason, the first input that it dropped.
    """

    sources: tuple[SourceCounts, ...]
    documents: dict[Split, list[int]]
    bytes: dict[Split, list[int]]
    words: dict[Split, int]
    chunks: list[Chunk]
    kept: dict[Split, list[tuple[int, int]]]
    examples: dict[str, str]

    def chunks_of(self, split: Split) -> list[tuple[Chunk, int, int]]:
        """The chunks of which a split has documents, with their number and bytes."""
        return [(chunk, *kept) for chunk, kept in zip(self.chunks, self.kept[split], strict=True) if kept[0]]


def count_collected(parts: int, chunks: Sequence[Chunk], names: Sequence[str], folder: epath.Path) -> Collected:
    """Adds up what the parts and the chunks say.

    Args:
        parts: how many there are.
        chunks: all of theirs.
        names: of the sources.
        folder: where they are.
    """
    dropped: list[Counter[str]] = [Counter() for _ in names]
    cut: list[Counter[str]] = [Counter() for _ in names]
    read = [0] * len(names)
    examples: dict[str, str] = {}
    for part in range(parts):
        counts = counts_of(part, folder)
        read[counts.source] += counts.read
        dropped[counts.source].update(counts.dropped)
        cut[counts.source].update(counts.cut)
        examples = counts.examples | examples  # the first stays
    kept: dict[Split, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    documents: dict[Split, list[int]] = {split: [0] * len(names) for split in SPLITS}
    sizes: dict[Split, list[int]] = {split: [0] * len(names) for split in SPLITS}
    words = dict.fromkeys(SPLITS, 0)
    for chunk in chunks:
        out = read_array(dropped_file(chunk, folder))
        for number, count in enumerate(np.bincount(out).tolist()):
            if number and count:
                dropped[chunk.source][REASONS[number]] += count
        columns = read_array(folder / f"{chunk.name}.columns.npy")
        for split, wanted in zip(SPLITS, is_kept(columns, out), strict=True):
            count, size = int(wanted.sum()), int(columns["bytes"][wanted].sum())
            kept[split].append((count, size))
            documents[split][chunk.source] += count
            sizes[split][chunk.source] += size
            words[split] += int(columns["words"][wanted].sum())
    sources = tuple(
        SourceCounts(
            name=name,
            read=read[number],
            kept=sum(documents[split][number] for split in SPLITS),
            dropped=dict(sorted(dropped[number].items())),
            cut=dict(cut[number]),
        )
        for number, name in enumerate(names)
    )
    return Collected(
        sources=sources,
        documents=documents,
        bytes=sizes,
        words=words,
        chunks=list(chunks),
        kept=kept,
        examples=examples,
    )


def check_collected(collected: Collected, validation_fraction: float) -> None:
    """Refuses a corpus without documents, or with an empty split.

    Raises:
        RefusedError: with what was dropped and why, or how to fill the split.
    """
    totals = {split: sum(collected.documents[split]) for split in SPLITS}
    if not any(totals.values()):
        read = sum(source.read for source in collected.sources)
        lines = [f"  {reason}, e.g. {message}" for reason, message in collected.examples.items()]
        raise RefusedError("\n".join([f"data.sources: of {read:,} inputs read, no document is left; dropped:", *lines]))
    empty = next((split for split in SPLITS if not totals[split]), None)
    if empty:
        change = "raise" if empty == "validation" else "lower"
        raise RefusedError(
            f"the {empty} split is empty: each of the {sum(totals.values()):,} documents is drawn for validation with "
            f"probability data.validation_fraction={validation_fraction}; {change} it, or add documents"
        )
