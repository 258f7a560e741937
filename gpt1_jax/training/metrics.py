"""Where a run's figures are kept: metrics.jsonl and TensorBoard; and the clock they are taken by."""

import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

# pyrefly: ignore[missing-module-attribute]  # protobuf makes the classes when the modules are imported
from tensorboardX.proto.event_pb2 import Event, SessionLog

# pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from gpt1_jax.config import Config
from gpt1_jax.data.storage import is_remote, storage_errors, write_atomically
from gpt1_jax.errors import DamagedError
from gpt1_jax.outside import parse_json

METRICS = "metrics.jsonl"

_FLUSH_SECONDS = 120.0  # in which what TensorBoard shows comes to the disk

Record = dict[str, Any]


class MetricsLog:
    """Appends to metrics.jsonl, a line per record, and mirrors the numbers to TensorBoard.

    Nothing can be appended to an object in a bucket. The files of a run there grow on this machine, and are put in
    their places by :meth:`flush`. It is called before every checkpoint, so a killed process loses only lines of steps
    that will be made again.

    Args:
        config: the run.
        step: the step that the run goes on from. Records after it, written by a process that died before its next
            checkpoint, are dropped: those steps will be made, and written, again.
        writes: whether to write at all; of the processes of a run one does.

    Raises:
        DamagedError: if the file holds what no process of ours has written.
    """

    def __init__(self, config: Config, step: int, writes: bool = True):
        self.seconds = 0.0  # training time of the records kept
        self._writes = writes
        if not writes:
            return
        self._run_dir = config.run_dir
        self._remote = is_remote(self._run_dir)
        self._folder = Path(tempfile.mkdtemp(prefix="gpt1-") if self._remote else self._run_dir)
        kept = []
        for record in read_records(self._run_dir / METRICS, "step", "tokens"):
            if record["step"] <= step:
                kept.append(json.dumps(record) + "\n")
                self.seconds = record.get("seconds", self.seconds)
        write_atomically(self._folder / METRICS, "".join(kept).encode())
        self._file = (self._folder / METRICS).open("a", buffering=1, encoding="utf-8")
        self._board: _Board | None = None
        if config.logging.tensorboard:
            self._board = _Board(self._folder / "tensorboard", step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; ``step`` is among its keys.

        Raises:
            StorageError: if the disk is full or failing.
        """
        if not self._writes:
            return
        with storage_errors(self._folder / METRICS):
            self._file.write(json.dumps(record) + "\n")
            if self._board is not None:
                self._board.add(record)

    def flush(self) -> None:
        """Puts the files of a run in a bucket there as they are now; those of a local run are there already."""
        if not (self._writes and self._remote):
            return
        if self._board is not None:
            self._board.flush()
        for file in self._folder.rglob("*"):
            if file.is_file():
                write_atomically(self._run_dir / file.relative_to(self._folder), file.read_bytes())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._writes:
            return
        try:
            self._file.close()
            if self._board is not None:
                self._board.close()
                self._board = None
            self.flush()
        except Exception:
            if error is None:  # else what has ended the run is worth more
                raise
        finally:
            if self._remote:
                shutil.rmtree(self._folder)


class _Board:
    """A file of events for TensorBoard.

    tensorboardX's own writer of them has a thread, which ends silently where the disk is full; who gives it an event
    then waits for ever.

    Args:
        folder: in which it is made.
        step: what earlier files hold of later steps is no longer shown.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        # A name that sorts behind those of earlier starts.
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}"))
        self._flushed = -math.inf
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a record."""
        numbers = {key: value for key, value in record.items() if key != "step" and value is not None}
        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        self._write(Event(step=record["step"], summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Has the disk keep what was written."""
        self._flushed = time.monotonic()
        self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())


def read_records(path: epath.Path, *keys: str) -> list[Record]:
    """The records of a file of JSON lines; a last line that a killed process left unfinished is passed over.

    Args:
        path: of the file; one that is not there has no records.
        keys: that every record has.

    Raises:
        DamagedError: naming the file and the line.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line:
            continue
        try:
            record = parse_json(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise DamagedError(f"{path}:{number}: not a line of JSON: {error}; mend or delete the line") from None
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            raise DamagedError(f"{path}:{number}: the record lacks {', '.join(missing)}; mend or delete the line")
        records.append(record)
    return records


class Stopwatch:
    """Seconds of training, without those spent in evaluation and the like. The wall clock plays no part."""

    def __init__(self, seconds: float = 0.0):
        self._start = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    def leave_out(self, seconds: float) -> None:
        """Takes back time in which no training was done."""
        self._start += seconds
