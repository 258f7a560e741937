"""What a run needs and how long it takes on given devices, from the train step compiled for them."""

import dataclasses
from dataclasses import dataclass

from gpt1_jax.config import Config
from gpt1_jax.model.transformer import flops_per_token, num_parameters
from gpt1_jax.planning.compiled import Step, compile_step
from gpt1_jax.planning.devices import Target
from gpt1_jax.planning.hlo import parse_program
from gpt1_jax.planning.network import mesh_coordinates
from gpt1_jax.planning.schedule import Collective, Cost, Device, step_cost
from gpt1_jax.planning.search import Progress, cheapest_change, largest_batch
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.hardware import PEAK_FLOPS


@dataclass(frozen=True)
class Parts:
    """What the seconds of a step are spent on; they add up.

    Attributes:
        compute: arithmetic and memory as the TPU compiler itself estimates them.
        kernels: kernels written by hand, an estimate from their arithmetic and their bytes.
        uncosted: what the compiler gives no cost, an estimate from bytes.
        waits: waiting for memory, for the links between chips, for the network between slices; estimates.
    """

    compute: float
    kernels: float
    uncosted: float
    waits: dict[str, float]


@dataclass(frozen=True)
class Change:
    """Keys with which the run fits.

    Attributes:
        overrides: as the command line takes them.
        peak_bytes: then.
        step_seconds: then; an estimate, None where nothing is timed.
    """

    overrides: tuple[str, ...]
    peak_bytes: int
    step_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """A plan. Bytes are those of one chip, what is None is not known on these devices.

    Attributes:
        topology: such as ``v5e:4x4``.
        slices: how many of it.
        chips: in all.
        mesh: devices along each axis.
        dtype: of the products.
        parameters: numbers that the model learns.
        batch_size: sequences in an update.
        tokens_per_step: in an update.
        model_flops_per_token: without recomputation.
        argument_bytes: the state and the batch.
        temporary_bytes: what a step makes and frees.
        code_bytes: the program.
        peak_bytes: the most at once, arguments and program included.
        hbm_bytes: what a program may use.
        fits: whether that is enough.
        donated_bytes: memory of the arguments that the results take over.
        state_donated: whether that is so of every array of the state.
        collectives: exchanges between chips.
        step_seconds: an estimate, the sum of ``step_parts``.
        step_parts: what they are spent on.
        step_without: what is not in them, nor in the exchanges, because the program does not show it.
        tokens_per_second: an estimate.
        mfu: model FLOPs over peak FLOPs; an estimate.
        hours: of all steps, without evaluations and checkpoints; an estimate.
        chip_hours: those hours times chips.
        largest_batch: the largest batch known to fit; None also where it was not searched.
        change: where it does not fit, what to change; None also where it was not searched, or nothing tried would do.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    dtype: str
    parameters: int
    batch_size: int
    tokens_per_step: int
    model_flops_per_token: int
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int | None
    peak_bytes: int
    hbm_bytes: int | None
    fits: bool | None
    donated_bytes: int | None
    state_donated: bool | None
    collectives: tuple[Collective, ...] | None
    step_seconds: float | None
    step_parts: Parts | None
    step_without: tuple[str, ...]
    tokens_per_second: float | None
    mfu: float | None
    hours: float | None
    chip_hours: float | None
    largest_batch: int | None = None
    change: Change | None = None


def make_plan(config: Config, target: Target, search: bool, progress: Progress) -> Plan:
    """Compiles the train step, and others like it where something is searched.

    Args:
        config: the run.
        target: the devices.
        search: whether to look for the largest batch, and where the run does not fit, for what to change.
        progress: is told what is compiled.

    Raises:
        UserError: if the configuration does not divide over the devices.
    """
    config, choices = resolve(config, target.platform)
    for choice in choices:
        progress(f"plan: {choice}")
    progress(f"plan: compiling the step of {config.name} for {len(target.devices)} devices, {target.name}")
    step = compile_step(config, target)
    plan = describe(step, target)
    if not search or target.memory_bytes is None:
        return plan
    found = None if plan.fits else cheapest_change(step, target, progress)
    change = found and Change(found[0], found[1].peak_bytes, describe(found[1], target).step_seconds)
    return dataclasses.replace(plan, largest_batch=largest_batch(step, target, progress), change=change)


def describe(step: Step, target: Target) -> Plan:
    """What is known of one compiled step."""
    config = step.config
    chips = len(target.devices)
    kind = target.slice.chip.device_kind if target.slice else target.devices[0].device_kind
    peak = config.logging.peak_flops or PEAK_FLOPS.get(kind)
    program = parse_program(step.text) if step.text else None
    cost = None
    if program:
        coordinates = mesh_coordinates(step.mesh.devices) if target.slice else ()
        cost = step_cost(program, Device(chips, target.slice, coordinates, peak))
    seconds = cost.seconds if cost and cost.costed and not cost.uncounted else None
    tokens = config.train.batch_size * config.context_length
    flops = flops_per_token(config.model, config.context_length)
    hours = None if seconds is None else seconds * config.train.steps / 3600
    return Plan(
        topology=target.name,
        slices=target.slice.count if target.slice else 1,
        chips=chips,
        mesh=dict(step.mesh.shape),
        dtype=config.model.dtype,
        parameters=num_parameters(config.model),
        batch_size=config.train.batch_size,
        tokens_per_step=tokens,
        model_flops_per_token=flops,
        argument_bytes=step.argument_bytes,
        temporary_bytes=step.temporary_bytes,
        code_bytes=step.code_bytes,
        peak_bytes=step.peak_bytes,
        hbm_bytes=target.memory_bytes,
        fits=step.fits(target.memory_bytes),
        donated_bytes=step.donated_bytes,
        state_donated=None if program is None else program.aliases == step.state_leaves,
        collectives=cost.collectives if cost else None,
        step_seconds=seconds,
        step_parts=_parts(cost) if cost and seconds is not None else None,
        step_without=tuple(sorted(cost.unknown)) if cost else (),
        tokens_per_second=None if seconds is None else tokens / seconds,
        mfu=None if seconds is None or peak is None else tokens * flops / seconds / (peak * chips),
        hours=hours,
        chip_hours=None if hours is None else hours * chips,
    )


def _parts(cost: Cost) -> Parts:
    waits = {way: cost.waits.get(way, 0.0) for way in ("memory", "links", "slices")}
    return Parts(cost.compute, cost.kernels, cost.uncosted, waits)
