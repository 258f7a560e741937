"""What a run left on disk, read for its report."""

from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.config_file import load_config
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.outside import parse_json
from gpt1_jax.training.metrics import METRICS, Record, read_records
from gpt1_jax.training.run import CONFIG, read_results

SAMPLES = "samples.jsonl"  # a line per completion: step, prompt, completion
EVALUATION = "evaluation.json"  # the final figures: step, and the keys of `gpt1 evaluate --json`


@dataclass(frozen=True)
class RunRecords:
    """A run as its files tell it.

    Attributes:
        name: what it is called in the report.
        config: its configuration.
        steps: the logged steps, in order.
        evaluations: the evaluations while training, in order.
        samples: completions, in order; may be empty.
        final: the final figures; empty if there was no final evaluation, or the run has gone on since.
        results: what a fine-tuned run is worth; empty of any other, and of one that is not done.
    """

    name: str
    config: Config
    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    final: Record
    results: Record


def read_runs(folders: Sequence[epath.Path]) -> list[RunRecords]:
    """Reads runs, called by the names of their folders, or by their paths if two have the same name.

    Raises:
        UserError: if there is none, or a folder holds no run or no metrics yet.
        DamagedError: if a file is not what training writes.
    """
    if not folders:
        raise UserError("no run to report on; give the folder of one, such as runs/tiny")
    names = [folder.resolve().name for folder in folders]
    return [_read_run(f, name if names.count(name) == 1 else str(f)) for f, name in zip(folders, names, strict=True)]


def _read_run(folder: epath.Path, name: str) -> RunRecords:
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: no run here ({CONFIG} is missing); give the folder of a run, such as runs/tiny")
    records = read_records(folder / METRICS, "step", "tokens")
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(
            f"{folder}: the run has logged no step yet, so there is nothing to report; "
            f"train it with 'gpt1 train {folder / CONFIG}'"
        )
    final = read_final(folder)
    return RunRecords(
        name=name,
        config=load_config(folder / CONFIG),
        steps=steps,
        evaluations=[record for record in records if "validation_loss" in record],
        samples=read_samples(folder),
        final=final if final.get("step", 0) >= steps[-1]["step"] else {},
        results=read_results(folder),
    )


def read_samples(folder: epath.Path) -> list[Record]:
    """The completions in a run's folder; none before its end.

    Raises:
        DamagedError: naming the file and the line.
    """
    return read_records(folder / SAMPLES, "step", "prompt", "completion")


def read_final(folder: epath.Path) -> Record:
    """The final figures in a run's folder; empty before its end.

    Raises:
        DamagedError: naming the file.
    """
    path = folder / EVALUATION
    if not path.exists():
        return {}
    try:
        return dict(parse_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{path}: not the figures of an evaluation: {error}; delete it and run 'gpt1 train' again"
        ) from None
