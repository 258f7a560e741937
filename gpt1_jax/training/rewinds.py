"""Going back to before a spike, and on with other data: which examples are left out, written down in the run's folder.

Chowdhery et al. 2022, "PaLM", section 5.1: going back some hundred steps, and on without the batches around the spike,
is enough that it does not come again.

What a run has left out is in ``rewinds.jsonl``. It fixes which examples each step reads; and the steps before the first
one left out are made again with the same bits, whichever checkpoint they are made from. So a run that is killed, or has
other checkpoints, decides the same and ends with the same weights.
"""

import hashlib
import json

import pydantic
from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.data.storage import write_atomically
from gpt1_jax.errors import DamagedError, DivergedError
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.metrics import read_records
from gpt1_jax.training.spikes import Spike

REWINDS = "rewinds.jsonl"


class Rewind(pydantic.BaseModel):
    """What was decided on a spike.

    Attributes:
        spike: its step, the first being 1.
        loss: of that step, nats per token.
        median: of the losses before.
        deviation: of those losses, the median distance from their median.
        step: the last step before it that stands.
        first: example that the next step would have read, counted in the sequence that the rewinds before have left.
        stop: example that it reads instead, counted in the same way.
        origin: fingerprint of the configuration and the data.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    spike: int
    loss: float
    median: float
    deviation: float
    step: int
    first: int
    stop: int
    origin: str


def left_out(config: Config, data: str, step: int) -> list[tuple[int, int]]:
    """First example, and the one after the last, of all that a run leaves out, as :class:`Rewind` counts them.

    A run that begins anew forgets what another configuration, or other data, made an attempt without a checkpoint leave
    out. To be called by one process alone.

    Args:
        config: the run.
        data: fingerprint.
        step: batches read before.

    Raises:
        DamagedError: if the record cannot be read.
    """
    rewinds = _read(config.run_dir)
    if step == 0:
        kept = [rewind for rewind in rewinds if rewind.origin == _origin(config, data)]
        if kept != rewinds:
            _write(config.run_dir, kept)
        rewinds = kept
    return [(rewind.first, rewind.stop) for rewind in rewinds]


def rewind(
    config: Config,
    data: str,
    spike: Spike,
    begin: int,
    read: int,
    checkpoints: Checkpoints,
    hosts: Hosts,
) -> Rewind:
    """Decides what to leave out, removes the checkpoints after the first of it, and writes the decision down.

    In this order: a run that is killed in between comes to the same spike, and decides the same. All processes call it.

    Args:
        config: the run.
        data: fingerprint.
        spike: what was seen.
        begin: batches read before this process went on.
        read: examples read before.
        checkpoints: of the run.
        hosts: the processes that train it.

    Raises:
        DivergedError: if there were too many before, or no sound checkpoint is old enough.
    """
    spikes = config.train.spikes
    assert spikes is not None
    made = hosts.first(lambda: len(_read(config.run_dir)))
    if made >= spikes.max_rewinds:
        raise DivergedError(
            f"{spike}: a spike, and the run has gone back {made} times before; lower optimizer.learning_rate="
            f"{config.optimizer.learning_rate}, or raise train.spikes.max_rewinds={spikes.max_rewinds}"
        )
    before = spikes.skip // 2
    step = max(0, spike.step - 1 - before)
    first = read + (step - begin) * config.train.batch_size
    found = Rewind(
        spike=spike.step,
        loss=spike.loss,
        median=spike.median,
        deviation=spike.deviation,
        step=step,
        first=first,
        stop=first + (spike.step - 1 - step + spikes.skip - before) * config.train.batch_size,
        origin=_origin(config, data),
    )
    checkpoints.wait()
    saved = checkpoints.steps()
    sound = next((old for old in reversed(saved) if old <= step and not checkpoints.problems(old)), None)
    # Before the first checkpoint is due, the run begins again; later that would lose too much to be done unasked.
    if sound is None and step >= config.checkpoint.every:
        raise DivergedError(
            f"{spike}: a spike, and there is no sound checkpoint of step {step} or before to go back to; give another "
            f"run more than checkpoint.keep={config.checkpoint.keep}, or go on from here with train.spikes=null and "
            "--allow-changes"
        )
    for undone in saved:
        if undone > step:
            checkpoints.remove(undone)
    hosts.first(lambda: _write(config.run_dir, [*_read(config.run_dir), found]))
    return found


def _origin(config: Config, data: str) -> str:
    return hashlib.sha256(f"{config.to_yaml()}{data}".encode()).hexdigest()[:16]


def _write(run_dir: epath.Path, rewinds: list[Rewind]) -> None:
    write_atomically(run_dir / REWINDS, "".join(each.model_dump_json() + "\n" for each in rewinds).encode())


def _read(run_dir: epath.Path) -> list[Rewind]:
    path = run_dir / REWINDS
    try:
        return [Rewind.model_validate_json(json.dumps(record)) for record in read_records(path, "spike")]
    except pydantic.ValidationError as error:
        raise DamagedError(f"{path}: not what training writes: {error}; restore it from a copy") from None
