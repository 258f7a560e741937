"""What ``auto`` means on a platform: the fastest of the ways to compute the same."""

from dataclasses import dataclass
from typing import Any

import jax

from gpt1_jax.config import Config, Section
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
    if config.model.dtype == "auto":
        choices.append(_dtype(platform))
        config = _with(config, choices[-1])
    refusals = _refusals(config, platform)
    asked = config.model.attention
    if asked == "auto":
        choices.append(_attention(platform, refusals))
        config = _with(config, choices[-1])
    elif asked in refusals:
        raise UserError(f"model.attention={asked}: {refusals[asked]}; set model.attention=auto or xla")
    if config.model.loss_chunk == "auto":
        choices.append(_loss_chunk(platform))
        config = _with(config, choices[-1])
    if config.train.gradient_dtype == "auto":
        choices.append(_gradient_dtype(config, platform))
        config = _with(config, choices[-1])
    return config, choices


def _dtype(platform: str) -> Choice:
    if platform != "cpu":
        return Choice("model.dtype", "bfloat16", f"which a {platform.upper()} multiplies fastest")
    if cpu_multiplies_bfloat16():
        return Choice("model.dtype", "bfloat16", "for which this CPU has matrix units")
    return Choice("model.dtype", "float32", "since this CPU has no matrix units for bfloat16")


def _gradient_dtype(config: Config, platform: str) -> Choice:
    if platform != "cpu" and config.model.dtype == "bfloat16":
        return Choice("train.gradient_dtype", "bfloat16", "half as much to send over slices and data as float32")
    reason = "which a CPU adds up as fast" if platform == "cpu" else f"as model.dtype={config.model.dtype}"
    return Choice("train.gradient_dtype", "float32", reason)


def _loss_chunk(platform: str) -> Choice:
    if platform == "cpu":
        return Choice("model.loss_chunk", 128, "whose logits a CPU's caches hold in part")
    return Choice("model.loss_chunk", 512, "so that the sum of the table's gradient is seldom read and written")


_KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # the fastest of each platform


def _attention(platform: str, refusals: dict[str, str]) -> Choice:
    kernel = _KERNELS.get(platform)
    if kernel is None:
        return Choice("model.attention", "xla", "which is fastest on a CPU")
    if kernel in refusals:
        return Choice("model.attention", "xla", f"since {kernel} cannot do this: {refusals[kernel]}")
    return Choice("model.attention", kernel, f"which is fastest on a {platform.upper()}")


def _refusals(config: Config, platform: str) -> dict[str, str]:
    """Why each kernel that cannot be taken cannot."""
    model = config.model
    found = {
        "splash": "it runs on TPUs" if platform != "tpu" else splash_refuses(config.context_length),
        "cudnn": "it runs on NVIDIA GPUs" if platform != "gpu" else cudnn_refuses(model.head_dim, model.dtype),
    }
    for kernel, reason in found.items():
        if model.attention_dropout:
            dropped = f"model.attention_dropout={model.attention_dropout}"
            reason = reason or f"it cannot drop attention probabilities ({dropped}; 0 allows it, and is another model)"
        elif model.objective != "causal":
            reason = reason or f"model.objective={model.objective} is not causal"
        elif config.mesh.sequence != 1:
            reason = reason or f"mesh.sequence={config.mesh.sequence} splits the queries of a sequence"
        found[kernel] = reason
    return {kernel: reason for kernel, reason in found.items() if reason}


def _with(config: Config, choice: Choice) -> Config:
    section, key = choice.key.split(".")
    part: Section = getattr(config, section)
    changed: dict[str, Any] = {section: part.model_copy(update={key: choice.value})}
    return config.model_copy(update=changed)
