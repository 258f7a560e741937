"""Near-duplicates by MinHash: documents that say, but for a few words, what an earlier one says.

A text is the set of its n-grams of words, without case, punctuation and white space. A signature holds the least hash
of that set under each of ``permutations`` hash functions; the share of entries in which two signatures agree estimates
the Jaccard similarity J of the sets (Broder 1997), with a standard deviation of at most 0.5 / sqrt(permutations). The
entries are cut into bands; documents that agree in a whole band fall into one bucket, and only these are compared
(Indyk and Motwani 1998). ``datasketch`` does the hashing, and chooses the bands for the threshold.

Definition: a document is dropped if, in the bucket of one of its bands, the first document is another one and the two
signatures agree in a share of at least ``threshold``. Whether the first document is dropped itself does not matter, so
the result is that of a sort, or of one grouping by key, and no band waits for another.

Why a threshold of 0.5: changing a share p of single words leaves about (1 - p)^n of the n-grams as they were, s say,
and J = s / (2 - s): for n = 5 that is 0.75 at 3 % of the words and 0.63 at 5 %. Passages of prose that are not copies
are far below that: of 31,302 none was lost, and 99 % of the copies with edits were found, against 58 % at a threshold
of 0.8; at 0.3 all were found, and two passages lost (benchmarks/near_duplicates.py).
"""

import functools
import importlib
import zlib
from typing import Any

import numpy as np

from gpt1_jax.config import NearDuplicates
from gpt1_jax.errors import UserError
from gpt1_jax.text.words import normal_words

_SEED = 1  # of the hash functions
_BLOCK = 4096  # n-grams hashed, and pairs compared, at once
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio


def check_near_duplicates(config: NearDuplicates) -> None:
    """Finds, before any work, what would stop the functions of this module.

    Raises:
        UserError: if the library is not installed, or the signature is too short for the threshold.
    """
    _bands(config)


def signature(text: str, config: NearDuplicates) -> np.ndarray:
    """The signature of a text, uint32, shape (permutations,): the same in any process, on any machine.

    A text of fewer words than an n-gram has is one n-gram of them all; one without words is itself the only word.
    """
    words = normal_words(text) or [text]
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    count = max(len(words) - config.ngram + 1, 1)
    shingles = np.zeros(count, np.uint64)
    for start in range(len(words) - count + 1):
        shingles = (shingles + hashes[start : start + count]) * _MULTIPLIER
    shingles >>= np.uint64(32)  # the upper half depends on every bit
    sketch = _library().MinHash(
        config.permutations, scheme="affine32", permutations=_permutations(config.permutations), hashfunc=int
    )
    for start in range(0, count, _BLOCK):
        sketch.update_batch(shingles[start : start + _BLOCK].tolist())
    return sketch.hashvalues


def band_keys(signatures: np.ndarray, config: NearDuplicates) -> np.ndarray:
    """The bucket of each band of each signature.

    Args:
        signatures: uint32, shape (documents, permutations).
        config: chooses the bands.

    Returns:
        uint64, shape (documents, bands): a hash of the band's number and entries. Buckets are those of equal band and
        equal key.
    """
    bands, _ = _bands(config)
    return np.stack([_keys_of_band(signatures, band, config) for band in range(bands)], axis=1)


def near_duplicates(signatures: np.ndarray, config: NearDuplicates) -> np.ndarray:
    """Which documents are dropped, by the definition above.

    Args:
        signatures: uint32, shape (documents, permutations), in the order of the documents; may be a memory map.
        config: the threshold, and the bands.

    Returns:
        bool, shape (documents,): true for a document that is dropped.
    """
    dropped = np.zeros(len(signatures), bool)
    for band in range(_bands(config)[0]):
        _, first, bucket = np.unique(_keys_of_band(signatures, band, config), return_index=True, return_inverse=True)
        firsts = first[bucket]
        others = np.flatnonzero((firsts != np.arange(len(firsts))) & ~dropped)
        for start in range(0, len(others), _BLOCK):
            block = others[start : start + _BLOCK]
            dropped[block] = is_near_duplicate(signatures[firsts[block]], signatures[block], config)
    return dropped


def is_near_duplicate(first: np.ndarray, later: np.ndarray, config: NearDuplicates) -> np.ndarray:
    """Whether signatures agree with those of the first documents of their buckets as far as ``threshold`` asks.

    Args:
        first: uint32, shape (..., permutations).
        later: uint32, shape (..., permutations).
        config: the threshold.

    Returns:
        bool, shape (...).
    """
    return np.mean(first == later, axis=-1) >= config.threshold


def _keys_of_band(signatures: np.ndarray, band: int, config: NearDuplicates) -> np.ndarray:
    """uint64, shape (documents,): the entries of a band, mixed one by one as in splitmix64 (Steele et al. 2014)."""
    _, rows = _bands(config)
    entries = np.array(signatures[:, band * rows : (band + 1) * rows])  # read once, where it is a memory map
    keys = np.full(len(entries), (band + 1) << 32, np.uint64)  # above the bits of an entry
    for row in range(rows):
        keys = (keys ^ entries[:, row]) + _MULTIPLIER
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    return keys


@functools.cache
def _bands(config: NearDuplicates) -> tuple[int, int]:
    """The number of bands and of entries in each, for which the library finds the fewest errors about the threshold."""
    try:
        index = _library().MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
    except ValueError as error:
        raise UserError(
            f"data.cleaning.near_duplicates: threshold={config.threshold} with permutations={config.permutations}: "
            f"{error}; lower the threshold or take more permutations"
        ) from None
    return index.b, index.r


@functools.cache
def _permutations(count: int) -> np.ndarray:
    return _library().MinHash(count, seed=_SEED, scheme="affine32").permutations


def _library() -> Any:
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise UserError(
            f"data.cleaning.near_duplicates needs the 'datasketch' library, which cannot be imported ({error}); "
            "install it with: pip install 'gpt1-jax[quality]'"
        ) from None
