"""What would fit: the largest batch, and, where the configuration does not, the change that costs least.

Nothing is said to fit that the compiler has not accepted. Between compilations memory is taken to grow in proportion to
the rows that a device works on at once, so that few of them are needed.
"""

from collections.abc import Callable, Iterator

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.model.sharding import axis_size
from gpt1_jax.planning.compiled import Step, batch_unit, compile_step, mesh_of
from gpt1_jax.planning.devices import Target

Progress = Callable[[str], None]

# Compilations that a search for the largest batch makes at most; each takes a minute or more.
_MOST = 5
# How close to the largest batch is close enough.
_CLOSE = 0.03


def largest_batch(step: Step, target: Target, progress: Progress) -> int | None:
    """The largest ``train.batch_size`` that is known to fit with all other keys as they are, to within about 3 %.

    None where no batch that was tried fits, or the memory of the devices is not known.
    """
    memory = target.memory_bytes
    if memory is None:
        return None
    unit = batch_unit(step.config, step.mesh)
    tried = {step.config.train.batch_size: step}
    for _ in range(_MOST):
        fitting = max((batch for batch in tried if tried[batch].fits(memory)), default=0)
        failing = min((batch for batch in tried if not tried[batch].fits(memory)), default=None)
        if fitting and tried[fitting].peak_bytes >= (1 - _CLOSE) * memory:
            break
        if failing is not None and failing - fitting <= max(unit, _CLOSE * fitting):
            break
        guess = _crossing(tried, memory) // unit * unit
        # Within what is known; where there is no upper end yet, not more than eight times what fits.
        guess = max(fitting + unit, min(guess, (failing or 8 * fitting + unit) - unit))
        progress(f"plan: does train.batch_size={guess} fit?")
        tried[guess] = compile_step(_with(step.config, f"train.batch_size={guess}"), target)
    return max((batch for batch in tried if tried[batch].fits(memory)), default=None)


def _crossing(tried: dict[int, Step], memory: int) -> int:
    """The batch at which a line through the two points nearest to the limit reaches it."""
    batch, *others = sorted(tried, key=lambda batch: abs(tried[batch].peak_bytes - memory))
    lacking = memory - tried[batch].peak_bytes
    if others:
        slope = (tried[batch].peak_bytes - tried[others[0]].peak_bytes) / (batch - others[0])
    else:
        slope = tried[batch].temporary_bytes / batch
    if slope <= 0:  # the compiler found other ways to save
        return 2 * batch if lacking > 0 else batch // 2
    return batch + int(lacking / slope)


def cheapest_change(step: Step, target: Target, progress: Progress) -> tuple[tuple[str, ...], Step] | None:
    """The first of :func:`changes` with which the compiler accepts the run, and the step; None if it accepts none."""
    for overrides in changes(step, target):
        try:
            config = _with(step.config, *overrides)
            mesh_of(config, target)
        except UserError:  # the model or the batch does not divide so
            continue
        progress(f"plan: does it fit with {' '.join(overrides)}?")
        changed = compile_step(config, target)
        if changed.fits(target.memory_bytes):
            return overrides, changed
    return None


def changes(step: Step, target: Target) -> Iterator[tuple[str, ...]]:
    """Keys that lessen memory and leave the update as it is, those that cost least time first.

    An optimizer's state that is split has the new parameters gathered, once a step. Smaller micro-batches cost as
    little, because their products are smaller; recomputation costs a third of the arithmetic; parameters that are split
    have to be gathered in every layer.
    """
    config, sizes = step.config, step.mesh.shape
    rows = config.train.batch_size // axis_size(step.mesh, "batch")
    finer = [count for count in range(config.train.accumulation + 1, rows + 1) if rows % count == 0]
    enough = next((count for count in finer if _would_fit(step, target, count)), None)
    accumulated = (f"train.accumulation={enough}",) if enough else ()
    smallest = (f"train.accumulation={finer[-1]}",) if finer else ()
    recomputed = ("model.remat=full",) if config.model.remat == "none" else ()
    split = ("mesh.data=1", f"mesh.fsdp={sizes['data'] * sizes['fsdp']}") if sizes["data"] > 1 else ()
    scattered = ("mesh.shard_optimizer=true",) if sizes["data"] > 1 and not config.mesh.shard_optimizer else ()
    least = (*recomputed, *smallest)
    ladder = [scattered, accumulated, recomputed, (*scattered, *least), split, (*split, *least)]
    yield from dict.fromkeys(filter(None, ladder))


def _would_fit(step: Step, target: Target, accumulation: int) -> bool:
    assert target.memory_bytes is not None
    fixed = step.peak_bytes - step.temporary_bytes
    return fixed + step.temporary_bytes * step.config.train.accumulation / accumulation <= target.memory_bytes


def _with(config: Config, *overrides: str) -> Config:
    return parse_config(config.to_yaml(), config.name, overrides)
