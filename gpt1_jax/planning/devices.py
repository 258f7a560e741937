"""The devices that a plan is made for: those of a TPU slice that is not there, virtual CPUs, or this machine's GPUs."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from gpt1_jax.errors import UserError
from gpt1_jax.planning.topologies import Slice, parse_slice

# What libtpu would ask the machine that it is on, if it were a TPU's, and complain of not finding.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process, such as a training, may have it
}


@dataclass(frozen=True)
class Target:
    """What a step is compiled for.

    Attributes:
        name: of the topology.
        platform: ``tpu``, ``cpu`` or ``gpu``.
        devices: to compile for; those of a TPU slice can do nothing else.
        slice: the TPU slice, or None.
        memory_bytes: of a device; None: not known, or shared with all else on the machine.
    """

    name: str
    platform: str
    devices: Sequence[jax.Device]
    slice: Slice | None
    memory_bytes: int | None


def open_target(name: str, slices: int = 1) -> Target:
    """The devices of ``v5e:4x4`` and the like, ``cpu:8``, or ``gpu``; to be called before JAX looks for devices.

    Args:
        name: as the user gives it.
        slices: how many TPU slices of this name train together.

    Raises:
        UserError: if there is no such topology, or its compiler is not installed.
    """
    cpus = re.fullmatch(r"cpu(?::(\d+))?", name)
    if (cpus or name == "gpu") and slices != 1:
        raise UserError(f"--slices {slices}: only TPUs come in slices; leave it out for --topology {name}")
    if cpus:
        return _cpus(name, int(cpus[1] or 1))
    if name == "gpu":
        return _gpus()
    slice_ = parse_slice(name, slices)
    # On a TPU's own host this process must leave the TPUs alone.
    jax.config.update("jax_platforms", "cpu")
    return Target(slice_.name, "tpu", _tpus(slice_), slice_, slice_.chip.hbm_bytes)


def _tpus(slice_: Slice) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {slice_.name}: the compiler for TPUs is not installed; on Linux, x86: "
            "pip install 'gpt1-jax[tpu]'"
        )
    os.environ.update(_LIBTPU)
    several = {"num_slices": slice_.count} if slice_.count > 1 else {}
    options = {**slice_.chip.options, **several}
    return topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options).devices


def _cpus(name: str, count: int) -> Target:
    if not count:
        raise UserError(f"--topology {name}: give the number of virtual devices, such as cpu:8")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return Target(f"cpu:{count}", "cpu", jax.devices("cpu"), None, None)


def _gpus() -> Target:
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        raise UserError(
            f"--topology gpu: JAX finds no GPU here ({str(error).splitlines()[0]}); the compiler for GPUs tries its "
            "kernels out, so run this on the machine that has the GPU, after pip install 'gpt1-jax[cuda]'"
        ) from None
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return Target(f"gpu:{len(devices)}", "gpu", devices, None, memory)
