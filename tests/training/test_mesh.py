from dataclasses import dataclass

import jax
import pytest
from jax.sharding import Mesh, PartitionSpec

from gpt1_jax.config import MeshConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.model.sharding import also_split_over, sharding_of
from gpt1_jax.training.mesh import check_mesh, make_mesh

AXES = ("slices", "data", "fsdp", "sequence", "tensor")


def abstract_mesh(data: int, fsdp: int, tensor: int, sequence: int = 1, slices: int = 1) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((slices, data, fsdp, sequence, tensor), AXES)


@dataclass(frozen=True)
class FakeDevice:
    """What make_mesh reads of a device that knows its slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig())
    assert isinstance(mesh, Mesh)
    sizes = {"slices": 1, "data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(mesh.shape) == sizes


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=2, data=2), MeshConfig(tensor=16)])
def test_sizes_that_do_not_use_every_device_are_refused(config):
    with pytest.raises(UserError, match=f"number of devices, {jax.device_count()}"):
        make_mesh(config)


def test_slices_are_those_that_devices_tell_of():
    devices = [FakeDevice(i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(fsdp=2), devices)
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert [{device.slice_index for device in group.flat} for group in mesh.devices] == [{0}, {1}]


def test_hosts_of_gpus_are_slices_only_by_default():
    devices = [FakeDevice(i, slice_index=i // 4, platform="gpu") for i in range(8)]
    assert make_mesh(MeshConfig(), devices).shape["slices"] == 2
    assert make_mesh(MeshConfig(slices=1, fsdp=8), devices).shape["fsdp"] == 8


@pytest.mark.parametrize("slices", [1, 3])
def test_slices_of_tpus_are_what_they_are(slices):
    devices = [FakeDevice(i, slice_index=i % 2, platform="tpu") for i in range(8)]
    with pytest.raises(UserError, match=f"mesh.slices={slices}: the devices are of 2 slices"):
        make_mesh(MeshConfig(slices=slices), devices)


def test_devices_that_tell_nothing_are_sliced_in_their_order():
    devices = [FakeDevice(i, slice_index=0) for i in range(8)]
    mesh = make_mesh(MeshConfig(slices=4), devices)
    assert dict(mesh.shape) == {"slices": 4, "data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert [sorted(device.id for device in group.flat) for group in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"mesh\.slices=3 does not divide the number of devices, 8"):
        make_mesh(MeshConfig(slices=3), devices)
    with pytest.raises(UserError, match="number of devices in each of 4 slices, 2"):
        make_mesh(MeshConfig(slices=4, fsdp=3), devices)


def test_rules_by_hand():
    mesh = abstract_mesh(2, 2, 2)
    query = sharding_of(mesh, ("layers", "embed", "heads", "head_dim"))
    assert query.spec == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert sharding_of(mesh, ("batch",)).spec == PartitionSpec(("slices", "data", "fsdp"))


def test_a_vocabulary_that_the_mesh_does_not_divide_is_replicated():
    mesh = abstract_mesh(1, 1, 4)
    assert sharding_of(mesh, ("vocab", "embed"), (40478, 768)).spec == PartitionSpec(None, ("fsdp",))
    assert sharding_of(mesh, ("vocab", "embed"), (40480, 768)).spec == PartitionSpec(("tensor",), ("fsdp",))


@pytest.mark.parametrize(
    ("shape", "overrides", "named"),
    [
        ((8, 1, 1), ["train.batch_size=12"], "train.batch_size=12"),
        ((4, 1, 1), ["train.accumulation=32"], "train.accumulation=32"),
        ((1, 5, 1), ["train.batch_size=10"], "model.embed_dim=768"),
        ((1, 1, 8), [], "model.num_heads=12"),
        ((1, 1, 4), ["model.mlp_dim=3070"], "model.mlp_dim=3070"),
        ((1, 1, 1, 3), [], "model.context_length=512"),
        ((1, 1, 1, 3), ["train.context_length=511"], "train.context_length=511"),
        ((4, 1, 1, 1, 5), [], "mesh.slices=5 x mesh.data=4"),
        ((4, 1, 1), ["train.deterministic_groups=2"], "train.deterministic_groups=2 is not a multiple of 4"),
        ((2, 2, 1), ["train.deterministic_groups=8"], "mesh.fsdp=2 splits it"),
        ((2, 1, 1), ["train.deterministic_groups=8", "mesh.shard_optimizer=true"], "mesh.shard_optimizer=true"),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(shape, overrides, named):
    with pytest.raises(UserError) as error:
        check_mesh(parse_config("", "c", overrides), abstract_mesh(*shape))
    assert named in str(error.value)


def test_a_mesh_that_divides_everything_passes():
    check_mesh(parse_config("", "c"), abstract_mesh(4, 2, 4, sequence=2, slices=2))


def test_the_optimizers_state_is_split_along_the_largest_whole_dimension_that_divides():
    mesh = abstract_mesh(4, 2, 1)
    query = sharding_of(mesh, ("layers", "embed", "heads", "head_dim"), (12, 768, 12, 64))
    assert also_split_over(query, "data", (12, 768, 12, 64)).spec == PartitionSpec(None, ("fsdp",), ("tensor",), "data")
    scale = sharding_of(mesh, ("layers", "head_dim"), (12, 66))
    assert also_split_over(scale, "data", (12, 66)).spec == PartitionSpec("data", None)
    odd = sharding_of(mesh, ("position",), (511,))
    assert also_split_over(odd, "data", (511,)).spec == PartitionSpec(None)
