"""How everything is laid out on a device mesh: the one place that maps logical axes to mesh axes.

Mesh axes, from the slowest network to the fastest:

- ``slices``: groups of devices joined by a slower network; splits the batch, replicates the parameters;
- ``data``: splits the batch, replicates the parameters;
- ``fsdp``: splits the batch, and the parameters too;
- ``sequence``: splits the positions of a sequence;
- ``tensor``: splits heads, MLP and vocabulary.

A traced function finds the mesh in its context (``jax.set_mesh``); without one nothing is split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Mesh axes over which each logical axis is split; a logical axis that is not listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slices", "data", "fsdp"),
    "sequence": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
# Over these every device has a whole copy of the model, and the step sums gradients itself (training/gradient.py).
REPLICAS = ("slices", "data")

Axes = Sequence[str | None]


def axis_size(mesh: Mesh | AbstractMesh, logical: str) -> int:
    """Over how many devices a logical axis is split."""
    return math.prod(mesh.shape[axis] for axis in RULES.get(logical, ()))


def sharding_of(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int] | None = None) -> NamedSharding:
    """The layout of an array with the given logical axes.

    A dimension of ``shape`` that its mesh axes do not divide (a vocabulary of 40478 on 4 devices) is replicated.
    """
    return NamedSharding(mesh, _spec(axes, dict(mesh.shape), shape))


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


def also_split_over(sharding: NamedSharding, axis: str, shape: Sequence[int]) -> NamedSharding:
    """A layout whose largest whole dimension that a mesh axis divides is split over that axis; or as it is."""
    mesh, spec = sharding.mesh, list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    named = [(names,) if isinstance(names, str) else names or () for names in spec]
    whole = [math.prod(mesh.shape[name] for name in names) == 1 for names in named]
    free = [dim for dim, size in enumerate(shape) if whole[dim] and size % mesh.shape[axis] == 0]
    if free:
        spec[max(free, key=lambda dim: shape[dim])] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


def split_axes(*logical: str) -> dict[str, int]:
    """The mesh axes, and their sizes, by which the compiler splits the given logical axes where this is called.

    None of size 1, and none inside of a function that already runs once for each device along it.
    """
    names = [axis for name in logical for axis in RULES[name]]
    return {name: size for name, size in automatic_axes().items() if name in names and size > 1}


def constrain(x: Array, axes: Axes) -> Array:
    """Has the compiler lay out ``x`` by its logical axes; None: whole along that dimension."""
    sizes = automatic_axes()
    return jax.lax.with_sharding_constraint(x, _spec(axes, sizes, x.shape)) if math.prod(sizes.values()) > 1 else x


def gathered(kernel: Array, axes: Axes) -> Array:
    """A parameter that ``fsdp`` splits, whole along its axes, for use."""
    if not split_axes("embed"):
        return kernel
    return constrain(kernel, [None if axis == "embed" else axis for axis in axes])


def on_each_device(
    f: Callable[..., Array],
    arrays: Sequence[Array | None],
    in_axes: Sequence[Axes],
    out_axes: Axes,
    logical: Sequence[str] | None = None,
) -> Array:
    """``f(*arrays)`` of each device's own parts, for what the compiler cannot split, or splits badly.

    Args:
        f: a function of arrays.
        arrays: its arguments.
        in_axes: logical axes of each of them.
        out_axes: logical axes of the result.
        logical: the axes along which it runs on parts, all others being left to the compiler; None: all there are, so
            that nothing is left to it, as in a kernel nothing may be.
    """
    sizes = automatic_axes() if logical is None else split_axes(*logical)
    if not sizes:
        return f(*arrays)
    # A dimension that its axes do not divide is an error here: the results of several devices could not be told apart.
    specs = tuple(None if array is None else _spec(axes, sizes) for axes, array in zip(in_axes, arrays, strict=True))
    mapped = jax.shard_map(f, in_specs=specs, out_specs=_spec(out_axes, sizes), axis_names=set(sizes), check_vma=False)
    return mapped(*arrays)


def automatic_axes() -> dict[str, int]:
    """The axes along which the compiler splits where this is called, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def _spec(axes: Axes, sizes: dict[str, int], shape: Sequence[int] | None = None) -> PartitionSpec:
    names = []
    for index, axis in enumerate(axes):
        mesh_axes = tuple(name for name in RULES.get(axis or "", ()) if name in sizes)
        divides = shape is None or shape[index] % math.prod(sizes[name] for name in mesh_axes) == 0
        names.append(mesh_axes if mesh_axes and divides else None)
    return PartitionSpec(*names)
