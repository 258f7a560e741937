"""Examples made by rules, for trying out translation and conversation without a network.

``toy_language`` pairs English sentences with an invented language of other words and another grammar. The verb comes
last, the object before it; an adjective follows its noun, and the article follows both. Noun and adjective have a
suffix for the plural and one for the object, the verb has one for the tense, and a negation is a word at the end::

    the old cats did not see a red bird  ->  mirula tolla so pavenu rikenu hi lonteko ne

``toy_dialogue`` are conversations in which the system says by what rule to answer, and the user says words, says a
name, or asks for it some turns later.

Which split an example is in is a hash of what is asked, so that no question of one is in the other. Examples are
different from each other within a split, and those of fewer rows are the first of more.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

_HELD_OUT = 8  # one example in so many is of the validation split
_Item = TypeVar("_Item")


class _Draw:
    """Draws; from ``random()`` alone, which gives the same numbers in every version of Python."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def one_of(self, items: Sequence[_Item]) -> _Item:
        return items[int(self._random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self._random() < probability


def toy_rows(
    kind: Literal["toy_language", "toy_dialogue"], split: Literal["train", "validation"], rows: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Examples of a split: records of ``english`` and ``toy``, or of ``messages``, each a role and a content.

    The same arguments give the same examples.
    """
    draw = _Draw(f"{kind}/{split}/{seed}")
    make: Callable[[_Draw], tuple[str, dict[str, Any]]] = _sentence if kind == "toy_language" else _dialogue
    seen: set[bytes] = set()
    while len(seen) < rows:
        asked, record = make(draw)
        digest = hashlib.sha256(asked.encode()).digest()[:16]
        if (digest[0] % _HELD_OUT == 0) == (split == "validation") and digest not in seen:
            seen.add(digest)
            yield record


_NOUNS: Mapping[str, str] = {
    "cat": "miru",
    "dog": "belo",
    "bird": "pave",
    "horse": "tando",
    "snake": "sika",
    "girl": "numa",
    "boy": "geri",
    "king": "volo",
    "queen": "vola",
    "farmer": "hupe",
    "teacher": "lemi",
    "doctor": "kasu",
    "tree": "dafo",
    "house": "zune",
    "ship": "rabi",
    "flower": "jolu",
}
_ADJECTIVES: Mapping[str, str] = {
    "red": "rike",
    "blue": "bano",
    "old": "tol",
    "young": "fim",
    "big": "gran",
    "small": "pit",
    "happy": "yuno",
    "quiet": "shem",
}


class _Verb(NamedTuple):
    past: str
    toy: str


_VERBS: Mapping[str, _Verb] = {
    "see": _Verb("saw", "lonte"),
    "love": _Verb("loved", "amire"),
    "find": _Verb("found", "tesko"),
    "follow": _Verb("followed", "sivu"),
    "hear": _Verb("heard", "oldi"),
    "draw": _Verb("drew", "krapi"),
    "need": _Verb("needed", "begu"),
    "know": _Verb("knew", "wensa"),
}
_ARTICLES = {("the", False): "so", ("the", True): "so", ("a", False): "hi", ("two", True): "du"}
_PLURAL, _OBJECT, _PRESENT, _PAST, _NOT = "la", "nu", "ti", "ko", "ne"


def _sentence(draw: _Draw) -> tuple[str, dict[str, Any]]:
    english_subject, toy_subject, plural = _noun_phrase(draw, "")
    english_object, toy_object, _ = _noun_phrase(draw, _OBJECT)
    verb = draw.one_of(list(_VERBS))
    past, negated = draw.chance(0.5), draw.chance(0.3)
    if negated:
        said = f"{'did' if past else 'do' if plural else 'does'} not {verb}"
    elif past:
        said = _VERBS[verb].past
    else:
        said = verb if plural else verb + "s"
    english = f"{english_subject} {said} {english_object}"
    toy = [toy_subject, toy_object, _VERBS[verb].toy + (_PAST if past else _PRESENT)] + [_NOT] * negated
    return english, {"english": english, "toy": " ".join(toy)}


def _noun_phrase(draw: _Draw, case: str) -> tuple[str, str, bool]:
    """A noun phrase in both languages, and whether it is plural."""
    (article, plural), toy_article = draw.one_of(list(_ARTICLES.items()))
    noun = draw.one_of(list(_NOUNS))
    adjectives = [draw.one_of(list(_ADJECTIVES))] if draw.chance(0.5) else []
    english_noun = noun + "s" * plural
    suffix = (_PLURAL if plural else "") + case
    english = [*adjectives, english_noun]
    english = [article + "n" * (article == "a" and english[0][0] in "aeiou"), *english]
    toy = [_NOUNS[noun] + suffix, *(_ADJECTIVES[adjective] + suffix for adjective in adjectives), toy_article]
    return " ".join(english), " ".join(toy), plural


_WORDS = "apple river moon stone cloud bread lamp road window garden silver winter music letter candle forest".split()
_NAMES = "Ada Bruno Clara David Emma Felix Grace Hugo Irene Jonas".split()
_ASK_NAME = "what is my name"
_RULES: Mapping[str, Callable[[list[str]], list[str]]] = {
    "Repeat the words.": lambda words: words,
    "Answer in capitals.": lambda words: [word.upper() for word in words],
    "Answer backwards, word by word.": lambda words: words[::-1],
    "Repeat the first word.": lambda words: words[:1],
    "Repeat the last word.": lambda words: words[-1:],
}


def _dialogue(draw: _Draw) -> tuple[str, dict[str, Any]]:
    system = draw.one_of(list(_RULES))
    rule = _RULES[system]
    name = draw.one_of(_NAMES)
    turns = 2 + draw.chance(0.5) + draw.chance(0.5)
    asks = draw.chance(0.5)
    words: list[str]
    messages = [{"role": "system", "content": system}]
    for turn in range(turns):
        if asks and turn == 0:
            said, words = f"my name is {name}", ["hello", name]
        elif asks and turn == turns - 1:
            said, words = _ASK_NAME, ["you", "are", name]
        else:
            words = [draw.one_of(_WORDS) for _ in range(2 + draw.chance(0.5))]
            said = " ".join(words)
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": " ".join(rule(words))})
    asked = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    return asked, {"messages": messages}
