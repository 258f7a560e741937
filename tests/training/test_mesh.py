import jax
import pytest
from jax.sharding import Mesh, PartitionSpec

from gpt1_jax.config import MeshConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.training.mesh import check_mesh, make_mesh, sharding_of


def abstract_mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig())
    assert isinstance(mesh, Mesh)
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=2, data=2), MeshConfig(tensor=16)])
def test_sizes_that_do_not_use_every_device_are_refused(config):
    with pytest.raises(UserError, match=f"number of devices, {jax.device_count()}"):
        make_mesh(config)


def test_rules_by_hand():
    mesh = abstract_mesh(2, 2, 2)
    query = sharding_of(mesh, ("layers", "embed", "heads", "head_dim"))
    assert query.spec == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert sharding_of(mesh, ("batch",)).spec == PartitionSpec(("data", "fsdp"))


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
    ],
)
def test_what_the_mesh_does_not_divide_is_named(shape, overrides, named):
    with pytest.raises(UserError) as error:
        check_mesh(parse_config("", "c", overrides), abstract_mesh(*shape))
    assert named in str(error.value)


def test_a_mesh_that_divides_everything_passes():
    check_mesh(parse_config("", "c"), abstract_mesh(8, 2, 4))
