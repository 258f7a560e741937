import json
import pickle
from pathlib import Path

import pytest

from gpt1_jax.config import Decontamination
from gpt1_jax.errors import UserError
from gpt1_jax.text.contamination import Contamination, load_contamination

# Fifteen words, so three passages of thirteen; then eight, which count as a whole; then seven, which do not.
LONG = "Alice was beginning to get very tired of sitting by her sister on the bank."
SHORT = "What is the capital city of old Bohemia?"
TINY = "All happy families are alike in ways."


def load(folder: Path, texts: tuple[str, ...] = (LONG, SHORT, TINY), **keys) -> Contamination:
    lines = "".join(json.dumps({"question": text}) + "\n" for text in texts)
    (folder / "eval.jsonl").write_text(lines, encoding="utf-8")
    return load_contamination(
        Decontamination(paths=(str(folder / "*.jsonl"),), text_field="question", **keys), max_chars=1000
    )


@pytest.mark.parametrize(
    ("text", "passage"),
    [
        (f"He read: {LONG} Then he slept.", "alice was beginning to get very tired of sitting by her sister on"),
        ("BEGINNING to get VERY tired,\nof sitting by her\tsister; on (the) grass", None),  # twelve words
        (
            "WAS _beginning_ to get VERY tired,\nof sitting by her\tsister; on (the) -- grass",
            "was beginning to get very tired of sitting by her sister on the",
        ),
        ("what is the capital city of old bohemia", "what is the capital city of old bohemia"),
        ("Tell me: what is the capital city of new Bohemia", None),
        (f"{TINY} {TINY}", None),
        ("", None),
    ],
)
def test_a_passage_is_found_whatever_its_case_and_punctuation(tmp_path: Path, text: str, passage: str | None):
    contamination = load(tmp_path)
    assert contamination.find(text) == passage
    assert pickle.loads(pickle.dumps(contamination)).find(text) == passage


def test_every_passage_of_a_text_is_looked_for(tmp_path: Path):
    words = [f"w{number}" for number in range(40)]
    contamination = load(tmp_path, (" ".join(words),))
    for start in range(28):
        assert contamination.find(" ".join(["x", *words[start : start + 13], "y"])) is not None
        assert contamination.find(" ".join(["x", *words[start : start + 12], "y"])) is None


def test_the_lengths_can_be_chosen(tmp_path: Path):
    assert load(tmp_path, ngram=5).find("so very tired of sitting by himself") == "very tired of sitting by"
    assert load(tmp_path, min_words=7).find(TINY) is not None
    assert load(tmp_path, min_words=20).find(SHORT) is None


def test_the_settings_tell_the_contents_apart(tmp_path: Path):
    first, again, other = load(tmp_path), load(tmp_path), load(tmp_path, (LONG, SHORT, TINY.upper()))
    assert first.settings() == again.settings() != other.settings()
    assert {"paths", "text_field", "ngram", "min_words", "files"} == set(first.settings())
    json.dumps(first.settings())


def test_empty_texts_are_passed_over(tmp_path: Path):
    assert load(tmp_path, ("", LONG)).find(LONG) is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"answer": "yes"}', r".*/eval.jsonl:1: missing_field: .*'question'.*mend it"),
        ("{", r".*/eval.jsonl:1: invalid_json"),
        ('{"question": "too few words"}', r"no text in .* has 8 words.*lower min_words"),
    ],
)
def test_texts_that_would_not_be_looked_for_are_refused(tmp_path: Path, line: str, message: str):
    (tmp_path / "eval.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=rf"^data.cleaning.decontaminate: {message}"):
        load_contamination(Decontamination(paths=(str(tmp_path / "*"),), text_field="question"), 1000)


def test_a_missing_file_is_named_by_the_key_that_asks_for_it(tmp_path: Path):
    with pytest.raises(UserError, match=r"^data.cleaning.decontaminate: paths: .*matches no file"):
        load_contamination(Decontamination(paths=(str(tmp_path / "none.txt"),)), 1000)
