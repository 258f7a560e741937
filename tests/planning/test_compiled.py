"""Small programs compiled for TPUs that are not there, their arithmetic, memory and exchanges known by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.planning import compiled
from gpt1_jax.planning.compiled import Step, compile_step, lacking_temporaries
from gpt1_jax.planning.devices import Target, open_target
from gpt1_jax.planning.hlo import parse_program
from gpt1_jax.planning.network import mesh_coordinates
from gpt1_jax.planning.schedule import Device, step_cost
from gpt1_jax.training.hardware import PEAK_FLOPS

N = 2048


def compile_for(target: Target, function: Callable[..., Any], *inputs: tuple[tuple[int, ...], Any, PartitionSpec]):
    mesh = Mesh(np.array(target.devices).reshape(2, 2), ("x", "y"))
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in inputs]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(spec for *_, spec in inputs), out_specs=PartitionSpec())
    program = parse_program(jax.jit(mapped).lower(*arguments).compile().as_text())
    assert target.slice
    return step_cost(program, Device(4, target.slice, mesh_coordinates(mesh.devices), PEAK_FLOPS["TPU v5 lite"]))


def test_the_products_of_a_loop_take_no_less_than_at_peak_and_not_much_more(v5e: Target):
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jax.lax.scan(lambda y, _: (x @ y, None), x, length=50)[0], ("x", "y"))

    found = compile_for(v5e, products, ((N, N), jnp.bfloat16, PartitionSpec()))
    at_peak = 50 * 2 * N**3 / PEAK_FLOPS["TPU v5 lite"]
    assert at_peak < found.compute < 2 * at_peak
    assert not found.unknown
    # The sum of N x N numbers of 16 or 32 bits over four chips with two links of 50 GB/s each.
    (exchange,) = found.collectives
    assert (exchange.kind, exchange.network, exchange.in_loop, exchange.count) == ("all-reduce", "links", False, 1)
    assert exchange.bytes in (2 * N * N, 4 * N * N)
    assert exchange.seconds == pytest.approx(2 * 3 / 4 * exchange.bytes / 1e11)


def test_exchanges_in_a_loop_are_counted_as_often_as_it_runs(v5e: Target):
    def gathers(x: jax.Array) -> jax.Array:
        def step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.psum(y * 0.5 + x, "x"), None

        return jax.lax.psum(jax.lax.scan(step, x, length=7)[0], ("x", "y"))

    found = compile_for(v5e, gathers, ((N, 512), jnp.float32, PartitionSpec()))
    inside = [exchange for exchange in found.collectives if exchange.in_loop]
    assert [(exchange.kind, exchange.count, exchange.bytes) for exchange in inside] == [
        ("all-reduce", 7, 7 * 4 * N * 512)
    ]
    assert inside[0].seconds == pytest.approx(2 * 1 / 2 * inside[0].bytes / 5e10)  # two chips, one link between them


def test_slices_are_compiled_for_together():
    pytest.importorskip("libtpu")
    target = open_target("v5e:1x1", 4)
    assert len({device.slice_index for device in target.devices}) == 4
    found = compile_for(target, lambda x: jax.lax.psum(x, ("x", "y")), ((N, 512), jnp.float32, PartitionSpec()))
    assert [(e.kind, e.network, e.count, e.bytes) for e in found.collectives] == [
        ("all-reduce", "slices", 1, 4 * N * 512)
    ]
    assert found.waits["slices"] == pytest.approx(2 * 3 / 4 * 4 * N * 512 / 3.125e9, rel=0.01)


@pytest.mark.parametrize("name", ["v4-8", "v5p:2x2x1", "v6e-4"])
def test_chips_are_devices(name: str):
    pytest.importorskip("libtpu")
    assert len(open_target(name).devices) == 4


TINY = [
    "model.vocab_size=256",
    "model.context_length=128",
    "model.num_layers=1",
    "model.embed_dim=128",
    "model.num_heads=1",
    "model.mlp_dim=128",
    "model.scan_layers=true",
    "train.batch_size=8",
    "evaluation.sample_tokens=8",
    "model.dtype=bfloat16",
    "model.attention=xla",
]


def test_a_program_that_does_not_fit_is_an_answer(v5e: Target, monkeypatch: pytest.MonkeyPatch):
    def too_large(config: Any, optimizer: Any, mesh: Mesh, separator: int) -> Any:
        whole = NamedSharding(mesh, PartitionSpec())
        x = jax.ShapeDtypeStruct((2**16, 2**10), jnp.float32, sharding=whole)
        return jax.jit(lambda x: jnp.sort(x @ x.T, axis=0)[0]).lower(x).compile()

    monkeypatch.setattr(compiled, "compile_train_step", too_large)
    step = compile_step(parse_config("", "c", TINY), v5e)
    assert step.text is None
    assert step.fits(v5e.memory_bytes) is False
    assert 16 * 2**30 <= step.temporary_bytes < 48 * 2**30  # 2^16 x 2^16 numbers of 4 bytes, and their sorting
    # 128 x (256 + 128) + 6 x 128 x 128 weights and some vectors, three of each, and 2 rows of 129 tokens of 4 bytes
    weights = 128 * (256 + 128) + 6 * 128 * 128
    assert 12 * weights < step.argument_bytes < 12 * (weights + 20 * 128) + 2 * 129 * 4 + 100
    assert step.peak_bytes == step.argument_bytes + step.temporary_bytes


def test_other_failures_of_the_compiler_are_failures(v5e: Target, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")

    monkeypatch.setattr(compiled, "compile_train_step", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_step(parse_config("", "c", TINY), v5e)


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("total memory required for HLO temporaries (29.50G) exceeds available HBM (15.75G)", 29.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm. Exceeded hbm capacity by", 16 * 2**30),
        ("Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_compiler_says_is_lacking(message: str, temporaries: float | None):
    assert lacking_temporaries(message, 2**30) == temporaries


def test_a_mesh_that_the_slice_does_not_make_up_is_refused(v5e: Target):
    with pytest.raises(UserError, match="number of devices, 4"):
        compile_step(parse_config("", "c", [*TINY, "mesh.data=3"]), v5e)
    with pytest.raises(UserError, match=r"train\.batch_size=6"):
        compile_step(parse_config("", "c", [*TINY, "train.batch_size=6"]), v5e)


def test_fitting_needs_the_whole_peak():
    config = parse_config("", "c")
    step = Step(config, None, 1, 40, 50, 10, 100, 40, "HloModule m")
    assert [step.fits(memory) for memory in (99, 100, None)] == [False, True, None]
