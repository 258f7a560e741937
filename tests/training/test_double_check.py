"""Which device a step computed twice names, and when it is refused."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt1_jax.config import Config, MeshConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.training.double_check import UNEQUAL, DoubleCheck, Unequal, check_repeatable
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.state import TrainState

FLIPS = {None: 0, 2: 1, 3: 1 << 31, 7: 1 << 12}  # of a device, which bits of a parameter that it holds are flipped


def faulty_step(mesh, device, flip, where):
    """A step that changes nothing, but for the bits of an array on one device the second time that it is called."""
    calls = []

    def step(state, batch):
        calls.append(1)
        if len(calls) != 2 or device is None:
            return state, {"loss": jnp.float32(1)}
        array = state.params[where]
        parts = []
        for shard in array.addressable_shards:
            bits = np.array(shard.data).view(np.uint32).copy()
            if shard.device == mesh.devices.flat[device]:
                bits.flat[0] ^= flip
            parts.append(jax.device_put(bits.view(np.float32), shard.device))
        changed = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
        return TrainState(state.step, {**state.params, where: changed}, state.opt_state, state.key), {
            "loss": jnp.float32(1)
        }

    return step


def main() -> None:
    """On eight virtual devices: which of them are named, by the device that errs and the array that it is in."""
    mesh = make_mesh(MeshConfig(fsdp=2))
    whole, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    rng = np.random.default_rng(0)
    params = {
        "whole": jax.device_put(rng.normal(size=(3, 5)).astype(np.float32), whole),
        "spread": jax.device_put(rng.normal(size=(4, 6)).astype(np.float32), spread),
    }
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(*jax.device_put((jnp.int32(0), params, {}, key), (whole, params_layout(params), {}, whole)))
    found = {}
    for where in params:
        for device, flip in FLIPS.items():
            check = DoubleCheck(faulty_step(mesh, device, flip, where), 1, 0, state, mesh)
            found[f"{where} {device}"] = np.flatnonzero(check(state, None)[1][UNEQUAL]).tolist()
    print(json.dumps(found))


def params_layout(params):
    return {name: array.sharding for name, array in params.items()}


def test_the_device_that_errs_is_named():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE)
    expected = {
        f"{where} {device}": [] if device is None else [device] for where in ("whole", "spread") for device in FLIPS
    }
    assert json.loads(done.stdout) == expected


def test_hosts_are_named_with_their_devices():
    devices = [SimpleNamespace(id=n, process_index=n // 2, device_kind="TPU v5e", platform="tpu") for n in range(4)]
    mesh = SimpleNamespace(devices=np.array(devices).reshape(2, 2))
    one = Unequal(40, np.array([False, False, False, True])).blame(mesh, ["ann", "bob"])
    assert one.startswith("step 40, computed twice from the same weights and batch, has given two results; they differ")
    assert "on process 1 on bob: TPU v5e 3; take that host out" in one
    all_of_them = Unequal(40, np.array([True] * 4)).blame(mesh, ["ann", "bob"])
    assert "process 0 on ann: TPU v5e 0, 1; process 1 on bob: TPU v5e 2, 3; what one device computes" in all_of_them


def test_gpus_have_to_be_told_to_keep_to_one_order(monkeypatch):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    config = parse_config("", "c", ["train.double_check_every=5"])
    with pytest.raises(UserError, match=r"train\.double_check_every=5: .*--xla_gpu_deterministic_ops=true"):
        check_repeatable(config, mesh)
    check_repeatable(Config(), mesh)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true --xla_dump_to=x")
    check_repeatable(config, mesh)


if __name__ == "__main__":
    main()
