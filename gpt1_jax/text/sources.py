"""From a source's configuration to the source."""

from gpt1_jax.source_config import Files, HuggingFace, PythonDocs, Source, Stories, Tfds
from gpt1_jax.text.document import TextSource
from gpt1_jax.text.files import FilesSource
from gpt1_jax.text.huggingface import HuggingFaceSource
from gpt1_jax.text.python_docs import PythonDocsSource
from gpt1_jax.text.stories import StoriesSource


def open_source(config: Source, max_chars: int) -> TextSource:
    """Opens a source.

    Args:
        config: its section of the configuration.
        max_chars: ``data.cleaning.max_chars``, which bounds what is read into memory at once.

    Raises:
        UserError: if it is not there, or needs a library that is not installed.
    """
    match config:
        case PythonDocs():
            return PythonDocsSource()
        case Stories():
            return StoriesSource(config)
        case Files():
            return FilesSource(config, max_chars)
        case Tfds():
            from gpt1_jax.text.tfds import TfdsSource  # half a second to import, for those who use it

            return TfdsSource(config)
        case HuggingFace():
            return HuggingFaceSource(config)
