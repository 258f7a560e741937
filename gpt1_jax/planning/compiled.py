"""The train step, compiled for devices that need not be there, and what the compiler says of its memory."""

import math
import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.model.sharding import axis_size
from gpt1_jax.planning.devices import Target
from gpt1_jax.training.mesh import check_mesh, make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state
from gpt1_jax.training.step import compile_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Step:
    """A step for one configuration.

    Attributes:
        config: what was compiled.
        mesh: of the devices.
        state_leaves: arrays in the training state.
        argument_bytes: of a device: its part of the state and of the batch.
        temporary_bytes: of a device: what the step makes and needs no more when it ends.
        code_bytes: of the program, which lies in the same memory; None where it does not fit.
        peak_bytes: the most that a device holds at once, program and arguments included.
        donated_bytes: of the arguments, those whose memory the results take; None where it does not fit.
        text: the optimized program; None where the compiler refuses it for lack of memory.
    """

    config: Config
    mesh: Mesh
    state_leaves: int
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int | None
    peak_bytes: int
    donated_bytes: int | None
    text: str | None

    def fits(self, memory_bytes: int | None) -> bool | None:
        """Whether a device has the memory; None where its memory is not known."""
        if self.text is None:
            return False
        return None if memory_bytes is None else self.peak_bytes <= memory_bytes


def mesh_of(config: Config, target: Target) -> Mesh:
    """The mesh that training would make of the devices.

    Raises:
        UserError: if the configuration does not divide over them.
    """
    mesh = make_mesh(config.mesh, target.devices)
    check_mesh(config, mesh)
    return mesh


def batch_unit(config: Config, mesh: Mesh) -> int:
    """The batch sizes that devices, accumulation and groups of rows divide are the multiples of this."""
    return math.lcm(axis_size(mesh, "batch"), config.train.deterministic_groups or 1) * config.train.accumulation


def compile_step(config: Config, target: Target) -> Step:
    """Compiles what ``gpt1 train`` runs.

    Raises:
        UserError: if the configuration does not divide over the devices.
    """
    mesh = mesh_of(config, target)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.tree.leaves(abstract_state(config, optimizer, mesh))
    try:
        # Any separator will do: packed windows of another one cost the same.
        compiled = compile_train_step(config, optimizer, mesh, 0)
    except jax.errors.JaxRuntimeError as error:
        rows = config.train.batch_size // axis_size(mesh, "batch")
        arguments = sum(_part_bytes(leaf) for leaf in state) + rows * (config.context_length + 1) * 4
        temporaries = lacking_temporaries(str(error), arguments)
        if temporaries is None:
            raise
        peak = arguments + temporaries
        return Step(config, mesh, len(state), arguments, temporaries, None, peak, None, None)
    memory = compiled.memory_analysis()
    assert memory is not None
    code = memory.generated_code_size_in_bytes
    peak = memory.peak_memory_in_bytes
    if target.platform != "tpu":  # whose compilers lay out what is alive at once, but count only some of it here
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return Step(
        config=config,
        mesh=mesh,
        state_leaves=len(state),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=code,
        peak_bytes=peak + code,
        donated_bytes=memory.alias_size_in_bytes,
        text=compiled.as_text(),
    )


def lacking_temporaries(message: str, argument_bytes: int) -> int | None:
    """Bytes of temporaries that a program would need, from what the TPU compiler says when it refuses it.

    None where the message is not about the memory of a chip.
    """
    temporaries = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if temporaries:
        return _bytes(temporaries)
    everything = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return _bytes(everything) - argument_bytes if everything else None


def _bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * _UNITS[found[2]])


def _part_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize
