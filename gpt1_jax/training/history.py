"""What order of data each step of a run was trained in, also where ``--allow-changes`` changed it midway.

The order is a function of a few settings, so a line of ``data.jsonl`` in the run's folder for each change of them says
for every step which examples it has read.
"""

import json
from collections.abc import Sequence

import numpy as np
import pydantic
from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.order import remaining
from gpt1_jax.data.storage import write_atomically
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.training.metrics import read_records

HISTORY = "data.jsonl"


class DataOrder(pydantic.BaseModel):
    """All that the examples of the steps after ``step`` depend on.

    Attributes:
        step: batches read before.
        examples: examples read before.
        corpus: fingerprint.
        seed: of the run.
        context_length: tokens in a sequence.
        batch_size: sequences in an update.
        weights: of each source, a number or a schedule over steps.
        left_out: what is never read (training/rewinds.py), as :func:`gpt1_jax.data.order.remaining` has it.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    step: int
    examples: int
    corpus: str
    seed: int
    context_length: int
    batch_size: int
    weights: tuple[float | dict[int, float], ...]
    left_out: tuple[tuple[int, int], ...] = ()

    def windows(self, corpus: Corpus) -> RandomWindows:
        """All training examples by their global indices."""
        weights = [
            {step * self.batch_size: w for step, w in weight.items()} if isinstance(weight, dict) else weight
            for weight in self.weights
        ]
        return RandomWindows(corpus, self.context_length, self.seed, weights)

    def examples_of(self, step: int) -> list[int]:
        """Global indices of the examples of a step, the first being 1."""
        first = self.examples + (step - 1 - self.step) * self.batch_size
        return remaining(np.arange(first, first + self.batch_size), self.left_out).tolist()


class RemainingWindows:
    """The sequence of training examples that a run reads, as :class:`gpt1_jax.data.loader.Examples`."""

    def __init__(self, order: DataOrder, corpus: Corpus):
        self._windows, self._left_out = order.windows(corpus), order.left_out

    def examples(self, indices: np.ndarray) -> np.ndarray:
        """Examples by their places in the sequence, int32 [n, context_length + 1]."""
        return self._windows.examples(remaining(indices, self._left_out))


def data_order(
    config: Config, corpus: Corpus, step: int, examples: int, left_out: Sequence[tuple[int, int]] = ()
) -> DataOrder:
    """The order in which a run reads from a step on.

    Args:
        config: the run.
        corpus: what it reads.
        step: batches read before.
        examples: examples read before.
        left_out: as :attr:`DataOrder.left_out`.

    Raises:
        UserError: if weights follow a schedule, which counts steps, and the steps before were of another batch size.
    """
    scheduled = any(isinstance(source.weight, dict) for source in config.data.sources)
    if scheduled and examples != step * config.train.batch_size:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: {examples} examples were read in the {step} steps so far, so "
            "with this size the schedules of data.sources would begin elsewhere; keep the batch size, or give each "
            "source a number as its weight"
        )
    return DataOrder(
        step=step,
        examples=examples,
        corpus=corpus.manifest.fingerprint,
        seed=config.seed,
        context_length=config.context_length,
        batch_size=config.train.batch_size,
        weights=tuple(source.weight for source in config.data.sources),
        left_out=tuple((first, stop) for first, stop in left_out),
    )


def note_order(run_dir: epath.Path, order: DataOrder) -> None:
    """Writes down the order from its step on, in the place of what an attempt that left no checkpoint noted."""
    noted = _read(run_dir)
    kept = [earlier for earlier in noted if earlier.step < order.step]
    if not kept or kept[-1].model_copy(update={"step": order.step, "examples": order.examples}) != order:
        kept.append(order)
    if kept != noted:
        write_atomically(run_dir / HISTORY, "".join(each.model_dump_json() + "\n" for each in kept).encode())


def order_at(run_dir: epath.Path, step: int) -> DataOrder:
    """The order in which an update was made.

    Raises:
        UserError: if it is not known.
        DamagedError: if the record cannot be read.
    """
    noted = _read(run_dir)
    if not noted:
        raise UserError(
            f"{run_dir}: no step of this run has read any data ({HISTORY} is missing): it was imported, or is not "
            f"trained yet; train it with 'gpt1 train {run_dir}/config.yaml'"
        )
    if step <= noted[0].step:
        raise UserError(f"{run_dir}: --step {step}: what was read is known from step {noted[0].step + 1} on")
    return [order for order in noted if order.step < step][-1]


def _read(run_dir: epath.Path) -> list[DataOrder]:
    path = run_dir / HISTORY
    try:
        return [DataOrder.model_validate_json(json.dumps(record)) for record in read_records(path, "step")]
    except pydantic.ValidationError as error:
        raise DamagedError(f"{path}: not what training writes: {error}; restore it from a copy, or delete it") from None
