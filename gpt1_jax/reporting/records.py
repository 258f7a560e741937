"""What a run left on disk, read for its report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt1_jax.config import Config
from gpt1_jax.config_file import load_config
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.training.metrics import METRICS, read_metrics
from gpt1_jax.training.run import CONFIG

SAMPLES = "samples.jsonl"  # a line per completion: step, prompt, completion
EVALUATION = "evaluation.json"  # the figures of the final evaluation, under the keys of `gpt1 evaluate --json`

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """A run as its files tell it.

    Attributes:
        name: what it is called in the report.
        config: its configuration.
        steps: the logged steps, in order.
        evaluations: the evaluations while training, in order.
        samples: completions, in order; may be empty.
        final: the final figures; empty if there was no final evaluation.
    """

    name: str
    config: Config
    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    final: Record


def read_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Reads runs, called by the names of their folders, or by their paths if two have the same name.

    Raises:
        UserError: if there is none, or a folder holds no run or no metrics yet.
        DamagedError: if a file is not what training writes.
    """
    if not folders:
        raise UserError("no run to report on; give the folder of one, such as runs/tiny")
    names = [folder.resolve().name for folder in folders]
    return [_read_run(f, name if names.count(name) == 1 else str(f)) for f, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunRecords:
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: no run here ({CONFIG} is missing); give the folder of a run, such as runs/tiny")
    records = _read_lines(folder / METRICS, "step", "tokens")
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(
            f"{folder}: the run has logged no step yet, so there is nothing to report; "
            f"train it with 'gpt1 train {folder / CONFIG}'"
        )
    return RunRecords(
        name=name,
        config=load_config(folder / CONFIG),
        steps=steps,
        evaluations=[record for record in records if "validation_loss" in record],
        samples=_read_lines(folder / SAMPLES, "step", "prompt", "completion"),
        final=_read_final(folder / EVALUATION),
    )


def _read_lines(path: Path, *keys: str) -> list[Record]:
    try:
        records = read_metrics(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: not lines of JSON: {error}") from None
    for number, record in enumerate(records, 1):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            raise DamagedError(f"{path}: record {number} lacks {', '.join(missing)}")
    return records


def _read_final(path: Path) -> Record:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path}: not the figures of an evaluation: {error}; run 'gpt1 evaluate' again") from None
