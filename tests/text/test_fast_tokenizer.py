import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt1_jax.errors import UserError
from gpt1_jax.generation.detokenize import Detokenizer
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import train_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "How vexingly quick daft zebras jump! \u2581 déjà vu 漢字",
] * 20
SPECIAL = ("<unk>", "<|endoftext|>", "<pad>")
LITERALS = st.lists(st.sampled_from([*SPECIAL, "<s>", "</s>", "<0x0A>", " ", "\n", "quick", "é", "😀"])).map("".join)


def byte_level(special: tuple[str, ...] = SPECIAL) -> tokenizers.Tokenizer:
    """A tokenizer as GPT-2's: bytes, special tokens registered."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def word_level(*words: str, special: tuple[str, ...] = (), unknown: str | None = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def fast(tokenizer: tokenizers.Tokenizer) -> FastTokenizer:
    return FastTokenizer(tokenizer.to_str().encode())


@pytest.fixture(scope="module")
def gpt2_like() -> FastTokenizer:
    return fast(byte_level())


@pytest.fixture(scope="module")
def byte_fallback() -> FastTokenizer:
    return FastTokenizer(fast_tokenizer_json(train_tokenizer(["\n".join(LINES)], 320)))


def test_ids_are_those_of_the_library(gpt2_like):
    text = "The quick zebras\n jump over 漢字!"
    tokens = gpt2_like.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == byte_level().encode(text).ids
    assert (gpt2_like.vocab_size, gpt2_like.separator_id, gpt2_like.unknown) == (320, 1, None)
    assert gpt2_like.decode([*tokens, 1]) == text
    assert gpt2_like.encode("").shape == (0,)
    assert [part.tolist() for part in gpt2_like.encode_batch([text, ""])] == [tokens.tolist(), []]


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(LITERALS, st.text(st.characters(exclude_categories=["Cs"]))))
def test_names_of_special_tokens_in_a_text_are_text(gpt2_like, text):
    tokens = gpt2_like.encode(text)
    assert not set(tokens.tolist()) & {0, 1, 2}
    assert gpt2_like.decode(tokens) == text


def test_half_a_surrogate_pair_is_refused(gpt2_like):
    with pytest.raises(UnicodeEncodeError):
        gpt2_like.encode("a\ud800b")


def test_truncation_padding_and_templates_of_the_file_do_not_act():
    raw = byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    text = "The quick brown fox"
    assert fast(raw).encode(text).tolist() == fast(byte_level()).encode(text).tolist()


def test_the_separator_is_the_first_known_name_that_no_text_gives():
    assert fast(word_level("a", special=("</s>", "<|endoftext|>"), unknown="a")).separator_id == 2
    assert fast(word_level("a", special=("<s>", "</s>"), unknown="a")).separator_id == 2
    # In the model's own vocabulary </s> is a word: the unknown token must do, as in the authors' vocabulary.
    unreserved = fast(word_level("a", "</s>", "<unk>", unknown="<unk>"))
    assert unreserved.separator_id == 2 and not unreserved.separator_reserved
    assert unreserved.encode("b").tolist() == [2]
    assert fast(word_level("a", special=("<s>",), unknown="a")).separator_reserved
    with pytest.raises(UserError, match=r"my\.json: .*no token to put between documents.*</s>"):
        FastTokenizer(byte_level(special=()).to_str().encode(), "my.json")


@pytest.mark.parametrize(
    "content",
    [b"{", b"{}", b"[]", b'{"model": {}}', b'{"model": "\xff"}', b'{"model": ' + b"[" * 100_000,
     word_level("a", unknown="<unk>").to_str().encode(),  # an unknown token that is not in the vocabulary
     tokenizers.Tokenizer(models.BPE()).to_str().encode()],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(UserError, match=r"^my\.json: "):
        FastTokenizer(content, "my.json")


def test_bytes_that_are_no_text_do_not_spoil_their_neighbours(byte_fallback):
    mark, tokens = byte_fallback.encode("\u2581").tolist(), byte_fallback.encode("quick").tolist()
    assert byte_fallback.decode(mark) == "\u2581"
    assert byte_fallback.decode([*mark, mark[0]]) == "\u2581\ufffd"
    assert byte_fallback.decode([*tokens, *mark[1:], *tokens, *mark]) == "quick\ufffd\ufffdquick\u2581"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(byte_fallback, gpt2_like, data):
    tokenizer = data.draw(st.sampled_from([byte_fallback, gpt2_like]))
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    stream = Detokenizer(tokenizer.decode)
    text = "".join([*(stream.push([token]) for token in tokens), stream.flush()])
    assert text == tokenizer.decode(tokens)


def test_a_process_forked_after_encoding_hears_no_warning():
    code = (
        "import os, sys; from gpt1_jax.text.fast_tokenizer import FastTokenizer\n"
        "tokenizer = FastTokenizer(sys.stdin.buffer.read()); tokenizer.encode_batch(['The fox'] * 50)\n"
        "child = os.fork()\n"
        "tokenizer.encode_batch(['The fox'] * 50)\n"
        "sys.exit(os.waitpid(child, 0)[1] if child else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=byte_level().to_str().encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_lossy_tokenizers_serve_too():
    raw = word_level("<unk>", "the", "fox", special=("<|endoftext|>",), unknown="<unk>")
    raw.normalizer = normalizers.Lowercase()
    tokenizer = fast(raw)
    assert tokenizer.encode("The FOX ran").tolist() == [1, 2, 0]
    assert tokenizer.decode([1, 2, 3]) == "the fox"


def test_special_tokens_of_a_file_are_found(gpt2_like):
    assert gpt2_like.special_tokens == ("<unk>", "<pad>")
    extended = gpt2_like.with_special_tokens(["<pad>", "_start_"])
    assert (extended.special_id("<pad>"), extended.special_id("_start_")) == (2, 320)


def test_special_tokens_that_would_hide_words_or_fill_gaps_are_refused():
    raw = byte_level()
    raw.add_tokens([tokenizers.AddedToken("start", normalized=False)])
    with pytest.raises(UserError, match=r"\(_start_\) cannot be added to .*: a text that spells one of them"):
        fast(raw).with_special_tokens(["_start_"])
    gap = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 5}, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"\(_start_\) cannot be added behind .* numbers below 6 are not in"):
        fast(gap).with_special_tokens(["_start_"])
