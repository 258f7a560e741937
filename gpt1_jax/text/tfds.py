"""Documents from TensorFlow Datasets, read through ``as_data_source``: no TensorFlow is needed."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gpt1_jax.errors import UserError
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
        self._builder: Any  # its decorators hide the types of its methods
        try:
            if Path(config.dataset).is_dir():
                self._builder = tfds.builder_from_directory(config.dataset)
            else:
                self._builder = tfds.builder(config.dataset, data_dir=config.data_dir, file_format="array_record")
        except Exception as error:  # the library raises many kinds, its own and of others
            raise UserError(f"data.sources: dataset '{config.dataset}' cannot be found by tfds: {error}") from None
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
        config = self._config
        try:
            if not Path(config.dataset).is_dir():
                with contextlib.redirect_stdout(sys.stderr):  # standard output is for the command's result
                    self._builder.download_and_prepare(file_format="array_record")
            return self._builder.as_data_source(config.split)
        except Exception as error:
            raise UserError(
                f"data.sources: dataset '{config.dataset}', split '{config.split}': {error}; splits: "
                f"{', '.join(self._builder.info.splits) or 'none'}. A dataset built with TensorFlow's own format must "
                "be built again with file_format array_record"
            ) from None

    def _check_field(self) -> None:
        features = self._builder.info.features
        for key in ("text_field", "identity_field"):
            field = getattr(self._config, key)
            if field is not None and field not in (features or ()):
                raise UserError(
                    f"data.sources: dataset '{self._config.dataset}' has no feature {key}='{field}'; it has: "
                    f"{', '.join(features or ()) or 'none'}"
                )
