"""A disk that is full or read-only: what is there stays sound, and the same command goes on when it can."""

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from gpt1_jax.errors import StorageError
from gpt1_jax.training.checkpoint import Checkpoints
from tests.faults.conftest import Row
from tests.running import RUN, Ended, Running, check_same, is_logged, last_step, records

STEPS, EVERY = 60, 20  # of the runs here until their disk is full
LEFT = 100_000  # bytes that a full disk still has: enough for the metrics, too few for a checkpoint
SIZE = 16_000_000  # bytes of a small disk

# Steps that take long enough to tell the one after a failed save from the next save; those behind the second the more.
SLOW = f"""
import itertools, time
from gpt1_jax.cli import main
from gpt1_jax.data.loader import Batches

calls = itertools.count()

def slow(batches, following=Batches.__next__):
    time.sleep(0.1 if next(calls) < {2 * EVERY} else 0.5)
    return following(batches)

Batches.__next__ = slow
main()
"""
# The command without the right of root to write where the mode says that nobody may.
HEEDING_MODES = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)
os.execv(sys.executable, [sys.executable, "-m", "gpt1_jax", *sys.argv[1:]])
"""


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[None]:
    """A small file system in memory at a folder that is made; the test is skipped where none can be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("there is no command to mount a file system with; the other way of this test needs none")
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed ({done.stderr.strip()}); the other way of this test needs no right")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


class Disk(Protocol):
    """A disk that can be filled.

    Attributes:
        folder: to run in; what is written there goes to the disk.
    """

    folder: Path

    def fill(self, running: Running, left: int) -> None:
        """Leaves so many bytes, also to what is running."""

    def empty(self) -> None:
        """Makes room again."""


class SmallDisk:
    """A small file system for the runs."""

    def __init__(self, folder: Path):
        self.folder, self._filler = folder, folder / "runs" / "filler"

    def fill(self, running: Running | None, left: int) -> None:
        self.empty()
        self._filler.write_bytes(bytes(shutil.disk_usage(self.folder / "runs").free - left))

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)


class LimitedFiles:
    """The system allows the process no longer files, and answers it as a full disk would."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self, running: Running, left: int) -> None:
        for job in running.jobs:
            resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (left, left))

    def empty(self) -> None:
        """The limit has ended with the process."""


@pytest.fixture(params=[SmallDisk, LimitedFiles])
def disk(request: pytest.FixtureRequest, make_folder: Callable[..., Path]) -> Iterator[Disk]:
    folder = make_folder("disk")
    with mounted(folder / "runs") if request.param is SmallDisk else contextlib.nullcontext():
        yield request.param(folder)


def is_complete(folder: Path, step: int) -> Callable[[], bool]:
    """The moment at which a checkpoint is there."""
    return (folder / RUN / "checkpoints" / str(step) / "manifest.json").exists


def sound(folder: Path) -> list[int]:
    """Steps of the checkpoints, all of which are sound."""
    with Checkpoints(folder / RUN) as checkpoints:
        assert not any(map(checkpoints.problems, checkpoints.steps()))
        return checkpoints.steps()


def check_full(ended: Ended, folder: Path) -> None:
    """Checks how a run has ended of which a checkpoint found no room."""
    assert (ended.code, ended.out) == (StorageError.exit_code, ""), ended.err
    said = re.search(
        rf"gpt1: \S*{RUN}/checkpoints: a checkpoint cannot be written; it needs at least ([\d,]+) bytes, "
        r"and [\d,]+ are free: .*; make room",
        ended.err,
    )
    assert said, ended.err
    assert 300_000 < int(said[1].replace(",", "")) < 500_000  # 12 bytes for each of 28,000 parameters


def check_goes_on(folder: Path, uninterrupted: Path) -> None:
    """Checks that the same command ends as if nothing had happened, and leaves nothing half written."""
    (ended,) = Running(folder).finish()
    assert ended.code == 0, ended.err
    check_same(folder, uninterrupted)
    assert all(path.name.isdecimal() for path in (folder / RUN / "checkpoints").iterdir())
    assert not list((folder / RUN).rglob("*.tmp"))


@pytest.mark.fault("full disk, read-only output")
def test_full_while_saving(disk: Disk, uninterrupted, row: Row):
    """First while training goes on beside the save, then in the last save, which is waited for."""
    folder, every = disk.folder, f"checkpoint.every={EVERY}"
    running = Running(folder, every, program=("-c", SLOW)).wait(is_complete(folder, EVERY))
    disk.fill(running, LEFT)
    (ended,) = running.finish()
    check_full(ended, folder)
    assert 2 * EVERY <= last_step(folder) < STEPS - 1  # it has not come as far as the next save
    assert sound(folder) == [EVERY]
    row.tried()
    disk.empty()
    running = Running(folder, every, program=("-c", SLOW)).wait(is_complete(folder, 2 * EVERY))
    disk.fill(running, LEFT)
    (ended,) = running.finish()
    check_full(ended, folder)
    assert last_step(folder) == STEPS
    assert sound(folder) == [EVERY, 2 * EVERY]
    row.tried()
    disk.empty()
    check_goes_on(folder, uninterrupted)


@pytest.mark.fault("full disk, read-only output")
def test_not_a_byte_left(disk: Disk, uninterrupted, row: Row):
    """What is full is first met by the metrics."""
    folder = disk.folder
    running = Running(folder, f"checkpoint.every={EVERY}", program=("-c", SLOW)).wait(is_logged(folder, EVERY + 1))
    running.wait(is_complete(folder, EVERY))
    disk.fill(running, 0)
    (ended,) = running.finish()
    assert (ended.code, ended.out) == (StorageError.exit_code, ""), ended.err
    assert re.search(rf"gpt1: \S*{RUN}/\S+: .*; make room", ended.err), ended.err
    assert sound(folder) == [EVERY]
    row.tried()
    disk.empty()
    check_goes_on(folder, uninterrupted)


@pytest.mark.fault("full disk, read-only output")
def test_too_little_room_is_found_before_the_first_step(make_folder, row: Row):
    folder: Path = make_folder("room")
    with mounted(folder / "runs"):
        disk = SmallDisk(folder)
        disk.fill(None, 1_000_000)
        (ended,) = Running(folder).finish()
        assert (ended.code, ended.out) == (StorageError.exit_code, ""), ended.err
        said = re.search(rf"{RUN}: ([\d,]+) bytes are free there, and ([\d,]+) are needed: 6 more", ended.err)
        assert said, ended.err
        free, needed = (int(figure.replace(",", "")) for figure in said.groups())
        assert free < 1_000_000 < 6 * 300_000 < needed
        assert not sound(folder) and not records(folder)
        row.tried()


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder, and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def read_only_mount(path: Path) -> Iterator[Callable[[str], None]]:
    """A small file system at a path; what sets it to ``ro`` or ``rw``."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)

    with mounted(path):
        yield remount


@contextlib.contextmanager
def read_only_modes(path: Path) -> Iterator[Callable[[str], None]]:
    """A folder; what sets the modes of all in it."""

    def set_modes(how: str) -> None:
        for each in (path, *path.rglob("*")):
            each.chmod(each.stat().st_mode & ~0o222 if how == "ro" else each.stat().st_mode | 0o200)

    path.mkdir()
    yield set_modes


@pytest.mark.fault("full disk, read-only output")
@pytest.mark.parametrize("output", [read_only_mount, read_only_modes])
def test_read_only(output, uninterrupted, make_folder, row: Row):
    folder: Path = make_folder("readonly")
    with output(folder / "runs") as make:
        shutil.copytree(uninterrupted / RUN, folder / RUN)
        shutil.rmtree(folder / RUN / "checkpoints" / str(STEPS))
        before = tree(folder / RUN)
        make("ro")
        (ended,) = Running(folder, program=("-c", HEEDING_MODES)).finish()
        assert (ended.code, ended.out) == (StorageError.exit_code, ""), ended.err
        assert re.search(rf"gpt1: \S*{RUN}/\S+: .*(Read-only|Permission)", ended.err), ended.err
        assert "parameters" not in ended.err  # not a step was prepared
        make("rw")
        assert tree(folder / RUN) == before
        row.tried()
        check_goes_on(folder, uninterrupted)
