r"""The authors' byte-pair encoding, as a tokenizer.json that holds all of it: cleaning, splitting, merges, decoding.

The authors clean a text (``text_standardize``), split it into words with spaCy's English tokenizer, put each word in
lower case, and merge its characters, the last of which carries ``</w>``. A newline between words is a word of its own.
Here cleaning and splitting are a list of rules that put spaces into the text; what lies between spaces is a word. A
rule is a regular expression of the ``tokenizers`` library (Oniguruma), most often for an empty place in the text.

It loses text: case, the kind of dashes and quotes, spacing. ``decode`` joins words with single spaces.

Deviation: ftfy, which the authors run first, is not in the rules, beyond line ends and curly quotes and ligatures;
``data.cleaning.fix_unicode`` runs it when a corpus is prepared.

Deviation: the rules are the main ones of spaCy's English, not all: contractions and Mr. and J. and U.S. and 3.5 and $5
come out alike, but not emoticons or long runs of signs. They find 99.8 % of the 335,000 words that spaCy 3.8 finds in a
sample of this project's embedded corpus, documentation in English.

Reference: openai/finetune-transformer-lm, text_utils.py; spaCy, lang/en and lang/punctuation.py.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from gpt1_jax.errors import UserError
from gpt1_jax.outside import parse_json, read_bounded
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.tokenizer import MOST_BYTES

_UNKNOWN = "<unk>"
_WORD_END = "</w>"

# text_standardize's marks: a run of one of them is set off by spaces.
_MARKS = r"""-~!";?+,)(/*\[\]}{|_"""
_BLANK = r"[\s\x1c-\x1f]"  # white space in Python's regular expressions
# What is a word by itself wherever it stands: most of these marks, every one of a run, and pictures.
_SINGLE = r"""[!";?,)(*\[\]}{_\p{So}]"""
_LEADING = r"[§%=+<>\#&:'`«»¿¡·。、$£€¥]"  # a word by itself where another begins
_TRAILING = r"[<>\#&:'`«»¿¡·。、]"  # or ends
_UNITS = (
    "km|km²|km³|m|m²|m³|dm|cm|cm²|cm³|mm|mm²|mm³|ha|µm|nm|yd|in|ft|kg|g|mg|µg|t|lb|oz|m/s|km/h|kmh|mph|hPa|Pa|mbar|"
    "mb|MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%|am|pm|a\\.m\\.|p\\.m\\.|\\$|£|€|¥"
)
# Words that keep their full stop, beside single letters. As written: "Miss." is a state, "miss." ends a sentence.
_ABBREVIATIONS = (
    "Adm Ak Ala Apr Ariz Ark Aug Bros Calif Co Colo Conn Corp Dec Del Dr Feb Fla Ga Gen Gov Ia Id Ill Inc Ind Jan Jr "
    "Jul Jun Kan Kans Ky La Ltd Mar Mass Md Messrs Mich Minn Miss Mo Mont Mr Mrs Ms Mt Neb Nebr Nev Nov Oct Okla Ore "
    "Pa Prof Rep Rev Sen Sep Sept St Tenn Va Wash Wis co vs a.m p.m e.g E.g i.e I.e v.s Ph.D"
).split()
_QUOTED = "em|Em|cause|Cause|cos|coz|cuz|Cuz|Cos|Coz|bout|nuff|Nuff|s|S|d|ll|re"  # 'em: the quote is theirs
_DROPPED_G = "goin|doin|havin|lovin|nothin|nuthin|somethin|ol"  # goin': likewise
_BEFORE_NOT = (
    "ai are ca could dare did does do had has have is may might must need ought sha should was were wo would"
).split()
_BEFORE_HAVE = "could might must not should would".split()
_PRONOUNS = "i you he she it we they that this these those there what when where who why how".split()
# Contractions without an apostrophe, by ending, but for those that are words: ill, well, were, hell, shell, shed, its.
_BARE = {
    "d": "i you he it we they that this these those there what when where who why how",
    "ll": "you it they that this these those there what when where who why how",
    "re": "you they these those there what when where why how",
    "ve": "i you we they these those there what when where who why how",
    "s": "he she that this there what when where who why how",
    "m": "i",
}


def read_original_tokenizer(encoder: Path, merges: Path) -> FastTokenizer:
    """As :func:`original_tokenizer`, from the files."""
    try:
        contents = [read_bounded(path, MOST_BYTES) for path in (encoder, merges)]
    except ValueError as error:
        raise UserError(f"{encoder.parent}: no tokenizer in {encoder.name} and {merges.name}: {error}") from None
    return original_tokenizer(*contents)


def original_tokenizer(encoder_json: bytes, merges: bytes) -> FastTokenizer:
    """The authors' tokenizer from their two files.

    Args:
        encoder_json: encoder_bpe_40000.json, or Hugging Face's vocab.json: each token with its id.
        merges: vocab_40000.bpe, or Hugging Face's merges.txt: pairs to merge, best first, under a line with a version.

    Raises:
        UserError: if the files are not of this format, or do not belong together.
    """
    vocabulary = _vocabulary(encoder_json)
    pairs = _pairs(merges)
    lost = [(left, right) for left, right in pairs if not {left, right, left + right} <= vocabulary.keys()]
    if lost:
        raise UserError(
            f"the merges are not those of this vocabulary: {lost[0][0]!r} + {lost[0][1]!r}, and {len(lost) - 1:,} "
            "others, have a part or a union that is no token; give the two files of one release"
        )
    try:
        model = models.BPE(
            vocab=vocabulary, merges=pairs, unk_token=_UNKNOWN, end_of_word_suffix=_WORD_END, fuse_unk=False
        )
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"the tokenizers library cannot use this vocabulary and its merges: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(), *_word_breaks(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    tokenizer.decoder = decoders.Sequence(
        [decoders.BPEDecoder(_WORD_END), decoders.Fuse(), decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")]
    )
    return FastTokenizer(tokenizer.to_str().encode(), "the authors' tokenizer")


def _vocabulary(content: bytes) -> dict[str, int]:
    try:
        vocabulary = parse_json(content)
    except ValueError as error:  # of the encoding, too
        raise UserError(f"the vocabulary (encoder_bpe_40000.json or vocab.json) is not JSON: {error}") from None
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(type(number) is int for number in numbers) or {*numbers} != {*range(len(numbers))}:
        raise UserError(
            "the vocabulary (encoder_bpe_40000.json or vocab.json) must be one JSON object that gives each token its "
            "own id, from 0 on without a gap"
        )
    if vocabulary.get(_UNKNOWN) != 0:
        raise UserError(
            f"the vocabulary gives {_UNKNOWN} the id {vocabulary.get(_UNKNOWN)}; in the authors' it is 0, and what is "
            "not in the vocabulary becomes 0"
        )
    return vocabulary


def _pairs(content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the merges (vocab_40000.bpe or merges.txt) are not UTF-8: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        match line.split():
            case [left, right]:
                pairs.append((left, right))
            case _:
                raise UserError(
                    f"line {number} of the merges (vocab_40000.bpe or merges.txt) is no pair: {line[:80]!r}"
                )
    return pairs


def _cleaning() -> list[normalizers.Normalizer]:
    """``text_standardize``, after the part of ftfy that fits: to single spaces, one at each end of the text."""
    return [
        normalizers.Prepend(" "),  # first: the library fails where a rule matches nothing at the start of a text
        normalizers.NFC(),
        _replace("\r\n|[\r\x85\u2028\u2029]", "\n"),
        _replace("[\u2018-\u201b\u02bc\u00b4]", "'"),
        _replace("[\u201c-\u201f]", '"'),
        *(_replace(ligature, letters) for ligature, letters in (("ﬀ", "ff"), ("ﬁ", "fi"), ("ﬂ", "fl"))),
        *(_replace(ligature, letters) for ligature, letters in (("ﬃ", "ffi"), ("ﬄ", "ffl"), ("[ﬅﬆ]", "st"))),
        _replace("[—–―]", "-"),  # noqa: RUF001
        _replace("…", "..."),
        _break(rf"(?<=([{_MARKS}]))(?!\1)|(?<![{_MARKS}])(?=[{_MARKS}])"),
        _break(r"\z"),
        _replace(rf"\A{_BLANK}+|{_BLANK}+\z", " "),  # every word has a space on both sides
        _replace(rf"{_BLANK}*\n{_BLANK}*", " \n "),
        _replace(rf"(?:(?!\n){_BLANK})+", " "),
    ]


def _word_breaks() -> list[normalizers.Normalizer]:
    """SpaCy's English rules: first what begins and ends a word, then what is inside."""
    stops = "".join("| " + word.replace(".", r"\.") for word in _ABBREVIATIONS)
    beginning = "|".join(" " + _LEADING * count for count in range(1, 5))
    return [
        _break(rf"(?<={_SINGLE})(?! )|(?={_SINGLE})(?<! )"),
        _break(rf"(?! )(?<={_LEADING})(?<={beginning})(?!(?<= ')(?:{_QUOTED})(?!\p{{L}}))"),
        _break(
            rf"(?=(?:'[sS]|{_TRAILING})(?:'[sS]|{_TRAILING}|\.)* )(?<! )(?!(?<={_DROPPED_G})' )"
            rf"|(?<=[0-9])(?=(?:{_UNITS})\.? )"
        ),
        _break(
            rf"(?=\. )(?<=[\p{{Ll}}\p{{Lo}}0-9%²+\-]|{_TRAILING}|\p{{Lu}}\p{{Lu}})(?<! [a-z]{stops})"
            r"|(?=\.\.)(?<![. ])|(?<=\.\.)(?![. ])"
            r"|(?=\.[\p{Lu}'])(?<=[\p{Ll}'])(?<! Ph)|(?<=[\p{Ll}']\.)(?=[\p{Lu}'])(?<! Ph\.)"
            r"|(?=[:<>=]\p{L})(?<=[\p{L}0-9])|(?<=[\p{L}0-9][:<>=])(?=\p{L})"
        ),
        _break("|".join(_contractions())),
    ]


def _contractions() -> list[str]:
    """The places inside don't, they'll, he'd've, dont, cannot."""
    return [
        rf"(?=n'?t(?:'ve)? )(?<={_after(_BEFORE_NOT)})",
        r"(?='ve )(?<=n't|'d|'ll)",
        rf"(?='?ve )(?<={_after(_BEFORE_HAVE)})",
        rf"(?='(?:d|ll|re|ve)(?:'ve)? )(?<={_after(_PRONOUNS)})",
        r"(?='m )(?<= [iI])",
        *(rf"(?={ending} )(?<={_after(words.split())})" for ending, words in _BARE.items()),
        r"(?=not )(?<= [cC]an)|(?=na )(?<= [gG]on)|(?=ta )(?<= [gG]ot)|(?=all )(?<= [yY]')|(?=on )(?<= [cC]'m)",
    ]


def _after(words: Iterable[str]) -> str:
    """Alternatives, for a look behind: each word at its beginning, in lower case or with a capital."""
    return "|".join(f" [{word[0]}{word[0].upper()}]{word[1:]}" for word in words)


def _replace(pattern: str, by: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), by)


def _break(pattern: str) -> normalizers.Normalizer:
    """A rule that ends one word and begins another at every place where the pattern matches nothing."""
    return normalizers.Replace(Regex(pattern), " ")
