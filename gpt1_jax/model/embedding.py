"""Token and position embeddings; the token table is also the output projection (paper, Eq. 2: W_e twice).

A model with rotary positions has none here, and a masked one has a vector for what is hidden from it.

Shapes: B batch, T position, D embedding, V vocabulary.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.dropout import DropoutKey, dropout
from gpt1_jax.model.layers import normal
from gpt1_jax.model.sharding import gathered


class Embedding(nnx.Module):
    """h_0 = dropout(W_e[token] + W_p[position]); the token ``config.mask_id`` has a vector of its own."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.token_kernel = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"))
        shape = (config.context_length, config.embed_dim)
        learned, masked = config.positions == "learned", config.objective == "masked"
        self.position_kernel = normal(rngs, shape, ("position", "embed")) if learned else None
        self.mask_kernel = normal(rngs, (config.embed_dim,), ("embed",)) if masked else None
        self.mask_id = config.mask_id
        self.dropout_rate = config.dropout
        self.dtype = dtype

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "#B T"],
        dropout_key: DropoutKey | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds tokens at the given positions, in the compute dtype."""
        token_kernel = gathered(self.token_kernel[...], ("vocab", "embed"))
        if self.mask_kernel is None:
            embedded_BTD = token_kernel[tokens_BT]
        else:
            hidden_BT1 = (tokens_BT == self.mask_id)[..., None]
            known_BTD = token_kernel[jnp.minimum(tokens_BT, self.mask_id - 1)]
            embedded_BTD = jnp.where(hidden_BT1, self.mask_kernel[...], known_BTD)
        if self.position_kernel is not None:
            embedded_BTD += gathered(self.position_kernel[...], ("position", "embed"))[positions_BT]
        return dropout(embedded_BTD.astype(self.dtype), self.dropout_rate, dropout_key)
