"""What runs the long stages of a preparation: the processes of this machine, or a Beam runner.

Every stage is functions of single parts that write files, and one decision over all documents, which are duplicates. So
an engine is small, and the bytes are the same with any.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import tensorflow_datasets as tfds
from etils import epath

from gpt1_jax.config import CleaningConfig, DataConfig
from gpt1_jax.data.collect import Part, collect_parts
from gpt1_jax.data.duplicates import Chunk, drop_duplicates
from gpt1_jax.pool import Pool, available_cores

Item = TypeVar("Item")
OnDone = Callable[[int], None]  # told how many more units are done


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs the stages. All files are on storage that every worker reaches."""

    def run(self, function: Callable[[Item], None], items: Sequence[Item], on_done: OnDone) -> None:
        """Calls a function that can be pickled with every item, in any order."""
        ...

    def collect(self, parts: Sequence[Part], config: DataConfig, folder: epath.Path, on_read: OnDone) -> None:
        """Reads and cleans parts (:func:`gpt1_jax.data.collect.collect_parts`)."""
        ...

    def drop_duplicates(self, chunks: Sequence[Chunk], config: CleaningConfig, folder: epath.Path) -> None:
        """Decides which documents are dropped (:mod:`gpt1_jax.data.duplicates`)."""
        ...

    def build(self, builder: tfds.core.DatasetBuilder) -> None:
        """Has a TFDS builder write its files."""
        ...


class LocalEngine(Engine):
    """The processes of this machine."""

    def __init__(self, workers: int | None, seconds: float) -> None:
        self._pool = Pool(workers or available_cores(), seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)

    def run(self, function: Callable[[Item], None], items: Sequence[Item], on_done: OnDone) -> None:
        """As :class:`Engine` says."""
        for _ in self._pool.map(function, items):
            on_done(1)

    def collect(self, parts: Sequence[Part], config: DataConfig, folder: epath.Path, on_read: OnDone) -> None:
        """Reads in this process and cleans in all of them, so that a single large file keeps them busy too."""
        collect_parts(parts, config, folder, self._pool.map, on_read)

    def drop_duplicates(self, chunks: Sequence[Chunk], config: CleaningConfig, folder: epath.Path) -> None:
        """As :class:`Engine` says."""
        drop_duplicates(chunks, config, folder)

    def build(self, builder: tfds.core.DatasetBuilder) -> None:
        """As :class:`Engine` says."""
        builder.download_and_prepare(download_config=download_config())


def download_config(runner: Any = None, options: Any = None) -> tfds.download.DownloadConfig:
    """How TFDS writes what is not downloaded; in this process, or on a Beam runner with options."""
    return tfds.download.DownloadConfig(
        register_checksums=False, try_download_gcs=False, beam_runner=runner, beam_options=options
    )
