"""From a training example back to the documents that it was cut from."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.documents import DocumentReader
from gpt1_jax.data.manifest import Split
from gpt1_jax.data.windows import RandomWindows


@dataclass(frozen=True)
class Part:
    """Tokens of one document.

    Attributes:
        identity: of the document, where it came from.
        split: that it is in.
        position: of the document, in that split of the TFDS dataset.
        first: its first token here, counted in the document.
        stop: one after its last here.
        length: tokens of the whole document, the separator after it included.
        tokens: int32 [stop - first].
    """

    identity: str
    split: Split
    position: int
    first: int
    stop: int
    length: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        example: its global index.
        source: name of its source.
        epoch: how many times the source was gone through before.
        parts: its documents, in order; their tokens together are the example's.
    """

    example: int
    source: str
    epoch: int
    parts: tuple[Part, ...]


def trace(corpus: Corpus, windows: RandomWindows, examples: Sequence[int]) -> Iterator[Row]:
    """Examples of the training split with their documents; of the corpus only the shards that they lie in are read.

    Raises:
        DamagedError: if the offsets, the tokens or the documents are missing or damaged.
        StorageError: if they cannot be reached.
    """
    lineage = _Lineage(corpus, "train")
    sources, epochs, starts = (column.tolist() for column in windows.places(examples))
    rows = windows.examples(np.asarray(examples))
    for example, source, epoch, start, tokens in zip(examples, sources, epochs, starts, rows, strict=True):
        yield Row(example, corpus.manifest.sources[source].name, epoch, tuple(lineage.parts(start, tokens)))


class _Lineage:
    """Finds the documents of a stretch of a split's stream."""

    def __init__(self, corpus: Corpus, split: Split):
        self._split: Split = split
        self._shards = corpus.manifest.shards_of(split)
        self._ends = np.cumsum([shard.tokens for shard in self._shards])
        self._documents = DocumentReader(corpus.folder, split, corpus.sums)
        self._offsets = functools.cache(lambda shard: corpus.offsets(self._shards[shard]))  # int64, 8 bytes a document

    def parts(self, start: int, tokens: np.ndarray) -> Iterator[Part]:
        """The documents of ``tokens``, which the stream holds from ``start`` on."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while len(tokens):
            offsets = self._offsets(shard)
            at = start - (int(self._ends[shard]) - self._shards[shard].tokens)  # in the shard
            while len(tokens) and at < self._shards[shard].tokens:
                document = int(np.searchsorted(offsets, at, side="right")) - 1
                begin, end = map(int, offsets[document : document + 2])
                count = min(len(tokens), end - at)
                position = self._shards[shard].first_document + document
                identity = self._documents[position][1]
                first = at - begin
                yield Part(identity, self._split, position, first, first + count, end - begin, tokens[:count])
                tokens, at, start = tokens[count:], at + count, start + count
            shard += 1
