"""Matrix products in a compute dtype: float32 sums, forwards and backwards.

Left to itself, the gradient of a bfloat16 product with a float32 result is a product of float32 cotangents, at a
fraction of the speed. Here the cotangent is rounded to the compute dtype first, as every framework's mixed precision
does, and the sum stays in float32, so no product rounds a weight's gradient.

Shapes: B batch, T position, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpt1_jax.model.sharding import gathered


def product(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two operands, in the dtype of ``x``, to which ``y`` is cast, with a float32 result."""
    return jnp.einsum(spec, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "B T *I"], kernel: Float[Array, "..."], bias: Float[Array, "*O"], axes: tuple[str, ...]
) -> Float[Array, "B T *O"]:
    """X W + b in the dtype of ``x``, summed in float32; the gradients of kernel and bias are float32 sums too.

    Args:
        x: inputs, of one dimension or two behind batch and position.
        kernel: [*I, *O].
        bias: of the outputs, of one dimension or two.
        axes: logical axes of the kernel. Where ``fsdp`` splits it, it is gathered for each use and never kept.
    """
    kernel = gathered(kernel.astype(x.dtype), axes)

    def joined(x: Array, kernel: Array) -> Array:
        x_BTI = _join(x)
        return product("BTI,IO->BTO", x_BTI, kernel.reshape(x_BTI.shape[2], -1)).reshape(*x.shape[:2], *bias.shape)

    def direct(x: Array, kernel: Array) -> Array:
        inputs, outputs = _letters(x.ndim - 2, bias.ndim)
        return product(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, kernel)

    return (_by_platform(joined, direct, x, kernel) + bias).astype(x.dtype)


def _affine_forward(x: Array, kernel: Array, bias: Array, axes: tuple[str, ...]) -> tuple[Array, tuple[Array, Array]]:
    return affine(x, kernel, bias, axes), (x, kernel)


def _affine_backward(axes: tuple[str, ...], operands: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel = operands
    kernel = gathered(kernel.astype(x.dtype), axes)

    def joined(g: Array, kernel: Array) -> Array:
        g_BTO = _join(g)
        return product("BTO,IO->BTI", g_BTO, kernel.reshape(-1, g_BTO.shape[2])).reshape(x.shape)

    def direct(g: Array, kernel: Array) -> Array:
        inputs, outputs = _letters(x.ndim - 2, g.ndim - 2)
        return product(f"BT{outputs},{inputs}{outputs}->BT{inputs}", g, kernel)

    dx = _by_platform(joined, direct, g, kernel).astype(x.dtype)
    return dx, sum_of_outer_products(x, g), _sum_of_rows(g)


affine.defvjp(_affine_forward, _affine_backward)


def sum_of_outer_products(x: Float[Array, "B T *I"], y: Float[Array, "B T *O"]) -> Float[Array, "..."]:
    """The gradient of a kernel: the sum over batch and positions of x y', float32."""

    def joined(x: Array, y: Array) -> Array:
        # The backend has no fast product of a transposed operand: it widens bfloat16 to float32, at a fifth of the
        # speed, and transposes float32 badly. Moving B out of the way makes a transpose that it does not fold in.
        x_BTI = _join(x)
        x_IM = x_BTI.transpose(2, 0, 1).reshape(x_BTI.shape[2], -1)
        y_MO = _join(y).reshape(x_IM.shape[1], -1)
        return product("IM,MO->IO", x_IM, y_MO).reshape(*x.shape[2:], *y.shape[2:])

    def direct(x: Array, y: Array) -> Array:
        inputs, outputs = _letters(x.ndim - 2, y.ndim - 2)
        return product(f"BT{inputs},BT{outputs}->{inputs}{outputs}", x, y)

    return _by_platform(joined, direct, x, y)


def _sum_of_rows(g: Array) -> Array:
    """The gradient of a bias: the sum over batch and positions, float32."""

    def plain(g: Array) -> Array:
        return g.sum((0, 1), dtype=jnp.float32)

    def product_with_ones(g: Array) -> Array:
        # A kernel's output, heads apart, is read once more for this sum, and half of every vector register is empty
        # where heads are narrow. The matrix units are five times as fast at it; a single row they would not be given.
        ones_RBT = jax.lax.optimization_barrier(jnp.ones((8, *g.shape[:2]), g.dtype))
        return product("RBT,BTOP->ROP", ones_RBT, g)[0]

    return plain(g) if g.ndim == 3 else jax.lax.platform_dependent(g, tpu=product_with_ones, default=plain)


def _by_platform(joined: Callable[..., Array], direct: Callable[..., Array], *operands: Array) -> Array:
    """XLA's CPU backend has fast products of two dimensions alone. Others write heads apart where they are so read."""
    return jax.lax.platform_dependent(*operands, cpu=joined, default=direct)


def _join(x: Array) -> Array:
    """[B, T, ...] as [B, T, size]."""
    return x.reshape(*x.shape[:2], -1)


def _letters(inputs: int, outputs: int) -> tuple[str, str]:
    """Einsum letters of the dimensions of an affine map's inputs and outputs."""
    return "IJ"[:inputs], "OP"[:outputs]
