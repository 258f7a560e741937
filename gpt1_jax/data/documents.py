"""The cleaned documents of a corpus: a TFDS dataset in ArrayRecord files, written and read without TensorFlow."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from gpt1_jax.data.manifest import Split
from gpt1_jax.errors import DamagedError, UserError

FOLDER = "documents"
# For each split the number of its records, and what generates them.
Records = Mapping[Split, tuple[int, Callable[[], Iterator[dict[str, str]]]]]
_KEYS = 2**128  # the range over which TFDS spreads its keys


class _DeterministicWriter(writer.ExampleWriter):
    """Writes the fields of a record in a fixed order: protobuf's maps have a different one in every process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, _ordered(example)) for key, example in examples))


def _ordered(example: bytes) -> bytes:
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
        # Above a gigabyte TFDS sorts records by key in buckets of a 1000th of the range. Keys spread over all of it
        # keep the order and fill the buckets evenly; 0, 1, 2 ... would gather everything in one, in memory.
        count, records = self._records[split]
        for position, record in enumerate(records()):
            yield position * (_KEYS // count), record


def write_documents(splits: Records, folder: Path, work: Path) -> None:
    """Writes the documents of the splits into ``folder``, by way of ``work``, which is emptied first and last."""
    shutil.rmtree(work, ignore_errors=True)
    builder = Documents(splits, data_dir=work, file_format="array_record")
    config = tfds.download.DownloadConfig(register_checksums=False, try_download_gcs=False)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # what TFDS prints there is not this command's result
        builder.download_and_prepare(download_config=config)
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
            self._records = tfds.builder_from_directory(folder).as_data_source(split)
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
