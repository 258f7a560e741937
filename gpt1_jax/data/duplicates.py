"""Stage two: which of the collected documents are dropped because another says the same.

Of documents with the same text the first is kept; near-duplicates are those that
:mod:`gpt1_jax.text.near_duplicates` defines, among what is then left. Either is a property of the whole collection and
of its order alone, whoever computes it. The folder gets, beside each chunk of documents::

    PPPPPP-CCCC.dropped.npy    of each document: 0, or why it is dropped, as an index into REASONS
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from gpt1_jax.config import CleaningConfig
from gpt1_jax.data.collect import chunk_name, counts_of, read_array, write_array
from gpt1_jax.text.document import DUPLICATE, NEAR_DUPLICATE
from gpt1_jax.text.near_duplicates import near_duplicates

REASONS = ("", DUPLICATE, NEAR_DUPLICATE)


class Chunk(NamedTuple):
    """A file of collected documents."""

    name: str
    source: int
    documents: int


def chunks_of(parts: int, folder: epath.Path) -> list[Chunk]:
    """Every chunk of the first ``parts`` parts, in the order of the documents."""
    counts = [counts_of(part, folder) for part in range(parts)]
    return [
        Chunk(chunk_name(part, number), count.source, documents)
        for part, count in enumerate(counts)
        for number, documents in enumerate(count.chunks)
    ]


def dropped_file(chunk: Chunk, folder: epath.Path) -> epath.Path:
    """Where it is written which documents of a chunk are dropped."""
    return folder / f"{chunk.name}.dropped.npy"


def drop_duplicates(chunks: Sequence[Chunk], config: CleaningConfig, folder: epath.Path) -> None:
    """Decides for all documents, in this process.

    Memory is 16 bytes a document for its digest, and its signature where near-duplicates are looked for.
    """
    total = sum(chunk.documents for chunk in chunks)
    dropped = np.zeros(total, np.uint8)
    if config.deduplicate:
        digests = np.concatenate([digests_of(chunk, folder) for chunk in chunks]) if chunks else np.empty((0, 2))
        dropped[_repeated(digests)] = REASONS.index(DUPLICATE)
    if config.near_duplicates:
        left = np.flatnonzero(dropped == 0)
        signatures = np.empty((len(left), config.near_duplicates.permutations), np.uint32)
        for (start, stop), found in zip(_bounds(chunks), (signatures_of(c, folder) for c in chunks), strict=True):
            first, last = np.searchsorted(left, [start, stop])
            signatures[first:last] = found[left[first:last] - start]
        dropped[left[near_duplicates(signatures, config.near_duplicates)]] = REASONS.index(NEAR_DUPLICATE)
    for chunk, (start, stop) in zip(chunks, _bounds(chunks), strict=True):
        write_array(dropped_file(chunk, folder), dropped[start:stop])


def digests_of(chunk: Chunk, folder: epath.Path) -> np.ndarray:
    """The first 16 bytes of the SHA-256 of each document's text, uint64 [documents, 2]."""
    return read_array(folder / f"{chunk.name}.columns.npy")["digest"]


def signatures_of(chunk: Chunk, folder: epath.Path) -> np.ndarray:
    """The MinHash signature of each document, uint32 [documents, permutations]."""
    return read_array(folder / f"{chunk.name}.signatures.npy")


def _repeated(digests: np.ndarray) -> np.ndarray:
    """The places of all digests but the first of each kind."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in the order of the documents
    ordered = digests[order]
    return order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]


def _bounds(chunks: Sequence[Chunk]) -> Iterator[tuple[int, int]]:
    """The first and last-plus-one document of each chunk."""
    start = 0
    for chunk in chunks:
        yield start, start + chunk.documents
        start += chunk.documents
