"""The order of fine-tuning examples: epochs, each a random order of its own, in batches of nearly equal lengths.

It is a pure function of seed and position: a run that is killed goes on where it was, and hosts agree without a word.
"""

from functools import cache, lru_cache

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

    Raises:
        UserError: if there are fewer examples than a batch has.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, context_length: int):
        self.steps_per_epoch = len(dataset) // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size={batch_size}: task.train has {len(dataset)} examples, fewer than a batch; lower it"
            )
        self._dataset, self._batch_size, self._seed, self._context_length = dataset, batch_size, seed, context_length
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._tokens_of = cache(self._count_tokens)

    def examples(self, indices: np.ndarray) -> Batch:
        """Examples of one batch by their place in the order of training."""
        step, row = np.divmod(indices, self._batch_size)
        assert (step == step[0]).all(), "rows of one batch"
        numbers_SB, longest_S = self._epoch(int(step[0]) // self.steps_per_epoch)
        place = int(step[0]) % self.steps_per_epoch
        width = width_for(longest_S[place], self._context_length)
        return self._dataset.batch(numbers_SB[place][row], width, self._batch_size)

    def tokens(self, examples: int) -> int:
        """Tokens of the first so many examples, without padding."""
        epochs, rest = divmod(examples, self.steps_per_epoch * self._batch_size)
        whole = sum(map(self._tokens_of, range(epochs)))
        return whole + (int(self._dataset.tokens_N[self._epoch(epochs)[0].reshape(-1)[:rest]].sum()) if rest else 0)

    def _count_tokens(self, epoch: int) -> int:
        return int(self._dataset.tokens_N[self._epoch(epoch)[0]].sum())

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples, [steps, batch_size], and the longest length of each batch."""
        size, steps = self._batch_size, self.steps_per_epoch
        shuffled = permute(np.arange(steps * size), len(self._dataset), make_key(self._seed, 0, epoch))
        lengths = self._dataset.lengths_N
        pools = [shuffled[start : start + _POOL * size] for start in range(0, steps * size, _POOL * size)]
        batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]).reshape(-1, size)
        batches = batches[permute(np.arange(steps), steps, make_key(self._seed, 1, epoch))]
        return batches, lengths[batches].max(axis=1)
