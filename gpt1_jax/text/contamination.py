"""Contamination: documents that hold a passage of an evaluation text, so that a model would have read the answers.

Reference: Brown et al. 2020, "Language Models are Few-Shot Learners" (GPT-3, arXiv 2005.14165), appendix C: passages of
13 words, compared in lower case and without punctuation; examples of fewer words are compared whole, down to 8.

Deviation: a document that holds a passage is dropped; GPT-3 cuts out 200 characters around each and keeps the pieces
of a document with up to ten. Every passage counts; GPT-3 ignores those found in more than ten training documents,
which a function of one document cannot know. So evaluation texts should not hold what many documents do, such as the
wording of a licence, and long documents, such as whole books, are lost for one quotation.
"""

from typing import Any

from gpt1_jax.config import Decontamination
from gpt1_jax.errors import UserError
from gpt1_jax.source_config import Files
from gpt1_jax.text.document import Document
from gpt1_jax.text.files import FilesSource
from gpt1_jax.text.words import ngrams, normal_words

_KEY = "data.cleaning.decontaminate"


class Contamination:
    """The passages of evaluation texts, to be looked for in documents; it can be pickled."""

    def __init__(self, passages: frozenset[str], settings: dict[str, Any]) -> None:
        self._passages = passages
        self._lengths = sorted({passage.count(" ") + 1 for passage in passages}, reverse=True)
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        """The keys, and the states of the files, for the corpus's fingerprint."""
        return self._settings

    def find(self, text: str) -> str | None:
        """A passage that the text shares with the evaluation texts, in lower case without punctuation; None if none.

        Of several the first of the longest, so that the result does not depend on the process.
        """
        words = normal_words(text)
        return next((gram for n in self._lengths for gram in ngrams(words, n) if gram in self._passages), None)


def load_contamination(config: Decontamination, max_chars: int) -> Contamination:
    """Reads the evaluation texts.

    Args:
        config: where they are, and what counts as a passage.
        max_chars: ``data.cleaning.max_chars``; an evaluation text that is longer is refused.

    Raises:
        UserError: if a file is not there, a text cannot be read, or no text has enough words to be looked for.
        StorageError: if remote storage cannot be reached.
    """
    passages: set[str] = set()
    try:
        source = FilesSource(Files(kind="files", paths=config.paths, text_field=config.text_field), max_chars)
        states = source.settings()["files"]
    except UserError as error:  # which says that it is about data.sources
        raise UserError(str(error).replace("data.sources", _KEY)) from None
    for item in source.read():
        if isinstance(item, Document):
            words = normal_words(item.text)
            passages |= set(ngrams(words, config.ngram))
            if config.min_words <= len(words) < config.ngram:
                passages.add(" ".join(words))
        elif item.reason != "empty":  # it would be looked for in no document
            raise UserError(f"{_KEY}: {item.identity}: {item.reason}: {item.detail}; mend it or leave it out of paths")
    if not passages:
        raise UserError(
            f"{_KEY}: no text in {' '.join(config.paths)} has {min(config.min_words, config.ngram)} words, so nothing "
            "would be looked for; lower min_words, or give other paths"
        )
    return Contamination(frozenset(passages), {**config.model_dump(mode="json"), "files": states})
