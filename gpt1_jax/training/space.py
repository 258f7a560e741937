"""Room for the checkpoints of a run, looked for before its first step."""

import math

import jax

from gpt1_jax.config import CheckpointConfig, Config
from gpt1_jax.data.storage import check_room
from gpt1_jax.training.checkpoint_folder import CheckpointFolder
from gpt1_jax.training.state import TrainState


def check_checkpoint_room(config: Config, state: TrainState, begin: int) -> None:
    """Checks that a run's disk has room for the checkpoints that it will hold beside those that are there.

    Args:
        config: the run; its folder exists.
        state: its shapes and dtypes.
        begin: step that it goes on from.

    Raises:
        StorageError: with the figures, if there is not.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    count = most_added(config.checkpoint, CheckpointFolder(config.run_dir).steps(), begin, config.train.steps)
    keep, every = config.checkpoint.keep, config.checkpoint.keep_every
    what = f"{count} more checkpoints of at least {size:,} bytes, by checkpoint.keep={keep}"
    what += f" and checkpoint.keep_every={every}" if every else ""
    check_room(config.run_dir, count * size, what + ", the one that is being written among them")


def most_added(config: CheckpointConfig, there: list[int], begin: int, steps: int) -> int:
    """How many more checkpoints a run has at once than are there, at most.

    Args:
        config: when one is written, and which are kept.
        there: steps of those that are there.
        begin: step that the run goes on from.
        steps: its last.
    """

    def written(multiple: int) -> int:
        """Checkpoints to come at multiples of a number of steps."""
        regular = math.lcm(config.every, multiple)
        last = steps > begin and steps % multiple == 0 and steps % config.every != 0
        return max(0, steps // regular - begin // regular) + last

    for_good = written(config.keep_every) if config.keep_every else 0
    passing = [step for step in there if not config.keep_every or step % config.keep_every]
    # An old one goes when the new one is complete.
    most = min(len(passing) + written(1) - for_good, config.keep + 1)
    return for_good + max(0, most - len(passing))
