"""Plans: of a step written by hand, of every shipped configuration, and of the paper's model as CI keeps it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from gpt1_jax.config_file import load_config, parse_config
from gpt1_jax.plan_command import print_plan
from gpt1_jax.planning import plan as planning
from gpt1_jax.planning.compiled import Step, mesh_of
from gpt1_jax.planning.devices import Target
from gpt1_jax.planning.plan import Change, Plan, describe, make_plan
from gpt1_jax.planning.topologies import parse_slice
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import abstract_state

# What scripts rely on.
KEYS = (
    "topology chips parameters model_flops_per_token argument_bytes temporary_bytes peak_bytes hbm_bytes fits "
    "donated_bytes collectives step_seconds tokens_per_second mfu chip_hours largest_batch"
).split()

HLO = """HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }

%fused (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[1000000]{0} parameter(0)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"300000000"}
  %r = f32[1000000]{0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%fused
  ROOT %d = f32[8]{0} dynamic-slice(%r, %f), dynamic_slice_sizes={8}
}
"""
CONFIG = ["model.dtype=bfloat16", "train.steps=3600000", "train.batch_size=64", "optimizer.warmup_steps=10"]


def target(memory: int | None = 1000, slice_: str | None = "v5e:2x2") -> Target:
    kind = SimpleNamespace(device_kind="TPU v5 lite" if slice_ else "cpu")
    return Target(slice_ or "cpu:4", "tpu" if slice_ else "cpu", [kind] * 4, slice_ and parse_slice(slice_), memory)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    coordinates = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    monkeypatch.setattr(planning, "mesh_coordinates", lambda devices: coordinates)
    mesh = SimpleNamespace(shape={"data": 4, "fsdp": 1, "tensor": 1}, devices=None)
    return Step(parse_config("", "c", CONFIG), mesh, 2, 400, 300, 100, 800, 390, HLO)


def test_a_plan_by_hand(step: Step):
    found = describe(step, target())
    assert found.step_parts is not None
    assert found.step_parts.compute == pytest.approx(0.2)  # 300 million cycles at 1.5 GHz
    assert found.step_parts.waits == pytest.approx({"memory": 0, "links": 2 * 3 / 4 * 4e6 / 1e11, "slices": 0})
    seconds = 0.2 + 6e-5
    assert found.step_seconds == pytest.approx(seconds)
    tokens = 64 * 512
    # 12 layers of 4 x 768 x 768 + 2 x 768 x 3072 and the output of 40478 x 768, and 12 layers of scores of 512 tokens
    flops = 6 * (12 * (4 * 768 * 768 + 2 * 768 * 3072) + 40478 * 768) + 12 * 12 * 768 * 512
    assert found.model_flops_per_token == flops
    assert found.tokens_per_second == pytest.approx(tokens / seconds)
    assert found.mfu == pytest.approx(tokens * flops / seconds / (4 * 197e12))
    assert found.hours == pytest.approx(1000 * seconds)
    assert found.chip_hours == pytest.approx(4000 * seconds)
    assert (found.parameters, found.chips, found.fits, found.state_donated) == (116_534_784, 4, True, True)


def test_what_is_not_known_is_none_and_never_0(step: Step, capsys: pytest.CaptureFixture[str]):
    found = describe(step, target(None, None))
    assert found.collectives is not None and found.collectives[0].seconds is None
    times = ("step_seconds", "step_parts", "tokens_per_second", "mfu", "hours", "chip_hours")
    assert {getattr(found, name) for name in times} == {None}
    assert (found.fits, found.hbm_bytes) == (None, None)
    print_plan(found, searched=True)
    assert "time of a step: not known on cpu" in capsys.readouterr().out


def test_a_program_without_costs_has_no_time(step: Step):
    bare = Step(**{**vars(step), "text": HLO.replace("estimated_cycles", "other")})
    assert describe(bare, target()).step_seconds is None


def test_what_is_not_donated_is_seen(step: Step, capsys: pytest.CaptureFixture[str]):
    kept = describe(Step(**{**vars(step), "text": HLO.replace(", {1}: (1, {}, may-alias)", "")}), target())
    assert kept.state_donated is False
    print_plan(kept, searched=False)
    assert "NOT ALL OF THE STATE IS DONATED" in capsys.readouterr().out


def test_a_printed_plan_calls_estimates_estimates(step: Step, capsys: pytest.CaptureFixture[str]):
    print_plan(describe(step, target()), searched=True)
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 32
    for line in ("v5e:2x2: 4 chips (data 4)", "time of a step, an estimate", "it fits", "1 all-reduce", "MFU 0."):
        assert line in out
    assert "200.00 ms  by the TPU compiler's own estimates" in out
    assert "exchanges between chips in a step; times are estimates" in out


def test_what_the_program_does_not_show_is_named(step: Step, capsys: pytest.CaptureFixture[str]):
    loop = HLO.replace(
        "  ROOT %d", "  %t = (s32[]) parameter(1)\n  %w.1 = (s32[]) while(%t), condition=%c, body=%b\n  ROOT %d"
    )
    loop += "\n%c (p: (s32[])) -> pred[] {\n  %p = (s32[]) parameter(0)\n  ROOT %q = pred[] custom-call(%p)\n}\n"
    loop += "\n%b (r: (s32[])) -> (s32[]) {\n  ROOT %r.1 = (s32[]) parameter(0)\n}\n"
    for where in (target(), target(None, None)):
        found = describe(Step(**{**vars(step), "text": loop}), where)
        assert found.step_without == ("all but one trip of the loop w.1",)
        print_plan(found, searched=False)
        assert "neither here nor below: all but one trip of the loop w.1" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_what_to_change(step: Step, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    refused = Step(**{**vars(step), "text": None, "peak_bytes": 2000, "code_bytes": None, "donated_bytes": None})
    monkeypatch.setattr(planning, "resolve", lambda config, platform: (config, []))
    monkeypatch.setattr(planning, "compile_step", lambda config, target: refused)
    monkeypatch.setattr(planning, "cheapest_change", lambda *_: (("model.remat=full",), step))
    monkeypatch.setattr(planning, "largest_batch", lambda *_: 32)
    found = make_plan(refused.config, target(), True, lambda line: None)
    assert (found.fits, found.step_seconds, found.collectives, found.largest_batch) == (False, None, None, 32)
    assert found.change == Change(("model.remat=full",), 800, describe(step, target()).step_seconds)
    print_plan(found, searched=True)
    out = capsys.readouterr().out
    assert "IT DOES NOT FIT" in out and "it fits with model.remat=full" in out and "train.batch_size=32 fits" in out
    monkeypatch.setattr(planning, "cheapest_change", lambda *_: None)
    print_plan(make_plan(refused.config, target(), True, lambda line: None), searched=True)
    assert "nothing that was tried makes it fit" in capsys.readouterr().out


def test_every_shipped_configuration_divides_over_a_slice_and_its_state_fits(configs: list[Path], v5e: Target):
    assert len(configs) >= 5
    for path in configs:
        config, _ = resolve(load_config(path), "tpu")
        mesh = mesh_of(config, v5e)
        state = abstract_state(config, make_optimizer(config.optimizer, config.train.steps), mesh)
        assert v5e.memory_bytes is not None
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) < v5e.memory_bytes / 4


def test_the_slices_are_listed_without_a_configuration(gpt1):
    result = gpt1("plan", "--list")
    assert result.code == 0
    assert "v5p:4x4x4" in result.out and "v5p-128" in result.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v5e:4x5"], "v5e:4x4 = v5e-16"),
        (["--topology", "cpu:0"], "such as cpu:8"),
        (["--topology", "cpu:8", "--slices", "2"], "only TPUs come in slices"),
        (["--topology", "v5e-16", "model.layers=3"], "model.num_layers"),
        (["--topology", "v5e:1x1", "mesh.data=3"], "number of devices, 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(gpt1, arguments: list[str], says: str):
    pytest.importorskip("libtpu")
    result = gpt1("plan", "configs/tiny.yaml", *arguments)
    assert (result.code, result.out) == (2, "")
    assert says in result.err


def test_without_the_compiler_its_extra_is_named(gpt1, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = gpt1("plan", "configs/tiny.yaml", "--topology", "v5e-16")
    assert result.code == 2
    assert "pip install 'gpt1-jax[tpu]'" in result.err


def test_virtual_cpus(tmp_path: Path):
    tiny = [
        "model.num_layers=1",
        "model.context_length=32",
        "evaluation.sample_tokens=8",
        "model.embed_dim=32",
        "model.num_heads=2",
        "model.mlp_dim=32",
        "model.vocab_size=300",
    ]
    command = [sys.executable, "-m", "gpt1_jax", "plan", "configs/tiny.yaml", "--topology", "cpu:8", "--json", *tiny]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout)
    assert set(KEYS) <= set(found)
    assert (found["topology"], found["chips"], found["mesh"]["data"], found["state_donated"]) == ("cpu:8", 8, 8, True)
    assert (found["step_seconds"], found["fits"], found["largest_batch"]) == (None, None, None)
    gradients = [exchange["bytes"] for exchange in found["collectives"] if exchange["kind"] == "all-reduce"]
    assert sum(gradients) >= 4 * found["parameters"]


@pytest.mark.full_size
def test_the_papers_model_on_sixteen_chips(gpt1):
    """What is promised of the step: memory, donation of all of the state, no gathering in a data-parallel step."""
    pytest.importorskip("libtpu")
    result = gpt1("plan", "configs/gpt1.yaml", "--topology", "v5e:4x4", "--no-search", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert set(Plan.__dataclass_fields__) == set(found) >= set(KEYS)
    assert (found["chips"], found["parameters"], found["fits"]) == (16, 116_534_784, True)
    assert found["peak_bytes"] < 3.2e9
    # The parameters and two moments in float32, padded to the tiles of a TPU, and no more of it than is donated.
    assert 12 * found["parameters"] < found["argument_bytes"] < 12.03 * found["parameters"]
    assert found["state_donated"]
    assert found["donated_bytes"] >= 12 * found["parameters"]
    kinds = {exchange["kind"] for exchange in found["collectives"]}
    assert kinds == {"all-reduce"}
    assert found["step_without"] == []
    assert 0.05 < found["mfu"] < 1
    parts = found["step_parts"]
    total = parts["compute"] + parts["kernels"] + parts["uncosted"] + sum(parts["waits"].values())
    assert found["step_seconds"] == pytest.approx(total)
    assert found["chip_hours"] == pytest.approx(16 * 3_300_000 * total / 3600)
