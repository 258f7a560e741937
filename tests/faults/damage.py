"""What may become of a file."""

from collections.abc import Callable
from pathlib import Path

# From the content of a file to what has become of it; None: it is deleted.
Damage = Callable[[bytes], bytes | None]


def flip(bit: int) -> Damage:
    """Flips a bit, counted over the whole file."""

    def flipped(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return flipped


def spoil(path: Path, damage: Damage) -> bool:
    """Damages a file; False if that leaves it as it was, as with zeroes where there were zeroes."""
    content = path.read_bytes()
    damaged = damage(content)
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    return damaged != content
