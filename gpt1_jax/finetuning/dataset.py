"""Encoded examples in memory, and batches of some of them.

Shapes: N examples, B batch, K sequences of an example (orders or answers), T position.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gpt1_jax.finetuning.forms import Encoded

_SMALLEST_WIDTH = 16
_TOGETHER = 1000  # examples


class Batch(NamedTuple):
    """Some examples, padded to one width.

    Attributes:
        tokens_BKT: token ids, int32; what is behind the last token of a sequence is seen by none before it.
        weights_BKT: of predicting each token from those before it, float32; those of an example of which anything is
            learned sum to its share.
        last_BK: position of the last token, at which a classifier reads; -1 where an example has fewer sequences.
        labels_B: class, number or right answer, float32.
        shares_B: of each example in the batch's loss, float32; they sum to 1.
    """

    tokens_BKT: np.ndarray | jax.Array
    weights_BKT: np.ndarray | jax.Array
    last_BK: np.ndarray | jax.Array
    labels_B: np.ndarray | jax.Array
    shares_B: np.ndarray | jax.Array


class Dataset:
    """Encoded examples; only their tokens, 4 bytes each, and a few numbers are kept.

    Attributes:
        labels_N: float32.
        lengths_N: tokens of the longest sequence of each example.
        tokens_N: tokens of all its sequences.
        choices: sequences of the example that has most.
        truncated: examples of which something was left out.
        fingerprint: SHA-256 of everything, hexadecimal.
    """

    def __init__(self, examples: Iterable[Encoded]):
        # Arrays of many examples: one of each would take more memory than the tokens in it.
        parts: list[tuple[np.ndarray, ...]] = []
        self.truncated, rest = 0, iter(examples)
        while some := list(itertools.islice(rest, _TOGETHER)):
            sequences = [sequence for example in some for sequence in example.sequences]
            tokens, lengths = np.concatenate(sequences), np.array([len(sequence) for sequence in sequences])
            learned = np.concatenate([part for example in some for part in example.learned])
            counts = np.array([len(example.sequences) for example in some])
            labels = np.array([example.label for example in some], np.float32)
            parts.append((tokens, learned, lengths, counts, labels))
            self.truncated += sum(example.truncated for example in some)
        self._tokens, self._learned, lengths, counts, self.labels_N = map(np.concatenate, zip(*parts, strict=True))
        self._sequences = np.concatenate([[0], np.cumsum(counts)])  # where those of each example begin
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.lengths_N = np.maximum.reduceat(lengths, self._sequences[:-1])
        self.tokens_N = np.add.reduceat(lengths, self._sequences[:-1])
        self.choices = int(np.diff(self._sequences).max())
        digest = hashlib.sha256()
        for array in (self._tokens, self._learned, self._starts, self._sequences, self.labels_N):
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels_N)

    def sequences(self, number: int) -> list[np.ndarray]:
        """The token ids of an example's sequences."""
        return [self._tokens[start:stop] for start, stop in self._bounds(number)]

    def batch(self, numbers: Sequence[int] | np.ndarray, width: int, size: int) -> Batch:
        """Some examples of a batch.

        Args:
            numbers: of the examples; -1 gives one that is all padding, without a share.
            width: T.
            size: of the whole batch.
        """
        shape = (len(numbers), self.choices, width)
        tokens_BKT, weights_BKT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        last_BK = np.full(shape[:2], -1, np.int32)
        labels_B, shares_B = np.zeros(shape[0], np.float32), np.zeros(shape[0], np.float32)
        for row, number in enumerate(numbers):
            if number < 0:
                continue
            bounds = self._bounds(number)
            for k, (start, stop) in enumerate(bounds):
                learned = self._learned[start:stop]
                tokens_BKT[row, k, : stop - start] = self._tokens[start:stop]
                # Averaged over each sequence, then over sequences, as the authors' code does. Of a conversation whose
                # system message fills the context nothing is learned.
                weights_BKT[row, k, : stop - start] = learned / (max(1, learned.sum()) * len(bounds) * size)
                last_BK[row, k] = stop - start - 1
            labels_B[row], shares_B[row] = self.labels_N[number], 1 / size
        return Batch(tokens_BKT, weights_BKT, last_BK, labels_B, shares_B)

    def _bounds(self, number: int) -> list[tuple[int, int]]:
        first, stop = self._sequences[number], self._sequences[number + 1]
        return list(zip(self._starts[first:stop], self._starts[first + 1 : stop + 1], strict=True))


def width_for(length: int, most: int, multiple: int = 1) -> int:
    """The width to which sequences of a length are padded: one of a few, each at most half as much again as the last.

    Args:
        length: of the longest of them.
        most: the context.
        multiple: it divides the context, and will divide the width: the devices that split a sequence.
    """
    width = _SMALLEST_WIDTH
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(-(-width // multiple) * multiple, most)
