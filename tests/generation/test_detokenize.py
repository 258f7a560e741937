import io
import random

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from gpt1_jax.generation.detokenize import Detokenizer


def decode_bytes(tokens) -> str:
    """A tokenizer of bytes, which spells what it cannot decode with one replacement character a byte or more."""
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def byte_fallback():
    generator = random.Random(0)
    letters = "abcdefgh"
    lines = [" ".join("".join(generator.choices(letters, k=4)) for _ in range(8)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_an_emoji_appears_with_its_last_byte():
    detokenizer = Detokenizer(decode_bytes)
    emoji = "🙂".encode()
    assert [detokenizer.push([byte]) for byte in b"a" + emoji + b"b"] == ["a", "", "", "", "🙂", "b"]
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_flushed():
    detokenizer = Detokenizer(decode_bytes)
    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_prompt_is_not_repeated_and_keeps_the_space_after_it(byte_fallback):
    prompt, new = byte_fallback.encode("abcd"), byte_fallback.encode("efgh")
    detokenizer = Detokenizer(byte_fallback.decode, prompt)
    assert detokenizer.push(new) + detokenizer.flush() == " efgh"


@given(text=st.text(max_size=30), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_pieces_join_to_the_whole(text, sizes):
    tokens, detokenizer, pieces = list(text.encode()), Detokenizer(decode_bytes), []
    while tokens:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.push(tokens[:size]))
        tokens = tokens[size:]
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("text", ["abcd 🙂🙃 efgh", "日本語 ab", "🙂", "é" * 5, "\ufffd a \ufffd"])
def test_sentencepiece_with_byte_fallback(byte_fallback, text):
    tokens = byte_fallback.encode(text)
    detokenizer = Detokenizer(byte_fallback.decode)
    pieces = [detokenizer.push([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == byte_fallback.decode(tokens) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)
