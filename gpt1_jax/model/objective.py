"""The language-model objective (paper, Eq. 1): cross entropy of the next token, without the logits of a whole batch.

Shapes: B batch, T position, C chunk of positions, D embedding, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_nats(
    x_BTD: Float[Array, "B T D"], table_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """Negative log-probability of each target, in nats, float32.

    Args:
        x_BTD: the last hidden states.
        table_VD: the output projection.
        targets_BT: the token that follows each position.
        chunk: positions of each sequence whose logits exist at once.
    """

    def nats(x_BCD: Array, targets_BC: Array) -> Array:
        return _nats(_logits(x_BCD, table_VD), targets_BC)

    chunks = _chunk(chunk, x_BTD, targets_BT)
    nats_BT = jax.lax.map(lambda c: nats(*c), chunks)
    return _unchunk(nats_BT, x_BTD.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of ``weights_BT`` times the negative log-probability of each target, in nats.

    The gradient is computed with the value, chunk by chunk, so that the logits of ``chunk`` positions are all that
    ever exists: those of the paper's batch are 64 x 512 x 40478 numbers. Arguments as in :func:`token_nats`.
    """
    return (token_nats(x_BTD, table_VD, targets_BT, chunk) * weights_BT).sum()


def _cross_entropy_fwd(
    x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, chunk: int
) -> tuple[Array, tuple[Array, ...]]:
    table_type = table_VD.dtype

    def step(dtable_VD: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        x_BCD, targets_BC, weights_BC = inputs
        logits_BCV = _logits(x_BCD, table_VD)
        nats_BC = _nats(logits_BCV, targets_BC)
        target_BCV = jax.nn.one_hot(targets_BC, table_VD.shape[0], dtype=jnp.float32)
        dlogits_BCV = (jax.nn.softmax(logits_BCV) - target_BCV) * weights_BC[..., None]
        dlogits_BCV = dlogits_BCV.astype(table_type)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, table_VD)
        dtable_VD += jnp.einsum("BCV,BCD->VD", dlogits_BCV, x_BCD, preferred_element_type=jnp.float32)
        return dtable_VD, (dx_BCD, nats_BC)

    dtable_VD, (dx, nats) = jax.lax.scan(
        step, jnp.zeros(table_VD.shape, jnp.float32), _chunk(chunk, x_BTD, targets_BT, weights_BT)
    )
    length = x_BTD.shape[1]
    nats_BT = _unchunk(nats, length)
    return (nats_BT * weights_BT).sum(), (_unchunk(dx, length), dtable_VD.astype(table_type), nats_BT)


def _cross_entropy_bwd(chunk: int, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, None, Array]:
    dx_BTD, dtable_VD, nats_BT = residuals
    return (dx_BTD * g).astype(dx_BTD.dtype), (dtable_VD * g).astype(dtable_VD.dtype), None, nats_BT * g


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _logits(x_BCD: Array, table_VD: Array) -> Array:
    return jnp.einsum("BCD,VD->BCV", x_BCD, table_VD, preferred_element_type=jnp.float32)


def _nats(logits_BCV: Array, targets_BC: Array) -> Array:
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC


def _chunk(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] to [T / C, B, C, ...], the end padded with zeros.

    Cut along the positions and not along the batch, which may be spread over devices.
    """
    batch, length = arrays[0].shape[:2]
    size = min(length, chunk)
    count = -(-length // size)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * size - length)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, size, *array.shape[2:]), 1, 0)

    return tuple(map(cut, arrays))


def _unchunk(chunks: Array, length: int) -> Array:
    """[T / C, B, C, ...] back to [B, T, ...], without the padding."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
