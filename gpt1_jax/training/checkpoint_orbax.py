"""How a checkpoint is written and read: the one module that speaks to Orbax.

Orbax writes to ``gs://`` by itself. It has no way to S3, so there a checkpoint is written on this machine and uploaded,
and downloaded to be read.
"""

import asyncio
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from gpt1_jax.data.manifest import FileSum
from gpt1_jax.data.storage import AnyPath, file_system, flush_folder, is_remote
from gpt1_jax.training.checkpoint_folder import CheckpointFolder
from gpt1_jax.training.checkpoint_manifest import ArrayKind, CheckpointManifest, files_in, sums_of, write_manifest

CHAT_TEMPLATE = "chat_template.jinja"
# Orbax takes the time of a save by the wall clock, which may be set while it lasts; deadlines.save goes by another one.
_SAVE_SECONDS = 100 * 365 * 24 * 3600
# Items of a checkpoint, by the names of their folders: trees of arrays, or what says how to restore them.
Trees = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The part of a checkpoint that is not arrays.

    Attributes:
        config: the resolved configuration, YAML.
        tokenizer: the serialized tokenizer.
        examples: training examples read so far, which is the position in the data.
        data: fingerprint of what they were read from, a corpus or a task; None: the weights were imported.
        corpus: fingerprint of the corpus of the pre-training; None: it is not known, the weights began as imported.
        chat_template: the form of the conversations that the model was trained on, Jinja; None: it was on none.
        skipped: of the last steps, how many in a row were skipped.
        losses: of the last steps, as many as a spike is judged by.
    """

    config: str
    tokenizer: bytes
    examples: int
    data: str | None
    corpus: str | None
    chat_template: str | None = None
    skipped: int = 0
    losses: tuple[float, ...] = ()


class _RunFilesHandler(ocp.CheckpointHandler):
    """Stores :class:`RunFiles` as files that a person can read."""

    def save(self, directory: epath.Path, args: "_SaveRunFiles") -> None:
        if jax.process_index() == 0:
            files = args.files
            (directory / "config.yaml").write_text(files.config, encoding="utf-8")
            (directory / "tokenizer.model").write_bytes(files.tokenizer)
            position = {name: getattr(files, name) for name in ("examples", "data", "corpus", "skipped", "losses")}
            (directory / "position.json").write_text(json.dumps(position), encoding="utf-8")
            if files.chat_template is not None:
                (directory / CHAT_TEMPLATE).write_text(files.chat_template, encoding="utf-8")

    def restore(self, directory: epath.Path, args: "_RestoreRunFiles") -> RunFiles:
        template = directory / CHAT_TEMPLATE
        position = json.loads((directory / "position.json").read_text(encoding="utf-8"))
        return RunFiles(
            config=(directory / "config.yaml").read_text(encoding="utf-8"),
            tokenizer=(directory / "tokenizer.model").read_bytes(),
            examples=position["examples"],
            data=position["data"],
            corpus=position["corpus"],
            chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
            skipped=position["skipped"],
            losses=tuple(position["losses"]),
        )


@ocp.args.register_with_handler(_RunFilesHandler, for_save=True)
@dataclass
class _SaveRunFiles(ocp.args.CheckpointArgs):
    files: RunFiles


@ocp.args.register_with_handler(_RunFilesHandler, for_restore=True)
@dataclass
class _RestoreRunFiles(ocp.args.CheckpointArgs):
    pass


class _Unfinished(atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is being written, which Orbax commits when the parts of all hosts are there.

    Args:
        folder: of all checkpoints.
        final: of this one.
        store: writes what Orbax says of a checkpoint, beside it all.
        manifest: gives the manifest, of the sums of the files.
        committed: called when the checkpoint is complete.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        final: epath.Path,
        store: Any,
        manifest: Callable[[Mapping[str, FileSum]], CheckpointManifest],
        committed: Callable[[], None],
    ):
        self._uploaded = _is_s3(final)
        if self._uploaded:
            place = epath.Path(tempfile.mkdtemp(prefix="gpt1-")) / final.name
        else:
            place = folder.unfinished(int(final.name))
        super().__init__(place, final, checkpoint_metadata_store=store)
        self._store, self._manifest, self._committed = store, manifest, committed

    async def finalize(self) -> None:
        """Called by Orbax, in process 0."""
        await asyncio.to_thread(self._commit)

    def _commit(self) -> None:
        self._store.wait_until_finished()
        written, final = self.get(), self.get_final()
        manifest = self._manifest(sums_of(written))
        if self._uploaded:
            self._upload()
            write_manifest(final, manifest)
            shutil.rmtree(written.parent)
        else:
            if not is_remote(written):
                flush_folder(written)
            write_manifest(written, manifest)
            if written != final:
                written.rename(final)
        self._committed()

    def _upload(self) -> None:
        files = files_in(self.get())
        remote, name = file_system(self.get_final())
        remote.put([os.fspath(self.get() / file) for file in files], [f"{name}/{file}" for file in files])


class Saver(ocp.AsyncCheckpointer):
    """Saves beside the training, one checkpoint after the other."""

    def __init__(self, folder: CheckpointFolder, committed: Callable[[], None]):
        super().__init__(ocp.CompositeCheckpointHandler(), timeout_secs=_SAVE_SECONDS)
        self._folder, self._committed = folder, committed

    def start(self, step: int, trees: Trees, files: RunFiles) -> None:
        """Returns once the arrays are copied and may be donated."""
        described = partial(_manifest, step, kinds_of(trees), files)
        self._unfinished = partial(
            _Unfinished, self._folder, store=self._metadata_store, manifest=described, committed=self._committed
        )
        items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()}
        self.save(self._folder.checkpoint(step), args=ocp.args.Composite(**items, run=_SaveRunFiles(files)))

    def get_temporary_path(self, directory: epath.Path) -> _Unfinished:
        """Where Orbax writes the checkpoint that was just started."""
        return self._unfinished(directory)


@contextlib.contextmanager
def _readable(checkpoint: epath.Path, items: Iterable[str]) -> Iterator[epath.Path]:
    """A folder with some items of a checkpoint that Orbax can read: its own, or a copy on this machine."""
    if not _is_s3(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="gpt1-") as folder:
        for item in items:
            remote, name = file_system(checkpoint / item)
            files = remote.find(name)
            remote.get(files, [os.path.join(folder, item, file.removeprefix(f"{name}/")) for file in files])
        yield epath.Path(folder)


def restore_trees(checkpoint: epath.Path, abstract: Trees) -> Any:
    """Trees of arrays, as attributes, laid out as the abstract ones say."""
    return _restore(checkpoint, {item: ocp.args.StandardRestore(tree) for item, tree in abstract.items()})


def restore_files(checkpoint: epath.Path) -> RunFiles:
    """What is not arrays."""
    return _restore(checkpoint, {"run": _RestoreRunFiles()}).run


def kinds_of(trees: Trees) -> dict[str, ArrayKind]:
    """Shape and dtype of every array of trees, by its path."""
    return {
        f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": ArrayKind(
            shape=leaf.shape, dtype=str(leaf.dtype)
        )
        for item, tree in trees.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _restore(checkpoint: epath.Path, items: Mapping[str, ocp.args.CheckpointArgs]) -> Any:
    with (
        _readable(checkpoint, items) as folder,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler(), temporary_path_class=_Unfinished) as reader,
    ):
        return reader.restore(folder, args=ocp.args.Composite(**items))


def _manifest(
    step: int, arrays: dict[str, ArrayKind], files: RunFiles, sums: Mapping[str, FileSum]
) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=hashlib.sha256(files.config.encode()).hexdigest(),
        tokenizer=hashlib.sha256(files.tokenizer).hexdigest(),
        arrays=arrays,
        files=dict(sums),
    )


def _is_s3(path: AnyPath) -> bool:
    return os.fspath(path).startswith("s3://")
