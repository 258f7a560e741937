"""How long chips take to exchange data, from the bytes, the links between them, and published bandwidths: estimates.

Links are those between neighbours of a slice; each of its dimensions that a group of chips spans works at the same
time, in both directions where it closes to a ring (Austin et al. 2025, "How to Scale Your Model", part 3). Latencies
are left out, so that small exchanges look shorter than they are.
"""

from collections.abc import Sequence

import numpy as np

from gpt1_jax.planning.topologies import Slice

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def link_seconds(kind: str, size: int, group: Sequence[Sequence[int]], slice_: Slice) -> float:
    """Seconds of one exchange over the links within a slice.

    Args:
        kind: one of ``COLLECTIVES``.
        size: bytes of the whole array, as a chip has it before a reduce-scatter or after an all-gather.
        group: the coordinates of the chips that take part.
        slice_: of which these are chips.
    """
    if len(group) == 1 or not size:
        return 0.0
    if kind == "collective-permute":
        return size / slice_.chip.link_bandwidth
    spans = [len({coordinates[axis] for coordinates in group}) for axis in range(len(slice_.shape))]
    rings = [slice_.wraps(axis) and spans[axis] == length for axis, length in enumerate(slice_.shape)]
    links = sum(2 if ring else 1 for span, ring in zip(spans, rings, strict=True) if span > 1)
    passes = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
    # In an all-to-all an array of the whole group goes half-way round, so a chip's part of it costs a quarter of
    # what gathering the array would.
    factor = passes.get(kind, max(spans) / 4)
    return factor * size * (len(group) - 1) / len(group) / (links * slice_.chip.link_bandwidth)


def slice_seconds(kind: str, size: int, slice_: Slice) -> float:
    """Seconds of one exchange between slices, over the network of their hosts.

    Args:
        kind: as of :func:`link_seconds`.
        size: bytes that one chip sends.
        slice_: the slices.
    """
    others = slice_.count - 1
    passes = {"all-reduce": 2 * others / slice_.count, "all-gather": others}
    return passes.get(kind, 1) * size / slice_.chip.dcn_bandwidth


def mesh_coordinates(devices: np.ndarray) -> list[tuple[int, ...]]:
    """Coordinates in its slice of each chip of the first slice, in the order of the mesh."""
    first = min(getattr(device, "slice_index", 0) or 0 for device in devices.flat)
    return [tuple(device.coords) for device in devices.flat if (getattr(device, "slice_index", 0) or 0) == first]
