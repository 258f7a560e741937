"""Checkpoints: the one module that speaks to Orbax.

A checkpoint is the folder ``checkpoints/STEP``. Orbax writes it under a temporary name and renames it when all of it is
there, so it is complete or absent. It holds all that a run needs to go on, and all that a reader of the model needs:

    params/     the weights
    training/   the optimizer's state, the step, the random key
    run/        config.yaml, tokenizer.model, position.json (examples read, and the fingerprint of their corpus)

The checkpoint of an imported model has no training/, and its corpus is null.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.errors import DamagedError
from gpt1_jax.model.transformer import Params
from gpt1_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class RunFiles:
    """The part of a checkpoint that is not arrays.

    Attributes:
        config: the resolved configuration, YAML.
        tokenizer: the serialized tokenizer.
        examples: training examples read so far, which is the position in the data.
        corpus: fingerprint of the corpus that they were read from; None: the weights were imported.
    """

    config: str
    tokenizer: bytes
    examples: int
    corpus: str | None


class _RunFilesHandler(ocp.CheckpointHandler):
    """Stores :class:`RunFiles` as files that a person can read."""

    def save(self, directory: epath.Path, args: "_SaveRunFiles") -> None:
        if jax.process_index() == 0:
            files = args.files
            (directory / "config.yaml").write_text(files.config, encoding="utf-8")
            (directory / "tokenizer.model").write_bytes(files.tokenizer)
            position = json.dumps({"examples": files.examples, "corpus": files.corpus})
            (directory / "position.json").write_text(position, encoding="utf-8")

    def restore(self, directory: epath.Path, args: "_RestoreRunFiles") -> RunFiles:
        position = json.loads((directory / "position.json").read_text(encoding="utf-8"))
        return RunFiles(
            config=(directory / "config.yaml").read_text(encoding="utf-8"),
            tokenizer=(directory / "tokenizer.model").read_bytes(),
            examples=position["examples"],
            corpus=position["corpus"],
        )


@ocp.args.register_with_handler(_RunFilesHandler, for_save=True)
@dataclass
class _SaveRunFiles(ocp.args.CheckpointArgs):
    files: RunFiles


@ocp.args.register_with_handler(_RunFilesHandler, for_restore=True)
@dataclass
class _RestoreRunFiles(ocp.args.CheckpointArgs):
    pass


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left.

    Args:
        run_dir: the run's folder.
        config: which checkpoints to keep; None to read only.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig | None = None):
        self.directory = run_dir.absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            keep_period=config.keep_every if config else None,
            cleanup_tmp_directories=config is not None,
            create=config is not None,
            read_only=config is None,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
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
        assert files.corpus is None
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
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of any type: Orbax raises what TensorStore finds as a bare Exception
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # the storage's fault
            raise DamagedError(
                f"{self.path(step)}: the checkpoint cannot be read: {error}\n"
                "move its folder away and run the same command again to go on from the checkpoint before it"
            ) from error


def _without_params(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
