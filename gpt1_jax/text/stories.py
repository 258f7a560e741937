r"""The synthetic source: small tales drawn from a grammar, the probability of each of which is known exactly.

No model of the tales can cost less than their entropy on average, so a model's distance from it is known, not guessed.
The grammar is data, :data:`gpt1_jax.text.tales.RULES`; here are its notation, its drawing, its reading and its sums.

A rule is a block of lines: its name, then its options, ``weight | text | facts``, a line for those that share weight
and facts, ``/`` between them. In a text::

    <rule>    says one of the rule's options, drawn in proportion to the weights
    {fact}    says what the fact holds; {Fact} with a capital letter
    [words]   are said, and are what * means among the facts

Facts hold from where their option begins: ``2 | a [red] / an [old] | colour=*``. They change what is said, never what
is drawn, so the draws are those of a context-free grammar: independent, given those that they are nested in. Two
options of a rule never begin alike, one with the other's beginning, so the text determines the draws: reading goes from
left to right without a second thought, p(tale) is the product of the draws' probabilities, and a tale's end is certain
once its last draw is said.
"""

import functools
import hashlib
import itertools
import math
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt1_jax.source_config import Stories
from gpt1_jax.text.document import Document, Skipped, parts
from gpt1_jax.text.tales import RULES

_PART = re.compile(r"<(\w+)>|{(\w+)}")
_UNSAID = re.compile(r"[\[\]]")
Facts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Recall:
    """A part of a text: what a fact holds, perhaps with a capital letter."""

    fact: str
    capital: bool

    def say(self, facts: Facts) -> str:
        """The words."""
        words = facts[self.fact]
        return words[0].upper() + words[1:] if self.capital else words


@dataclass(frozen=True, slots=True)
class Expand:
    """A part of a text: one of the options of a rule."""

    rule: str


Part = str | Recall | Expand


@dataclass(frozen=True, slots=True)
class Option:
    """One of the options of a rule.

    Attributes:
        weight: probability in units of the rule's total.
        nats: -ln of the probability.
        parts: of the text, in order.
        head: those before the first draw of another rule; what tells the options of a rule apart.
        facts: that hold from here on.
    """

    weight: int
    nats: float
    parts: tuple[Part, ...]
    head: tuple[str | Recall, ...]
    facts: Facts

    def begins(self, text: str, position: int, facts: Facts) -> bool:
        """Whether this option may be what a text says at a position, given the facts before it."""
        if self.facts and len(self.head) > 1:
            facts = {**facts, **self.facts}
        for part in self.head:
            words = part if isinstance(part, str) else part.say(facts)
            if not text.startswith(words, position):
                return False
            position += len(words)
        return True


class Rule(NamedTuple):
    """Options, and the running sums of their weights."""

    options: tuple[Option, ...]
    bounds: tuple[int, ...]


class Tale(NamedTuple):
    """A text and -ln of its probability, in nats."""

    text: str
    nats: float


@dataclass(frozen=True)
class Measure:
    """Exact sums over everything that a rule may say, nested draws included.

    Attributes:
        nats: entropy.
        bytes: expected length in UTF-8.
        count: different outcomes.
        likeliest: probability of the likeliest.
        collision: probability that two independent outcomes are the same.
        draws: most draws in one outcome.
        lengths: expected bytes of each fact afterwards.
    """

    nats: float
    bytes: float
    count: int
    likeliest: float
    collision: float
    draws: int
    lengths: Mapping[str, float]


class _NoTaleError(Exception):
    pass


class Grammar:
    """Rules that begin with the rule ``tale``.

    Attributes:
        measure: of the tales.

    Raises:
        ValueError: if a rule is missing, contains itself or has options that begin alike, or a fact is not known
            wherever it is said.
    """

    def __init__(self, rules: str):
        self._rules = dict(_rule(block) for block in re.split(r"\n\s*\n", rules.strip()))
        _check_apart(self._rules)
        self.measure = self._measured("tale", {}, ())

    def derive(self, pick: Callable[[Rule, Facts], Option]) -> Iterator[str]:
        """The words of a tale, piece by piece, as ``pick`` chooses among the options of each rule in turn."""
        facts: dict[str, str] = {}
        todo: list[Part] = [Expand("tale")]
        while todo:
            part = todo.pop()
            if isinstance(part, str):
                yield part
            elif isinstance(part, Recall):
                yield part.say(facts)
            else:
                option = pick(self._rules[part.rule], facts)
                facts.update(option.facts)
                todo += reversed(option.parts)

    def sample(self, seed: int, number: int) -> Tale:
        """Tale ``number`` of a seed, a pure function of both.

        The draws are 64-bit words of SHAKE-256 (FIPS 202) of the two numbers, so they are the same with any version of
        Python or of a library, and any tale is drawn without those before it. A probability is met to within 2**-64.
        """
        stream = hashlib.shake_256(f"{seed}/{number}".encode()).digest(8 * self.measure.draws)
        words = iter(struct.unpack(f"<{self.measure.draws}Q", stream))
        nats: list[float] = []

        def pick(rule: Rule, facts: Facts) -> Option:
            option = rule.options[bisect_right(rule.bounds, next(words) * rule.bounds[-1] >> 64)]
            nats.append(option.nats)
            return option

        return Tale("".join(self.derive(pick)), math.fsum(nats))

    def nats_of(self, text: str) -> float | None:
        """Exact -ln of the probability of a text, its end included, in nats; None if it is no tale of this grammar."""
        position = 0
        nats: list[float] = []

        def pick(rule: Rule, facts: Facts) -> Option:
            for option in rule.options:
                if option.begins(text, position, facts):
                    nats.append(option.nats)
                    return option
            raise _NoTaleError

        try:
            for words in self.derive(pick):
                if not text.startswith(words, position):
                    return None
                position += len(words)
        except _NoTaleError:
            return None
        return math.fsum(nats) if position == len(text) else None

    def _measured(self, name: str, lengths: Mapping[str, float], above: tuple[str, ...]) -> Measure:
        """Sums over a rule, given the expected length of every fact that is known before it.

        What is drawn depends on no fact, so given the options around it a fact is independent of what follows, and
        expected lengths are enough.
        """
        if name not in self._rules or name in above:
            raise ValueError(f"rule '{name}' " + ("contains itself" if name in above else "is missing"))
        rule = self._rules[name]
        outcomes: list[tuple[float, Measure]] = []
        for option in rule.options:
            probability = option.weight / rule.bounds[-1]
            known = {**lengths, **{fact: float(len(words.encode())) for fact, words in option.facts.items()}}
            nats, size, count, likeliest, collision, draws = option.nats, 0.0, 1, probability, probability**2, 1
            for part in option.parts:
                if isinstance(part, str):
                    size += len(part.encode())
                elif isinstance(part, Recall):
                    if part.fact not in known:
                        raise ValueError(f"rule '{name}': fact '{part.fact}' is not known wherever it is said")
                    size += known[part.fact]
                else:
                    inner = self._measured(part.rule, known, (*above, name))
                    nats, size, count = nats + inner.nats, size + inner.bytes, count * inner.count
                    likeliest, collision = likeliest * inner.likeliest, collision * inner.collision
                    draws, known = draws + inner.draws, dict(inner.lengths)
            outcomes.append((probability, Measure(nats, size, count, likeliest, collision, draws, known)))
        known_after = functools.reduce(lambda a, b: a & b, (set(inner.lengths) for _, inner in outcomes))
        return Measure(
            nats=math.fsum(p * inner.nats for p, inner in outcomes),
            bytes=math.fsum(p * inner.bytes for p, inner in outcomes),
            count=sum(inner.count for _, inner in outcomes),
            likeliest=max(inner.likeliest for _, inner in outcomes),
            collision=math.fsum(inner.collision for _, inner in outcomes),
            draws=max(inner.draws for _, inner in outcomes),
            lengths={fact: math.fsum(p * inner.lengths[fact] for p, inner in outcomes) for fact in known_after},
        )


def _rule(block: str) -> tuple[str, Rule]:
    """A rule from its lines; a line that begins with a space goes on with the one before."""
    name, *lines = re.sub(r"\n\s+", " ", block.strip()).split("\n")
    found: list[tuple[int, str, str]] = []
    for line in lines:
        weight, texts, facts = (*line.split("|"), "")[:3]
        found += [(int(weight), text.strip(), facts) for text in texts.strip().split(" / ")]
    total = sum(weight for weight, _, _ in found)
    options = tuple(_option(weight, total, text, facts) for weight, text, facts in found)
    return name, Rule(options, tuple(itertools.accumulate(option.weight for option in options)))


def _option(weight: int, total: int, text: str, facts: str) -> Option:
    kept = re.search(r"\[(.*?)\]", text)
    pairs = [pair.strip().split("=") for pair in facts.split(",") if pair.strip()]
    parts: list[Part] = []
    end = 0
    text_said = _UNSAID.sub("", text)
    for match in _PART.finditer(text_said):
        parts += [text_said[end : match.start()]] if match.start() > end else []
        rule, fact = match.groups()
        parts.append(Expand(rule) if rule else Recall(fact[0].lower() + fact[1:], fact[0].isupper()))
        end = match.end()
    parts += [text_said[end:]] if end < len(text_said) else []
    head: list[str | Recall] = []
    for part in parts:
        if isinstance(part, Expand):
            break
        head.append(part)
    return Option(
        weight=weight,
        nats=math.log(total / weight),
        parts=tuple(parts),
        head=tuple(head),
        facts={fact: (kept[1] if kept else text_said) if words == "*" else words for fact, words in pairs},
    )


def _check_apart(rules: Mapping[str, Rule]) -> None:
    """Refuses a rule of which one option may begin with all that another says before it draws again."""
    values: dict[str, set[str]] = {}
    for option in (option for rule in rules.values() for option in rule.options):
        for fact, words in option.facts.items():
            values.setdefault(fact, set()).add(words)
    for name, rule in rules.items():
        heads = [[_known(part, option.facts) for part in option.head] for option in rule.options]
        for a, b in itertools.combinations(heads, 2):
            if not _apart(a, b, values):
                raise ValueError(f"rule '{name}' has options that begin alike: {a} and {b}")


def _known(part: str | Recall, facts: Facts) -> str | Recall:
    return part.say(facts) if isinstance(part, Recall) and part.fact in facts else part


def _apart(a: Sequence[str | Recall], b: Sequence[str | Recall], values: Mapping[str, set[str]]) -> bool:
    """Whether two texts differ before either ends, whatever the facts in them hold."""
    if not a or not b:
        return False
    if a[0] == b[0]:
        return _apart(a[1:], b[1:], values)
    first_a, first_b = a[0], b[0]
    if isinstance(first_b, Recall):
        a, b, first_a, first_b = b, a, first_b, first_a
    if isinstance(first_a, Recall):
        return all(
            _apart([_known(x, known) for x in a], [_known(x, known) for x in b], values)
            for known in ({first_a.fact: words} for words in values.get(first_a.fact, ()))
        )
    assert isinstance(first_b, str)
    shared = min(len(first_a), len(first_b))
    if first_a[:shared] != first_b[:shared]:
        return True
    rest_a, rest_b = first_a[shared:], first_b[shared:]
    return _apart([*([rest_a] if rest_a else []), *a[1:]], [*([rest_b] if rest_b else []), *b[1:]], values)


@functools.cache
def grammar() -> Grammar:
    """The grammar of the source."""
    return Grammar(RULES)


class StoriesSource:
    """One document a tale."""

    name = label = "stories"
    network = None

    def __init__(self, config: Stories, numbers: range | None = None) -> None:
        self._config = config
        self._numbers = range(config.documents) if numbers is None else numbers

    def settings(self) -> dict[str, Any]:
        """How many, the seed, the method of drawing and the SHA-256 of the grammar."""
        return {
            "kind": "stories",
            "documents": self._config.documents,
            "seed": self._config.seed,
            "draws": "shake_256",
            "grammar": hashlib.sha256(RULES.encode()).hexdigest(),
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The tales, by number; each is drawn when it is asked for."""
        tales = grammar()
        for number in self._numbers:
            yield Document(tales.sample(self._config.seed, number).text, f"stories/{number}")

    def split(self) -> Sequence["StoriesSource"]:
        """Ten thousand tales each, or more of very many."""
        return [StoriesSource(self._config, numbers) for numbers in parts(self._numbers)]
