"""What the devices are: their peak rate, and how a CPU's memory is kept."""

import ctypes
import sys
from pathlib import Path

import jax

from gpt1_jax.config import Config

# Dense bfloat16 FLOP/s of one device as JAX counts devices, from the vendors' data sheets, by the name JAX reports.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has matrix units for bfloat16; vector instructions for it are no faster than float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False


def keep_freed_memory() -> None:
    """Makes the C library keep the memory that XLA frees after a step on a CPU, for the next step to use again.

    XLA allocates a step's temporaries, gigabytes, and frees them when it ends. By default glibc gives them back to
    the system, which hands them out again page by page, zeroed: a tenth of a step on bare metal, more in a virtual
    machine. To be called before other threads start, in a process that trains. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # parameters of mallopt, from malloc.h
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # that is, no threshold


def peak_flops(config: Config) -> float | None:
    """Peak FLOP/s of one device: ``logging.peak_flops``, else from the table, else None (MFU is then not known)."""
    return config.logging.peak_flops or PEAK_FLOPS.get(jax.devices()[0].device_kind)
