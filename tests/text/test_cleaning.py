import pytest

from gpt1_jax.config import CleaningConfig
from gpt1_jax.source_config import Quality
from gpt1_jax.text.cleaning import clean, standardize
from gpt1_jax.text.document import Document, Skipped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one—two–three―four", "one - two - three - four"),
        ("wait… no´s", "wait... no's"),
        ("Really?!", "Really ? !"),
        ("what??? (yes)", "what ??? ( yes )"),
        ('"hi," he\tsaid', '" hi , " he said'),
        ("a  \n\n  b\r\nc", "a \n b \n c"),
        ("back\\slash + a_b", "back\\slash + a _ b"),  # the authors' pattern misses backslashes
        ("  end.  ", "end."),
    ],
)
def test_standardize_is_the_authors(text, expected):
    assert standardize(text) == expected


def cleaned(text, **settings):
    return clean(Document(text, "id"), CleaningConfig(**{"min_chars": 1, **settings}), Quality())


def test_unicode_is_repaired_only_if_asked():
    assert cleaned("schÃ¶n &lt;3").text == "schön <3"
    assert cleaned("schÃ¶n", fix_unicode=False).text == "schÃ¶n"


def test_standardize_is_an_option():
    assert cleaned("a—b") == Document("a—b", "id")
    assert cleaned("a—b", standardize=True) == Document("a - b", "id")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("abc", "too_short"), ("abcd", None), ("a" * 8, None), ("a" * 9, "too_long"), ("ab\ud800cd", "surrogates")],
)
def test_filters(text, reason):
    result = cleaned(text, min_chars=4, max_chars=8)
    assert (result.reason if isinstance(result, Skipped) else None) == reason
