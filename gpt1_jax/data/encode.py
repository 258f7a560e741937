"""Documents to shards of tokens; the bytes depend on no engine and on no number of workers.

Ranges of documents are encoded first, wherever there is room; then it is decided which documents each shard holds, and
the shards are put together. In between the work folder holds, of each range of documents::

    SPLIT-SS-FFFFFFFFFFFF.range.tokens    of source SS from document F on: their tokens
    SPLIT-SS-FFFFFFFFFFFF.range.ends.npy  where each of them ends; written last
"""

import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from gpt1_jax.data.collect import read_array, write_array
from gpt1_jax.data.documents import DocumentReader
from gpt1_jax.data.manifest import SPLITS, Shard, Split
from gpt1_jax.data.storage import is_remote, local_copy, put_file, write_atomically
from gpt1_jax.text.tokenizer import Tokenizer, read_tokenizer

TOKENIZER = "tokenizer.model"
_RANGE_BYTES = 1_000_000  # of text, encoded in one go
_MOST_RANGES = 10_000  # of a split; then they are larger. A Beam runner is sent a list of them


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the tokens on disk: little-endian uint16, or uint32 for a vocabulary that needs it."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Range:
    """Documents [start, stop) of one source in one split."""

    split: Split
    source: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its files, before the ending."""
        return f"{self.split}-{self.source:02}-{self.start:012}.range"


class Piece(NamedTuple):
    """Documents [first, last) of a range."""

    range: Range
    first: int
    last: int


@dataclass(frozen=True)
class ShardPlan:
    """A shard, and where the tokens of its documents are."""

    shard: Shard
    pieces: tuple[Piece, ...]


def plan_ranges(documents: Mapping[Split, Sequence[int]], sizes: Mapping[Split, Sequence[int]]) -> list[Range]:
    """Ranges of about a megabyte of text each, or more of a large corpus, by split, source and place.

    Args:
        documents: of each split, how many of each source.
        sizes: of each split, bytes of text of each source.
    """
    ranges: list[Range] = []
    for split in SPLITS:
        wanted = max(_RANGE_BYTES, sum(sizes[split]) // _MOST_RANGES)
        first = 0
        for source, (count, size) in enumerate(zip(documents[split], sizes[split], strict=True)):
            stop, step = first + count, max(1, wanted * count // max(1, size))
            ranges += [Range(split, source, at, min(stop, at + step)) for at in range(first, stop, step)]
            first = stop
    return ranges


def encode_range(documents: Range, corpus: epath.Path, work: epath.Path) -> None:
    """Writes the tokens of a range of documents, and where each of them ends."""
    tokens, ends = encoded(documents, corpus)
    write_atomically(work / f"{documents.name}.tokens", tokens.tobytes())
    write_array(work / f"{documents.name}.ends.npy", ends)


def encoded(documents: Range, corpus: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a range, each document followed by the separator, and where each of them ends (int64)."""
    reader, tokenizer = _opened(corpus, documents.split)
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator_id], dtype)
    pieces: list[np.ndarray] = []
    for texts in _blocks(text for text, _ in reader.read(documents.start, documents.stop)):
        for found in tokenizer.encode_batch(texts):
            pieces += [np.asarray(found, dtype), separator]
    ends = np.cumsum([len(piece) for piece in pieces])[1::2]
    return np.concatenate(pieces), ends


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts of about a megabyte together: encoding takes many times the memory of the text."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _RANGE_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


@functools.lru_cache(maxsize=2)
def _opened(corpus: epath.Path, split: Split) -> tuple[DocumentReader, Tokenizer]:
    return DocumentReader(corpus, split), read_tokenizer(corpus / TOKENIZER)


def forget_opened() -> None:
    """Closes what encoding in this process has opened, which another preparation may replace."""
    _opened.cache_clear()


def plan_shards(ranges: Sequence[Range], work: epath.Path, shard_tokens: int) -> list[ShardPlan]:
    """Which documents each shard holds: whole ones, as many as fit into ``shard_tokens``, and at least one.

    A shard has one split and one source.
    """
    plans: list[ShardPlan] = []
    for documents in ranges:
        ends = read_array(work / f"{documents.name}.ends.npy")
        at = 0
        while at < len(ends):
            begin = int(ends[at - 1]) if at else 0
            last = plans[-1].shard if plans else None
            same = last is not None and (last.split, last.source) == (documents.split, documents.source)
            room = shard_tokens - last.tokens if last is not None and same else 0
            stop = int(np.searchsorted(ends, begin + room, side="right"))
            if stop <= at:  # the next document needs a new shard
                number = int(Path(last.file).stem.rpartition("-")[2]) + 1 if last is not None and same else 0
                plans.append(ShardPlan(_empty_shard(documents, number, at), ()))
                stop = max(at + 1, int(np.searchsorted(ends, begin + shard_tokens, side="right")))
            plans[-1] = _grown(plans[-1], Piece(documents, at, stop), int(ends[stop - 1]) - begin)
            at = stop
    return plans


def _empty_shard(documents: Range, number: int, at: int) -> Shard:
    return Shard(
        split=documents.split,
        source=documents.source,
        file=f"{documents.split}-{documents.source:02}-{number:05}.tokens",
        tokens=0,
        documents=0,
        first_document=documents.start + at,
    )


def _grown(plan: ShardPlan, piece: Piece, tokens: int) -> ShardPlan:
    shard = plan.shard
    grown = {"tokens": shard.tokens + tokens, "documents": shard.documents + piece.last - piece.first}
    return ShardPlan(shard.model_copy(update=grown), (*plan.pieces, piece))


def write_shard(plan: ShardPlan, corpus: epath.Path, work: epath.Path) -> None:
    """Puts a shard together: its tokens, and last its offsets."""
    _write(plan.shard, (_read_piece(piece, corpus, work) for piece in plan.pieces), corpus, work)


def rebuild_shard(shard: Shard, corpus: epath.Path, work: epath.Path) -> None:
    """Makes one shard of a prepared corpus again, from its documents."""
    documents = Range(shard.split, shard.source, shard.first_document, shard.first_document + shard.documents)
    _write(shard, iter([encoded(documents, corpus)]), corpus, work)


def _read_piece(piece: Piece, corpus: epath.Path, work: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    dtype = token_dtype(_opened(corpus, piece.range.split)[1].vocab_size)
    ends = read_array(work / f"{piece.range.name}.ends.npy")
    tokens = np.fromfile(local_copy(work / f"{piece.range.name}.tokens"), dtype)
    begin = int(ends[piece.first - 1]) if piece.first else 0
    return tokens[begin : ends[piece.last - 1]], ends[piece.first : piece.last] - begin


def _write(shard: Shard, pieces: Iterator[tuple[np.ndarray, np.ndarray]], corpus: epath.Path, work: epath.Path) -> None:
    path, offsets = corpus / shard.file, [np.zeros(1, np.int64)]
    with tempfile.TemporaryDirectory(dir=None if is_remote(work) else work) as folder:
        local = Path(folder) / shard.file
        with open(local, "wb") as file:
            for tokens, ends in pieces:
                file.write(tokens.tobytes())
                offsets.append(offsets[-1][-1] + ends)
        put_file(local, path)
    write_atomically(corpus / shard.offsets_file, np.concatenate(offsets).astype("<i8").tobytes())
