"""Causal attention by kernels that others wrote and tuned for one kind of device, each with its own gradient.

They take what :func:`gpt1_jax.model.causal_attention.causal_attention` takes and equal it to rounding. Neither can
drop attention probabilities: training/choices.py takes them only where none are dropped.

Shapes: B batch, N heads, T position, S key position, H head size.
"""

import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Float, Int, UInt32

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.segments import same_document
from gpt1_jax.model.sharding import on_each_device

_LANES = 128  # the splash kernel's blocks of queries and keys are multiples of it
_LARGEST_BLOCK = 512
_CUDNN_LENGTHS = 64  # what it takes without padding of its own
# Each device runs a kernel on its own rows and heads: the compiler does not know how to split one.
_HEADS_AXES = ("batch", "heads", None, None)
_OPERAND_AXES = (_HEADS_AXES, _HEADS_AXES, _HEADS_AXES, ("batch", None))  # queries, keys, values, starts


def splash_attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BNTH: Float[Array, "B N T H"],
    v_BNTH: Float[Array, "B N T H"],
    seed: UInt32[Array, "3"] | None,
    dropout_rate: float,
    starts_BT: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """JAX's splash attention for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

    Args:
        q_BNTH: queries; T is a multiple of 128.
        k_BNTH: keys.
        v_BNTH: values.
        seed: of the other forms' dropout.
        dropout_rate: 0, or there is no seed.
        starts_BT: where the document of each position begins; None: all see all.
        interpret: run the kernel on any device, step by step, for tests.

    Returns:
        The attended values in the dtype of the queries; scores, softmax and sums are float32.
    """
    assert seed is None or dropout_rate == 0, "the kernel has no dropout"

    def attend(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, starts_BT: Array | None) -> Array:
        segments = None if starts_BT is None else splash.SegmentIds(starts_BT, starts_BT)
        scaled_BNTH = q_BNTH * jnp.asarray(1 / math.sqrt(q_BNTH.shape[-1]), q_BNTH.dtype)
        _, heads, length, _ = q_BNTH.shape
        kernel = _splash_kernel(heads, length, interpret)
        return cast(Array, jax.vmap(kernel)(scaled_BNTH, k_BNTH, v_BNTH, segments))

    return on_each_device(attend, (q_BNTH, k_BNTH, v_BNTH, starts_BT), _OPERAND_AXES, _HEADS_AXES)


def _splash_kernel(heads: int, length: int, interpret: bool) -> splash.SplashAttentionKernel:
    block = next(size for size in range(_LARGEST_BLOCK, 0, -_LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # one pass over the scores for the gradients of queries, keys and values
    )
    causal = splash_attention_mask.CausalMask((length, length))
    mask = splash_attention_mask.MultiHeadMask([causal] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def cudnn_attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BNTH: Float[Array, "B N T H"],
    v_BNTH: Float[Array, "B N T H"],
    seed: UInt32[Array, "3"] | None,
    dropout_rate: float,
    starts_BT: Int[Array, "B T"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B N T H"]:
    """CuDNN's flash attention for NVIDIA GPUs (jax.nn.dot_product_attention).

    Args:
        q_BNTH: queries, bfloat16; H is at most 128 and a multiple of 8.
        k_BNTH: keys.
        v_BNTH: values.
        seed: of the other forms' dropout.
        dropout_rate: 0, or there is no seed.
        starts_BT: where the document of each position begins; None: all see all.
        implementation: ``xla`` runs the same call on any device, for tests.

    Returns:
        The attended values in the dtype of the queries; scores, softmax and sums are float32.
    """
    assert seed is None or dropout_rate == 0, "the kernel has no dropout"

    def attend(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, starts_BT: Array | None) -> Array:
        q_BTNH, k_BTNH, v_BTNH = (x.swapaxes(1, 2) for x in (q_BNTH, k_BNTH, v_BNTH))
        mask_B1TS = None if starts_BT is None else same_document(starts_BT)[:, None]
        o_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BTNH, v_BTNH, mask=mask_B1TS, is_causal=True, implementation=implementation
        )
        return o_BTNH.swapaxes(1, 2)

    return on_each_device(attend, (q_BNTH, k_BNTH, v_BNTH, starts_BT), _OPERAND_AXES, _HEADS_AXES)


def splash_refuses(length: int) -> str | None:
    """Why the splash kernel cannot take sequences of a length; None if it can."""
    return f"the context of {length} tokens is not a multiple of {_LANES}" if length % _LANES else None


def at_length(config: ModelConfig, length: int) -> ModelConfig:
    """A model whose kernel of attention was chosen for its context, for sequences of another length."""
    splash_cannot = config.attention == "splash" and splash_refuses(length)
    cudnn_cannot = config.attention == "cudnn" and length % _CUDNN_LENGTHS
    return config.model_copy(update={"attention": "xla"}) if splash_cannot or cudnn_cannot else config


def cudnn_refuses(head_dim: int, dtype: str) -> str | None:
    """Why cuDNN's kernel cannot take heads of a width in a compute dtype; None if it can."""
    if dtype != "bfloat16":
        return f"model.dtype is {dtype}, not bfloat16"
    return f"heads are {head_dim} wide, not a multiple of 8 up to 128" if head_dim % 8 or head_dim > 128 else None
