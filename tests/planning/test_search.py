"""The searches, with a compiler whose memory is a formula: what it answers is counted, and known by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.planning import search
from gpt1_jax.planning.compiled import Step
from gpt1_jax.planning.devices import Target

DEVICES = 4
MEMORY = 1000


class Compiler:
    """Stands for the real one: a device needs 200, split with ``fsdp``, and what ``rows`` makes of its rows."""

    def __init__(self, rows: Callable[[float], float]):
        self.rows = rows
        self.asked: list[str] = []

    def mesh(self, config: Config, target: Target) -> Mesh:
        fsdp = config.mesh.fsdp or 1
        if config.model.embed_dim % fsdp:
            raise UserError("not divided")
        devices = np.arange(DEVICES).reshape(1, DEVICES // fsdp, fsdp, 1, 1)
        return Mesh(devices, ("slices", "data", "fsdp", "sequence", "tensor"))

    def step(self, config: Config, target: Target) -> Step:
        rows = config.train.batch_size / config.train.accumulation / DEVICES
        temporaries = int(self.rows(rows) * (0.25 if config.model.remat == "full" else 1))
        arguments = 200 // (config.mesh.fsdp or 1) - 20 * config.mesh.shard_optimizer
        fits = arguments + temporaries <= MEMORY
        text = "HloModule m" if fits else None
        self.asked.append(f"{config.train.batch_size}")
        mesh = self.mesh(config, target)
        return Step(config, mesh, 1, arguments, temporaries, 0, arguments + temporaries, 0, text)


SMALLEST = ("model.remat=full", "train.accumulation=16")
TARGET = Target("v5e:2x2", "tpu", (), None, MEMORY)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Compiler, Step]]:
    def make(rows: Callable[[float], float], *overrides: str) -> tuple[Compiler, Step]:
        made = Compiler(rows)
        monkeypatch.setattr(search, "compile_step", made.step)
        monkeypatch.setattr(search, "mesh_of", made.mesh)
        step = made.step(parse_config("", "c", overrides), TARGET)
        made.asked.clear()
        return made, step

    return make


def silent(line: str) -> None:
    assert line.startswith("plan: do")


@pytest.mark.parametrize("batch", [4, 64, 400, 40_000])
def test_the_largest_batch_is_found_from_either_side(compiler, batch):
    made, step = compiler(lambda rows: 50 + 2 * rows, f"train.batch_size={batch}")
    found = search.largest_batch(step, TARGET, silent)
    assert found is not None and 0.97 * 1500 <= found <= 1500  # (1000 - 200 - 50) / 2 rows on each of 4 devices
    assert found % DEVICES == 0
    assert len(made.asked) <= 5


def test_the_largest_batch_is_a_multiple_of_what_the_devices_and_the_accumulation_divide(compiler):
    _, step = compiler(lambda rows: 100 * rows, "train.batch_size=80", "train.accumulation=5")
    assert search.largest_batch(step, TARGET, silent) == 4 * 5 * 8


def test_memory_in_steps_is_no_trap(compiler):
    made, step = compiler(lambda rows: 100 * (rows // 32), "train.batch_size=64")
    found = search.largest_batch(step, TARGET, silent)
    assert str(found) in made.asked
    assert found is not None and 200 + 100 * (found // DEVICES // 32) <= MEMORY


def test_where_nothing_fits_there_is_no_largest_batch(compiler):
    _, step = compiler(lambda rows: 900 + rows, "train.batch_size=64")
    assert search.largest_batch(step, TARGET, silent) is None


def test_where_memory_is_not_known_nothing_is_searched(compiler):
    made, step = compiler(lambda rows: rows)
    assert search.largest_batch(step, Target("cpu:4", "cpu", (), None, None), silent) is None
    assert not made.asked


@pytest.mark.parametrize(
    ("rows", "overrides", "change"),
    [
        (lambda rows: 815, [], ("mesh.shard_optimizer=true",)),
        (lambda rows: 100 * rows, [], ("train.accumulation=2",)),  # 16 rows: 800 of 800 with half of them
        (lambda rows: 200 * rows, [], ("train.accumulation=4",)),
        (lambda rows: 1000 + rows, [], ("model.remat=full",)),
        (lambda rows: 3000 + 200 * rows, [], ("mesh.shard_optimizer=true", *SMALLEST)),
        # Half of the rows were expected to do, and do not; then as few as there can be.
        (lambda rows: 700 + 50 * rows, ["model.remat=full"], ("mesh.shard_optimizer=true", "train.accumulation=16")),
        (
            lambda rows: 3500 + rows,
            ["train.batch_size=4", "mesh.shard_optimizer=true"],
            ("mesh.data=1", "mesh.fsdp=4", "model.remat=full"),
        ),
        (
            lambda rows: 900,
            ["model.remat=full", "train.batch_size=4", "mesh.shard_optimizer=true"],
            ("mesh.data=1", "mesh.fsdp=4"),
        ),
    ],
)
def test_the_change_that_costs_least_is_taken(compiler, rows, overrides, change):
    scale = 4 if "model.remat=full" in overrides else 1
    _, step = compiler(lambda r: scale * rows(r), *overrides)
    found = search.cheapest_change(step, TARGET, silent)
    assert found is not None
    assert found[0] == change
    assert found[1].fits(MEMORY)


def test_what_the_model_does_not_divide_over_is_passed_over(compiler):
    _, step = compiler(
        lambda rows: 900,
        "model.remat=full",
        "train.batch_size=4",
        "mesh.shard_optimizer=true",
        "model.embed_dim=6",
        "model.num_heads=1",
    )
    assert search.cheapest_change(step, TARGET, silent) is None
