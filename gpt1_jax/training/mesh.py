"""The device mesh of a run, and what it must divide; model/sharding.py says what its axes split."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gpt1_jax.config import Config, MeshConfig
from gpt1_jax.errors import UserError
from gpt1_jax.model.sharding import REPLICAS, RULES, axis_size


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices on the axes ``slices``, ``data``, ``fsdp``, ``sequence`` and ``tensor``.

    Raises:
        UserError: if the sizes do not use every device exactly once, or the slices are not those of the devices.
    """
    devices = jax.devices() if devices is None else devices
    groups = _slices(config, devices)
    sizes = config.axes
    count = len(groups[0])
    given = math.prod(size for size in sizes.values() if size is not None)
    if count % given or (None not in sizes.values() and given != count):
        shown = ", ".join(f"mesh.{axis}={'null' if size is None else size}" for axis, size in sizes.items())
        each = "" if len(groups) == 1 else f" in each of {len(groups)} slices"
        raise UserError(
            f"{shown}: these sizes do not multiply to the number of devices{each}, {count}; "
            "set one of them to null to let it take the devices that are left"
        )
    shape = tuple(count // given if size is None else size for size in sizes.values())
    # A physical axis of a TPU slice may be split between two of the mesh, which few shapes can do without.
    arranged = [mesh_utils.create_device_mesh(shape, devices=group, allow_split_physical_axes=True) for group in groups]
    names = ("slices", *sizes)
    return Mesh(np.stack(arranged), names, axis_types=(AxisType.Auto,) * len(names))


def _slices(config: MeshConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        # To XLA each host of GPUs is a slice. That is a good guess, but only of TPUs is it all that there can be.
        told = device.platform == "tpu" or config.slices is None
        found.setdefault(getattr(device, "slice_index", 0) if told else 0, []).append(device)
    if config.slices is None or config.slices == len(found):
        return [found[index] for index in sorted(found)]
    if len(found) > 1:
        raise UserError(
            f"mesh.slices={config.slices}: the devices are of {len(found)} slices; set it to {len(found)} or to null"
        )
    # Other devices stand in the order of the hosts that hold them.
    if len(devices) % config.slices:
        raise UserError(f"mesh.slices={config.slices} does not divide the number of devices, {len(devices)}")
    size = len(devices) // config.slices
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Checks that the mesh divides what it splits.

    Raises:
        UserError: naming every key that it does not divide.
    """
    rows = config.train.batch_size // config.train.accumulation
    context = f"{'train' if config.train.context_length else 'model'}.context_length={config.context_length}"
    checks = {
        f"train.batch_size={config.train.batch_size} / train.accumulation={config.train.accumulation}": (rows, "batch"),
        f"model.embed_dim={config.model.embed_dim}": (config.model.embed_dim, "embed"),
        f"model.num_heads={config.model.num_heads}": (config.model.num_heads, "heads"),
        f"model.mlp_dim={config.model.mlp_dim}": (config.model.mlp_dim, "mlp"),
        context: (config.context_length, "sequence"),
    }
    problems = [
        f"{name} is not a multiple of {axis_size(mesh, axis)}, the devices it is split over "
        f"({' x '.join(f'mesh.{a}={mesh.shape[a]}' for a in RULES[axis])})"
        for name, (size, axis) in checks.items()
        if size % axis_size(mesh, axis)
    ]
    if problems:
        advice = f"choose a batch that is a multiple of {axis_size(mesh, 'batch')}, or other sizes of the mesh"
        raise UserError("\n".join([*problems, advice]))
    if config.train.deterministic_groups:
        _check_deterministic(config.train.deterministic_groups, config, mesh)


def _check_deterministic(groups: int, config: Config, mesh: Mesh) -> None:
    replicas = math.prod(mesh.shape[axis] for axis in REPLICAS)
    key = f"train.deterministic_groups={groups}"
    if groups % replicas:
        raise UserError(f"{key} is not a multiple of {replicas}, the devices that the batch is split over; raise it")
    split = [f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if axis not in REPLICAS and size > 1]
    split += ["mesh.shard_optimizer=true"] * config.mesh.shard_optimizer
    if split:
        raise UserError(
            f"{key} needs a whole model on every device, {', '.join(split)} splits it; set mesh.data alone, or leave "
            "the key out"
        )
