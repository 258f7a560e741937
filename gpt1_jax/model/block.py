"""One layer of the decoder: attention and MLP, each followed by its residual and *then* normalisation (post-LN)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.attention import Attention, KVCache
from gpt1_jax.model.dropout import DropoutKey, dropout
from gpt1_jax.model.layers import Linear, branch_std, gelu, make_norm
from gpt1_jax.model.lora import lora_of


class Block(nnx.Module):
    """n = ln_1(x + attention(x)); y = ln_2(n + mlp(n)), dropout on both branches (paper, Eq. 2 and section 4.1).

    With ``norm_position: pre`` (Radford et al. 2019, section 2.3): n = x + attention(ln_1(x)); y = n + mlp(ln_2(n)).
    The MLP is W_out gelu(W_in x), or with ``activation: swiglu`` W_out (silu(W_gate x) * W_in x) (Shazeer 2020).
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        embed, mlp, bias = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}, config.bias
        self.attention = Attention(config, dtype, rngs)
        self.ln_1 = make_norm(config, config.embed_dim)
        lora = {name: lora_of(config, name) for name in ("mlp_in", "mlp_out", "mlp_gate")}
        self.mlp_in = Linear(embed, mlp, dtype, rngs, bias=bias, lora=lora["mlp_in"])
        self.mlp_out = Linear(mlp, embed, dtype, rngs, bias=bias, std=branch_std(config), lora=lora["mlp_out"])
        gated = config.activation == "swiglu"
        self.mlp_gate = Linear(embed, mlp, dtype, rngs, bias=bias, lora=lora["mlp_gate"]) if gated else None
        self.ln_2 = make_norm(config, config.embed_dim)
        self.dropout_rate = config.dropout
        self.pre_norm = config.norm_position == "pre"

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
        """Returns the layer's output and the updated cache; arguments as in :class:`Attention`."""
        keys = [None] * 3 if dropout_key is None else dropout_key.split(3)
        attended_BTD, cache = self.attention(
            self.ln_1(x_BTD) if self.pre_norm else x_BTD,
            positions_BT,
            mask_BTS=mask_BTS,
            starts_BT=starts_BT,
            cache=cache,
            layer=layer,
            slot=slot,
            dropout_key=keys[0],
        )
        x_BTD = x_BTD + dropout(attended_BTD, self.dropout_rate, keys[1])
        x_BTD = x_BTD if self.pre_norm else self.ln_1(x_BTD)
        mapped_BTD = self.mlp(self.ln_2(x_BTD) if self.pre_norm else x_BTD)
        x_BTD = x_BTD + dropout(mapped_BTD, self.dropout_rate, keys[2])
        return x_BTD if self.pre_norm else self.ln_2(x_BTD), cache

    def mlp(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The position-wise branch."""
        hidden_BTF = self.mlp_in(x_BTD)
        if self.mlp_gate is None:
            return self.mlp_out(gelu(hidden_BTF))
        return self.mlp_out(jax.nn.silu(self.mlp_gate(x_BTD)) * hidden_BTF)
