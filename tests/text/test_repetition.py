from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest

from gpt1_jax.source_config import Quality
from gpt1_jax.text.document import Document, Skipped
from gpt1_jax.text.quality import apply_quality
from gpt1_jax.text.repetition import repetition_measures


def values(text: str) -> dict[str, float]:
    return {rule: value for rule, value, _, _ in repetition_measures(text)}


def dropped(text: str) -> str | None:
    result = apply_quality(Document(text, "id"), Quality(repetition=True))
    return result.detail if isinstance(result, Skipped) else None


def fresh(count: int, kind: str = "") -> list[str]:
    """Words of eight characters, none of which comes again."""
    return [f"{kind:x<4}{number:04}" for number in range(count)]


def test_lines_and_paragraphs_by_hand():
    # 6 lines of 2, 2, 2, 4, 2, 4 characters; 3 are repeats, of 2 + 2 + 4 = 8 of 16 characters.
    # 4 paragraphs of 2, 5, 4, 7 characters ("aa", "aa\nbb", "cccc", "aa\ncccc"), none of them repeated.
    text = "aa\n\n aa \nbb\n\n\ncccc\n \naa\ncccc"
    assert list(values(text).items())[:4] == [
        ("share of lines that are duplicates", 3 / 6),
        ("share of characters in duplicate lines", 8 / 16),
        ("share of paragraphs that are duplicates", 0),
        ("share of characters in duplicate paragraphs", 0),
    ]
    assert values("one\ntwo\n\nx\n\none\ntwo\n\nx")["share of paragraphs that are duplicates"] == 2 / 4
    assert values("one\ntwo\n\nx\n\none\ntwo\n\nx")["share of characters in duplicate paragraphs"] == 8 / 16


def test_ngrams_by_hand():
    # "a b" comes three times, overlapping nothing: 6 of 10 letters; "a b c" twice: 6 of 10; 4-grams come once.
    assert values("a b c x a b c y a b") == {
        "share of lines that are duplicates": 0,
        "share of characters in duplicate lines": 0,
        "share of paragraphs that are duplicates": 0,
        "share of characters in duplicate paragraphs": 0,
        "share of characters in the most frequent 2-gram": 6 / 10,
        "share of characters in the most frequent 3-gram": 6 / 10,
    }
    # Of the seven 5-grams the last six are repeats, and lie on the last ten of eleven words.
    assert values("a " * 11)["share of characters in duplicate 5-grams"] == 10 / 11


@pytest.mark.parametrize("mark", ["\n", "\n\n"], ids=["lines", "paragraphs"])
def test_the_limit_on_the_number_of_duplicates(mark: str):
    def text(repeats: int) -> str:  # ten parts, of which the repeats are short
        return mark.join([" ".join(fresh(30, f"{part}")) for part in range(9 - repeats)] + ["end"] * (repeats + 1))

    assert dropped(text(3)) is None
    assert "s that are duplicates: 0.4; at most 0.3" in (dropped(text(4)) or "")


@pytest.mark.parametrize("mark", ["\n", "\n\n"], ids=["lines", "paragraphs"])
def test_the_limit_on_their_characters(mark: str):
    def text(rest: int) -> str:  # 40 different characters twice, without a space, and other parts
        return mark.join(["x" * 40, "x" * 40] + [str(n) * 20 for n in range(3)] + ["z" * rest])

    assert dropped(text(60)) is None  # 40 of 200
    assert "share of characters in duplicate" in (dropped(text(59)) or "")


@pytest.mark.parametrize(("n", "count"), [(2, 10), (3, 6), (4, 4)])  # n x count of 100 words: 20, 18, 16 %
def test_the_limits_on_the_most_frequent_ngram(n: int, count: int):
    def text(words: int) -> str:
        rest = fresh(words - n * count)
        for position in range(count):
            rest[position * (n + 2) : position * (n + 2)] = fresh(n, "g")
        return " ".join(rest)

    assert dropped(text(100)) is None
    assert f"share of characters in the most frequent {n}-gram" in (dropped(text(99)) or "")


@pytest.mark.parametrize(("n", "percent"), [(5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10)])
def test_the_limits_on_duplicate_ngrams(n: int, percent: int):
    def text(words: int) -> str:  # of 100 n words `percent` times n are repeats, each behind a new word
        parts = [[f"i{number:07}", *fresh(n, f"{number}g")] for number in range(percent)]
        again = [[f"j{number:07}", *part[1:]] for number, part in enumerate(parts)]
        return " ".join(sum(parts + again, fresh(words - 2 * percent * (n + 1))))

    assert dropped(text(100 * n)) is None
    assert f"share of characters in duplicate {n}-grams" in (dropped(text(100 * n - 1)) or "")


def reference(words: list[str], n: int) -> float | None:
    """The same share from tuples of words, counted one by one; None if no n-gram comes again."""
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    if len(set(grams)) == len(grams):
        return None
    again = [start for start, gram in enumerate(grams) if gram in grams[:start]]
    if n < 5:
        counts = Counter(grams)
        most = [gram for gram in grams if counts[gram] == max(counts.values())]
        top = min(most, key=lambda gram: [words.index(word) for word in gram])
        again = [start for start, gram in enumerate(grams) if gram == top]
    under = {place for start in again for place in range(start, start + n)}
    return sum(len(words[place]) for place in under) / sum(map(len, words))


@hypothesis.given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=40))
def test_ngrams_are_those_of_a_plain_count(words: list[str]):
    measured = values(" ".join(words))
    for n in range(2, 11):
        kind = f"the most frequent {n}-gram" if n < 5 else f"duplicate {n}-grams"
        assert measured.get(f"share of characters in {kind}") == reference(words, n)


def test_a_text_of_no_words_repeats_nothing():
    assert set(values("").values()) == {0}
    assert dropped("word") is None
