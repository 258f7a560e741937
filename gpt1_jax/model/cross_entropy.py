"""Cross entropy of tokens (paper, Eq. 1), without the logits of a whole batch.

Shapes: B batch, T position, C chunk of positions, D embedding, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gpt1_jax.model.layers import soft_cap
from gpt1_jax.model.products import product, sum_of_outer_products
from gpt1_jax.model.sharding import on_each_device


def token_nats(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int,
    cap: float | None = None,
) -> Float[Array, "B T"]:
    """Negative log-probability of each target, in nats, float32.

    Args:
        x_BTD: the last hidden states.
        table_VD: the output projection; it is cast to the dtype of ``x_BTD``.
        targets_BT: the token to predict at each position.
        chunk: positions of each sequence whose logits exist at once.
        cap: bound of the logits, see :func:`gpt1_jax.model.layers.soft_cap`.
    """
    return _of_targets(_nats, x_BTD, table_VD, targets_BT, chunk, cap)


def token_nats_and_greedy(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int,
    cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The nats of each target, and whether it is the likeliest token, of equal ones the one of the lowest id.

    Arguments as in :func:`token_nats`.
    """

    def both(logits_BCV: Array, targets_BC: Array) -> tuple[Array, Array]:
        return _nats(logits_BCV, targets_BC), logits_BCV.argmax(-1) == targets_BC

    return _of_targets(both, x_BTD, table_VD, targets_BT, chunk, cap)


def _of_targets(
    f: Callable[[Array, Array], Any], x_BTD: Array, table_VD: Array, targets_BT: Array, chunk: int, cap: float | None
) -> Any:
    """``f`` of the logits and the targets of each chunk, its results joined."""
    table_VD = table_VD.astype(x_BTD.dtype)

    def of_chunk(inputs: tuple[Array, Array]) -> Any:
        x_BCD, targets_BC = inputs
        return f(soft_cap(_products(x_BCD, table_VD), cap), targets_BC)

    results = jax.lax.map(of_chunk, _chunk(chunk, x_BTD, targets_BT))
    return jax.tree.map(lambda chunks: _unchunk(chunks, x_BTD.shape[1]), results)


def _nats(logits_BCV: Array, targets_BC: Array) -> Array:
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
    cap: float | None = None,
) -> Float[Array, ""]:
    """Sum of ``weights_BT`` times the negative log-probability of each target, in nats.

    The gradient is computed with the value, chunk by chunk, so that the logits of ``chunk`` positions are all that
    ever exists: those of the paper's batch are 64 x 512 x 40478 numbers. Arguments as in :func:`token_nats`.
    """

    def part(x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array) -> Array:
        return _cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, chunk, cap)[None, None]

    # Each device cuts its own positions into chunks, and the table's gradient is summed over devices once, at the end.
    rows = ("batch", "sequence")
    in_axes = ((*rows, None), (None, None), rows, rows)
    return on_each_device(part, (x_BTD, table_VD, targets_BT, weights_BT), in_axes, rows, logical=rows).sum()


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, chunk: int, cap: float | None
) -> Array:
    return (token_nats(x_BTD, table_VD, targets_BT, chunk, cap) * weights_BT).sum()


def _cross_entropy_fwd(
    x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, chunk: int, cap: float | None
) -> tuple[Array, tuple[Array, ...]]:
    compute = x_BTD.dtype
    table_of_products_VD = table_VD.astype(compute)

    def step(dtable_DV: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        # The gradient of the logits is weight * (softmax - one_hot). Its two parts are kept apart, so that the largest
        # array, exp(logits), is made once, and the one-hot part is a few rows of the table instead of a product.
        x_BCD, targets_BC, weights_BC = inputs
        x32_BCD = x_BCD.astype(jnp.float32)
        target_rows_BCD = table_of_products_VD[targets_BC].astype(jnp.float32)
        chosen_BC = soft_cap((x32_BCD * target_rows_BCD).sum(-1), cap)
        logits_BCV = soft_cap(_products(x_BCD, table_of_products_VD), cap)
        highest_BC1 = logits_BCV.max(-1, keepdims=True)
        exp_BCV = jnp.exp(logits_BCV - highest_BC1)
        total_BC1 = exp_BCV.sum(-1, keepdims=True)
        nats_BC = (highest_BC1 + jnp.log(total_BC1))[..., 0] - chosen_BC
        pull_BCV = (exp_BCV * _slope(logits_BCV, cap)).astype(compute)
        scale_BC1 = weights_BC[..., None] / total_BC1
        target_pull_BC = weights_BC * _slope(chosen_BC, cap)
        dx_BCD = product("BCV,VD->BCD", pull_BCV, table_of_products_VD)
        dx_BCD = dx_BCD * scale_BC1 - target_pull_BC[..., None] * target_rows_BCD
        dtable_DV += sum_of_outer_products((x32_BCD * scale_BC1).astype(compute), pull_BCV)
        return dtable_DV, (dx_BCD.astype(compute), nats_BC, target_pull_BC)

    zeros_DV = jnp.zeros(table_VD.shape[::-1], jnp.float32)
    chunks = _chunk(chunk, x_BTD, targets_BT, weights_BT)
    dtable_DV, outputs = jax.lax.scan(step, zeros_DV, chunks)  # pyrefly: ignore[bad-argument-type]
    dx_BTD, nats_BT, target_pull_BT = (_unchunk(output, x_BTD.shape[1]) for output in outputs)
    # Without the barrier XLA's CPU backend makes the transpose part of a product that it then cannot run.
    dtable_VD = jax.lax.optimization_barrier(dtable_DV).T
    dtable_VD = dtable_VD.at[targets_BT].add(-target_pull_BT[..., None] * x_BTD.astype(jnp.float32))
    return (nats_BT * weights_BT).sum(), (dx_BTD, dtable_VD.astype(table_VD.dtype), nats_BT)


def _cross_entropy_bwd(
    chunk: int, cap: float | None, residuals: tuple[Array, ...], g: Array
) -> tuple[Array, Array, None, Array]:
    dx_BTD, dtable_VD, nats_BT = residuals
    return (dx_BTD * g).astype(dx_BTD.dtype), (dtable_VD * g).astype(dtable_VD.dtype), None, nats_BT * g


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _products(x_BCD: Array, table_VD: Array) -> Array:
    return product("BCD,VD->BCV", x_BCD, table_VD)


def _slope(capped: Array, cap: float | None) -> Array | int:
    """Derivative of the soft cap, by its result."""
    return 1 if cap is None else 1 - jnp.square(capped / cap)


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
