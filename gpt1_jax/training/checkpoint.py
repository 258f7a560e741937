"""The checkpoints of a run: which there are, whether they are sound, and what they hold.

A checkpoint is the folder ``checkpoints/STEP`` with a manifest, which is written last: it is complete or absent
(:mod:`gpt1_jax.training.checkpoint_folder`), and whatever has changed in it since is found before anything of it is
used (:mod:`gpt1_jax.training.checkpoint_manifest`). It holds all that a run needs to go on, and all that a reader of
the model needs:

    params/         the weights
    training/       the optimizer's state, the step, the random key
    run/            config.yaml, tokenizer.model, position.json (examples read, and fingerprints: of what they were
                    read from, and of the corpus of the pre-training; how the last steps went), of a model of
                    conversations chat_template.jinja
    manifest.json   size and SHA-256 of every file, shape and dtype of every array

The checkpoint of an imported model has no training/, and both fingerprints are null.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import jax
from etils import epath

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.data.integrity import Problem
from gpt1_jax.data.storage import AnyPath, is_remote, storage_fault
from gpt1_jax.errors import DamagedError, StorageError, UserError
from gpt1_jax.model.transformer import Params
from gpt1_jax.training.checkpoint_folder import CheckpointFolder
from gpt1_jax.training.checkpoint_manifest import differences, problems_in, read_manifest
from gpt1_jax.training.checkpoint_orbax import RunFiles, Saver, Trees, kinds_of, restore_files, restore_trees
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.state import TrainState

_T = TypeVar("_T")
_SHOWN = 5  # of the things that are wrong, so many are named in a message


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left.

    Attributes:
        directory: of all of them.

    Args:
        run_dir: the run's folder, local or in a bucket.
        config: which checkpoints to keep; None to read only, which changes nothing there.
        hosts: the processes that open them together; each calls what the others call.
    """

    def __init__(self, run_dir: AnyPath, config: CheckpointConfig | None = None, hosts: Hosts | None = None):
        self._folder, self._hosts = CheckpointFolder(run_dir), hosts or Hosts()
        self.directory = self._folder.path
        self._checked: set[int] = set()
        self._bytes = 0  # of the arrays that were last saved
        self._saver: Saver | None = None
        if config is not None:
            self._hosts.first(self._folder.prepare)
            self._saver = Saver(self._folder, partial(self._folder.retire, config.keep, config.keep_every))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._saver:
            with self._writing():
                self._saver.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, sound or not, or None."""
        return max(self._folder.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, sound or not, the newest last; the same in all processes."""
        return self._hosts.first(self._folder.steps)

    def path(self, step: int) -> epath.Path:
        """Folder of a checkpoint."""
        return self._folder.checkpoint(step)

    # ---- soundness

    def problems(self, step: int) -> list[Problem]:
        """What of a checkpoint is not as it was written; every file is read, each host its share of them.

        Raises:
            StorageError: if a file cannot be read.
        """
        share = slice(self._hosts.process, None, self._hosts.processes)
        found = self._hosts.gather(problems_in(self.path(step), step, share=share))
        problems = sorted({Problem(*problem) for of_host in found for problem in of_host})
        if not problems:
            self._checked.add(step)
        return problems

    def newest_sound(self) -> int | None:
        """The step of the newest checkpoint that is as it was written; None if there is none at all.

        Newer ones are named on standard error. Who writes moves them aside, too, so that the run can go on.

        Raises:
            DamagedError: if there are checkpoints, and none of them is sound.
            StorageError: if a file cannot be read.
        """
        damaged: dict[int, str] = {}
        while steps := [step for step in self.steps() if step not in damaged]:
            step = steps[-1]
            problems = self.problems(step)
            if not problems:
                self._pass_over(damaged, step)
                return step
            if step in self.steps():  # else its run has deleted it meanwhile
                damaged[step] = self._told(step, problems)
        if damaged:
            raise DamagedError(
                "\n".join(damaged.values()) + f"\n{self.directory}: no checkpoint is sound; put a copy of one back, or "
                "move them all away to begin again"
            )
        return None

    def check(self, step: int) -> None:
        """Checks a checkpoint that no other can stand in for.

        Raises:
            UserError: if there is none of that step.
            DamagedError: if it is not as it was written.
            StorageError: if a file cannot be read.
        """
        steps = self.steps()
        if step not in steps:
            there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none at all"
            raise UserError(f"{self.directory}: there is no checkpoint of step {step}; {there}")
        if problems := self.problems(step):
            raise DamagedError(f"{self._told(step, problems)}\nchoose another step, or put a copy of it back")

    def _pass_over(self, damaged: Mapping[int, str], sound: int) -> None:
        for step, told in damaged.items():
            moved = ""
            if self._saver:
                moved = f"\n  moved to {self._hosts.first(lambda step=step: str(self._folder.set_aside(step)))}"
            if self._hosts.process == 0:
                print(f"{told}{moved}\n  the checkpoint of step {sound} is taken", file=sys.stderr, flush=True)

    def _told(self, step: int, problems: Sequence[Problem]) -> str:
        return f"{self.path(step)}: the checkpoint is damaged:" + _lines(f"{file} {what}" for file, what in problems)

    # ---- writing

    def save(self, step: int, state: TrainState, files: RunFiles) -> None:
        """Starts a save: returns once the state is copied and may be donated, and writes beside the training.

        Raises:
            StorageError: if this one or the one before cannot be written, with the bytes that it needs.
        """
        self._start(step, {"params": state.params, "training": _without_params(state)}, files)

    def save_imported(self, params: Params, files: RunFiles) -> None:
        """Starts to save weights that were trained elsewhere, as step 0; raises as :meth:`save`."""
        assert files.data is None
        self._start(0, {"params": params}, files)

    def _start(self, step: int, trees: Trees, files: RunFiles) -> None:
        assert self._saver
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with self._writing():
            self._saver.start(step, trees, files)

    def remove(self, step: int) -> None:
        """Removes a checkpoint, which is none from the first moment on; no save may be under way."""
        assert self._saver
        self._hosts.first(lambda: self._folder.delete(step))
        self._checked.discard(step)

    def raise_failure(self) -> None:
        """Raises what went wrong with a save that has ended, as :meth:`save`; it does not wait for one that has not."""
        assert self._saver
        with self._writing():
            self._saver.check_for_errors()

    def wait(self) -> None:
        """Returns when every save has reached the disk; raises what went wrong with one, as :meth:`save`."""
        assert self._saver
        with self._writing():
            self._saver.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says of a full disk what a checkpoint needs."""
        try:
            yield
        except Exception as error:  # of any type: TensorStore's is a ValueError
            fault = storage_fault(error)
            if not isinstance(fault, StorageError):
                raise
            free = "" if is_remote(self.directory) else f", and {shutil.disk_usage(self.directory).free:,} are free"
            raise StorageError(
                f"{self.directory}: a checkpoint cannot be written; it needs at least {self._bytes:,} bytes{free}: "
                f"{fault}"
            ) from error

    def confirm(self, step: int) -> None:
        """Waits for a save, and reads it back.

        Raises:
            DamagedError: if it is not what was written.
            StorageError: if it cannot be written or read.
        """
        self.wait()
        if problems := self.problems(step):
            raise DamagedError(f"{self._told(step, problems)}\nit was only just written: the storage is not reliable")

    # ---- reading

    def newest_files(self, fit: Callable[[RunFiles], bool] = lambda files: True) -> tuple[int, RunFiles] | None:
        """The newest checkpoint whose configuration and position are sound and fit, and those; its arrays are not read.

        Raises:
            StorageError: if a file cannot be read.
        """
        for step in reversed(self._folder.steps()):
            with contextlib.suppress(DamagedError):
                if fit(files := self.read_files(step)):
                    return step, files
        return None

    def read_files(self, step: int) -> RunFiles:
        """The configuration, the tokenizer and the position of a checkpoint.

        Raises:
            DamagedError: if one is not as it was written.
            StorageError: if one cannot be read.
        """
        if step not in self._checked and (problems := problems_in(self.path(step), step, under="run/")):
            raise DamagedError(self._told(step, problems))
        return self._read(step, restore_files)

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, laid out as ``abstract`` says.

        Raises:
            UserError: if the arrays of the checkpoint have other shapes or dtypes, or are others.
            DamagedError: if the checkpoint is not as it was written.
            StorageError: if it cannot be read.
        """
        found = self._restore_arrays(step, {"params": abstract.params, "training": _without_params(abstract)})
        return TrainState(params=found.params, **found.training)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The weights alone, laid out as ``abstract`` says; raises as :meth:`restore_state`."""
        return self._restore_arrays(step, {"params": abstract}).params

    def _restore_arrays(self, step: int, trees: Trees) -> Any:
        if step not in self._checked:
            self.check(step)
        stored = read_manifest(self.path(step)).arrays
        stored = {path: kind for path, kind in stored.items() if path.partition("/")[0] in trees}
        if others := list(differences(stored, kinds_of(trees))):
            raise UserError(
                f"{self.path(step)}: its arrays are not those that the configuration asks for:{_lines(others)}\n"
                "restore it under the configuration that made it, which is in run/config.yaml, or start another run "
                "with name=NEW"
            )
        return self._read(step, lambda checkpoint: restore_trees(checkpoint, trees))

    def _read(self, step: int, read: Callable[[epath.Path], _T]) -> _T:
        try:
            return read(self.path(step))
        except Exception as error:  # of any type: Orbax raises what TensorStore finds as a bare Exception
            if storage_fault(error) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
                raise  # the storage's fault
            raise DamagedError(
                f"{self.path(step)}: the checkpoint cannot be read, though its files are as they were written: {error}"
            ) from error


def _lines(things: Iterable[str]) -> str:
    """The first of many things, a line each."""
    every = list(things)
    more = f"\n  and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return "".join(f"\n  {thing}" for thing in every[:_SHOWN]) + more


def _without_params(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
