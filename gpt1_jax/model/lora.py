"""Low-rank updates beside frozen matrices (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt1_jax.config import LoraConfig, ModelConfig


def lora_of(config: ModelConfig, name: str) -> LoraConfig | None:
    """The low-rank update of the matrices of that name, if they have one."""
    return config.lora if config.lora and name in config.lora.targets else None


def lora_scale(config: LoraConfig) -> float:
    """What the product of an update's two matrices is multiplied by."""
    return config.alpha / config.rank


def merged(config: ModelConfig, params: Any) -> Any:
    """The parameters of the same model without updates: W + (alpha / rank) A B in the place of W, float32."""
    lora = config.lora
    if lora is None or not isinstance(params, dict):
        return params
    if "lora_in" not in params:
        return {name: merged(config, inner) for name, inner in params.items()}
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(params["lora_in"], params["lora_out"])  # layer by layer
    rest = {name: leaf for name, leaf in params.items() if name not in ("lora_in", "lora_out")}
    return {**rest, "kernel": params["kernel"] + lora_scale(lora) * product}
