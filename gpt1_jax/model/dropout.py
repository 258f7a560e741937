"""Dropout whose mask is a pure function of a key and of each element's global position.

So it is the same on any mesh, in any blocking of the computation, and can be made anew in the backward pass instead
of being stored. A counter-based hash costs a few integer operations that fuse into what uses them; JAX's threefry
made the compiled step slower, and its compilation many times longer (docs/performance.md).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes each element with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Args:
        x: at least one dimension.
        rate: probability, in [0, 1).
        key: random key, or None to leave ``x`` as it is.

    Returns:
        The shape and dtype of ``x``.
    """
    if key is None or rate == 0:
        return x
    rows = np.uint32(0)
    for dim, size in enumerate(x.shape[:-1]):
        rows = rows * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    columns = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
    keep = keep_mask(seed_of(key), jnp.asarray(rows), columns, rate)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)


def seed_of(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """Two random words of a key, as :func:`keep_mask` takes them."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_mask(
    seed: UInt32[Array, "2"], rows: UInt32[Array, "..."], columns: UInt32[Array, "..."], rate: float
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
