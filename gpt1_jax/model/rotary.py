"""Rotary position embeddings (Su et al. 2021, "RoFormer", section 3.4).

Shapes: B batch, T position, N heads, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BASE = 10_000  # paper, section 3.2.2: theta_i = 10000^(-2i/d)


def rotate(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "#B T"]) -> Float[Array, "B T N H"]:
    """Turns pair i of every head by the angle position x 10000^(-2i/H), so that scores depend on distances alone.

    Deviation: a pair is the numbers i and i + H/2, as in most public implementations; the paper pairs neighbours. The
    two differ by a permutation of a head's numbers, which the projections before it learn.

    Args:
        x_BTNH: queries or keys; H is even.
        positions_BT: the position of each.

    Returns:
        The shape and dtype of ``x_BTNH``; angles and products are float32.
    """
    half = x_BTNH.shape[-1] // 2
    rates_H = _BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1H = positions_BT[..., None, None].astype(jnp.float32) * rates_H
    cos, sin = jnp.cos(angles_BT1H), jnp.sin(angles_BT1H)
    first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
