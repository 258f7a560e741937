"""A step computed twice from the same state and batch, and compared bit for bit: what finds a device that errs.

A processor that computes wrongly now and then says nothing of it (Hochschild et al. 2021, "Cores that don't count").
Both times the same compiled program runs, so equal devices give equal bits, and the run's own bits are the same with
and without the check.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gpt1_jax.config import Config
from gpt1_jax.errors import UserError
from gpt1_jax.training.state import TrainState
from gpt1_jax.training.step import Metrics, TrainStep

UNEQUAL = "unequal"  # among the metrics of a step that was checked: of each device, whether its results differ
_GPU_FLAG = "--xla_gpu_deterministic_ops=true"


class Unequal(Exception):
    """A step that was computed twice has given two results.

    Attributes:
        step: which, the first being 1.
        unequal_D: of each device of the mesh, whether its results differ.
    """

    def __init__(self, step: int, unequal_D: np.ndarray):
        super().__init__(f"step {step}, computed twice from the same weights and batch, has given two results")
        self.step, self.unequal_D = step, unequal_D

    def blame(self, mesh: Mesh, names: Sequence[str]) -> str:
        """What to tell the user.

        Args:
            mesh: the devices.
            names: of the hosts, by the number of their process.
        """
        found: dict[int, list[jax.Device]] = defaultdict(list)
        for device, unequal in zip(mesh.devices.flat, self.unequal_D, strict=True):
            if unequal:
                found[device.process_index].append(device)
        hosts = "; ".join(
            f"process {process} on {names[process]}: {devices[0].device_kind} {', '.join(str(d.id) for d in devices)}"
            for process, devices in sorted(found.items())
        )
        advice = "take that host out of the run, and run the same command again"
        if len(found) > 1:
            advice = (
                "what one device computes wrongly comes to others with the sums over devices; test these hosts, and "
                "run the same command again without the one that errs"
            )
        return f"{self}; they differ on {hosts}; {advice}"


def double_checked(step_fn: TrainStep, config: Config, step: int, layout: TrainState, mesh: Mesh) -> TrainStep:
    """The step, computed twice every ``train.double_check_every`` steps, as :class:`DoubleCheck`; or as it is."""
    every = config.train.double_check_every
    return DoubleCheck(step_fn, every, step, layout, mesh) if every else step_fn


class DoubleCheck:
    """A train step that is computed twice every so many steps; call it as the step itself.

    On those steps the devices hold the state twice, and their metrics have :data:`UNEQUAL`. Nothing waits for them.

    Args:
        step_fn: the step; it may donate its state.
        every: steps.
        step: batches read before.
        layout: of the state, abstract.
        mesh: the devices.
    """

    def __init__(self, step_fn: TrainStep, every: int, step: int, layout: TrainState, mesh: Mesh):
        self._step_fn, self._every, self._step = step_fn, every, step
        layouts = jax.tree.map(lambda leaf: leaf.sharding, layout)
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=layouts)
        self._sums = jax.jit(device_sums(layout, mesh))
        self._differ = jax.jit(jnp.not_equal)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The new state, and the metrics."""
        self._step += 1
        if self._step % self._every:
            return self._step_fn(state, batch)
        first_D = self._sums(*self._step_fn(self._copy(state), batch))
        state, metrics = self._step_fn(state, batch)
        return state, {**metrics, UNEQUAL: self._differ(first_D, self._sums(state, metrics))}


def device_sums(layout: TrainState, mesh: Mesh) -> Callable[[TrainState, Metrics], jax.Array]:
    """What gives, of each device, the sum modulo 2^32 of the bits of all that it holds of a state and of metrics.

    The sums stand in the order of the mesh, and all devices know them. A single bit that differs changes one, and so
    does all but one in 2^32 of whatever else may differ.

    Args:
        layout: of the state, abstract.
        mesh: the devices.
    """
    axes = tuple(mesh.axis_names)

    def of_device(state: TrainState, metrics: Metrics) -> jax.Array:
        sums = [_bits(leaf).sum(dtype=jnp.uint32) for leaf in jax.tree.leaves((state, metrics))]
        return jax.lax.all_gather(reduce(jnp.add, sums), axes)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, layout), PartitionSpec()
    return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def check_repeatable(config: Config, mesh: Mesh) -> None:
    """Checks that sound devices give the same bits twice, if that is to be asked of them.

    Raises:
        UserError: if they are GPUs, and XLA was not told to keep to one order of sums.
    """
    every = config.train.double_check_every
    if every and mesh.devices.flat[0].platform == "gpu" and _GPU_FLAG not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(
            f"train.double_check_every={every}: XLA adds up in no fixed order on GPUs, so a step computed twice may "
            f"differ where nothing is wrong; set the environment's XLA_FLAGS={_GPU_FLAG}, or the key to 0"
        )


def _bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
