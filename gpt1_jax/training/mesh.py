"""The device mesh, and the one place that says how everything is laid out on it.

Axes: ``data`` splits the batch and replicates the parameters; ``fsdp`` splits the batch and the parameters;
``tensor`` splits heads, MLP and vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt1_jax.config import Config, MeshConfig
from gpt1_jax.errors import UserError

# Mesh axes over which each logical axis is split; a logical axis that is not listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices on the axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
        UserError: if the sizes do not use every device exactly once.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(config)
    given = math.prod(size for size in sizes.values() if size is not None)
    shown = ", ".join(f"mesh.{axis}={'null' if size is None else size}" for axis, size in sizes.items())
    if len(devices) % given or (None not in sizes.values() and given != len(devices)):
        raise UserError(
            f"{shown}: these sizes do not multiply to the number of devices, {len(devices)}; "
            "set one of them to null to let it take the devices that are left"
        )
    shape = tuple(len(devices) // given if size is None else size for size in sizes.values())
    return Mesh(mesh_utils.create_device_mesh(shape, devices=devices), tuple(sizes))


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Checks that the mesh divides what it splits.

    Raises:
        UserError: naming every key that it does not divide.
    """
    rows = axis_size(mesh, "batch")
    checks = {
        f"train.batch_size={config.train.batch_size} / train.accumulation={config.train.accumulation}": (
            config.train.batch_size // config.train.accumulation,
            "batch",
        ),
        f"model.embed_dim={config.model.embed_dim}": (config.model.embed_dim, "embed"),
        f"model.num_heads={config.model.num_heads}": (config.model.num_heads, "heads"),
        f"model.mlp_dim={config.model.mlp_dim}": (config.model.mlp_dim, "mlp"),
    }
    problems = [
        f"{name} is not a multiple of {axis_size(mesh, axis)}, the devices it is split over "
        f"({' x '.join(f'mesh.{a}={mesh.shape[a]}' for a in RULES[axis])})"
        for name, (size, axis) in checks.items()
        if size % axis_size(mesh, axis)
    ]
    if problems:
        advice = f"choose a batch that is a multiple of {rows}, or other sizes of the mesh"
        raise UserError("\n".join([*problems, advice]))


def axis_size(mesh: Mesh, logical: str) -> int:
    """Over how many devices a logical axis is split."""
    return math.prod(mesh.shape[axis] for axis in RULES.get(logical, ()))


def sharding_of(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
    """The layout of an array with the given logical axes.

    A dimension of ``shape`` that its mesh axes do not divide (a vocabulary of 40478 on 4 devices) is replicated.
    """
    names = []
    for index, axis in enumerate(axes):
        mesh_axes = RULES.get(axis or "", ())
        divides = shape is None or shape[index] % axis_size(mesh, axis or "") == 0
        names.append(mesh_axes if mesh_axes and divides else None)
    return NamedSharding(mesh, PartitionSpec(*names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the devices, everything else of a batch whole."""
    return sharding_of(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """The layout of every leaf of ``shapes``, whose logical axes stand at the same place in ``axes``."""
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda a, leaf: sharding_of(mesh, a, np.shape(leaf)), axes, shapes, is_leaf=is_axes)
