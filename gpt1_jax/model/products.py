"""Matrix products in a compute dtype: float32 sums, forwards and backwards.

Left to itself, the gradient of a bfloat16 product with a float32 result is a product of float32 cotangents, at a
fraction of the speed. Here the cotangent is rounded to the compute dtype first, as every framework's mixed precision
does, and the sum stays in float32, so a weight's gradient is never rounded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two operands, in the dtype of ``x``, to which ``y`` is cast, with a float32 result."""
    return jnp.einsum(spec, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def affine(x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"], bias_O: Float[Array, " O"]) -> Array:
    """X W + b in the dtype of ``x``, summed in float32; the gradients of kernel and bias are float32 sums too.

    Shapes: B batch, T position, I inputs, O outputs.
    """
    return (product("BTI,IO->BTO", x_BTI, kernel_IO) + bias_O).astype(x_BTI.dtype)


def _affine_forward(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> tuple[Array, tuple[Array, Array]]:
    return affine(x_BTI, kernel_IO, bias_O), (x_BTI, kernel_IO.astype(x_BTI.dtype))


def _affine_backward(operands: tuple[Array, Array], g_BTO: Array) -> tuple[Array, Array, Array]:
    x_BTI, kernel_IO = operands
    dx_BTI = product("BTO,IO->BTI", g_BTO, kernel_IO).astype(x_BTI.dtype)
    return dx_BTI, sum_of_outer_products(x_BTI, g_BTO), g_BTO.sum((0, 1), dtype=jnp.float32)


affine.defvjp(_affine_forward, _affine_backward)


def sum_of_outer_products(x_BTI: Float[Array, "B T I"], y_BTO: Float[Array, "B T O"]) -> Float[Array, "I O"]:
    """The gradient of a kernel: the sum over batch and positions of x y', float32."""

    def plain(x_BTI: Array, y_BTO: Array) -> Array:
        return product("BTI,BTO->IO", x_BTI, y_BTO)

    def transposed(x_BTI: Array, y_BTO: Array) -> Array:
        # XLA's CPU backend has no fast product of a transposed operand: it widens bfloat16 to float32, at a fifth of
        # the speed, and transposes float32 badly. Moving B out of the way makes a transpose that it does not fold in.
        x_IM = x_BTI.transpose(2, 0, 1).reshape(x_BTI.shape[2], -1)
        return product("IM,MO->IO", x_IM, y_BTO.reshape(x_IM.shape[1], -1))

    return jax.lax.platform_dependent(x_BTI, y_BTO, cpu=transposed, default=plain)
