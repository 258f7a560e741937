"""The authors' tokenizer, held against a plain restatement of their loop and against spaCy's words."""

import itertools
import json
import random
import string
import unicodedata
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from gpt1_jax.errors import UserError
from gpt1_jax.generation.detokenize import Detokenizer
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json, tokenizer_config
from gpt1_jax.interop.original_tokenizer import original_tokenizer
from gpt1_jax.text.cleaning import standardize
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.tokenizer import load_tokenizer

WORDS = (
    "abba cabbage baggage babble dabble gabble abide decide bead deed feed cab fab gab aged caged bagged faced".split()
)
ANY = st.text(st.characters(exclude_categories=["Cs"]))
MARKS = [*" \n\t.,'\"-:;$%<>=as5A\x85\x1c\u2581—“’…é漢😀", "n't", "can't", "Mr.", "U.S.", "</w>"]
HARD = st.lists(st.sampled_from(MARKS)).map("".join)


@pytest.fixture(scope="module")
def files() -> tuple[bytes, bytes]:
    """A vocabulary of the authors' layout: <unk>, characters, characters that end a word, merges, the newline."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    draw = random.Random(0)
    learner.train_from_iterator([" ".join(draw.choices(WORDS, k=500))], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation})
    tokens = ["<unk>", *characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), "\n</w>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    return json.dumps(vocabulary).encode(), "\n".join(lines).encode()


@pytest.fixture(scope="module")
def tokenizer(files) -> FastTokenizer:
    return original_tokenizer(*files)


def authors_bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The symbols of a word: the best pair is joined wherever it stands, until none is known."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        while symbols:
            if tuple(symbols[:2]) == best:
                joined.append(symbols.pop(0) + symbols.pop(0))
            else:
                joined.append(symbols.pop(0))
        symbols = joined
    return symbols


def test_tokens_are_those_of_the_authors_loop(tokenizer, files):
    vocabulary = json.loads(files[0])
    ranks = {tuple(line.split()): rank for rank, line in enumerate(files[1].decode().split("\n")[1:-1])}
    draw = random.Random(1)
    for _ in range(2000):
        # Words that no rule splits; ж is no character of the vocabulary, nor is é.
        words = [
            "".join(draw.choices("abcdefgжé", [9, 9, 3, 5, 9, 3, 9, 1, 1], k=draw.randint(2, 12))) for _ in range(4)
        ]
        words += draw.choices(WORDS, k=2)
        draw.shuffle(words)
        expected = [vocabulary.get(symbol, 0) for word in words for symbol in authors_bpe(word, ranks)]
        assert tokenizer.encode(" ".join(words)).tolist() == expected, words


def test_unknown_characters_are_unknown_one_by_one(tokenizer):
    assert tokenizer.encode("жж").tolist() == [0, 0]
    assert tokenizer.encode("aжb").tolist()[1] == 0
    assert len(tokenizer.encode("aжb")) == 3
    assert tokenizer.separator_id == 0
    assert tokenizer.unknown == "<unk>"


def test_a_newline_is_a_word(tokenizer, files):
    newline = json.loads(files[0])["\n</w>"]
    a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
    for text in ("a\nb", " a \n\n  b\n", "\na\r\nb", "a\u2028b"):
        assert tokenizer.encode(text).tolist() == [*a, newline, *b]
    assert tokenizer.decode([*a, newline, *b]) == "a\nb"
    assert tokenizer.encode(" \n ").tolist() == []


# What spaCy 3.8 (spacy.blank("en")) makes of the standardised text, in lower case and joined with spaces.
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\"I don't know what you're on about,\" said Mr. Harper. \"It wasn't me who'd called her.\"",
         "\" i do n't know what you 're on about , \" said mr. harper . \" it was n't me who 'd called her . \""),
        ("He wouldn't've done it -- he'd never, I'm sure; they'll say that's Jack's.",
         "he would n't 've done it -- he 'd never , i 'm sure ; they 'll say that 's jack 's ."),
        ("Dr. A. B. Smith, Ph.D., came at 10:30 a.m. in a $45,000 car (or so he said). 20% off, e.g. 5km!",
         "dr. a. b. smith , ph.d. , came at 10:30 a.m. in a $ 45 , 000 car ( or so he said ) . 20 % off , e.g. 5 km !"),
        ("It was the U.S. Army's fault, by James I. of St. Louis. The end.Next: x=y",
         "it was the u.s. army 's fault , by james i. of st. louis . the end . next : x = y"),
        ("Give 'em the dogs' leashes. 'Tis three o'clock, ma'am... Rock 'n' roll, goin' on. 'Hello.'",
         "give 'em the dogs ' leashes . ' tis three o'clock , ma'am ... rock ' n ' roll , goin' on . ' hello . '"),
        ("cannot gonna dont im y'all let's isn't. Wait...what?!",
         "can not gon na do nt i m y' all let 's is n't . wait ... what ? !"),
        ("“Don’t—stop…” [she]", "\" do n't - stop ... \" [ she ]"),
    ],
)  # fmt: skip
def test_words_are_those_of_spacy(tokenizer, text, words):
    assert tokenizer.decode(tokenizer.encode(text)) == words


@settings(max_examples=300, deadline=None)
@given(text=HARD)
def test_words_have_the_characters_of_the_standardised_text(tokenizer, text):
    found = tokenizer.decode(tokenizer.encode(text))
    plain = unicodedata.normalize("NFC", text).translate({0x2019: "'", 0x201C: '"', 0x85: "\n", 0x1C: " "})
    known = [c for c in standardize(plain).lower() if c in {*string.printable} - {*" \t\r\x0b\x0c"}]
    assert [c for c in found if c != " "] == known


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(ANY, HARD))
def test_any_text_is_read_and_what_is_decoded_is_stable(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.max(initial=0) < tokenizer.vocab_size
    known = tokenizer.decode(tokens)
    assert known == known.lower()
    assert "  " not in known


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    texts = [tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    assert all(texts[-1].startswith(text) for text in texts)
    stream = Detokenizer(tokenizer.decode)
    assert "".join(stream.push([token]) for token in tokens) + stream.flush() == texts[-1]


def test_its_bytes_are_all_of_it(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(fast_tokenizer_json(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, 32)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}))
    auto: Any = AutoTokenizer.from_pretrained(tmp_path)
    stored = load_tokenizer(tokenizer.to_bytes())
    assert (auto.eos_token, auto.unk_token_id) == ("<unk>", 0)
    for text in ("I can't, Mr. A.!\nCabbage…", "<unk> </w> жab", "", "\n a  b "):
        expected = tokenizer.encode(text).tolist()
        assert auto(text)["input_ids"] == stored.encode(text).tolist() == expected
        assert auto.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected)


def test_the_name_of_the_unknown_token_is_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<unk>")) == "< unk >"
    assert 0 not in tokenizer.encode("<unk>")


def test_hugging_face_names_of_the_files_differ_and_their_format_does_not(files):
    without_end = files[1].removesuffix(b"\n")
    assert original_tokenizer(files[0], without_end).to_bytes() == original_tokenizer(*files).to_bytes()


@pytest.mark.parametrize(
    ("encoder", "merges", "message"),
    [
        (b"\xff", b"", "vocabulary.*is not JSON"),
        (b"[]", b"", "must be one JSON object"),
        (b'{"<unk>": 0, "a": 2}', b"", "from 0 on without a gap"),
        (b'{"a": 0, "<unk>": 1}', b"", "gives <unk> the id 1"),
        (b'{"<unk>": 0}', b"\xff", "not UTF-8"),
        (b'{"<unk>": 0}', b"#version: 0.2\na b c\n", "line 2 of the merges.*'a b c'"),
        (b'{"<unk>": 0, "a": 1, "b": 2}', b"#version: 0.2\na b\n", "'a' [+] 'b', and 0 others, have a part"),
    ],
)
def test_files_of_another_format_are_refused(encoder, merges, message):
    with pytest.raises(UserError, match=message):
        original_tokenizer(encoder, merges)
