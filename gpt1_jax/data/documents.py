"""The cleaned documents of a corpus: a TFDS dataset in ArrayRecord files, written and read without TensorFlow.

It lies in ``CORPUS/documents/NAME/VERSION``, so it is found by name and version, ``tfds.builder("NAME/VERSION",
data_dir="CORPUS/documents")``, or by its folder.
"""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from gpt1_jax.data.collect import read_array
from gpt1_jax.data.duplicates import Chunk, dropped_file
from gpt1_jax.data.integrity import damage_of
from gpt1_jax.data.manifest import SPLITS, FileSum, Split
from gpt1_jax.data.storage import AnyPath, is_remote, local_copy, put_file
from gpt1_jax.errors import DamagedError, GPT1Error, StorageError, UserError

FOLDER = "documents"
VERSION = "1.0.0"
_RECORDS = 64  # read at once
_SHARD_BYTES = 128_000_000  # of text in one ArrayRecord file; as much is held in memory while it is written
_MOST_OPEN = 4  # files of a reader
_MOST_SHARDS = 1024  # of a split; then they are larger. TFDS makes two steps of a Beam pipeline of each


class Span(NamedTuple):
    """Some of the documents that a chunk gives to a split: ``take`` of them, after the first ``skip``."""

    chunk: Chunk
    skip: int
    take: int


class _Shard:
    """Generates the documents of one ArrayRecord file."""

    def __init__(self, work: epath.Path, split: Split, spans: Sequence[Span]) -> None:
        self._work, self._split, self._spans = work, split, spans

    def __call__(self) -> Iterator[tuple[int, dict[str, str]]]:
        key = 0
        for chunk, skip, take in self._spans:
            for record in islice(self._kept(chunk), skip, skip + take):
                yield key, record
                key += 1

    def _kept(self, chunk: Chunk) -> Iterator[dict[str, str]]:
        columns = read_array(self._work / f"{chunk.name}.columns.npy")
        wanted = is_kept(columns, read_array(dropped_file(chunk, self._work)))[SPLITS.index(self._split)]
        with open(local_copy(self._work / f"{chunk.name}.jsonl"), encoding="utf-8") as file:
            for line, kept in zip(file, wanted, strict=True):
                if kept:
                    yield json.loads(line)


def is_kept(columns: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Whether a split has each document of a chunk, bool [splits, documents]."""
    return np.stack([(dropped == 0) & (columns["split"] == number) for number in range(len(SPLITS))])


class _Writer(writer.ExampleWriter):
    """Writes the fields of a record in a fixed order, and to any storage.

    Protobuf's maps have a different order in every process, and ArrayRecord writes local files alone.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
        with tempfile.TemporaryDirectory(dir=None if is_remote(path) else os.path.dirname(path)) as folder:
            local = Path(folder) / os.path.basename(path)
            super().write(local, ((key, _ordered(example)) for key, example in examples))
            put_file(local, path)


def _ordered(example: bytes) -> bytes:
    # pyrefly: ignore[missing-attribute]  # protobuf makes the class when the module is imported
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


class Documents(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Text, identity and source of every cleaned document, in the order in which they were read."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, name: str, shards: Mapping[Split, Sequence[_Shard]], **kwargs: Any) -> None:
        self.name = name
        self._shards = shards
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        def text(doc: str) -> tfds.features.Text:
            return tfds.features.Text(doc=doc)

        features = {
            "text": text("the cleaned text"),
            "identity": text("where it came from: a file, a line or row of it, a URL"),
            "source": text("the source's name, as in the manifest"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Cleaned documents of a prepared corpus.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[Split, Sequence[_Shard]]:
        return self._shards

    def _example_writer(self) -> writer.ExampleWriter:
        return _Writer(self.info.file_format)


Build = Callable[[tfds.core.DatasetBuilder], None]


def write_documents(
    corpus: epath.Path,
    name: str,
    kept: Mapping[Split, Sequence[tuple[Chunk, int, int]]],
    work: epath.Path,
    build: Build,
) -> None:
    """Writes the documents of the splits.

    Args:
        corpus: where to.
        name: of the corpus, from which that of the dataset is made.
        kept: of each split the chunks, in order, with the number and the bytes of the documents that it has of them.
        work: where the chunks are.
        build: makes a TFDS builder write, on whatever engine.

    Raises:
        StorageError: if the disk is full or failing.
    """
    folder = corpus / FOLDER
    if folder.exists():  # what a killed process left
        folder.rmtree()
    shards = {split: [_Shard(work, split, spans) for spans in _plan(kept[split])] for split in SPLITS}
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # what TFDS prints there is not this command's result
        try:
            build(Documents(dataset_name(name), shards, data_dir=folder, file_format="array_record"))
        except RuntimeError as error:  # how ArrayRecord reports a failed write
            raise StorageError(
                f"{folder}: the documents cannot be written: {error}; make room or set data.root elsewhere, and run "
                "the same command again"
            ) from None


def remove_leftovers(corpus: epath.Path) -> None:
    """Removes what is no part of the dataset: TFDS's notes and downloads, and what lost workers have left."""
    for note in (corpus / FOLDER).glob(f"*/{VERSION}/*.shard_infos.json"):
        note.unlink()
    folders = [corpus / FOLDER / "downloads", *(corpus / FOLDER).glob("*/*incomplete*")]
    folders += [path for path in (corpus / FOLDER).glob(f"*/{VERSION}/*") if path.is_dir()]
    for folder in folders:
        folder.rmtree(missing_ok=True)


def dataset_files(corpus: epath.Path) -> list[epath.Path]:
    """The files of the dataset."""
    (folder,) = _datasets(corpus)
    return sorted(folder.iterdir())


def dataset_name(corpus: str) -> str:
    """The name of a corpus, ``python_docs`` or ``books+wiki``, as one that TFDS accepts."""
    name = re.sub(r"[^a-z0-9]+", "_", corpus.lower()).strip("_")
    return name if name[:1].isalpha() else f"corpus_{name}"


def _datasets(corpus: epath.Path) -> list[epath.Path]:
    return [found.parent for found in (corpus / FOLDER).glob(f"*/{VERSION}/dataset_info.json")]


def _plan(chunks: Sequence[tuple[Chunk, int, int]]) -> list[list[Span]]:
    """Which documents each ArrayRecord file of a split holds: files of equal bytes, as far as those of chunks tell."""
    total = sum(size for _, _, size in chunks)
    files = min(-(-total // _SHARD_BYTES), _MOST_SHARDS)
    plan: list[list[Span]] = [[] for _ in range(files)]
    start = 0
    for chunk, count, size in chunks:
        first, last = (at * files // total for at in (start, start + size - 1))
        # Where in the chunk each of these files ends, its documents taken to be of one size.
        cuts = [count * max(0, total * (file + 1) // files - start) // size for file in range(first, last)]
        for file, (skip, stop) in enumerate(pairwise([0, *cuts, count]), first):
            if skip < stop:
                plan[file].append(Span(chunk, skip, stop - skip))
        start += size
    return [spans for spans in plan if spans]


class DocumentReader:
    """Random access to the documents of one split, in the order of its tokens."""

    def __init__(self, corpus: str | os.PathLike[str], split: Split, sums: Mapping[str, FileSum] | None = None) -> None:
        """Opens the documents of a prepared corpus.

        Args:
            corpus: its folder.
            split: of it.
            sums: what each file of the corpus must be before it is used; None: they are trusted.

        Raises:
            DamagedError: if they are missing, altered, or cannot be read.
        """
        self._folder = epath.Path(corpus) / FOLDER
        ours = {file: expected for file, expected in (sums or {}).items() if file.startswith(f"{FOLDER}/")}
        self._sums = {os.path.basename(file): expected for file, expected in ours.items()}
        for file in ours:
            if file.endswith(".json"):  # what the files of documents are opened by
                self._check(epath.Path(corpus) / file)
        with self._readable():
            (folder,) = _datasets(epath.Path(corpus))
            info: Any = tfds.builder_from_directory(folder).info  # its decorators hide the types of its methods
            found = info.splits[split]
            self._features, self._files = info.features, found.filepaths
            self._ends = np.cumsum(found.shard_lengths)
        self._open: dict[int, ArrayRecordDataSource] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> tuple[str, str]:
        """Text and identity of a document."""
        return next(self.read(position, position + 1))

    def read(self, start: int, stop: int) -> Iterator[tuple[str, str]]:
        """Text and identity of documents [start, stop).

        Raises:
            DamagedError: if a file is missing or cannot be read.
        """
        for file in range(int(np.searchsorted(self._ends, start, side="right")), len(self._files)):
            begin = int(self._ends[file - 1]) if file else 0
            if begin >= stop:
                return
            wanted = range(max(start, begin) - begin, min(stop, int(self._ends[file])) - begin)
            for at in range(wanted.start, wanted.stop, _RECORDS):
                with self._readable():
                    places = range(at, min(at + _RECORDS, wanted.stop))
                    records = self._opened(file).__getitems__(places)
                    found = [self._features.deserialize_example_np(record) for record in records]
                for record in found:
                    yield record["text"].decode(), record["identity"].decode()

    def _opened(self, file: int) -> ArrayRecordDataSource:
        if file not in self._open:
            while len(self._open) >= _MOST_OPEN:  # each is an open file
                self._open.pop(next(iter(self._open))).__exit__(None, None, None)
            self._check(self._files[file])
            self._open[file] = ArrayRecordDataSource([os.fspath(local_copy(self._files[file]))])
        return self._open[file]

    def _check(self, path: AnyPath) -> None:
        expected = self._sums.get(os.path.basename(path))
        if expected and (what := damage_of(path, expected)):
            raise DamagedError(f"{path}: this file of the corpus {what}; run 'gpt1 prepare' again to rebuild it")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except GPT1Error:  # which says itself what it is
            raise
        except Exception as error:  # the libraries raise many kinds
            raise DamagedError(
                f"{self._folder}: the documents cannot be read: {error}; run 'gpt1 prepare' again to rebuild them"
            ) from None


def read_documents(
    corpus: str | os.PathLike[str], split: Split, sums: Mapping[str, FileSum] | None = None
) -> Iterator[tuple[str, str]]:
    """Text and identity of every document of a split, in the order of its tokens; ``sums`` as of a reader.

    Raises:
        UserError: if there is no such split.
        DamagedError: if the documents are missing or cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"'{split}' is no split of a corpus; there are train and validation")
    reader = DocumentReader(corpus, split, sums)
    return reader.read(0, len(reader))
