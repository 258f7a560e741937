"""One layer of the decoder: attention and MLP, each followed by its residual and *then* LayerNorm (post-LN)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.attention import Attention, KVCache
from gpt1_jax.model.dropout import dropout
from gpt1_jax.model.layers import LayerNorm, Linear, gelu


class Block(nnx.Module):
    """n = ln_1(x + attention(x)); y = ln_2(n + mlp(n)), dropout on both branches (paper, Eq. 2 and section 4.1)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.attention = Attention(config, dtype, rngs)
        self.ln_1 = LayerNorm(config.embed_dim)
        self.mlp_in = Linear(embed, mlp, dtype, rngs)
        self.mlp_out = Linear(mlp, embed, dtype, rngs)
        self.ln_2 = LayerNorm(config.embed_dim)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        mask_BTS: Bool[Array, "B T S"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int | None = None,
        slot: Int[Array, ""] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns the layer's output and the updated cache; arguments as in :class:`Attention`."""
        keys = (None, None, None) if dropout_key is None else tuple(jax.random.split(dropout_key, 3))
        attended_BTD, cache = self.attention(
            x_BTD, mask_BTS=mask_BTS, cache=cache, layer=layer, slot=slot, dropout_key=keys[0]
        )
        x_BTD = self.ln_1(x_BTD + dropout(attended_BTD, self.dropout_rate, keys[1]))
        hidden_BTF = gelu(self.mlp_in(x_BTD))
        return self.ln_2(x_BTD + dropout(self.mlp_out(hidden_BTF), self.dropout_rate, keys[2])), cache
