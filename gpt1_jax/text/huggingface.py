"""Documents read with the ``datasets`` library, an optional extra that is imported only when used."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from gpt1_jax.errors import StorageError, UserError
from gpt1_jax.source_config import HuggingFace
from gpt1_jax.text.document import Document, Skipped, named, to_document
from gpt1_jax.text.files import file_states, matched


class HuggingFaceSource:
    """A split of a dataset, streamed shard by shard; a document's identity names shard and row."""

    def __init__(self, config: HuggingFace, shards: range | None = None) -> None:
        self._config = config
        self._shards = shards  # None: all
        self.name = f"huggingface:{config.dataset}/{config.split}"
        self.label = config.dataset.rpartition("/")[2]
        self._library = datasets_library("data.sources")
        self._files = matched(config.files)
        local = config.files and not any("://" in path for path in self._files)
        self.network = None if local else f"the 'datasets' library streams {config.dataset} from the Hugging Face hub"

    def __reduce__(self) -> tuple:
        return HuggingFaceSource, (self._config, self._shards)

    def settings(self) -> dict[str, Any]:
        """The dataset, the split, and the states of its data files if it has any."""
        return {
            **self._config.model_dump(mode="json", exclude={"weight", "quality"}),
            "states": file_states(self._files),
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The records in the order of the split.

        Raises:
            UserError: if the dataset or the split cannot be opened.
            StorageError: if it cannot be read to its end.
        """
        records, field = self._records(), self._config.text_field
        count = records.num_shards
        for shard in range(count) if self._shards is None else self._shards:
            try:
                for row, record in enumerate(records.shard(count, shard)):
                    document = to_document(record.get(field), f"{self.name}:{shard}:{row}", field)
                    yield named(document, record, self._config.identity_field)
            except Exception as error:  # of the network, mostly; the library raises many kinds
                raise StorageError(
                    f"{self.name}: shard {shard} cannot be read: {type(error).__name__}: {error}; run the same command "
                    "again"
                ) from None

    def split(self) -> Sequence["HuggingFaceSource"]:
        """A shard each."""
        return [HuggingFaceSource(self._config, range(n, n + 1)) for n in range(self._records().num_shards)]

    def _records(self) -> Any:
        config = self._config
        try:
            return self._library.load_dataset(
                config.dataset, config.subset, data_files=self._files or None, split=config.split, streaming=True
            )
        except Exception as error:  # the library raises many kinds, its own and of others
            raise UserError(f"data.sources: dataset '{config.dataset}', split '{config.split}': {error}") from None


def datasets_library(key: str) -> Any:
    """The ``datasets`` library; ``key`` is what asks for it.

    Raises:
        UserError: if it cannot be imported.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{key}: kind 'huggingface' needs the 'datasets' library, which cannot be imported ({error}); "
            "install it with: pip install 'gpt1-jax[huggingface]'"
        ) from None
