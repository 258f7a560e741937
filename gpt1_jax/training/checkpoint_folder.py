"""The folder ``checkpoints`` of a run: what its names mean, which of them are kept, and what becomes of the others.

    STEP            a checkpoint; it is complete when it has a manifest
    saving-STEP     one that is being written, or what a killed process left of it
    deleting-STEP   one that is being deleted, or what a killed process left of it
    damaged-STEP    one that was found damaged and was moved aside; nothing here ever deletes it

A disk's folder gets its name when its manifest is written, and loses it before anything in it is deleted: a folder
``STEP`` without a manifest has lost it, and is damaged. In a bucket, where nothing can be renamed, the files are put
under their last name, the manifest last, and are deleted after the manifest: there it is one that is not complete.
"""

import os
import re
from typing import Literal, NamedTuple

from etils import epath

from gpt1_jax.data.storage import AnyPath, file_system, is_remote, make_folder, names_in
from gpt1_jax.training.checkpoint_manifest import MANIFEST, files_in, read_manifest

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]*")
_OTHER = re.compile(r"(saving|damaged)-([0-9]+)(-[0-9]+)?")


class Listed(NamedTuple):
    """What is in the folder, as ``gpt1 checkpoint list`` shows it.

    Attributes:
        name: of the folder in it.
        step: of the checkpoint.
        state: ``complete``, ``incomplete`` or ``damaged``; no file but the manifest is read to find it out.
        bytes: size of all files, but for the manifest of a complete one.
        written: when, UTC, ISO 8601; None where no manifest says it.
        config: SHA-256 of its configuration; None as before.
        tokenizer: SHA-256 of its tokenizer; None as before.
    """

    name: str
    step: int
    state: Literal["complete", "incomplete", "damaged"]
    bytes: int
    written: str | None = None
    config: str | None = None
    tokenizer: str | None = None


class CheckpointFolder:
    """The folder of a run's checkpoints, which need not exist.

    Attributes:
        path: of the folder.
    """

    def __init__(self, run_dir: AnyPath):
        self._remote = is_remote(run_dir)
        self.path = epath.Path(run_dir if self._remote else os.path.abspath(run_dir)) / CHECKPOINTS

    def checkpoint(self, step: int) -> epath.Path:
        """Folder of a checkpoint."""
        return self.path / str(step)

    def unfinished(self, step: int) -> epath.Path:
        """Folder in which a checkpoint is written."""
        return self.checkpoint(step) if self._remote else self.path / f"saving-{step}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints, in order: those that are complete, and those that were and have been damaged."""
        names = filter(_STEP.fullmatch, names_in(self.path))
        return sorted(int(name) for name in names if not self._remote or (self.path / name / MANIFEST).exists())

    def prepare(self) -> None:
        """Makes the folder where need be, and deletes what a killed process left half written or half deleted."""
        make_folder(self.path)
        whole = set(map(str, self.steps()))
        for name in names_in(self.path):
            half = name.startswith(("saving-", "deleting-"))
            if half or (self._remote and _STEP.fullmatch(name) and name not in whole):
                (self.path / name).rmtree()

    def retire(self, keep: int, keep_every: int | None) -> None:
        """Deletes all checkpoints but the newest ones, and those whose step is a multiple."""
        for step in self.steps()[:-keep]:
            if keep_every is None or step % keep_every:
                self.delete(step)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, which is none from the first moment on."""
        folder = self.checkpoint(step)
        if self._remote:
            (folder / MANIFEST).unlink()
        else:
            folder = self.path / f"deleting-{step}"
            self.checkpoint(step).rename(folder)
        folder.rmtree()

    def set_aside(self, step: int) -> epath.Path:
        """Gives a damaged checkpoint another name, under which nothing will touch it; its new path."""
        names, number = names_in(self.path), 1
        name = f"damaged-{step}"
        while name in names:
            number += 1
            name = f"damaged-{step}-{number}"
        old, new = self.checkpoint(step), self.path / name
        if self._remote:
            files, source = file_system(old)
            for file in files_in(old):
                files.copy(f"{source}/{file}", f"{file_system(new)[1]}/{file}")
            self.delete(step)
        else:
            old.rename(new)
        return new

    def listed(self) -> list[Listed]:
        """What is in the folder, by step; not what is being deleted."""
        found = []
        for name in names_in(self.path):
            if _STEP.fullmatch(name):
                found.append(self._listed(name))
            elif matched := _OTHER.fullmatch(name):
                state = "damaged" if matched[1] == "damaged" else "incomplete"
                found.append(Listed(name, int(matched[2]), state, self._size(name)))
        return sorted(found, key=lambda each: (each.step, each.name))

    def _listed(self, name: str) -> Listed:
        try:
            manifest = read_manifest(self.path / name)
        except FileNotFoundError:
            return Listed(name, int(name), "incomplete" if self._remote else "damaged", self._size(name))
        except ValueError:
            return Listed(name, int(name), "damaged", self._size(name))
        facts = manifest.written, manifest.config, manifest.tokenizer
        return Listed(name, manifest.step, "complete", manifest.bytes, *facts)

    def _size(self, name: str) -> int:
        files, path = file_system(self.path / name)
        return int(files.du(path))
