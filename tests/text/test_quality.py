import sys

import pytest

from gpt1_jax.errors import UserError
from gpt1_jax.source_config import Quality
from gpt1_jax.text import quality as module
from gpt1_jax.text.document import Document, Skipped
from gpt1_jax.text.quality import apply_quality, check_quality

ENGLISH = "It was a bright cold day in April, and nobody had told the children that the school would be closed. "
GERMAN = "Es war ein heller kalter Tag im April, und niemand hatte den Kindern gesagt, dass die Schule zu ist. "
CHINESE = "四月的一天,天气晴朗而寒冷,没有人告诉孩子们学校会关门。"


def dropped(text: str, **rules) -> str | None:
    """Why a text is dropped, and None if it is kept as it is."""
    result = apply_quality(Document(text, "id"), Quality(**rules))
    if isinstance(result, Document):
        assert result == Document(text, "id")
        return None
    assert result.identity == "id"
    return f"{result.reason}: {result.detail}"


def words(*counted: tuple[int, str]) -> str:
    """ "the" and "and", and as many of each word as it says."""
    return " ".join(["the", "and"] + [word for count, word in counted for _ in range(count)])


def lines(count: int, marked: int, mark: str, at_end: bool = False) -> str:
    """Lines of ten words, so many of them with a mark."""
    line = "the cats and dogs slept all day under our table"
    return "\n".join((line + mark if at_end else mark + line) if n < marked else line for n in range(count))


@pytest.mark.parametrize(
    ("kept", "gone", "rule"),
    [
        (words((48, "cat")), words((47, "cat")), "symbols: words: 49; at least 50"),
        (words((99_998, "cat")), words((99_999, "cat")), "symbols: words: 100,001; at most 100,000"),
        (words((98, "cat")), words((97, "cat"), (1, "a")), "symbols: mean length of a word: 2.98; at least 3"),
        (
            words((97, "x" * 10), (1, "x" * 24)),
            words((97, "x" * 10), (1, "x" * 25)),
            "symbols: mean length of a word: 10.01",
        ),
        (
            words((88, "cat"), (10, "cat#")),
            words((87, "cat"), (11, "cat#")),
            "hash signs for each word: 0.11; at most 0.1",
        ),
        (words((10, "cat..."), (88, "cat")), words((11, "cat..."), (87, "cat")), "ellipses for each word: 0.11"),
        (
            words((10, "cat…"), (88, "cat")),
            words((10, "cat…"), (1, "cat..."), (87, "cat")),
            "ellipses for each word: 0.11",
        ),
        (lines(10, 9, "• "), lines(11, 10, "• "), "share of bullet lines: 0.909091; at most 0.9"),
        (lines(10, 9, "  - "), lines(11, 10, "  - "), "share of bullet lines"),
        (
            lines(10, 3, " ...", True),
            lines(10, 4, "…  ", True),
            "share of lines cut off by an ellipsis: 0.4; at most 0.3",
        ),
        (
            words((78, "cat"), (20, "1984")),
            words((77, "cat"), (21, "1984")),
            "share of words with a letter: 0.79; at least 0.8",
        ),
        ('"The, cats AND ' + 60 * "cats ", "the the " + 60 * "cats ", "different English stop words: 1; at least 2"),
    ],
    ids=lambda value: value.split(";")[0] if ": " in value else "text",
)
def test_each_rule_on_symbols_at_its_limit_and_beyond(kept: str, gone: str, rule: str):
    assert dropped(kept, symbols=True) is None
    assert rule in (dropped(gone, symbols=True) or "")
    assert dropped(gone) is None


def test_a_text_without_words_has_too_few():
    assert dropped(" \n ", symbols=True, repetition=True) == "symbols: words: 0; at least 50"


def test_repetition_is_a_rule_of_its_own():
    text = "\n".join(["the same line of text again and again"] * 20)
    assert dropped(text, symbols=True) is None
    assert dropped(text, repetition=True) == "repetition: share of lines that are duplicates: 0.95; at most 0.3"


def test_the_language_must_be_one_of_those_asked_for():
    assert dropped(ENGLISH, languages=("en",)) is None
    assert dropped(GERMAN, languages=("en", "de")) is None
    reason = dropped(GERMAN, languages=("en", "fr"), min_language_probability=0.5)
    assert reason is not None and reason.startswith("language: probability of being in en, fr: 0.0")
    assert "quality.min_language_probability=0.5" in reason and "most likely 'de'" in reason


def test_the_probabilities_of_the_languages_asked_for_add_up():
    text = "Han skal lese en bok i dag."  # Norwegian and Danish alike
    ranked = dict(module._identifier().rank(text))
    both = ranked["no"] + ranked["da"]
    assert max(ranked["no"], ranked["da"]) < both - 0.01
    assert dropped(text, languages=("no", "da"), min_language_probability=both - 0.005) is None
    assert dropped(text, languages=("no",), min_language_probability=both - 0.005) is not None


def test_only_the_beginning_is_classified():
    assert dropped(ENGLISH * 40 + CHINESE * 1000, languages=("en",)) is None
    assert dropped(CHINESE * 1000 + ENGLISH * 40, languages=("en",)) is not None


def test_an_unknown_language_is_refused_early_with_the_nearest():
    check_quality(Quality(languages=("en", "zh"), symbols=True))
    with pytest.raises(UserError, match=r"quality.languages: 'eng' is no language .*did you mean 'en'.*af, "):
        check_quality(Quality(languages=("de", "eng")))


def test_a_missing_library_is_named_early_and_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    module._identifier.cache_clear()
    check_quality(Quality(symbols=True, repetition=True, gutenberg=True))
    with pytest.raises(UserError, match=r"py3langid.*pip install 'gpt1-jax\[quality\]'"):
        check_quality(Quality(languages=("en",)))


def test_the_licence_goes_before_anything_is_judged():
    text = f"{CHINESE * 90}\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n{ENGLISH}\n"
    quality = Quality(gutenberg=True, languages=("en",))
    assert apply_quality(Document(text, "id"), quality) == Document(ENGLISH.strip(), "id")
    assert dropped(text, languages=("en",)) is not None


def test_nothing_between_the_markers_is_no_document():
    text = "*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\n*** END OF THE PROJECT GUTENBERG EBOOK A ***"
    result = apply_quality(Document(text, "id"), Quality(gutenberg=True))
    assert isinstance(result, Skipped) and result.reason == "too_short"
