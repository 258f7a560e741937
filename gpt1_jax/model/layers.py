"""The layers that blocks are made of, with the paper's initialisation and logical axis names on every parameter.

Every parameter carries the metadata ``axes``: one logical name for each of its dimensions. training/mesh.py maps
them to the axes of the device mesh.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gpt1_jax.model.products import affine

INIT_STD = 0.02  # paper, 4.1: weights start from N(0, 0.02)
LAYER_NORM_EPSILON = 1e-5  # authors' code
_GELU_SCALE = math.sqrt(2 / math.pi)


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A float32 parameter drawn from N(0, 0.02^2)."""
    return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


class Linear(nnx.Module):
    """An affine map over the last ``len(inputs)`` dimensions.

    Args:
        inputs: sizes of the dimensions contracted over, by logical axis name.
        outputs: sizes of the dimensions that take their place, by logical axis name.
        dtype: dtype of the product.
        rngs: source of the kernel's random key.
    """

    def __init__(self, inputs: dict[str, int], outputs: dict[str, int], dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (*inputs.values(), *outputs.values()), (*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), jnp.float32), axes=tuple(outputs))
        self.num_inputs = len(inputs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps [B, T, *inputs] to [B, T, *outputs]."""
        # One plain matrix product: backends have fast code for two dimensions, and not always for more.
        kernel, bias = self.kernel[...], self.bias[...]
        in_size = math.prod(kernel.shape[: self.num_inputs])
        outer = x.shape[: x.ndim - self.num_inputs]
        y = affine(x.astype(self.dtype).reshape(*outer, in_size), kernel.reshape(in_size, -1), bias.reshape(-1))
        return y.reshape(*outer, *bias.shape)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension, statistics in float32, epsilon inside the root."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the shape and dtype of ``x``."""
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


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
