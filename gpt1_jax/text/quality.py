"""Quality: which documents of a source are kept, by language and by the rules published for web pages.

References: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher"
(arXiv 2112.11446), appendix A.1.1, for ``symbols`` here and for :mod:`gpt1_jax.text.repetition`.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

from gpt1_jax.errors import UserError, nearest
from gpt1_jax.source_config import Quality
from gpt1_jax.text.document import GUTENBERG, LANGUAGE, REPETITION, SYMBOLS, TOO_SHORT, Document, Skipped
from gpt1_jax.text.gutenberg import strip_gutenberg
from gpt1_jax.text.repetition import repetition_measures

_LANGUAGE_CHARS = 4000  # of a document are classified: the library is sure of most after 300
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "▪", "◦", "-", "*")
_ELLIPSES = ("...", "…")
_LETTER = re.compile(r"[^\W\d_]")


def check_quality(quality: Quality) -> None:
    """Finds, before any work, what would stop :func:`apply_quality`.

    Raises:
        UserError: if a language is asked for and the library is not installed, or does not know it.
    """
    if quality.languages:
        known = _identifier().labels
        for code in quality.languages:
            if code not in known:
                raise UserError(
                    f"data.sources: quality.languages: '{code}' is no language that py3langid knows"
                    f"{nearest(code, known)}; it knows: {', '.join(sorted(known))}"
                )


def apply_quality(document: Document, quality: Quality) -> Document | Skipped:
    """The document, without the licence of Project Gutenberg if that is asked for, or the first rule that it breaks.

    A pure function, in the order: ``gutenberg``, ``languages``, ``symbols``, ``repetition``.

    Returns:
        The document, or why it is dropped: ``language``, ``symbols`` or ``repetition``, with the rule, the value and
        the limit in its detail; ``too_short`` if the markers of Project Gutenberg hold nothing between them.
    """
    text, identity, cut = document.text, document.identity, None
    if quality.gutenberg:
        text = strip_gutenberg(text)
        cut = GUTENBERG if text != document.text else None
        if not text:
            return Skipped(identity, TOO_SHORT, "nothing stands between the markers of Project Gutenberg")
    if quality.languages and (detail := _foreign(text, quality)):
        return Skipped(identity, LANGUAGE, detail)
    for asked, reason, measures in (
        (quality.symbols, SYMBOLS, _symbol_measures),
        (quality.repetition, REPETITION, repetition_measures),
    ):
        for rule, value, low, high in measures(text) if asked else ():
            if not low <= value <= high:
                limit = f"at least {low:,}" if value < low else f"at most {high:,}"
                return Skipped(identity, reason, f"{rule}: {value:,.6g}; {limit}")
    return Document(text, identity, cut)


def _foreign(text: str, quality: Quality) -> str | None:
    """What is wrong with the language, if anything: the probability that it is one of those asked for is too low."""
    ranked = _identifier().rank(text[:_LANGUAGE_CHARS])
    probability = sum(share for language, share in ranked if language in quality.languages)
    if probability >= quality.min_language_probability:
        return None
    asked = ", ".join(quality.languages)
    limit = f"quality.min_language_probability={quality.min_language_probability}"
    return f"probability of being in {asked}: {probability:.3f}; {limit}; most likely '{ranked[0][0]}'"


@functools.cache
def _identifier() -> Any:
    """The model of the library, read once in each process: half a second."""
    try:
        library: Any = importlib.import_module("py3langid.langid")
    except ImportError as error:
        raise UserError(
            f"data.sources: quality.languages needs the 'py3langid' library, which cannot be imported ({error}); "
            "install it with: pip install 'gpt1-jax[quality]'"
        ) from None
    return library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)


def _symbol_measures(text: str) -> Iterator[tuple[str, float, float, float]]:
    """The rules on words, symbols and lines: what is measured, its value, and the least and the most it may be.

    Words are what stands between white space, lines are those that are not blank. The paper does not list the bullets
    that it counts.
    """
    words = text.split()
    yield "words", len(words), 50, 100_000
    yield "mean length of a word", sum(map(len, words)) / len(words), 3, 10
    yield "hash signs for each word", text.count("#") / len(words), 0, 0.1
    yield "ellipses for each word", sum(map(text.count, _ELLIPSES)) / len(words), 0, 0.1
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    yield "share of bullet lines", sum(line.startswith(_BULLETS) for line in lines) / len(lines), 0, 0.9
    yield "share of lines cut off by an ellipsis", sum(line.endswith(_ELLIPSES) for line in lines) / len(lines), 0, 0.3
    yield "share of words with a letter", sum(1 for word in words if _LETTER.search(word)) / len(words), 0.8, 1
    found = {word.strip(".,;:!?\"'()[]").lower() for word in words}
    yield "different English stop words", len(_STOP_WORDS & found), 2, len(_STOP_WORDS)
