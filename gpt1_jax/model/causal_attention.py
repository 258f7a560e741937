"""Causal attention in blocks of queries, each of which reads only the keys that it may see.

So half of the scores are never computed, and none are kept for the backward pass, which makes them anew from the
saved normalizers (Dao et al. 2022, "FlashAttention", algorithms 2 and 4, without the tiling of the keys).

Shapes: B batch, N heads, T position, Q queries of one block, S the keys up to its end, H head size.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gpt1_jax.model.dropout import keep_mask
from gpt1_jax.model.products import product

_QUERIES = 128  # in a block


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BNTH: Float[Array, "B N T H"],
    v_BNTH: Float[Array, "B N T H"],
    seed: UInt32[Array, "3"] | None,
    dropout_rate: float,
    starts_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B N T H"]:
    """softmax(q k' / sqrt(H)) v, where query t sees keys 0 to t, or those from the start of its document to t.

    Args:
        q_BNTH: queries.
        k_BNTH: keys.
        v_BNTH: values.
        seed: of the dropout on the probabilities; None switches it off. The mask is that of
            :func:`gpt1_jax.model.dropout.dropout` on the whole [B, N, T, T] array.
        dropout_rate: probability with which a probability is zeroed.
        starts_BT: where the document of each position begins (:mod:`gpt1_jax.model.segments`); None: all see all.

    Returns:
        The attended values in the dtype of the queries; scores, softmax and sums are float32.
    """
    return _forward(q_BNTH, k_BNTH, v_BNTH, seed, dropout_rate, starts_BT)[0]


def _forward(
    q_BNTH: Array,
    k_BNTH: Array,
    v_BNTH: Array,
    seed: Array | None,
    dropout_rate: float,
    starts_BT: Array | None = None,
) -> tuple[Array, tuple]:
    outputs, normalizers = [], []
    for start, stop in _blocks(q_BNTH):
        scores_BNQS = _scores(q_BNTH, k_BNTH, starts_BT, start, stop)
        highest_BNQ1 = scores_BNQS.max(-1, keepdims=True)
        weights_BNQS = jnp.exp(scores_BNQS - highest_BNQ1)
        total_BNQ1 = weights_BNQS.sum(-1, keepdims=True)
        kept_BNQS = _dropped(weights_BNQS, q_BNTH, seed, dropout_rate, start)
        sums_BNQH = product("BNQS,BNSH->BNQH", kept_BNQS.astype(q_BNTH.dtype), v_BNTH[:, :, :stop])
        outputs.append((sums_BNQH / total_BNQ1).astype(q_BNTH.dtype))
        normalizers.append(highest_BNQ1 + jnp.log(total_BNQ1))
    o_BNTH = jnp.concatenate(outputs, axis=2)
    return o_BNTH, (q_BNTH, k_BNTH, v_BNTH, seed, starts_BT, o_BNTH, normalizers)


def _backward(dropout_rate: float, residuals: tuple, do_BNTH: Array) -> tuple[Array, Array, Array, None, None]:
    q_BNTH, k_BNTH, v_BNTH, seed, starts_BT, o_BNTH, normalizers = residuals
    dtype, length = q_BNTH.dtype, q_BNTH.shape[2]
    scale = 1 / math.sqrt(q_BNTH.shape[-1])
    delta_BNT1 = (o_BNTH.astype(jnp.float32) * do_BNTH.astype(jnp.float32)).sum(-1, keepdims=True)
    # Keys' and values' gradients are summed transposed, from small transposed operands that XLA must not fold back
    # into the products: its CPU backend widens those of transposed bfloat16 operands to float32.
    q_BNHT, do_BNHT = jax.lax.optimization_barrier((q_BNTH.swapaxes(2, 3), do_BNTH.swapaxes(2, 3)))
    dq, dk_BNHT, dv_BNHT = [], jnp.zeros(q_BNHT.shape, jnp.float32), jnp.zeros(q_BNHT.shape, jnp.float32)
    for (start, stop), normalizer_BNQ1 in zip(_blocks(q_BNTH), normalizers, strict=True):
        probs_BNQS = jnp.exp(_scores(q_BNTH, k_BNTH, starts_BT, start, stop) - normalizer_BNQ1)
        dprobs_BNQS = product("BNQH,BNSH->BNQS", do_BNTH[:, :, start:stop], v_BNTH[:, :, :stop])
        dprobs_BNQS = _dropped(dprobs_BNQS, q_BNTH, seed, dropout_rate, start)
        dscores_BNQS = (probs_BNQS * (dprobs_BNQS - delta_BNT1[:, :, start:stop]) * scale).astype(dtype)
        kept_BNQS = _dropped(probs_BNQS, q_BNTH, seed, dropout_rate, start).astype(dtype)
        dq.append(product("BNQS,BNSH->BNQH", dscores_BNQS, k_BNTH[:, :, :stop]).astype(dtype))
        unseen = [(0, 0), (0, 0), (0, 0), (0, length - stop)]
        dk_BNHT += jnp.pad(product("BNHQ,BNQS->BNHS", q_BNHT[..., start:stop], dscores_BNQS), unseen)
        dv_BNHT += jnp.pad(product("BNHQ,BNQS->BNHS", do_BNHT[..., start:stop], kept_BNQS), unseen)
    dk_BNTH, dv_BNTH = (d.astype(dtype).swapaxes(2, 3) for d in (dk_BNHT, dv_BNHT))
    return jnp.concatenate(dq, axis=2), dk_BNTH, dv_BNTH, None, None


causal_attention.defvjp(_forward, _backward)


def _blocks(q_BNTH: Array) -> list[tuple[int, int]]:
    """First and last-plus-one query of each block."""
    length = q_BNTH.shape[2]
    return [(start, min(start + _QUERIES, length)) for start in range(0, length, _QUERIES)]


def _scores(q_BNTH: Array, k_BNTH: Array, starts_BT: Array | None, start: int, stop: int) -> Array:
    scores_BNQS = product("BNQH,BNSH->BNQS", q_BNTH[:, :, start:stop], k_BNTH[:, :, :stop])
    seen_QS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    seen_BNQS = seen_QS if starts_BT is None else seen_QS & _within_document(starts_BT, start, stop)
    return jnp.where(seen_BNQS, scores_BNQS / math.sqrt(q_BNTH.shape[-1]), -jnp.inf)


def _within_document(starts_BT: Array, start: int, stop: int) -> Bool[Array, "B 1 Q S"]:
    return jnp.arange(stop) >= starts_BT[:, None, start:stop, None]


def _dropped(x_BNQS: Array, q_BNTH: Array, seed: Array | None, rate: float, start: int) -> Array:
    """Dropout of one block of probabilities, or of their gradient."""
    if seed is None or rate == 0:
        return x_BNQS
    heads, length = q_BNTH.shape[1:3]
    iota = partial(jax.lax.broadcasted_iota, jnp.uint32, x_BNQS.shape)
    rows = ((iota(0) + seed[2]) * jnp.uint32(heads) + iota(1)) * jnp.uint32(length) + iota(2) + jnp.uint32(start)
    return jnp.where(keep_mask(seed, rows, iota(3), rate), x_BNQS * (1 / (1 - rate)), 0)
