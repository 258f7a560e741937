"""What is in a prepared corpus, in figures."""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.manifest import SPLITS, Split, SplitCounts
from gpt1_jax.text.document import DUPLICATE, NEAR_DUPLICATE


class Statistics(NamedTuple):
    """The figures.

    Attributes:
        splits: documents, bytes, words and tokens of each.
        bytes_per_token: of the whole corpus, separators counted as tokens.
        lengths: documents by their length: key n counts those of n to 2n - 1 tokens, the separator included.
        sources: tokens of the training split by source.
        origins: where the most documents are from (see :func:`origin_of`), with their number.
        duplicate_rate: share of the inputs read that were dropped as duplicates or near-duplicates.
        dropped: inputs that were dropped, by reason.
    """

    splits: dict[Split, SplitCounts]
    bytes_per_token: float
    lengths: dict[int, int]
    sources: dict[str, int]
    origins: dict[str, int]
    duplicate_rate: float
    dropped: dict[str, int]


def statistics(corpus: Corpus, top: int, on_document: Callable[[int], None] = lambda count: None) -> Statistics:
    """Reads the manifest, the offsets and every document's identity.

    Args:
        corpus: opened.
        top: how many origins to name.
        on_document: told, now and then, how many documents were read.

    Raises:
        DamagedError: if a file is missing or damaged.
    """
    manifest = corpus.manifest
    lengths: Counter[int] = Counter()
    for shard in manifest.shards:
        exponents = np.log2(np.diff(corpus.offsets(shard))).astype(int)
        lengths.update(dict(enumerate(np.bincount(exponents).tolist())))
    origins: Counter[str] = Counter()
    for split in SPLITS:
        for _, identity in read_documents(corpus.folder, split, corpus.sums):
            origins[origin_of(identity)] += 1
            if not origins.total() % 10_000:
                on_document(origins.total())
    dropped: Counter[str] = Counter()
    for source in manifest.sources:
        dropped.update(source.dropped)
    read = sum(source.read for source in manifest.sources)
    counts = manifest.splits.values()
    names = [source.name for source in manifest.sources]
    return Statistics(
        splits=manifest.splits,
        bytes_per_token=sum(split.bytes for split in counts) / sum(split.tokens for split in counts),
        lengths={2**exponent: count for exponent, count in sorted(lengths.items()) if count},
        sources=dict(zip(names, corpus.source_tokens("train"), strict=True)),
        origins=dict(sorted(origins.items(), key=lambda item: (-item[1], item[0]))[:top]),
        duplicate_rate=(dropped[DUPLICATE] + dropped[NEAR_DUPLICATE]) / read,
        dropped=dict(sorted(dropped.items())),
    )


def origin_of(identity: str) -> str:
    """Where a document is from: the domain of a URL, the file of a line or row, the folder of a file.

    ``https://en.wikipedia.org/wiki/Tea`` gives ``en.wikipedia.org``, ``posts/a.jsonl:17`` ``posts/a.jsonl``,
    ``books/emma.txt`` ``books``.
    """
    if identity.startswith(("http://", "https://")):
        with contextlib.suppress(ValueError):  # it is no URL after all
            return urlsplit(identity).hostname or identity
    parts = identity.split(":")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    rest = ":".join(parts)
    return rest if rest != identity else identity.rpartition("/")[0] or identity
