"""Documents from TensorFlow Datasets, read through ``as_data_source``: no TensorFlow is needed."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from gpt1_jax.errors import UserError, nearest
from gpt1_jax.source_config import Tfds
from gpt1_jax.text.document import Document, Skipped, named, parts, to_document
from gpt1_jax.text.files import file_states


class TfdsSource:
    """A split of a dataset, given by name (prepared if needed, as ArrayRecord) or by the folder of a built one."""

    def __init__(self, config: Tfds, rows: range | None = None) -> None:
        self._config = config
        self._rows = rows  # None: all
        self.name = f"tfds:{config.dataset}/{config.split}"
        self.label = config.dataset.strip("/").split("/")[-1 if Path(config.dataset).is_dir() else 0]
        self._builder = open_builder(config.dataset, config.data_dir, "data.sources")
        self._check_field()
        built = Path(self._builder.data_dir).exists()
        size = self._builder.info.download_size
        self.network = None if built else f"TFDS downloads {size} and builds {self._builder.data_dir}"

    def __reduce__(self) -> tuple:
        return TfdsSource, (self._config, self._rows)

    def settings(self) -> dict[str, Any]:
        """The dataset with its version, and the files of one that is built already."""
        folder = Path(self._config.dataset)
        files = sorted(str(path) for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        return {
            **self._config.model_dump(exclude={"weight", "quality", "data_dir"}),
            "version": self._builder.info.full_name,
            "files": file_states(files),
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The records in the order of the split.

        Raises:
            UserError: if the dataset cannot be built, has no such split, or a format without random access.
        """
        records, field = self._records(), self._config.text_field
        for row in range(len(records)) if self._rows is None else self._rows:
            record = records[row]
            document = to_document(record[field], f"{self.name}:{row}", field)
            yield named(document, record, self._config.identity_field)

    def split(self) -> Sequence["TfdsSource"]:
        """Ten thousand records each, or more of very many; builds the dataset if need be."""
        return [TfdsSource(self._config, rows) for rows in parts(range(len(self._records())))]

    def _records(self) -> Any:
        return open_records(self._builder, self._config.dataset, self._config.split, "data.sources")

    def _check_field(self) -> None:
        features = self._builder.info.features
        for key in ("text_field", "identity_field"):
            field = getattr(self._config, key)
            if field is not None and field not in (features or ()):
                raise UserError(
                    f"data.sources: dataset '{self._config.dataset}' has no feature {key}='{field}'; it has: "
                    f"{', '.join(features or ()) or 'none'}"
                )


def open_builder(dataset: str, data_dir: str | None, key: str) -> Any:  # its decorators hide the types of its methods
    """The builder of a dataset, given by name or by the folder of a built one; ``key`` is where it was given.

    Raises:
        UserError: if there is none.
    """
    try:
        if Path(dataset).is_dir():
            return tfds.builder_from_directory(dataset)
        return tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:  # its message lists all of the several hundred names
        known = nearest(dataset, tfds.list_builders(with_community_datasets=False))
        raise UserError(
            f"{key}: dataset '{dataset}' cannot be found by tfds{known}. Without TensorFlow, it does not know the "
            "older of its datasets"
        ) from None
    except Exception as error:  # the library raises many kinds, its own and of others
        raise UserError(f"{key}: dataset '{dataset}' cannot be found by tfds: {error}") from None


def open_records(builder: Any, dataset: str, split: str, key: str) -> Any:
    """The records of a split, a sequence; builds the dataset if need be.

    Raises:
        UserError: if the dataset cannot be built, has no such split, or a format without random access.
    """
    try:
        if not Path(dataset).is_dir():
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the command's result
                builder.download_and_prepare(file_format="array_record")
        return builder.as_data_source(split)
    except Exception as error:
        raise UserError(
            f"{key}: dataset '{dataset}', split '{split}': {error}; splits: "
            f"{', '.join(builder.info.splits) or 'none'}. A dataset built with TensorFlow's own format must "
            "be built again with file_format array_record"
        ) from None


def plain(value: Any, feature: Any) -> Any:
    """A value of a record as text, numbers, lists and dicts; ``feature`` is the library's description of it.

    The library holds a sequence of records as a record of lists; here it is a list of records.

    Raises:
        UnicodeDecodeError: if a text is not UTF-8.
    """
    if isinstance(value, Mapping):
        repeated = isinstance(feature, tfds.features.Sequence)
        fields: Any = feature.feature if repeated else feature
        columns = {name: plain(cell, fields[name]) for name, cell in value.items()}
        if not repeated:
            return columns
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), feature)
    return [plain(item, feature) for item in value] if isinstance(value, list) else value
