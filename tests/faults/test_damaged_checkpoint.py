"""Whatever becomes of a file of a checkpoint: it is named and moved aside, and the checkpoint before it is taken."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import DamagedError
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import TrainState, abstract_state
from tests.faults.conftest import Row
from tests.faults.damage import Damage, flip, spoil
from tests.running import RUN, Running, check_same

NEWEST, BEFORE, OLD = 60, 56, 40  # steps of the uninterrupted run's checkpoints
FLIPS, LEAST = 500, 5  # of all files, and of each
BLOCK = 4096


def cut(share: float) -> Damage:
    """Leaves a share of the file, less than all of it."""
    return lambda content: content[: int(share * len(content))]


def zero(share: float) -> Damage:
    """Zeroes the block that lies so far in the file."""

    def zeroed(content: bytes) -> bytes:
        begin = int(share * len(content)) // BLOCK * BLOCK
        block = content[begin : begin + BLOCK]
        return content[:begin] + bytes(len(block)) + content[begin + len(block) :]

    return zeroed


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder, and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Run:
    """A copy of the uninterrupted run, whose newest checkpoint is damaged and put back, again and again.

    Attributes:
        newest: the folder of that checkpoint.
        sizes: of its files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.newest = folder / "checkpoints" / str(NEWEST)
        self._files = tree(self.newest)
        self.sizes = {name: len(content) for name, content in self._files.items()}
        with Checkpoints(folder) as checkpoints:
            config = parse_config(checkpoints.read_files(NEWEST).config, "checkpoint")
            optimizer = make_optimizer(config.optimizer, config.train.steps)
            self._layout = abstract_state(config, optimizer, make_mesh(config.mesh))
            self._states = {step: self._bits(checkpoints, step) for step in (BEFORE, NEWEST)}
        assert self._states[BEFORE] != self._states[NEWEST]

    def _bits(self, checkpoints: Checkpoints, step: int) -> list[bytes]:
        state: TrainState = checkpoints.restore_state(step, self._layout)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    def attempt(self, file: str, damage: Damage, said: Callable[[], str]) -> bool:
        """Damages a file and opens the run as training does; False if there was nothing to damage."""
        if not spoil(self.newest / file, damage):
            return False
        left = tree(self.newest)
        with Checkpoints(self._folder, CheckpointConfig()) as checkpoints:
            assert checkpoints.newest_sound() == BEFORE, f"{file}: the damage is not seen"
            assert self._bits(checkpoints, BEFORE) == self._states[BEFORE]
        aside = self.newest.with_name(f"damaged-{NEWEST}")
        err = said()
        assert f"{self.newest}: the checkpoint is damaged:\n  {file} " in err
        assert f"moved to {aside}\n  the checkpoint of step {BEFORE} is taken" in err
        assert tree(aside) == left
        aside.rename(self.newest)
        (self.newest / file).write_bytes(self._files[file])
        return True

    def check_sound(self) -> None:
        """Checks that the newest checkpoint is taken as long as nothing has happened to it."""
        with Checkpoints(self._folder, CheckpointConfig()) as checkpoints:
            assert checkpoints.newest_sound() == NEWEST
            assert self._bits(checkpoints, NEWEST) == self._states[NEWEST]


@pytest.fixture
def run(uninterrupted: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(Path(shutil.copytree(uninterrupted / RUN, tmp_path / "run")))
    yield run
    run.check_sound()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was printed on standard error since it was last asked for."""
    return lambda: capsys.readouterr().err


@pytest.mark.fault("damaged checkpoint")
@pytest.mark.parametrize("seed", range(2))
def test_flipped_bits(seed, run: Run, said, row: Row):
    """Anywhere in a checkpoint, so mostly in the arrays, and some in each file."""
    draw = random.Random(seed)
    names = [name for name, size in run.sizes.items() if size]
    chosen = names * LEAST
    chosen += draw.choices(names, [run.sizes[name] for name in names], k=FLIPS // 2 - len(chosen))
    for name in chosen:
        assert run.attempt(name, flip(draw.randrange(8 * run.sizes[name])), said)
        row.tried()


@pytest.mark.fault("damaged checkpoint")
def test_every_file_truncated_deleted_and_zeroed(run: Run, said, row: Row):
    draw = random.Random(0)
    for name, size in run.sizes.items():
        ways: list[Damage] = [cut(draw.random()), zero(draw.random()), lambda content: None]
        tried = sum(run.attempt(name, damage, said) for damage in ways)
        assert tried == (3 if size else 1)
        row.tried(tried)


def weights_of(checkpoint: Path) -> Path:
    """The largest file of its weights."""
    return max((path for path in (checkpoint / "params").rglob("*") if path.is_file()), key=os.path.getsize)


@pytest.mark.fault("damaged checkpoint")
def test_where_none_is_sound_none_is_touched(uninterrupted, tmp_path, said, row: Row):
    checkpoints = Path(shutil.copytree(uninterrupted / RUN / "checkpoints", tmp_path / "checkpoints"))
    for folder in checkpoints.iterdir():
        spoil(weights_of(folder), flip(77))
    before = tree(checkpoints)
    with Checkpoints(tmp_path, CheckpointConfig()) as opened, pytest.raises(DamagedError) as refused:
        opened.newest_sound()
    for folder in checkpoints.iterdir():
        assert f"{folder}: the checkpoint is damaged:\n  {weights_of(folder).relative_to(folder)} has SHA" in str(
            refused.value
        )
    assert tree(checkpoints) == before
    row.tried()


@pytest.mark.fault("damaged checkpoint")
@pytest.mark.parametrize(
    ("file", "damage", "steps", "taken"),
    [
        ("manifest.json", flip(4000), [NEWEST], BEFORE),
        ("run/position.json", lambda content: None, [NEWEST], BEFORE),
        ("params", cut(0.5), [NEWEST, BEFORE], OLD),
    ],
)
def test_train_goes_on_from_the_one_before(file, damage, steps, taken, uninterrupted, make_folder, row: Row):
    folder: Path = make_folder("damaged")
    shutil.copytree(uninterrupted / "runs", folder / "runs")
    left = {}
    for step in steps:
        checkpoint = folder / RUN / "checkpoints" / str(step)
        assert spoil(weights_of(checkpoint) if file == "params" else checkpoint / file, damage)
        left[step] = tree(checkpoint)
    ((code, _, err),) = Running(folder).finish()
    assert code == 0, err
    for step, files in left.items():
        assert f"checkpoints/{step}: the checkpoint is damaged:\n  {file}" in err
        assert tree(folder / RUN / "checkpoints" / f"damaged-{step}") == files
    assert f"steps {taken} to {NEWEST}" in err
    check_same(folder, uninterrupted)
    row.tried(len(steps))


@pytest.mark.fault("damaged checkpoint")
def test_what_reads_a_run_takes_the_one_before_and_changes_nothing(uninterrupted, tmp_path, gpt1, row: Row):
    run = Path(shutil.copytree(uninterrupted / RUN, tmp_path / "run"))
    newest = run / "checkpoints" / str(NEWEST)
    commands = [("evaluate", run, "--json"), ("generate", run, "The cat", "--tokens", 8)]
    sound = [gpt1(*command).out for command in commands]
    newest.rename(tmp_path / "away")
    expected = [gpt1(*command) for command in commands]
    (tmp_path / "away").rename(newest)
    assert all(each.code == 0 and each.out for each in expected) and expected[0].out != sound[0]
    file = weights_of(newest)
    spoil(file, flip(77))
    before = tree(run)
    named = f"{newest}: the checkpoint is damaged:\n  {file.relative_to(newest)} has SHA-256"
    for command, each in zip(commands, expected, strict=True):
        found = gpt1(*command)
        assert (found.code, found.out) == (0, each.out), found.err
        assert named in found.err and f"the checkpoint of step {BEFORE} is taken" in found.err
        row.tried()
    verified = gpt1("checkpoint", "verify", run, "--json")
    assert verified.code == DamagedError.exit_code
    problems = {each["step"]: each["problems"] for each in json.loads(verified.out)["checkpoints"]}
    assert [each["file"] for each in problems.pop(NEWEST)] == [str(file.relative_to(newest))]
    assert problems and not any(problems.values())
    row.tried()
    assert tree(run) == before
