"""The TPU slices that exist, by the names that users know them by, and the published figures of their chips.

v4 and v5p are named after the TensorCores of a slice, two a chip (``v4-32`` has 16 chips), v5e and v6e after its chips;
every slice also has the name ``GENERATION:SHAPE`` in chips, ``v5p:4x4x4``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpt1_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, all figures of one chip, which is one device.

    Attributes:
        name: of the generation.
        device_kind: its name in JAX.
        cores: TensorCores, which the cloud counts in its names.
        clock: of a TensorCore, cycles per second.
        hbm_bytes: memory that a program may use.
        hbm_bandwidth: bytes per second.
        link_bandwidth: of one link to a neighbouring chip, bytes per second in one direction.
        dcn_bandwidth: its share of its host's network, over which slices talk, bytes per second in one direction.
        shapes: the slices that exist, smallest first.
        options: what the compiler must be told to count a chip as one device.
    """

    name: str
    device_kind: str
    cores: int
    clock: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    shapes: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_GIB = 2**30

# Sources. HBM bandwidth, links, hosts and shapes: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; where they give no links
# (v4) and no network (v4, v5p): Austin et al. 2025, "How to Scale Your Model", part 2. Memory: the limit that libtpu's
# compiler holds programs to, the published capacity less what the system keeps. Clock: peak FLOP/s over the FLOP that
# the matrix units do in a cycle, 2 x 128 x 128 each of eight (v4, v5p) or four (v5e), 2 x 256 x 256 each of four (v6e).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "TPU v4", 2, 1.05e9, int(30.75 * _GIB), 1.2e12, 4.5e10, 6.25e9, _3D, {"chip_config_name": "megacore"}
        ),
        Chip("v5e", "TPU v5 lite", 1, 1.5e9, int(15.75 * _GIB), 8.19e11, 5e10, 3.125e9, _2D),
        Chip(
            "v5p",
            "TPU v5",
            2,
            1.75e9,
            int(95.73 * _GIB),
            2.765e12,
            1e11,
            6.25e9,
            (*_3D, "16x16x16", "16x16x24"),
        ),
        Chip("v6e", "TPU v6 lite", 1, 1.75e9, int(31.24 * _GIB), 1.64e12, 1e11, 1.25e10, _2D),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips that their own links join, as many times as there are slices.

    Attributes:
        chip: the generation.
        shape: chips along each dimension.
        count: how many such slices train together.
    """

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """Such as ``v5e:4x4``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.count

    def wraps(self, axis: int) -> bool:
        """Whether the links along a dimension close to a ring.

        They do in a dimension of 16 on v5e and v6e, and in slices of whole cubes of 4 x 4 x 4 on v4 and v5p.
        """
        if len(self.shape) == 2:
            return self.shape[axis] == 16
        return all(length % 4 == 0 for length in self.shape)


def parse_slice(name: str, count: int = 1) -> Slice:
    """The slice of a name such as ``v5e:4x4``, ``v5e-16``, ``v5litepod-16`` or ``v4-32``.

    Raises:
        UserError: if there is no such slice, naming the nearest, or if ``count`` is not positive.
    """
    if count < 1:
        raise UserError(f"--slices {count}: give the number of slices, 1 or more")
    found = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    chip = CHIPS.get({"v5litepod": "v5e"}.get(found[1], found[1])) if found else None
    if found is None or chip is None:
        raise UserError(
            f"--topology {name}: no such TPU slice{nearest(name, _names())}; a generation and its chips or their "
            f"shape, such as v5e-16 or v5p:4x4x4; 'gpt1 plan --list' prints those that exist"
        )
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
        if found[3] in chip.shapes or _is_of_cubes(chip, shape):
            return Slice(chip, shape, count)
    else:
        for text in chip.shapes:
            shape = tuple(map(int, text.split("x")))
            if math.prod(shape) * chip.cores == int(found[2]):
                return Slice(chip, shape, count)
    chips = math.prod(map(int, found[3].split("x"))) if found[3] else int(found[2]) // chip.cores
    near = sorted(chip.shapes, key=lambda text: abs(math.log(max(chips, 1) / _size(text))))[:3]
    unit = " (v4 and v5p are named after their TensorCores, two a chip)" if found[2] and chip.cores == 2 else ""
    raise UserError(
        f"--topology {name}: {chip.name} has no slice of this {'shape' if found[3] else 'size'}{unit}; nearest are "
        + ", ".join(f"{chip.name}:{text} = {cloud_name(chip, text)}" for text in sorted(near, key=_size))
    )


def cloud_name(chip: Chip, shape: str) -> str:
    """What the cloud calls a slice, such as ``v5p-128`` for 64 chips."""
    return f"{chip.name}-{_size(shape) * chip.cores}"


def table() -> str:
    """The slices that exist, a line for each."""
    lines = ["slice           cloud name   chips   HBM of a chip"]
    for chip in CHIPS.values():
        lines += [
            f"{chip.name + ':' + shape:<15} {cloud_name(chip, shape):<11} {_size(shape):>6}   "
            f"{chip.hbm_bytes / _GIB:.2f} GiB"
            for shape in chip.shapes
        ]
    return "\n".join(lines)


def _names() -> list[str]:
    return [name for chip in CHIPS.values() for s in chip.shapes for name in (f"{chip.name}:{s}", cloud_name(chip, s))]


def _size(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _is_of_cubes(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether a slice is made of whole cubes of 4 x 4 x 4 chips, which v4 and v5p join as one likes."""
    return len(shape) == 3 == len(chip.shapes[0].split("x")) and (
        all(length % 4 == 0 for length in shape) and math.prod(shape) <= _size(chip.shapes[-1])
    )
