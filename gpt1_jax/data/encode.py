"""From documents to shards of tokens, on all cores; the bytes do not depend on how many."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt1_jax.data.collect import SPLITS, Collected, Progress
from gpt1_jax.data.documents import DocumentReader
from gpt1_jax.data.manifest import Shard, Split
from gpt1_jax.data.storage import write_atomically
from gpt1_jax.pool import ordered_map
from gpt1_jax.text.tokenizer import Tokenizer, read_tokenizer

TOKENIZER = "tokenizer.model"
_JOB_BYTES = 1_000_000  # of text, encoded in one go


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the tokens on disk: little-endian uint16, or uint32 for a vocabulary that needs it."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class _Job:
    """A range of the documents of one source in one split."""

    corpus: Path
    split: Split
    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a range of documents, each followed by the separator, and where each document ends."""

    job: _Job
    tokens: np.ndarray
    ends: np.ndarray


def encode_documents(
    corpus: Path, work: Path, collected: Collected, shard_tokens: int, workers: int, progress: Progress
) -> tuple[Shard, ...]:
    """Writes the shards of every split and source, and returns them in order.

    A shard holds whole documents, and no more than ``shard_tokens`` tokens unless a single document does. Each is
    noted in ``work`` when it is complete: a second call goes on after the last.
    """
    shards: list[Shard] = []
    jobs: list[_Job] = []
    for split in SPLITS:
        first = 0
        step = max(1, _JOB_BYTES * sum(collected.documents[split]) // max(1, collected.bytes[split]))
        for source, documents in enumerate(collected.documents[split]):
            done = _noted(work, split, source)
            start, stop = first + sum(shard.documents for shard in done), first + documents
            jobs += [_Job(corpus, split, source, at, min(stop, at + step)) for at in range(start, stop, step)]
            shards += done
            first = stop
    writer = _ShardWriter(corpus, work, shard_tokens, shards)
    total = sum(map(sum, collected.documents.values()))
    encoded_documents = sum(shard.documents for shard in shards)
    try:
        for encoded in ordered_map(_encode, jobs, workers):
            writer.add(encoded)
            encoded_documents += len(encoded.ends)
            progress("encoding", encoded_documents, total)
        writer.close_shard()
    finally:
        writer.close()
        _opened.cache_clear()
    return tuple(sorted(writer.shards, key=lambda shard: (SPLITS.index(shard.split), shard.file)))


@functools.lru_cache(maxsize=2)
def _opened(corpus: Path, split: Split) -> tuple[DocumentReader, Tokenizer]:
    return DocumentReader(corpus, split), read_tokenizer(corpus / TOKENIZER)


def _encode(job: _Job) -> _Encoded:
    documents, tokenizer = _opened(job.corpus, job.split)
    encoded = tokenizer.encode_batch([documents[position][0] for position in range(job.start, job.stop)])
    ends = np.cumsum([len(tokens) + 1 for tokens in encoded])
    tokens = np.full(ends[-1], tokenizer.separator_id, token_dtype(tokenizer.vocab_size))
    for end, document in zip(ends, encoded, strict=True):
        tokens[end - 1 - len(document) : end - 1] = document
    return _Encoded(job, tokens, ends)


def _noted(work: Path, split: Split, source: int) -> list[Shard]:
    """The shards of a source that are complete, in order."""
    notes = sorted(work.glob(f"{split}-{source:02d}-*.shard"))
    return [Shard.model_validate_json(note.read_text(encoding="utf-8")) for note in notes]


class _ShardWriter:
    """Cuts a stream of documents, ordered by split and source, into shards."""

    def __init__(self, corpus: Path, work: Path, shard_tokens: int, done: list[Shard]) -> None:
        self._corpus, self._work, self._limit = corpus, work, shard_tokens
        self.shards = list(done)
        self._key: tuple[Split, int] | None = None
        self._file: BinaryIO | None = None
        self._offsets = [0]
        self._first = 0

    def add(self, encoded: _Encoded) -> None:
        """Adds a range of documents: as many at a time as the shard has room for."""
        key = encoded.job.split, encoded.job.source
        if key != self._key:
            self.close_shard()
            self._key = key
        ends, at = encoded.ends, 0
        while at < len(ends):
            begin = ends[at - 1] if at else 0
            if self._file is None:
                self._file = open(self._work / "open.tokens", "wb")
                self._offsets, self._first = [0], encoded.job.start + at
            room = self._limit - self._offsets[-1]
            stop = max(at, int(np.searchsorted(ends, begin + room, side="right")))
            if stop == at and len(self._offsets) == 1:  # one document that is longer than a shard
                stop = at + 1
            if stop == at:
                self.close_shard()
                continue
            self._file.write(encoded.tokens[begin : ends[stop - 1]].tobytes())
            self._offsets += (self._offsets[-1] + ends[at:stop] - begin).tolist()
            at = stop

    def close_shard(self) -> None:
        """Completes the shard that is open, if one is: tokens, offsets, and last the note that it is there."""
        if self._file is None or self._key is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        split, source = self._key
        number = sum((shard.split, shard.source) == self._key for shard in self.shards)
        shard = Shard(
            split=split,
            source=source,
            file=f"{split}-{source:02d}-{number:05d}.tokens",
            tokens=self._offsets[-1],
            documents=len(self._offsets) - 1,
            first_document=self._first,
        )
        (self._work / "open.tokens").replace(self._corpus / shard.file)
        write_atomically(self._corpus / shard.offsets_file, np.asarray(self._offsets, "<i8").tobytes())
        note = (self._work / shard.file).with_suffix(".shard")
        write_atomically(note, shard.model_dump_json().encode())
        self.shards.append(shard)

    def close(self) -> None:
        """Closes the file of an open shard without completing it."""
        if self._file is not None:
            self._file.close()
            self._file = None
