"""Which process of a job this one is: as the keys say, or as the machine it runs on says."""

import os
import re
import warnings
from dataclasses import dataclass, field

from gpt1_jax.config import DistributedConfig
from gpt1_jax.errors import UserError


@dataclass(frozen=True)
class Place:
    """One process among several.

    Attributes:
        coordinator: host:port at which the others find process 0.
        processes: how many.
        process: the number of this one.
        devices: numbers of the GPUs of this machine that are this process's; None: all devices are.
        names: of the hosts, by the number of their process, as far as they are known beforehand.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    names: dict[int, str] = field(default_factory=dict)


def find_place(config: DistributedConfig) -> Place | None:
    """The place of this process; None if it is the only one.

    Without keys it is looked for as JAX does: by the environment of Open MPI and SLURM, and on a TPU or in a Kubernetes
    job by their services. Nothing is asked over a network on other machines.

    Raises:
        UserError: if this is one of several processes, and it cannot be found out which.
    """
    if config.processes is not None:
        if config.processes == 1:
            return None
        assert config.coordinator is not None and config.process is not None  # validated
        return Place(config.coordinator, config.processes, config.process, names=_names(config.processes))
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return None  # a shell in an allocation, whose number of tasks is that of what it may start
    # JAX has no public way to this; jax.distributed.initialize calls it with these arguments.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            # Of the missing package `kubernetes`: in a job it is an error, and to no other pod does it matter.
            warnings.filterwarnings("error", "Kubernetes environment detected")
            given = os.environ.get("JAX_LOCAL_DEVICE_IDS")  # of which JAX reads only what nothing else has found
            own = [int(number) for number in given.split(",")] if given else None
            coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, own, None, int(config.timeout)
            )
    except Exception as error:  # of any type: those of an HTTP client, of Kubernetes, of parsing
        if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
            return None  # a pod of another kind, such as a notebook's
        raise UserError(f"it cannot be found out which hosts train together: {error}\n{_ADVICE}") from error
    if coordinator is None or processes is None or process is None or processes == 1:
        return None
    return Place(coordinator, processes, process, tuple(devices) if devices else None, _names(processes))


_ADVICE = (
    "set distributed.coordinator, distributed.processes and distributed.process, or distributed.processes=1 to train "
    "on this host alone"
)


def _names(processes: int) -> dict[int, str]:
    """Host names by process, where the environment lists one for each."""
    for names in (
        os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","),
        _expand(os.environ.get("SLURM_STEP_NODELIST", "")),
    ):
        if len(names) == processes:
            return dict(enumerate(names))
    return {}


def _expand(nodes: str) -> list[str]:
    """SLURM's list of nodes, such as ``gpu[001-003,7],login``, name by name."""
    names = []
    for prefix, ranges in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last) + 1) if last else [None]
            names += [f"{prefix}{first if number is None else f'{number:0{len(first)}}'}" for number in numbers]
    return names
