"""Cleaning: a pure function of one document, so that any engine may run it anywhere and in any order."""

import re

import ftfy

from gpt1_jax.config import CleaningConfig
from gpt1_jax.source_config import Quality
from gpt1_jax.text.document import TOO_LONG, TOO_SHORT, Document, Skipped
from gpt1_jax.text.quality import apply_quality

_ASCII = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})  # noqa: RUF001
# The authors' pattern has `\\+` in a string that is not raw: a plus sign, so that backslashes are left alone.
_PUNCTUATION = re.compile(r"""(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)""")
_NEWLINE = re.compile(r"\s*\n\s*")
_SPACE = re.compile(r"[^\S\n]+")


def standardize(text: str) -> str:
    """The authors' ``text_standardize``: ASCII dashes and quotes, spaces around punctuation, single spaces.

    Reference: openai/finetune-transformer-lm, text_utils.py.
    """
    text = _PUNCTUATION.sub(r" \1 ", text.translate(_ASCII))
    text = _NEWLINE.sub(" \n ", text)
    return _SPACE.sub(" ", text).strip()


def clean(document: Document, config: CleaningConfig, quality: Quality) -> Document | Skipped:
    """Repairs, filters and standardises one document.

    Args:
        document: as it was read.
        config: of every document.
        quality: of those of its source.

    Returns:
        The cleaned document, or why it is dropped: ``surrogates`` (not Unicode text), ``too_short``, ``too_long``, or
        for its quality (:func:`gpt1_jax.text.quality.apply_quality`).
    """
    text, identity, cut = document.text, document.identity, None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Skipped(identity, "surrogates", f"half of a surrogate pair, which is not text: {error}")
    if len(text) <= config.max_chars:  # a longer one is not worth repairing
        if config.fix_unicode:
            text = ftfy.fix_text(text)
        judged = apply_quality(Document(text, identity), quality)  # by its lines, which standardising changes
        if isinstance(judged, Skipped):
            return judged
        text, cut = judged.text, judged.cut
        if config.standardize:
            text = standardize(text)
    if len(text) > config.max_chars:
        return Skipped(identity, TOO_LONG, f"{len(text):,} characters; data.cleaning.max_chars={config.max_chars:,}")
    if len(text) < config.min_chars:
        return Skipped(identity, TOO_SHORT, f"{len(text)} characters; data.cleaning.min_chars={config.min_chars}")
    return Document(text, identity, cut)
