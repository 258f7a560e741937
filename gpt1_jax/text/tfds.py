"""Documents from TensorFlow Datasets, read through ``as_data_source``: no TensorFlow is needed."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gpt1_jax.config import Tfds
from gpt1_jax.errors import UserError
from gpt1_jax.text.document import Document, Skipped, to_document
from gpt1_jax.text.files import file_states


class TfdsSource:
    """A split of a dataset, given by name (prepared if needed, as ArrayRecord) or by the folder of a built one."""

    def __init__(self, config: Tfds) -> None:
        self._config = config
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

    def settings(self) -> dict[str, Any]:
        """The dataset with its version, and the files of one that is built already."""
        folder = Path(self._config.dataset)
        files = sorted(str(path) for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        return {
            **self._config.model_dump(exclude={"weight", "data_dir"}),
            "version": self._builder.info.full_name,
            "files": file_states(files),
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The records in the order of the split.

        Raises:
            UserError: if the dataset cannot be built, has no such split, or a format without random access.
        """
        config = self._config
        try:
            if not Path(config.dataset).is_dir():
                with contextlib.redirect_stdout(sys.stderr):  # standard output is for the command's result
                    self._builder.download_and_prepare(file_format="array_record")
            records = self._builder.as_data_source(config.split)
        except Exception as error:
            raise UserError(
                f"data.sources: dataset '{config.dataset}', split '{config.split}': {error}; splits: "
                f"{', '.join(self._builder.info.splits) or 'none'}. A dataset built with TensorFlow's own format must "
                "be built again with file_format array_record"
            ) from None
        for row in range(len(records)):
            value = records[row][config.text_field]
            yield to_document(value, f"{self.name}:{row}", config.text_field)

    def _check_field(self) -> None:
        features = self._builder.info.features
        if features is None or self._config.text_field not in features:
            raise UserError(
                f"data.sources: dataset '{self._config.dataset}' has no feature "
                f"text_field='{self._config.text_field}'; it has: {', '.join(features or ()) or 'none'}"
            )
