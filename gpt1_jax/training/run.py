"""A run's folder: made by training, opened by everything that uses a trained model."""

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from gpt1_jax.config import Config, FinetuneConfig, MeshConfig, differences
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.storage import AnyPath, make_folder, write_atomically, write_changed
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.model.sharding import tree_shardings
from gpt1_jax.model.transformer import Params, abstract_params, parameter_axes
from gpt1_jax.outside import parse_json
from gpt1_jax.text.tokenizer import Tokenizer, load_tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.mesh import check_mesh, make_mesh

CONFIG = "config.yaml"
RESULTS = "results.json"  # of a fine-tuned run: what it is worth, and which of its checkpoints is the best
_PATIENCE_SECONDS = 10.0  # for which a shared disk may show an older listing

# Keys, and with a dot at the end sections, that may differ when a run goes on, because its losses and weights do not
# depend on them.
_FREE_KEYS = (
    "name",
    "runs_dir",
    "data.root",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "data.readers",
    "data.engine",
    "data.beam_options",
    "model.attention",
    "model.loss_chunk",
    "model.scan_layers",
    "model.remat",
    "train.gradient_dtype",
    "train.log_every",
    "train.compilation_cache",
    "train.max_skipped_steps",
    "train.spikes.max_rewinds",
    "train.double_check_every",
    "mesh.",
    "checkpoint.",
    "evaluation.",
    "logging.",
    "distributed.",
    "deadlines.",
    "finetune.name",
    "finetune.runs_dir",
    "finetune.model.attention",
    "finetune.model.scan_layers",
    "finetune.model.remat",
    "finetune.train.log_every",
    "finetune.train.gradient_dtype",
    "finetune.train.compilation_cache",
    "finetune.train.max_skipped_steps",
    "finetune.train.double_check_every",
    "finetune.mesh.",
    "finetune.evaluation.",
    "finetune.logging.",
    "finetune.distributed.",
    "finetune.deadlines.",
)
# Of the model's, those that imported weights leave open.
_FREE_KEYS_OF_IMPORTED = (
    "model.dropout",
    "model.attention_dropout",
    "model.dtype",
)


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to use it.

    Attributes:
        path: the run's folder, local or in a bucket.
        config: the configuration that it was trained with.
        step: updates made.
        examples: training examples read.
        corpus: fingerprint of the corpus that it was pre-trained on; None: the weights began as imported.
        tokenizer: the tokenizer that it was trained with.
        mesh: the devices that hold the weights.
        params: the weights, float32.
        chat_template: the form of the conversations that it was trained on, Jinja; None: it was on none.
    """

    path: epath.Path
    config: Config
    step: int
    examples: int
    corpus: str | None
    tokenizer: Tokenizer
    mesh: Mesh
    params: Params
    chat_template: str | None = None


def open_run(path: AnyPath, mesh: Mesh | None = None, step: int | None = None, hosts: Hosts | None = None) -> Run:
    """Reads the newest sound checkpoint of a run, or of a fine-tuned one that is done the best.

    Newer ones that are damaged are named on standard error.

    Args:
        path: the run's folder.
        step: of another checkpoint.
        mesh: where to put the weights; None: the run's own mesh, or, where the devices at hand do not make it up, all
            of them with a copy of the weights on each.
        hosts: the processes that open it together.

    Raises:
        UserError: if there is no run, no checkpoint yet, or none of that step.
        DamagedError: if no checkpoint is sound, or not the one of that step.
    """
    path = epath.Path(path)
    check_is_run(path)
    with Checkpoints(path, hosts=hosts) as checkpoints:
        asked = read_results(path).get("step") if step is None else step
        if asked is not None:
            checkpoints.check(asked)
        step = checkpoints.newest_sound() if asked is None else asked
        if step is None:
            raise UserError(f"{path}: the run has no checkpoint yet; train it with 'gpt1 train {path / CONFIG}'")
        files = checkpoints.read_files(step)
        config = _config_in(files, checkpoints.path(step))
        # It may have been trained where there is another kernel of attention.
        config, _ = resolve(config.model_copy(update={"model": config.model.model_copy(update={"attention": "auto"})}))
        mesh = mesh or _mesh_for(config)
        layouts = tree_shardings(mesh, parameter_axes(config.model), abstract_params(config.model))
        abstract = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            abstract_params(config.model),
            layouts,
        )
        params = checkpoints.restore_params(step, abstract)
    tokenizer = load_tokenizer(files.tokenizer)
    return Run(path, config, step, files.examples, files.corpus, tokenizer, mesh, params, files.chat_template)


def check_is_run(path: epath.Path) -> None:
    """Checks that a folder is that of a run.

    Raises:
        UserError: if it is not.
    """
    if not (path / CONFIG).exists():
        raise UserError(f"{path}: no run here ({CONFIG} is missing); give the folder of a run, such as runs/tiny")


def read_results(path: epath.Path) -> dict[str, Any]:
    """What results.json says of a fine-tuned run; empty where there is none.

    Raises:
        DamagedError: if it cannot be read.
    """
    results = path / RESULTS
    if not results.exists():
        return {}
    try:
        found = parse_json(results.read_bytes())
        return {**found, "step": int(found["step"])}
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{results}: not what fine-tuning writes: {error!r}; delete it and run it again") from None


def check_pretraining(config: Config) -> None:
    """Checks that a configuration is of a run that learns from a corpus.

    Raises:
        UserError: if it is of a fine-tuned one, or has a part that fine-tuning alone would train.
    """
    if config.finetune is not None:
        raise UserError(
            f"finetune: {config.run_dir} is the configuration of a fine-tuned run; 'gpt1 finetune' makes such, from "
            f"{config.finetune.base}; 'gpt1 train' and 'gpt1 plan' are of pre-training"
        )
    for key in ("num_classes", "lora"):
        if (value := getattr(config.model, key)) is not None:
            raise UserError(f"model.{key}={value}: nothing in pre-training would train it; 'gpt1 finetune' sets it")


def check_run(config: Config, allow_changes: bool) -> None:
    """Checks that the run's newest checkpoint, if it has one, was made by this configuration.

    An attempt that did not come to a checkpoint binds nothing, whatever it left behind. Imported weights bind the
    shape of the model alone.

    Its arrays are not read: that a checkpoint is sound is found out when the run goes on from it.

    Raises:
        UserError: naming every key that differs and matters.
    """
    if allow_changes:
        return
    with Checkpoints(config.run_dir) as checkpoints:
        newest = checkpoints.newest_files()
        if newest is None:
            return
        step, files = newest
        made_by = _config_in(files, checkpoints.path(step))
    changes = list(differences(made_by.model_dump(mode="json"), config.model_dump(mode="json")))
    changes = [change for change in changes if not _is_free(change[0])]
    if files.data is None:
        changes = [c for c in changes if c[0].startswith("model.") and c[0] not in _FREE_KEYS_OF_IMPORTED]
    if changes:
        raise UserError(
            f"{config.run_dir}: this run was made by another configuration:\n"
            + "".join(f"  {key}: {old} there, {new} now\n" for key, old, new in changes)
            + "start another run with name=NEW, or pass --allow-changes to go on with the values of now"
        )


def _is_free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in _FREE_KEYS)


def check_shared(config: Config | FinetuneConfig, hosts: Hosts) -> None:
    """Checks that all processes see the same run, before one of them writes into a folder of its own.

    Raises:
        UserError: naming the processes that do not see what process 0 writes; or if checkpoints go to S3, whose way
            there is through the disk of one machine.
    """
    if hosts.processes == 1:
        return
    if os.fspath(config.run_dir).startswith("s3://"):
        raise UserError(
            f"runs_dir={config.runs_dir}: several processes cannot write a checkpoint to S3; give a folder that all "
            "hosts share, or gs://"
        )

    def write() -> str:
        make_folder(config.run_dir)
        path = config.run_dir / f".shared-{uuid.uuid4().hex[:8]}"
        write_atomically(path, b"")
        return path.name

    path = config.run_dir / hosts.first(write)
    blind = [process for process, sees in enumerate(hosts.gather(_appears(path))) if not sees]
    if hosts.process == 0:
        path.unlink()
    if blind:
        raise UserError(
            f"runs_dir={config.runs_dir}: process(es) {', '.join(map(str, blind))} do not see what process 0 writes "
            "there; give a folder that all hosts share"
        )


def _appears(path: epath.Path) -> bool:
    """Whether a file is there, or comes soon."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def write_config(config: Config) -> None:
    """Writes the resolved configuration into the run's folder, in the place of another that is there."""
    make_folder(config.run_dir)
    write_changed(config.run_dir / CONFIG, config.to_yaml().encode())


def _config_in(files: RunFiles, checkpoint: epath.Path) -> Config:
    return parse_config(files.config, str(checkpoint / "run" / CONFIG))


def _mesh_for(config: Config) -> Mesh:
    try:
        mesh = make_mesh(config.mesh)
        check_mesh(config, mesh)
    except UserError:  # trained on other devices
        return make_mesh(MeshConfig())
    return mesh
