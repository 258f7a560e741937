"""What ``auto`` means on a platform: the fastest of the ways to compute the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from gpt1_jax.config import Config
from gpt1_jax.errors import UserError
from gpt1_jax.model.attention_kernels import cudnn_refuses, splash_refuses
from gpt1_jax.training.hardware import cpu_multiplies_bfloat16


@dataclass(frozen=True)
class Choice:
    """What a key that is ``auto`` stands for, and why.

    Attributes:
        key: dotted, as in a configuration.
        value: what it stands for.
        reason: why, and where another value would be faster, what stands in its way.
    """

    key: str
    value: str | int
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: auto is {self.value}, {self.reason}"


def resolve(config: Config, platform: str | None = None) -> tuple[Config, list[Choice]]:
    """The configuration with every ``auto`` replaced, and what was chosen.

    Args:
        config: of a run.
        platform: ``tpu``, ``gpu`` or ``cpu``; None: of the default device.

    Raises:
        UserError: if it asks for an attention kernel that cannot do what it says, or not on this platform.
    """
    platform = platform or jax.default_backend()
    choices = []
    for key, choose in _AUTO.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) == "auto":
            value, reason = choose(config, platform)
            choices.append(Choice(key, value, reason))
            changed: dict[str, Any] = {section: getattr(config, section).model_copy(update={name: value})}
            config = config.model_copy(update=changed)
    kernel = config.model.attention
    refused = _refusal(config, platform, kernel)
    if refused:
        raise UserError(f"model.attention={kernel}: {refused}; set model.attention=auto or xla")
    return config, choices


def _dtype(config: Config, platform: str) -> tuple[str, str]:
    if platform != "cpu":
        return "bfloat16", f"which a {platform.upper()} multiplies fastest"
    if cpu_multiplies_bfloat16():
        return "bfloat16", "for which this CPU has matrix units"
    return "float32", "since this CPU has no matrix units for bfloat16"


def _attention(config: Config, platform: str) -> tuple[str, str]:
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if kernel is None:
        return "xla", "which is fastest on a CPU"
    refused = _refusal(config, platform, kernel)
    if refused:
        return "xla", f"since {kernel} cannot do this: {refused}"
    return kernel, f"which is fastest on a {platform.upper()}"


def _loss_chunk(config: Config, platform: str) -> tuple[int, str]:
    if platform == "cpu":
        return 128, "whose logits a CPU's caches hold in part"
    return 512, "so that the sum of the table's gradient is seldom read and written"


def _gradient_dtype(config: Config, platform: str) -> tuple[str, str]:
    if platform == "cpu":
        return "float32", "which a CPU adds up as fast"
    if config.model.dtype == "bfloat16":
        return "bfloat16", "half as much to send over slices and data as float32"
    return "float32", f"as model.dtype={config.model.dtype}"


# In this order: a later choice depends on the values of earlier ones.
_AUTO: dict[str, Callable[[Config, str], tuple[str | int, str]]] = {
    "model.dtype": _dtype,
    "model.attention": _attention,
    "model.loss_chunk": _loss_chunk,
    "train.gradient_dtype": _gradient_dtype,
}


def _refusal(config: Config, platform: str, kernel: str) -> str | None:
    """Why a form of attention cannot be taken; None if it can."""
    model = config.model
    refused = None
    match kernel:
        case "xla":
            return None
        case "splash":
            refused = "it runs on TPUs" if platform != "tpu" else splash_refuses(config.context_length)
        case "cudnn":
            refused = "it runs on NVIDIA GPUs" if platform != "gpu" else cudnn_refuses(model.head_dim, model.dtype)
    if refused:
        return refused
    if model.attention_dropout:
        dropped = f"model.attention_dropout={model.attention_dropout}"
        return f"it cannot drop attention probabilities ({dropped}; 0 allows it, and is another model)"
    if model.objective != "causal":
        return f"model.objective={model.objective} is not causal"
    if config.mesh.sequence != 1:
        return f"mesh.sequence={config.mesh.sequence} splits the queries of a sequence"
    return None
