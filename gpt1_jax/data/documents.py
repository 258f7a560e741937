"""The cleaned documents of a corpus: a TFDS dataset in ArrayRecord files, written and read without TensorFlow."""

import array
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle, writer
from tensorflow_datasets.proto import tf_example_pb2

from gpt1_jax.data.manifest import Split
from gpt1_jax.errors import DamagedError, StorageError, UserError

FOLDER = "documents"
Records = Mapping[Split, Callable[[], Iterator[dict[str, str]]]]  # what generates the records of each split
_SHUFFLER = shuffle.Shuffler


class _InOrder:
    """Takes the place of TFDS's ``Shuffler`` for records that come in order: they wait in a file for their shard.

    Above a gigabyte TFDS's own keeps them in files that only TensorFlow can open, and sorts them all in memory.
    """

    def __init__(self, dirpath: Any, **_: Any) -> None:
        self._file = tempfile.TemporaryFile(dir=dirpath)
        self._sizes = array.array("Q")
        self.size = 0  # bytes

    @property
    def num_examples(self) -> int:
        return len(self._sizes)

    @property
    def bucket_lengths(self) -> list[int]:
        return [len(self._sizes)]

    def add(self, key: int, data: bytes) -> None:
        self._file.write(data)
        self._sizes.append(len(data))
        self.size += len(data)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self._file as file:
            file.seek(0)
            for key, size in enumerate(self._sizes):
                yield key, file.read(size)


class _DeterministicWriter(writer.ExampleWriter):
    """Writes the fields of a record in a fixed order: protobuf's maps have a different one in every process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, _ordered(example)) for key, example in examples))


def _ordered(example: bytes) -> bytes:
    # pyrefly: ignore[missing-attribute]  # protobuf makes the class when the module is imported
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Text, identity and source of every cleaned document, in the order in which they were read."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Records, **kwargs: Any) -> None:
        self._records = splits
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Cleaned documents of a prepared corpus.",
            features=tfds.features.FeaturesDict({"text": text(), "identity": text(), "source": text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(split) for split in self._records}

    def _example_writer(self) -> writer.ExampleWriter:
        return _DeterministicWriter(self.info.file_format)

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(self._records[split]())


def write_documents(splits: Records, folder: Path, work: Path) -> None:
    """Writes the documents of the splits into ``folder``, by way of ``work``, which is emptied first and last.

    Raises:
        StorageError: if the disk is full or failing.
    """
    shutil.rmtree(work, ignore_errors=True)
    builder = Documents(splits, data_dir=work, file_format="array_record")
    config = tfds.download.DownloadConfig(register_checksums=False, try_download_gcs=False)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # what TFDS prints there is not this command's result
        try:
            # TFDS offers no other way to choose it.
            shuffle.Shuffler = _InOrder  # pyrefly: ignore[bad-assignment]  # it has what the writer uses
            builder.download_and_prepare(download_config=config)
        except RuntimeError as error:  # how ArrayRecord reports a failed write
            raise StorageError(
                f"{folder}: the documents cannot be written: {error}; make room or set data.root elsewhere, and run "
                "the same command again"
            ) from None
        finally:
            shuffle.Shuffler = _SHUFFLER
    shutil.rmtree(folder, ignore_errors=True)
    Path(builder.data_dir).rename(folder)
    shutil.rmtree(work)


class DocumentReader:
    """Random access to the documents of one split."""

    def __init__(self, corpus: str | Path, split: Split) -> None:
        """Opens the documents of a prepared corpus.

        Raises:
            DamagedError: if they are missing or cannot be read.
        """
        folder = Path(corpus) / FOLDER
        try:
            builder: Any = tfds.builder_from_directory(folder)  # its decorators hide the types of its methods
            self._records: Sequence[dict[str, bytes]] = builder.as_data_source(split)
        except Exception as error:  # the library raises many kinds
            raise DamagedError(f"{folder}: the documents cannot be read: {error}; prepare the corpus again") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> tuple[str, str]:
        """Text and identity of a document."""
        record = self._records[position]
        return record["text"].decode(), record["identity"].decode()


def read_documents(corpus: str | Path, split: Split) -> Iterator[tuple[str, str]]:
    """Text and identity of every document of a split, in the order of its tokens.

    Raises:
        UserError: if there is no such split.
        DamagedError: if the documents are missing or cannot be read.
    """
    if split not in ("train", "validation"):
        raise UserError(f"'{split}' is no split of a corpus; there are train and validation")
    reader = DocumentReader(corpus, split)
    return (reader[position] for position in range(len(reader)))
