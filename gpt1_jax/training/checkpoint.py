"""Checkpoints: the one module that speaks to Orbax.

A checkpoint is the folder ``checkpoints/STEP``. Orbax writes it under a temporary name and renames it when all of it is
there, so it is complete or absent. In a bucket, where nothing can be renamed, the file ``commit_success.txt``, written
last, says that all of it is there. It holds all that a run needs to go on, and all that a reader of the model needs:

    params/     the weights
    training/   the optimizer's state, the step, the random key
    run/        config.yaml, tokenizer.model, position.json (examples read, and fingerprints: of what they were read
                from, and of the corpus of the pre-training), of a model of conversations chat_template.jinja

The checkpoint of an imported model has no training/, and both fingerprints are null.

Orbax writes to ``gs://`` by itself. It has no way to S3, so there a checkpoint is written on this machine and uploaded,
and downloaded to be read.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.data.storage import AnyPath, file_system, is_remote, storage_fault, write_atomically
from gpt1_jax.errors import DamagedError
from gpt1_jax.model.transformer import Params
from gpt1_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"
CHAT_TEMPLATE = "chat_template.jinja"


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
    """

    config: str
    tokenizer: bytes
    examples: int
    data: str | None
    corpus: str | None
    chat_template: str | None = None


class _RunFilesHandler(ocp.CheckpointHandler):
    """Stores :class:`RunFiles` as files that a person can read."""

    def save(self, directory: epath.Path, args: "_SaveRunFiles") -> None:
        if jax.process_index() == 0:
            files = args.files
            (directory / "config.yaml").write_text(files.config, encoding="utf-8")
            (directory / "tokenizer.model").write_bytes(files.tokenizer)
            position = json.dumps({"examples": files.examples, "data": files.data, "corpus": files.corpus})
            (directory / "position.json").write_text(position, encoding="utf-8")
            if files.chat_template is not None:
                (directory / CHAT_TEMPLATE).write_text(files.chat_template, encoding="utf-8")

    def restore(self, directory: epath.Path, args: "_RestoreRunFiles") -> RunFiles:
        template = directory / CHAT_TEMPLATE
        position = json.loads((directory / "position.json").read_text(encoding="utf-8"))
        return RunFiles(
            config=(directory / "config.yaml").read_text(encoding="utf-8"),
            tokenizer=(directory / "tokenizer.model").read_bytes(),
            examples=position["examples"],
            data=position.get("data", position["corpus"]),  # a run of before there was fine-tuning has one alone
            corpus=position["corpus"],
            chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        )


@ocp.args.register_with_handler(_RunFilesHandler, for_save=True)
@dataclass
class _SaveRunFiles(ocp.args.CheckpointArgs):
    files: RunFiles


@ocp.args.register_with_handler(_RunFilesHandler, for_restore=True)
@dataclass
class _RestoreRunFiles(ocp.args.CheckpointArgs):
    pass


class _UploadedPath(atomicity.CommitFileTemporaryPath):
    """A checkpoint in a bucket that is written on this machine, and uploaded when all of it is there, its mark last."""

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> "_UploadedPath":
        if not is_remote(final_path):  # a part of the checkpoint, already on this machine
            return cls(final_path, final_path, **options)
        return cls(epath.Path(tempfile.mkdtemp(prefix="gpt1-")) / final_path.name, final_path, **options)

    async def finalize(self) -> None:
        if not is_remote(self.get_final()):
            await super().finalize()
            return
        await asyncio.to_thread(self._upload)

    def _upload(self) -> None:
        local, final = Path(self.get()), self.get_final()
        files = [file for file in local.rglob("*") if file.is_file()]
        remote, name = file_system(final)
        remote.put([os.fspath(file) for file in files], [f"{name}/{file.relative_to(local)}" for file in files])
        write_atomically(final / atomicity.COMMIT_SUCCESS_FILE, b"all of the checkpoint is here\n")
        shutil.rmtree(local.parent)


@contextlib.contextmanager
def _readable(checkpoint: epath.Path, items: Iterable[str]) -> Iterator[epath.Path]:
    """A folder with some items of a checkpoint that Orbax can read: itself, or a copy on this machine."""
    if not os.fspath(checkpoint).startswith("s3://"):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="gpt1-") as folder:
        for item in items:
            remote, name = file_system(checkpoint / item)
            files = remote.find(name)
            remote.get(files, [os.path.join(folder, item, file.removeprefix(f"{name}/")) for file in files])
        yield epath.Path(folder)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left.

    Args:
        run_dir: the run's folder, local or in a bucket.
        config: which checkpoints to keep; None to read only.
    """

    def __init__(self, run_dir: AnyPath, config: CheckpointConfig | None = None):
        remote = is_remote(run_dir)
        self.directory = epath.Path(run_dir if remote else os.path.abspath(run_dir)) / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            keep_period=config.keep_every if config else None,
            cleanup_tmp_directories=config is not None,
            create=config is not None and not remote,  # it would make a missing bucket
            read_only=config is None,
            temporary_path_class=_UploadedPath if os.fspath(self.directory).startswith("s3://") else None,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Folder of a checkpoint."""
        return self.directory / str(step)

    def save(self, step: int, state: TrainState, files: RunFiles) -> None:
        """Starts a save: returns once the state is copied and may be donated, and writes beside the training."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(_without_params(state)),
                run=_SaveRunFiles(files),
            ),
            force=True,
        )

    def save_imported(self, params: Params, files: RunFiles) -> None:
        """Starts to save weights that were trained elsewhere, as step 0."""
        assert files.data is None
        self._manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params), run=_SaveRunFiles(files)))

    def wait(self) -> None:
        """Returns when every save has reached the disk; raises what went wrong with one."""
        self._manager.wait_until_finished()

    def read_files(self, step: int) -> RunFiles:
        """The configuration, the tokenizer and the position of a checkpoint."""
        return self._restore(step, run=_RestoreRunFiles()).run

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, laid out as ``abstract`` says."""
        found = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            training=ocp.args.StandardRestore(_without_params(abstract)),
        )
        return TrainState(params=found.params, **found.training)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The weights alone, laid out as ``abstract`` says."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract)).params

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            with (
                _readable(self.path(step), items) as folder,
                ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader,
            ):
                return reader.restore(folder, args=ocp.args.Composite(**items))
        except Exception as error:  # of any type: Orbax raises what TensorStore finds as a bare Exception
            if storage_fault(error) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
                raise  # the storage's fault
            raise DamagedError(
                f"{self.path(step)}: the checkpoint cannot be read: {error}\n"
                "move its folder away and run the same command again to go on from the checkpoint before it"
            ) from error


def _without_params(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
