"""The order of fine-tuning examples: epochs, each a random order of its own, in batches of nearly equal lengths.

It is a pure function of seed and position: a run that is killed goes on where it was, and hosts agree without a word.
"""

import threading
from typing import NamedTuple

import numpy as np

from gpt1_jax.data.order import make_key, permute
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.dataset import Batch, Dataset, width_for

_POOL = 64  # batches whose examples are sorted by length: enough for little padding, few enough to stay random


class EpochOrder:
    """The training examples of a run, as :class:`gpt1_jax.data.loader.Examples`.

    In each epoch the examples are permuted and cut into pools; those of a pool are sorted by length and cut into
    batches; and the batches are permuted. What does not fill a batch is left out of that epoch, as in ``iter_data`` of
    the authors' utils.py.

    Args:
        dataset: the examples.
        batch_size: examples in a batch.
        seed: of the run.
        context_length: most tokens of a sequence.
        multiple: of widths, as :func:`gpt1_jax.finetuning.dataset.width_for` has it.

    Raises:
        UserError: if there are fewer examples than a batch has.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, context_length: int, multiple: int = 1):
        self.steps_per_epoch = len(dataset) // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size={batch_size}: task.train has {len(dataset)} examples, fewer than a batch; lower it"
            )
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._context_length, self._multiple = context_length, multiple
        self._making = threading.Lock()  # the loader's thread and the one that counts tokens ask for the same epochs
        self._epochs: dict[int, _Epoch] = {}
        self._totals: dict[int, int] = {}  # tokens of epochs, also of those that are kept no more

    def examples(self, indices: np.ndarray) -> Batch:
        """Examples of one batch by their place in the order of training."""
        step, row = np.divmod(indices, self._batch_size)
        assert (step == step[0]).all(), "rows of one batch"
        epoch, place = divmod(int(step[0]), self.steps_per_epoch)
        found = self._epoch(epoch)
        width = width_for(found.longest_S[place], self._context_length, self._multiple)
        return self._dataset.batch(found.numbers_SB[place][row], width, self._batch_size)

    def tokens(self, examples: int) -> int:
        """Tokens of the first so many examples, without padding; of whole batches."""
        epochs, steps = divmod(examples // self._batch_size, self.steps_per_epoch)
        whole = sum(map(self._total, range(epochs)))
        return whole + (int(self._epoch(epochs).tokens_S[steps - 1]) if steps else 0)

    def _total(self, epoch: int) -> int:
        if epoch not in self._totals:
            self._totals[epoch] = int(self._epoch(epoch).tokens_S[-1])
        return self._totals[epoch]

    def _epoch(self, epoch: int) -> "_Epoch":
        with self._making:
            if epoch not in self._epochs:
                while len(self._epochs) > 1:  # the one that is read, and the next
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self._make_epoch(epoch)
            return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> "_Epoch":
        size, steps = self._batch_size, self.steps_per_epoch
        shuffled = permute(np.arange(steps * size), len(self._dataset), make_key(self._seed, 0, epoch))
        lengths = self._dataset.lengths_N
        pools = [shuffled[start : start + _POOL * size] for start in range(0, steps * size, _POOL * size)]
        batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]).reshape(-1, size)
        batches = batches[permute(np.arange(steps), steps, make_key(self._seed, 1, epoch))]
        tokens_S = self._dataset.tokens_N[batches].sum(axis=1, dtype=np.int64)
        return _Epoch(batches, lengths[batches].max(axis=1), np.cumsum(tokens_S))


class _Epoch(NamedTuple):
    """The batches of an epoch: numbers of their examples, longest length, tokens up to the end of each."""

    numbers_SB: np.ndarray
    longest_S: np.ndarray
    tokens_S: np.ndarray
