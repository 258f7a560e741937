"""Token and position embeddings; the token table is also the output projection (paper, Eq. 2: W_e twice).

Shapes: B batch, T position, D embedding, V vocabulary.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.dropout import dropout
from gpt1_jax.model.layers import normal


class Embedding(nnx.Module):
    """h_0 = dropout(W_e[token] + W_p[position])."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.token_kernel = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"))
        self.position_kernel = normal(rngs, (config.context_length, config.embed_dim), ("position", "embed"))
        self.dropout_rate = config.dropout
        self.dtype = dtype

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "#B T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds tokens at the given positions, in the compute dtype."""
        embedded = self.token_kernel[...][tokens_BT] + self.position_kernel[...][positions_BT]
        return dropout(embedded.astype(self.dtype), self.dropout_rate, dropout_key)
