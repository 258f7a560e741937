"""Causal multi-head self-attention (paper, section 3.1), and the one function behind which kernels live.

Shapes: B batch, T query position, S key position, D embedding, L layers, N heads, K heads of keys and values, H head
size.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.attention_kernels import cudnn_attention, splash_attention
from gpt1_jax.model.causal_attention import causal_attention
from gpt1_jax.model.dropout import DropoutKey, dropout, seed_of
from gpt1_jax.model.layers import Linear, branch_std, make_norm
from gpt1_jax.model.lora import lora_of
from gpt1_jax.model.rotary import rotate
from gpt1_jax.model.segments import same_document
from gpt1_jax.model.sharding import constrain, split_axes

# What the key model.attention chooses from: causal attention over [B, N, T, H]. A kernel that drops probabilities
# itself belongs here too. Where nobody has resolved auto (training/choices.py), it is the form that runs anywhere.
_CAUSAL = {"auto": causal_attention, "xla": causal_attention, "splash": splash_attention, "cudnn": cudnn_attention}
_MASKED = -1e30  # finite, so that a row with no key at all is uniform and not NaN


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far, of every layer, one slot a position."""

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]


def cache_mask(last_BT: Int[Array, "B T"], pads_B: Int[Array, " B"], slots: Any) -> Bool[Array, "B T S"]:
    """Which slots of a cache each query sees: from its row's first real token to ``last_BT``.

    Args:
        last_BT: the last slot that each query sees.
        pads_B: slots of padding on the left of each row.
        slots: of the cache; a number, or a symbolic dimension where a step is exported for any size.
    """
    slots_S = jnp.arange(slots)
    return (slots_S >= pads_B[:, None, None]) & (slots_S <= last_BT[..., None])


def dot_product_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    mask_BTS: Bool[Array, "#B #T S"] | None = None,
    starts_BT: Int[Array, "B T"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention: softmax(q k' / sqrt(H)) v.

    Args:
        q_BTNH: queries.
        k_BSKH: keys; query head n reads head n K / N of them (Ainslie et al. 2023, grouped-query attention).
        v_BSKH: values.
        mask_BTS: which key each query may see; None means causal, query t sees keys 0 to t (then S = T).
        starts_BT: of the causal form, where the document of each position begins: query t sees keys from there to t.
        dropout_rate: probability with which an attention probability is zeroed.
        dropout_key: random key of that dropout; None switches it off.
        implementation: of the causal form, a value of ``model.attention``.

    Returns:
        The attended values, in the dtype of the values. Scores and softmax are float32.
    """
    k_BSNH, v_BSNH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    if mask_BTS is None and implementation in ("auto", "xla") and split_axes("sequence"):
        # Each device has some of the queries and needs every key: blocks would be cut across devices.
        k_BSNH, v_BSNH = (constrain(x, ("batch", None, "heads", None)) for x in (k_BSNH, v_BSNH))
        mask_BTS = _causal_mask(q_BTNH.shape[1], starts_BT)
    if mask_BTS is None:
        q_BNTH, k_BNTH, v_BNTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
        seed = None if dropout_key is None else seed_of(dropout_key)
        return _CAUSAL[implementation](q_BNTH, k_BNTH, v_BNTH, seed, dropout_rate, starts_BT).swapaxes(1, 2)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    scale = 1 / math.sqrt(q_BTNH.shape[-1])
    probs_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS * scale, _MASKED), axis=-1)
    probs_BNTS = dropout(probs_BNTS.astype(v_BSNH.dtype), dropout_rate, dropout_key)
    return jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS, v_BSNH)


def _causal_mask(length: int, starts_BT: Array | None) -> Array:
    seen_TS = jnp.arange(length)[:, None] >= jnp.arange(length)
    return seen_TS[None] if starts_BT is None else seen_TS & same_document(starts_BT)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        embed, bias = {"embed": config.embed_dim}, config.bias
        # Apart from each other: as one product their gradients would have to be joined in memory first.
        self.query, self.key, self.value = (
            Linear(embed, outputs, dtype, rngs, bias=bias, lora=lora_of(config, name))
            for name, outputs in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        self.out = Linear(heads, embed, dtype, rngs, bias=bias, std=branch_std(config), lora=lora_of(config, "out"))
        norms = [make_norm(config, config.head_dim, "head_dim") if config.qk_norm else None for _ in range(2)]
        self.query_norm, self.key_norm = norms
        self.rotary = config.positions == "rotary"
        self.dropout_rate = config.attention_dropout
        self.implementation = config.attention

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "#B T"],
        *,
        mask_BTS: Bool[Array, "#B #T S"] | None = None,
        starts_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int | None = None,
        slot: Int[Array, ""] | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within ``x_BTD``, or, with a cache, to everything the cache holds too.

        Args:
            x_BTD: the T new positions.
            positions_BT: the number of each.
            mask_BTS: which keys each query may see; None means causal within ``x_BTD``.
            starts_BT: without a mask, where the document of each position begins.
            cache: keys and values of S slots, of which this layer's T are overwritten from ``slot`` on.
            layer: with a cache, which layer this is.
            slot: first slot of the new positions.
            dropout_key: random key; None switches dropout off.

        Returns:
            The output, and the updated cache (None if none was given).
        """
        q_BTNH, k_BSKH, v_BSKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        if self.rotary:
            q_BTNH, k_BSKH = rotate(q_BTNH, positions_BT), rotate(k_BSKH, positions_BT)
        if cache is not None:
            assert layer is not None and slot is not None
            start = (layer, 0, slot, 0, 0)
            k_LBSKH = jax.lax.dynamic_update_slice(cache.k_LBSKH, k_BSKH[None], start)
            v_LBSKH = jax.lax.dynamic_update_slice(cache.v_LBSKH, v_BSKH[None], start)
            k_BSKH, v_BSKH = k_LBSKH[layer], v_LBSKH[layer]
            cache = KVCache(k_LBSKH, v_LBSKH)
        attended_BTNH = dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask_BTS=mask_BTS,
            starts_BT=starts_BT,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        return self.out(attended_BTNH), cache
