"""Dropout whose mask is a pure function of a key and of each element's global position.

So it is the same on any mesh, in any blocking of the computation, and can be made anew in the backward pass instead
of being stored. A counter-based hash costs a few integer operations that fuse into what uses them; JAX's threefry
made the compiled step slower, and its compilation many times longer (docs/performance.md).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


class DropoutKey(NamedTuple):
    """What masks are made from.

    Attributes:
        key: random key.
        first_row: number of the first row at hand in its batch, where a function sees only some of the rows.
    """

    key: Key[Array, ""]
    first_row: Int[Array, ""] | int = 0

    def split(self, count: int) -> list["DropoutKey"]:
        """Keys of so many masks."""
        return [self._replace(key=key) for key in jax.random.split(self.key, count)]

    def fold_in(self, number: Int[Array, ""] | int) -> "DropoutKey":
        """The key of a numbered part, such as a layer."""
        return self._replace(key=jax.random.fold_in(self.key, number))


def dropout(x: Float[Array, "..."], rate: float, key: DropoutKey | None) -> Float[Array, "..."]:
    """Zeroes each element with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Args:
        x: at least two dimensions, rows of a batch first.
        rate: probability, in [0, 1).
        key: None leaves ``x`` as it is.

    Returns:
        The shape and dtype of ``x``.
    """
    if key is None or rate == 0:
        return x
    seed = seed_of(key)
    rows = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0) + seed[2]
    for dim, size in enumerate(x.shape[1:-1], 1):
        rows = rows * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    columns = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
    keep = keep_mask(seed, rows, columns, rate)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)


def seed_of(key: DropoutKey) -> UInt32[Array, "3"]:
    """Two random words of a key, as :func:`keep_mask` takes them, and its first row."""
    return jnp.append(jax.random.bits(key.key, (2,), jnp.uint32), jnp.asarray(key.first_row, jnp.uint32))


def keep_mask(
    seed: UInt32[Array, "3"], rows: UInt32[Array, "..."], columns: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """True with probability ``1 - rate``, for each pair of a row and a column number, which broadcast.

    Rows are hashed before columns, so that no two rows have the same mask shifted.
    """
    row_words = _mix(rows ^ seed[0])
    words = _mix(columns * np.uint32(0x9E3779B9) ^ row_words ^ seed[1])
    return words >= np.uint32(round(rate * 2**32))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words with good avalanche: lowbias32 of C. Wellons, "Prospecting for Hash Functions"."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
