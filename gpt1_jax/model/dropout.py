"""Dropout whose random bits depend on the key and on the element's global position alone, never on the mesh."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_BITS = 16
_PER_WORD = 32 // _BITS


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes each element with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Args:
        x: any shape.
        rate: probability, in [0, 1).
        key: random key, or None to leave ``x`` as it is.

    Returns:
        The shape and dtype of ``x``.

    Deviation: an element takes 16 random bits, not 32, so the probability is rounded to a multiple of 2^-16. Half the
    bits are half the work, and at 0.1 the rounding is 6e-6.
    """
    if key is None or rate == 0:
        return x
    threshold = round(rate * 2**_BITS)
    *outer, last = x.shape
    words = jax.random.bits(key, (*outer, -(-last // _PER_WORD)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*outer, -1)[..., :last]
    keep = bits >= threshold
    scale = 2**_BITS / (2**_BITS - threshold)
    return jnp.where(keep, x * jnp.asarray(scale, x.dtype), 0)
