"""Documents read with the ``datasets`` library, an optional extra that is imported only when used."""

import importlib
from collections.abc import Iterator
from typing import Any

from gpt1_jax.config import HuggingFace
from gpt1_jax.errors import UserError
from gpt1_jax.text.document import Document, Skipped, to_document
from gpt1_jax.text.files import file_states, matched


class HuggingFaceSource:
    """A split of a dataset, streamed."""

    def __init__(self, config: HuggingFace) -> None:
        self._config = config
        self.name = f"huggingface:{config.dataset}/{config.split}"
        self.label = config.dataset.rpartition("/")[2]
        try:
            self._library: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise UserError(
                f"data.sources: kind 'huggingface' needs the 'datasets' library, which cannot be imported ({error}); "
                "install it with: pip install 'gpt1-jax[huggingface]'"
            ) from None
        self._files = matched(config.files)

    def settings(self) -> dict[str, Any]:
        """The dataset, the split, and the states of its data files if it has any."""
        return {**self._config.model_dump(mode="json", exclude={"weight"}), "states": file_states(self._files)}

    def read(self) -> Iterator[Document | Skipped]:
        """The records in the order of the split.

        Raises:
            UserError: if the dataset or the split cannot be opened.
        """
        config = self._config
        try:
            records = self._library.load_dataset(
                config.dataset, config.subset, data_files=self._files or None, split=config.split, streaming=True
            )
        except Exception as error:  # the library raises many kinds, its own and of others
            raise UserError(f"data.sources: dataset '{config.dataset}', split '{config.split}': {error}") from None
        for row, record in enumerate(records):
            yield to_document(record.get(config.text_field), f"{self.name}:{row}", config.text_field)
