"""The words of a text without case, punctuation and white space: what makes two texts say the same."""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"[^\W_]+")


def normal_words(text: str) -> list[str]:
    """The runs of letters and digits, in lower case and in Unicode's form NFKC."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(words: Sequence[str], n: int) -> Iterator[str]:
    """Every ``n`` consecutive words, joined by spaces, in order; none if there are fewer words."""
    return map(" ".join, zip(*(itertools.islice(words, start, None) for start in range(n)), strict=False))
