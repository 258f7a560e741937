"""The order in which examples are drawn: pure integer functions of the seed and of an example's index.

Nothing here holds state or sees a file, a process or a device, so the order cannot depend on any of them. All of it
works on arrays of indices and is exact in 64 bits.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt1_jax.errors import UserError
from gpt1_jax.source_config import weight_at

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

# At a million records two rounds leave neighbours correlated at 0.99; four measure as a random order does, and two more
# are the margin for structure that was not measured.
ROUNDS = 6
PERIOD = 1 << 16  # slots after which a mixture of sources repeats: a share is exact to 1 in 65,536


def make_key(seed: int, *parts: ArrayLike) -> UInt64:
    """Derives an independent key for every (seed, parts), for instance (seed, source, epoch).

    Args:
        seed: of the run, at least 0.
        *parts: non-negative integers or arrays of them, broadcast against each other.

    Returns:
        The keys, uint64, at least one-dimensional.
    """
    key = _mix(np.atleast_1d(np.uint64(seed)))
    for part in parts:
        key = _mix(key + np.asarray(part).astype(np.uint64))
    return key


def draw(key: UInt64, bound: ArrayLike) -> Int64:
    """A number in [0, bound) for each key, int64. Its bias, bound / 2**64, is beyond measurement."""
    # The tag sets it apart from the round keys of the permutation, which are derived from the same key.
    return (_mix(key ^ np.uint64(0x6F66667365740000)) % np.asarray(bound).astype(np.uint64)).astype(np.int64)


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> Int64:
    """The places of ``index`` in a pseudo-random permutation of ``range(size)`` chosen by ``key``.

    A Feistel network of 6 rounds over a grid of rows x columns, the smallest near-square one that holds ``size``
    cells; a result beyond ``size`` goes through again until it is inside (cycle-walking). The grid has fewer than
    sqrt(size) + 1 cells to spare, so hardly any does. Constant memory, and any index costs the same.

    Args:
        index: in [0, size), below 2**62.
        size: at least 1.
        key: from :func:`make_key`. All three are broadcast against each other.

    Returns:
        int64, at least one-dimensional, in [0, size); for one size and key, all different.

    References:
        Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", methods 2 (cycle-walking) and 3
        (generalised Feistel).
    """
    index, size, key = np.broadcast_arrays(*(np.atleast_1d(x).astype(np.uint64) for x in (index, size, key)))
    columns = np.sqrt(size).astype(np.uint64) + np.uint64(1)
    rows = (size + columns - np.uint64(1)) // columns
    place = _feistel(index, rows, columns, key)
    while (outside := place >= size).any():
        place[outside] = _feistel(place[outside], rows[outside], columns[outside], key[outside])
    return place.astype(np.int64)


def _feistel(cell: UInt64, rows: UInt64, columns: UInt64, key: UInt64) -> UInt64:
    """Permutes the cells of the grid: each round adds a keyed hash of one coordinate to the other."""
    row, column = np.divmod(cell, columns)
    for number in range(0, ROUNDS, 2):
        # Half of the hash leaves room for the sum in 64 bits.
        row = (row + (_mix(column ^ _mix(key + np.uint64(number))) >> np.uint64(1))) % rows
        column = (column + (_mix(row ^ _mix(key + np.uint64(number + 1))) >> np.uint64(1))) % columns
    return row * columns + column


def _mix(x: UInt64) -> UInt64:
    """The output of SplitMix64 in state ``x`` (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def remaining(place: ArrayLike, left_out: Sequence[tuple[int, int]]) -> Int64:
    """Global indices of examples by their places in the sequence that is left of all.

    Args:
        place: at least 0.
        left_out: first example, and the one after the last, of each part that is left out, counted in the sequence that
            the parts before it leave.
    """
    index = np.asarray(place, np.int64)
    for first, stop in reversed(left_out):
        index = np.where(index >= first, index + (stop - first), index)
    return index


class Mixture:
    """Which source each global example comes from, in exact proportions.

    Every :data:`PERIOD` consecutive examples hold ``quotas[k]`` of source k, spread evenly: of any run of examples,
    source k gives its share to within one example for each source of the mixture.

    Args:
        weights: one for each source, at least 0: how many times as often it is drawn as its size makes it.
        tokens: of each source.
        names: of each source, for messages.

    Attributes:
        quotas: examples of each source in a period, int64, proportional to weight x tokens by largest remainder.

    Raises:
        UserError: if a positive weight is too small to give its source one example in a period, or all are 0.
    """

    def __init__(self, weights: Sequence[float], tokens: Sequence[int], names: Sequence[str]):
        # Fractions, so that the quotas are the same on every machine.
        sizes = [Fraction(weight) * count for weight, count in zip(weights, tokens, strict=True)]
        if not sum(sizes):
            raise UserError("data.sources: every source has weight 0 or no tokens; nothing to draw from")
        exact = [size * PERIOD / sum(sizes) for size in sizes]
        quotas = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda k: quotas[k] - exact[k])
        for k in by_remainder[: PERIOD - sum(quotas)]:
            quotas[k] += 1
        for k, (quota, weight) in enumerate(zip(quotas, weights, strict=True)):
            if weight > 0 and not quota:
                share = float(exact[k] / PERIOD)
                raise UserError(
                    f"data.sources.{k}.weight={weight:g} is too small: source '{names[k]}' ({tokens[k]} tokens) would "
                    f"be {share:.1e} of the examples, and the least that can be drawn is 1 in {PERIOD}; "
                    f"raise the weight to about {weight / (share * PERIOD):.3g}, or remove the source"
                )
        self.quotas = np.array(quotas, np.int64)
        self._source = np.repeat(np.arange(len(quotas)), quotas)
        self._rank = np.concatenate([np.arange(quota) for quota in quotas])
        # Example j of a source with quota q belongs at (2j + 1) / 2q of the period. Different fractions this small
        # differ as floats, and equal ones are equal floats, so the order is exact.
        slots = np.argsort((2 * self._rank + 1) / (2 * self.quotas[self._source]), kind="stable")
        self._source, self._rank = self._source[slots], self._rank[slots]

    def locate(self, example: ArrayLike) -> tuple[Int64, Int64]:
        """The source of each global example, and how many examples of that source come before it (int64 both)."""
        cycle, slot = np.divmod(np.asarray(example, np.int64), PERIOD)
        source = self._source[slot]
        return source, cycle * self.quotas[source] + self._rank[slot]

    def drawn(self, examples: int) -> Int64:
        """How many of the first ``examples`` are of each source."""
        cycles, slots = divmod(examples, PERIOD)
        return cycles * self.quotas + np.bincount(self._source[:slots], minlength=len(self.quotas))


class Curriculum:
    """A mixture whose weights change at given examples; each source goes on where it stood.

    A phase lasts as long as no weight changes, and is a :class:`Mixture` from its first example on. How much of each
    source the phases before it drew is counted once, in whole periods and the part of one, so an example is located
    in constant time and memory, however far it lies.

    Args:
        weights: one for each source: a number, at least 0, or a mapping from the example from which a weight holds to
            that weight, its least key 0.
        tokens: of each source.
        names: of each source, for messages.

    Attributes:
        quotas: of the mixture of each phase, int64 [phases, sources].

    Raises:
        UserError: as :class:`Mixture`.
    """

    def __init__(self, weights: Sequence[float | Mapping[int, float]], tokens: Sequence[int], names: Sequence[str]):
        changes = sorted({0}.union(*(weight for weight in weights if isinstance(weight, Mapping))))
        self._first = np.array(changes, np.int64)  # example of each phase
        self._phases = [Mixture([weight_at(weight, at) for weight in weights], tokens, names) for at in changes]
        self.quotas = np.stack([phase.quotas for phase in self._phases])
        lengths = np.diff(changes).tolist()
        drawn = [phase.drawn(length) for phase, length in zip(self._phases, lengths, strict=False)]
        self._drawn = np.cumsum([np.zeros_like(self.quotas[0]), *drawn], axis=0)  # of each source before each phase

    def locate(self, example: ArrayLike) -> tuple[Int64, Int64]:
        """The source of each global example, and how many examples of that source come before it (int64 both)."""
        examples = np.asarray(example, np.int64)
        phases = np.searchsorted(self._first, examples, side="right") - 1
        source, drawn = np.empty_like(examples), np.empty_like(examples)
        for phase in np.unique(phases):
            here = phases == phase
            source[here], drawn[here] = self._phases[phase].locate(examples[here] - self._first[phase])
        return source, drawn + self._drawn[phases, source]
