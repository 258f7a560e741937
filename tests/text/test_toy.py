import itertools
import re

import pytest

from gpt1_jax.text.toy import toy_rows

LANGUAGE, DIALOGUE = "toy_language", "toy_dialogue"


def key(row):
    """What an example asks."""
    if "english" in row:
        return row["english"]
    return tuple(message["content"] for message in row["messages"] if message["role"] != "assistant")


@pytest.mark.parametrize("kind", [LANGUAGE, DIALOGUE])
def test_examples_are_different_and_in_one_split_whatever_the_seed(kind):
    splits = {
        (split, seed): list(toy_rows(kind, split, 1000, seed)) for split in ("train", "validation") for seed in (0, 1)
    }
    asked = {name: {key(row) for row in rows} for name, rows in splits.items()}
    assert all(len(questions) == 1000 for questions in asked.values())
    for one, other in itertools.product((0, 1), repeat=2):
        assert not asked["train", one] & asked["validation", other]
    assert splits["train", 0] != splits["train", 1]


@pytest.mark.parametrize("kind", [LANGUAGE, DIALOGUE])
def test_the_same_arguments_give_the_same_rows_and_fewer_are_the_first(kind):
    rows = list(toy_rows(kind, "train", 50, 3))
    assert list(toy_rows(kind, "train", 20, 3)) == rows[:20]


def test_rows_do_not_change_with_versions():
    (pair,) = toy_rows(LANGUAGE, "train", 1, 0)
    assert pair == {
        "english": "two farmers knew the red horses",
        "toy": "hupela du tandolanu rikelanu so wensako",
    }
    (conversation,) = toy_rows(DIALOGUE, "train", 1, 0)
    assert [message["content"] for message in conversation["messages"]] == [
        "Answer in capitals.",
        "my name is Jonas",
        "HELLO JONAS",
        "bread river moon",
        "BREAD RIVER MOON",
        "what is my name",
        "YOU ARE JONAS",
    ]


# The lexicon of the toy language, written down once more.
WORDS = dict(
    pair.split("=")
    for pair in (
        "cat=miru dog=belo bird=pave horse=tando snake=sika girl=numa boy=geri king=volo queen=vola farmer=hupe "
        "teacher=lemi doctor=kasu tree=dafo house=zune ship=rabi flower=jolu red=rike blue=bano old=tol young=fim "
        "big=gran small=pit happy=yuno quiet=shem see=lonte saw=lonte love=amire loved=amire find=tesko found=tesko "
        "follow=sivu followed=sivu hear=oldi heard=oldi draw=krapi drew=krapi need=begu needed=begu know=wensa "
        "knew=wensa the=so a=hi an=hi two=du"
    ).split()
)
SENTENCE = re.compile(
    r"(?P<a1>the|an?|two) (?:(?P<j1>\w+) )??(?P<n1>\w+) (?:(?P<aux>do|does|did) (?P<neg>not) )?(?P<verb>\w+) "
    r"(?P<a2>the|an?|two) (?:(?P<j2>\w+) )?(?P<n2>\w+)"
)
NOUNS = set(list(WORDS)[:16])


def translated(english: str) -> str:
    """The rules of the toy language, applied to what an expression makes of a sentence."""
    part = SENTENCE.fullmatch(english)
    assert part, english

    def phrase(number, case):
        noun = part[f"n{number}"]
        suffix = ("" if noun in NOUNS else "la") + case
        adjective = part[f"j{number}"]
        words = [WORDS[noun if noun in NOUNS else noun[:-1]] + suffix]
        return [*words, *([WORDS[adjective] + suffix] if adjective else []), WORDS[part[f"a{number}"]]]

    verb, stem = part["verb"], part["verb"].removesuffix("s")
    present = (
        part["aux"] in ("do", "does") if part["aux"] else stem in "see love find follow hear draw need know".split()
    )
    ending = "ti" if present else "ko"
    toy = phrase(1, "") + phrase(2, "nu") + [WORDS.get(verb) or WORDS[stem]]
    return " ".join(toy) + ending + " ne" * bool(part["neg"])


def test_sentences_follow_the_rules():
    rows = list(toy_rows(LANGUAGE, "train", 2000, 5))
    assert [row["toy"] for row in rows] == [translated(row["english"]) for row in rows]
    said = {word for row in rows for word in row["english"].split()}
    assert {"an", "does", "do", "did", "sees", "see", "saw", "cats", "cat"} <= said
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", row["english"]) for row in rows)


def test_the_documented_sentence():
    assert translated("the old cats did not see a red bird") == "mirula tolla so pavenu rikenu hi lonteko ne"


RULES = {
    "Repeat the words.": lambda words: " ".join(words),
    "Answer in capitals.": lambda words: " ".join(words).upper(),
    "Answer backwards, word by word.": lambda words: " ".join(reversed(words)),
    "Repeat the first word.": lambda words: words[0],
    "Repeat the last word.": lambda words: words[-1],
}


def test_answers_follow_from_the_rule_and_from_what_was_said():
    rules, turns, asked = set(), set(), 0
    for row in toy_rows(DIALOGUE, "validation", 500, 5):
        system, *rest = row["messages"]
        assert [message["role"] for message in row["messages"]] == ["system"] + ["user", "assistant"] * (len(rest) // 2)
        name = None
        for question, answer in zip(rest[::2], rest[1::2], strict=True):
            said = question["content"]
            if said.startswith("my name is "):
                name = said.split()[-1]
                words = ["hello", name]
            elif said == "what is my name":
                asked += 1
                words = ["you", "are", name]
            else:
                words = said.split()
            assert answer["content"] == RULES[system["content"]](words)
        rules.add(system["content"])
        turns.add(len(rest) // 2)
    assert rules == set(RULES) and turns == {2, 3, 4} and asked > 100
