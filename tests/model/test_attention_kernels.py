"""Kernels of attention against the plain form: splash interpreted, cuDNN's call as XLA computes it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from gpt1_jax.model.attention_kernels import (
    cudnn_attention,
    cudnn_refuses,
    splash_attention,
    splash_refuses,
)
from gpt1_jax.model.causal_attention import causal_attention
from gpt1_jax.model.segments import document_starts

KERNELS = {
    "splash": partial(splash_attention, interpret=True),
    "cudnn": partial(cudnn_attention, implementation="xla"),
}
BFLOAT16 = 2.0**-8  # its relative rounding


def with_gradients(attend: Callable, dtype: str, length: int, packed: bool) -> list[np.ndarray]:
    """The attended values and the gradients of queries, keys and values."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, cotangent = (jax.random.normal(key, (2, 3, length, 64)).astype(dtype) for key in keys[:4])
    starts = document_starts(jax.random.randint(keys[4], (2, length), 0, 40), 0) if packed else None

    @jax.jit
    def both(*operands: jax.Array) -> tuple[jax.Array, ...]:
        value, pull = jax.vjp(lambda q, k, v: attend(q, k, v, None, 0.0, starts), *operands)
        return value, *pull(cotangent)

    results = both(q, k, v)
    assert all(result.dtype == dtype for result in results)
    return [np.asarray(result, np.float32) for result in results]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "length"), [("splash", 128), ("splash", 640), ("cudnn", 128), ("cudnn", 100)])
def test_a_kernel_equals_the_plain_form(name, length, packed):
    found = with_gradients(KERNELS[name], "float32", length, packed)
    expected = with_gradients(causal_attention, "float32", length, packed)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_in_bfloat16_is_within_its_rounding_of_float32(name):
    found = with_gradients(KERNELS[name], "bfloat16", 128, packed=False)
    expected = with_gradients(causal_attention, "float32", 128, packed=False)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= BFLOAT16 * max(8, 4 * np.abs(b).max())


def lowered(kernel: Callable, platform: str) -> str:
    """The gradient of a kernel as the platform's compiler is given it."""
    x = jax.ShapeDtypeStruct((2, 4, 256, 64), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda q, k, v: kernel(q, k, v, None, 0.0).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    return step.trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_is_given_two_kernels():
    assert lowered(splash_attention, "tpu").count("tpu_custom_call") == 2  # forwards; all gradients at once


def test_a_gpu_is_given_cudnns(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)  # there is none here
    text = lowered(cudnn_attention, "cuda")
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.parametrize("kernel", [splash_attention, cudnn_attention])
def test_a_kernel_is_never_asked_to_drop(kernel):
    x = jnp.ones((1, 1, 128, 64))
    with pytest.raises(AssertionError, match="no dropout"):
        kernel(x, x, x, jnp.zeros(3, jnp.uint32), 0.1)


def test_what_a_kernel_cannot_take_is_said():
    assert splash_refuses(512) is None
    assert "500" in str(splash_refuses(500))
    assert cudnn_refuses(64, "bfloat16") is None
    assert "float32" in str(cudnn_refuses(64, "float32"))
    assert "12 wide" in str(cudnn_refuses(12, "bfloat16"))
    assert "136 wide" in str(cudnn_refuses(136, "bfloat16"))
