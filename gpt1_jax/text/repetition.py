"""Repetition within a document, by the rules of Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1 and table A1."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

_PARAGRAPHS = re.compile(r"\n\s*\n")
_TOP_LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}  # n: the most that the most frequent n-gram may cover
_DUPLICATE_LIMITS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # all n-grams that come again
Measure = tuple[str, float, float, float]


def repetition_measures(text: str) -> Iterator[Measure]:
    """The rules on repetition, in the paper's order: what is measured, its value, and the least and most it may be.

    What occurs again counts where it occurs again, not where it is first. Shares of characters leave white space out.
    Words are what stands between white space, in the case that they have.

    Deviation: the paper leaves all of this open; an n-gram that occurs once is no repetition, so texts of a few words
    are not dropped for it. A character under several n-grams counts once, as in the paper.
    """
    for name, parts in (("lines", text.splitlines()), ("paragraphs", _PARAGRAPHS.split(text))):
        yield from _part_measures(name, [stripped for part in parts if (stripped := part.strip())])
    yield from _ngram_measures(text.split())


def _part_measures(name: str, parts: Sequence[str]) -> Iterator[Measure]:
    seen: set[str] = set()
    repeated = [part for part in parts if part in seen or seen.add(part)]  # set.add gives None
    yield f"share of {name} that are duplicates", len(repeated) / max(len(parts), 1), 0, 0.30
    characters = sum(map(len, repeated)) / max(sum(map(len, parts)), 1)
    yield f"share of characters in duplicate {name}", characters, 0, 0.20


def _ngram_measures(words: Sequence[str]) -> Iterator[Measure]:
    """Every n-gram becomes an integer, exactly: that of its first n - 1 words, and the next word."""
    numbers: dict[str, int] = {}
    word_ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ids = word_ids
    for n in range(2, max(_DUPLICATE_LIMITS) + 1):
        if len(words) < n:
            return
        _, first, ids, counts = np.unique(
            ids[:-1] * len(numbers) + word_ids[n - 1 :], return_index=True, return_inverse=True, return_counts=True
        )
        if counts.max() == 1:  # then no longer n-gram comes again either
            return
        if n in _TOP_LIMITS:
            covered = _covered(ids == counts.argmax(), n, lengths)  # the first of several
            yield f"share of characters in the most frequent {n}-gram", covered, 0, _TOP_LIMITS[n]
        else:
            again = np.ones(len(ids), bool)
            again[first] = False
            covered = _covered(again, n, lengths)
            yield f"share of characters in duplicate {n}-grams", covered, 0, _DUPLICATE_LIMITS[n]


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """The share of characters in the words under the n-grams that start where ``starts`` is true."""
    steps = np.zeros(len(lengths) + 1, np.int64)
    steps[:-n] += starts
    steps[n:] -= starts
    return float(lengths[np.cumsum(steps[:-1]) > 0].sum() / lengths.sum())
