"""What of a checkpoint is damaged is found and named, and never used; the newest sound one is."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import DamagedError, StorageError, UserError
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.checkpoint_folder import CheckpointFolder
from gpt1_jax.training.checkpoint_manifest import MANIFEST, problems_in, read_manifest
from gpt1_jax.training.hosts import join
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.state import TrainState

FILES = RunFiles(config="a: 1\n", tokenizer=b"\0model", examples=8, data="e" * 16, corpus="f" * 16)
BLOCK = 4096


def state(step: int, width: int = 3000) -> TrainState:
    """Of a few kilobytes that hardly compress; its bits are those of its step."""
    draw = np.random.default_rng(step)
    weights, moments = (jnp.asarray(draw.normal(size=(2, width)), jnp.float32) for _ in range(2))
    return TrainState(jnp.int32(step), {"embedding": {"w": weights}}, {"m": moments}, jnp.arange(2, dtype=jnp.uint32))


def abstract(of: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), of)


def bits(of: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(of)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("written")
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        for step in (4, 8, 12):
            checkpoints.save(step, state(step), FILES)
        checkpoints.confirm(12)
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights_file(checkpoint: Path) -> Path:
    return max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def flip(path: Path, bit: int = 12345) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_manifest_says_what_is_there(written):
    folder = written / "checkpoints" / "12"
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.bytes) == (12, sum(file.bytes for file in manifest.files.values()))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        MANIFEST,
        *manifest.files,
    }
    assert {path: str(kind) for path, kind in manifest.arrays.items()} == {
        "params/embedding/w": "float32 [2, 3000]",
        "training/key": "uint32 [2]",
        "training/opt_state/m": "float32 [2, 3000]",
        "training/step": "int32 []",
    }
    assert manifest.config == manifest.files["run/config.yaml"].sha256
    assert manifest.tokenizer == manifest.files["run/tokenizer.model"].sha256
    assert names(written) == ["12", "4", "8"]


@pytest.fixture(scope="module")
def spoiled(written: Path) -> Iterator[Path]:
    """A checkpoint whose files are spoiled and put back, one after the other."""
    copy = written.parent / "spoiled"
    shutil.copytree(written / "checkpoints" / "12", copy)
    yield copy


def damages(draw: st.DrawFn, content: bytes) -> bytes | None:
    """The content with a bit flipped, an end or a block missing; None: deleted."""
    how = draw(st.sampled_from(["bit", "cut", "zeroed", "deleted"]))
    if how == "deleted":
        return None
    at = draw(st.integers(0, len(content) - 1))
    if how == "cut":
        return content[:at]
    changed = bytearray(content)
    if how == "bit":
        changed[at] ^= 1 << draw(st.integers(0, 7))
    else:
        begin = at - at % BLOCK
        changed[begin : begin + BLOCK] = bytes(len(changed[begin : begin + BLOCK]))
    return bytes(changed)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_any_file_is_found_and_named(spoiled: Path, data: st.DataObject):
    file = data.draw(st.sampled_from([MANIFEST, *sorted(read_manifest(spoiled).files)]))
    path = spoiled / file
    content = path.read_bytes()
    damaged = data.draw(st.composite(damages)(content), "damage")
    if damaged == content:  # a block that was zero
        return
    try:
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        assert [problem.file for problem in problems_in(spoiled, 12)] == [file]
    finally:
        path.write_bytes(content)
    assert problems_in(spoiled, 12) == []


def test_a_writer_moves_the_damaged_ones_aside_and_goes_on_from_the_sound_one(run, capsys):
    flip(weights_file(run / "checkpoints" / "12"))
    (run / "checkpoints" / "8" / MANIFEST).unlink()
    aside = run / "checkpoints" / "damaged-12"
    aside.mkdir()
    (aside / "evidence").write_text("of an earlier time")
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        assert checkpoints.newest_sound() == 4
        told = capsys.readouterr().err
        assert names(run) == ["4", "damaged-12", "damaged-12-2", "damaged-8"]
        assert bits(checkpoints.restore_state(4, abstract(state(4)))) == bits(state(4))
        checkpoints.save(8, state(8), FILES)
        checkpoints.confirm(8)
    file = weights_file(run / "checkpoints" / "damaged-12-2").relative_to(run / "checkpoints" / "damaged-12-2")
    assert f"{run}/checkpoints/12: the checkpoint is damaged:\n  {file} has SHA-256 " in told
    assert f"{run}/checkpoints/8: the checkpoint is damaged:\n  {MANIFEST} is missing" in told
    assert f"moved to {run}/checkpoints/damaged-12-2\n  the checkpoint of step 4 is taken" in told
    assert (aside / "evidence").read_text() == "of an earlier time"


def test_a_reader_names_the_damaged_one_and_moves_nothing(run, capsys):
    weights_file(run / "checkpoints" / "12").unlink()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.newest_sound() == 8
        assert "checkpoints/12: the checkpoint is damaged:" in capsys.readouterr().err
        with pytest.raises(DamagedError, match=r"checkpoints/12: the checkpoint is damaged:\n.* is missing\n"):
            checkpoints.check(12)
        with pytest.raises(DamagedError, match="checkpoints/12: the checkpoint is damaged"):
            checkpoints.restore_state(12, abstract(state(12)))
        with pytest.raises(UserError, match=r"no checkpoint of step 5; there are those of 4, 8, 12"):
            checkpoints.check(5)
    assert names(run) == ["12", "4", "8"]


@pytest.mark.parametrize("config", [None, CheckpointConfig()], ids=["reader", "writer"])
def test_where_none_is_sound_all_are_named_and_stay(run, config):
    for step in (4, 8, 12):
        flip(weights_file(run / "checkpoints" / str(step)))
    with Checkpoints(run, config) as checkpoints, pytest.raises(DamagedError) as error:
        checkpoints.newest_sound()
    assert all(f"checkpoints/{step}: the checkpoint is damaged" in str(error.value) for step in (4, 8, 12))
    assert names(run) == ["12", "4", "8"]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(run):
    shutil.move(run / "checkpoints" / "12", run / "checkpoints" / "16")
    assert problems_in(CheckpointFolder(run).checkpoint(16), 16) == [(MANIFEST, "is of step 12")]


def test_the_configuration_is_read_without_the_arrays_and_only_if_sound(run):
    flip(weights_file(run / "checkpoints" / "12"))
    with Checkpoints(run) as checkpoints:
        assert checkpoints.newest_files() == (12, FILES)
    flip(run / "checkpoints" / "12" / "run" / "config.yaml", 3)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.newest_files() == (8, FILES)
        with pytest.raises(DamagedError, match=r"run/config\.yaml has SHA-256"):
            checkpoints.read_files(12)


OTHERS: dict[str, tuple[Callable[[TrainState], TrainState], str]] = {
    "dtype": (
        lambda s: jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16) if x.dtype == jnp.float32 else x, s),
        r"params/embedding/w: float32 \[2, 3000\] there, bfloat16 \[2, 3000\] asked for",
    ),
    "shape": (
        lambda s: abstract(state(12, 2999)),
        r"opt_state/m: float32 \[2, 3000\] there, float32 \[2, 2999\] asked",
    ),
    "more": (
        lambda s: TrainState(s.step, s.params | {"b": s.key}, s.opt_state, s.key),
        r"params/b: not there, uint32 \[2\] asked for",
    ),
    "less": (
        lambda s: TrainState(s.step, s.params, {}, s.key),
        r"training/opt_state/m: float32 \[2, 3000\] there, not asked for",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_arrays_that_are_others_than_asked_for_are_refused(written, what):
    change, told = OTHERS[what]
    with Checkpoints(written) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_state(12, change(abstract(state(12))))


def test_what_a_killed_writer_leaves_is_never_listed_and_is_removed(run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "12", checkpoints / "deleting-2")
    shutil.copytree(checkpoints / "12", checkpoints / "saving-16")
    (checkpoints / "deleting-2" / MANIFEST).unlink()
    with Checkpoints(run) as reader:
        assert reader.newest_sound() == 12
    assert CheckpointFolder(run).steps() == [4, 8, 12]
    assert names(run) == ["12", "4", "8", "deleting-2", "saving-16"]
    with Checkpoints(run, CheckpointConfig()):
        assert names(run) == ["12", "4", "8"]


def test_a_checkpoint_loses_its_name_before_anything_in_it(run, monkeypatch):
    folder, seen = CheckpointFolder(run), []
    rmtree = type(folder.path).rmtree

    def watched(path, *arguments, **options):
        seen.append((path.name, folder.steps(), len(list(Path(path).rglob("*"))) > 5))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(type(folder.path), "rmtree", watched)
    folder.retire(keep=1, keep_every=8)
    assert seen == [("deleting-4", [8, 12], True)]
    assert names(run) == ["12", "8"]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_a_manifest(run, monkeypatch):
    """Also on a file system that flushes files alone."""
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if os.path.isdir(flushed[-1]):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        checkpoints.save(16, state(16), FILES)
        checkpoints.confirm(16)
    saving = run / "checkpoints" / "saving-16"
    (manifest,) = (path for path in flushed if MANIFEST in path)
    before = {Path(path) for path in flushed[: flushed.index(manifest)]}
    checkpoint = run / "checkpoints" / "16"
    assert before >= {saving / file for file in read_manifest(checkpoint).files}
    assert before >= {saving / path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_dir()} | {
        saving
    }


def test_a_disk_that_does_not_take_a_checkpoint_is_told_of(run, monkeypatch):
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(os, "fsync", failing)
        checkpoints.save(16, state(16), FILES)
        with pytest.raises(StorageError, match="Input/output error"):
            checkpoints.confirm(16)
        monkeypatch.undo()
        assert checkpoints.newest_sound() == 12


def test_a_save_that_fails_is_told_of_at_once(run):
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        (run / "checkpoints" / "16").write_text("in the way of the checkpoint's name")
        with pytest.raises(ValueError, match="already exists"):
            checkpoints.save(16, state(16), FILES)
        os.unlink(run / "checkpoints" / "16")
        checkpoints.save(16, state(16), FILES)
        (run / "checkpoints" / "16").mkdir()
        (run / "checkpoints" / "16" / "in the way").touch()
        failed = None
        while failed is None:  # it fails beside the training
            try:
                checkpoints.raise_failure()
            except OSError as error:
                failed = error
        shutil.rmtree(run / "checkpoints" / "16")
        assert checkpoints.latest() == 12


def test_a_last_checkpoint_that_is_not_what_was_written_is_told_of(run):
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        checkpoints.save(16, state(16), FILES)
        checkpoints.wait()
        flip(weights_file(run / "checkpoints" / "16"))
        with pytest.raises(DamagedError, match=r"16: the checkpoint is damaged:\n.*\nit was only just written"):
            checkpoints.confirm(16)


def test_two_hosts_write_one_checkpoint_and_agree_on_the_sound_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [[sys.executable, __file__, str(tmp_path), str(port), process] for process in "01"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    files = {path.name for path in (tmp_path / "run/checkpoints/4/params").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= files
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in "01"]
    assert found == [{"sound": 4, "same": True, "names": ["4", "damaged-8"]}] * 2


def on_a_host(folder: Path, port: str, process: str) -> None:
    keys = f"coordinator: '127.0.0.1:{port}', processes: 2, process: {process}"
    config = parse_config(f"distributed: {{{keys}}}", "test")
    with Interruption() as interruption, join(config, print, interruption) as hosts:
        mesh = jax.make_mesh((2,), ("data",))

        def put(array: np.ndarray, *axes: str | None) -> jax.Array:
            layout = jax.NamedSharding(mesh, jax.P(*axes))
            return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

        weights = np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
        whole = put(np.arange(2, dtype=np.uint32))
        made = TrainState(put(np.array(4, np.int32)), {"w": put(weights, "data")}, {}, whole)
        with Checkpoints(folder / "run", CheckpointConfig(), hosts) as checkpoints:
            for step in (4, 8):
                checkpoints.save(step, made, FILES)
            checkpoints.confirm(8)
            hosts.first(lambda: flip(weights_file(folder / "run/checkpoints/8")))
            sound = checkpoints.newest_sound()
            restored = checkpoints.restore_state(4, abstract(made)).params["w"].addressable_shards[0]
        same = np.array_equal(restored.data, weights[restored.index])
        result = {"sound": sound, "same": same, "names": names(folder / "run")}
        (folder / f"{process}.json").write_text(json.dumps(result))


def test_the_commands_list_and_verify(run, gpt1):
    (run / "config.yaml").write_text("")
    sound = gpt1("checkpoint", "verify", run)
    assert sound.code == 0, sound.err
    assert [line.rpartition(": ")[2] for line in sound.out.splitlines()] == ["sound"] * 3
    file = weights_file(run / "checkpoints" / "8")
    flip(file)
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "damaged-2")
    (run / "checkpoints" / "saving-16").mkdir()
    (run / "checkpoints" / "deleting-1").mkdir()
    damaged = gpt1("checkpoint", "verify", run, "--json")
    assert damaged.code == 3 and "damaged checkpoints: 8;" in damaged.err
    found = {each["step"]: each["problems"] for each in json.loads(damaged.out)["checkpoints"]}
    assert [problem["file"] for problem in found.pop(8)] == [str(file.relative_to(run / "checkpoints" / "8"))]
    assert found == {4: [], 12: []}
    assert gpt1("checkpoint", "verify", run, "--step", 12).code == 0
    assert gpt1("checkpoint", "verify", run, "--step", 5).code == 2
    listed = gpt1("checkpoint", "list", run, "--json")
    assert listed.code == 0, listed.err
    shown = json.loads(listed.out)["checkpoints"]
    assert [(each["name"], each["step"], each["state"]) for each in shown] == [
        ("damaged-2", 2, "damaged"),
        ("4", 4, "complete"),
        ("8", 8, "complete"),
        ("12", 12, "complete"),
        ("saving-16", 16, "incomplete"),
    ]
    assert shown[3]["bytes"] == read_manifest(CheckpointFolder(run).checkpoint(12)).bytes
    assert len(gpt1("checkpoint", "list", run).out.splitlines()) == 5
    assert gpt1("checkpoint", "list", run.parent).code == 2


if __name__ == "__main__":
    on_a_host(Path(sys.argv[1]), *sys.argv[2:])
