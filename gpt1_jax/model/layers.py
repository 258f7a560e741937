"""The layers that blocks are made of, with the paper's initialisation and logical axis names on every parameter.

Every parameter carries the metadata ``axes``: one logical name for each of its dimensions. sharding.py maps
them to the axes of the device mesh.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gpt1_jax.config import LoraConfig, ModelConfig
from gpt1_jax.model.lora import lora_scale
from gpt1_jax.model.products import affine

INIT_STD = 0.02  # paper, 4.1: weights start from N(0, 0.02)
NORM_EPSILON = 1e-5  # authors' code
_GELU_SCALE = math.sqrt(2 / math.pi)


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], std: float = INIT_STD) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def branch_std(config: ModelConfig) -> float:
    """Standard deviation of the initial last matrix of a residual branch.

    That of all others in the paper's model. The sum of pre-LN branches is normalised by nothing and grows with the
    depth, so there it is smaller by sqrt(2 L) (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.3).
    """
    return INIT_STD if config.norm_position == "post" else INIT_STD / math.sqrt(2 * config.num_layers)


class Linear(nnx.Module):
    """An affine map over the last ``len(inputs)`` dimensions.

    Args:
        inputs: sizes of the dimensions contracted over, by logical axis name.
        outputs: sizes of the dimensions that take their place, by logical axis name.
        dtype: dtype of the product.
        rngs: source of the kernel's random key.
        bias: whether a bias is added.
        std: standard deviation of the initial kernel.
        lora: a low-rank update beside the kernel, at first zero (Hu et al. 2021, section 4.1); None: none.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        bias: bool = True,
        std: float = INIT_STD,
        lora: LoraConfig | None = None,
    ):
        self.kernel = normal(rngs, (*inputs.values(), *outputs.values()), (*inputs, *outputs), std)
        zeros = jnp.zeros(tuple(outputs.values()), jnp.float32)
        self.bias = nnx.Param(zeros, axes=tuple(outputs)) if bias else None
        rank = lora.rank if lora else 0
        zeros = jnp.zeros((rank, *outputs.values()), jnp.float32)
        # Each is set once: NNX lets nothing that was None become a parameter.
        self.lora_in = normal(rngs, (*inputs.values(), rank), (*inputs, "rank")) if lora else None
        self.lora_out = nnx.Param(zeros, axes=("rank", *outputs)) if lora else None
        self.axes, self.num_inputs = (*inputs, *outputs), len(inputs)
        self.lora_scale = lora_scale(lora) if lora else 0.0
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps [B, T, *inputs] to [B, T, *outputs]."""
        x = x.astype(self.dtype)
        kernel = self.kernel[...]
        bias = jnp.zeros(kernel.shape[self.num_inputs :], jnp.float32) if self.bias is None else self.bias[...]
        y = affine(x, kernel, bias, self.axes)
        if self.lora_in is None or self.lora_out is None:
            return y
        inner, outer = self.lora_in[...], self.lora_out[...]
        inner_axes, outer_axes = (*self.axes[: self.num_inputs], "rank"), ("rank", *self.axes[self.num_inputs :])
        low_BTR = affine(x, inner, jnp.zeros(inner.shape[-1:], jnp.float32), inner_axes)
        update = affine(low_BTR, outer, jnp.zeros(outer.shape[1:], jnp.float32), outer_axes)
        return y + update * jnp.asarray(self.lora_scale, y.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016), statistics in float32, epsilon inside the root."""

    def __init__(self, size: int, axis: str = "embed", bias: bool = True):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=(axis,)) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the shape and dtype of ``x``."""
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + NORM_EPSILON) * self.scale[...]
        return (normed if self.bias is None else normed + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last dimension (Zhang & Sennrich 2019), in float32, without a bias."""

    def __init__(self, size: int, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the shape and dtype of ``x``."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.square(x32).mean(-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + NORM_EPSILON) * self.scale[...]).astype(x.dtype)


def make_norm(config: ModelConfig, size: int, axis: str = "embed") -> LayerNorm | RMSNorm:
    """The normalisation that ``model.norm`` names, over a dimension of the given size and logical axis name."""
    return RMSNorm(size, axis) if config.norm == "rms_norm" else LayerNorm(size, axis, config.bias)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""GELU in its tanh form, as the authors computed it (Hendrycks & Gimpel 2016, section 2), float32 inside.

    .. math::
        \tfrac{1}{2} x (1 + \tanh u) = \frac{x}{1 + e^{-2u}}, \qquad u = \sqrt{2 / \pi} (x + 0.044715 x^3)

    The right-hand side, because a division is what XLA will not compute a second time where the backward pass reads
    the result again.
    """
    x32 = x.astype(jnp.float32)
    return (x32 / (1 + jnp.exp(-2 * _gelu_argument(x32)))).astype(x.dtype)


def _gelu_argument(x: Array) -> Array:
    return _GELU_SCALE * (x + 0.044715 * x**3)


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    gate = jax.nn.sigmoid(2 * _gelu_argument(x32))
    slope = 2 * _GELU_SCALE * (1 + 3 * 0.044715 * x32**2)
    return ((g32 * (gate + x32 * gate * (1 - gate) * slope)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Bends scores into (-cap, cap): cap tanh(x / cap) (Gemma Team 2024, "Gemma 2", section 2); None leaves them."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
