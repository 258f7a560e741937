"""On what, and with what, a benchmark was run."""

import datetime
import importlib.metadata
import platform
from typing import Any


def gpu() -> str | None:
    """The name of the GPU as torch and JAX give it; None where torch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def described() -> dict[str, Any]:
    """What makes figures comparable: the device, the day, and the versions of what was measured."""
    names = "jax", "jaxlib", "jax-cuda13-plugin", "torch", "transformers", "triton", "nvidia-cudnn-cu13"
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return {
        "device": gpu() or platform.processor() or platform.machine(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed[name] for name in names if name in installed},
    }
