import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.errors import UserError
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer, train_tokenizer
from gpt1_jax.text.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\nHow vexingly quick daft zebras jump!\n\n  été, naïve: 漢字\n" * 20
# Characters that tokenizers stumble over, more often than chance would bring them.
HARD = st.text(st.sampled_from(" \t\n\r\0\x0b\x85\u2028\u2581\ufeff\ufffd<|>unk/se0x4aé漢😀"))
ANY = st.text(st.characters(exclude_categories=["Cs"]))
LITERALS = st.lists(st.sampled_from(["<unk>", "<s>", "</s>", "<|endoftext|>", "<0x0A>", "\u2581", " ", "\n", "a"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 330)


def test_ids(tokenizer):
    processor = spm.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
    assert [processor.id_to_piece(n) for n in range(4)] == ["<unk>", "<|endoftext|>", "\n", "<0x00>"]
    assert tokenizer.separator_id == 1
    assert tokenizer.vocab_size == 330
    assert isinstance(tokenizer, Tokenizer)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(ANY, HARD, LITERALS.map("".join)))
def test_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text
    assert not set(tokens.tolist()) & {0, tokenizer.separator_id}


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.one_of(HARD, ANY)))
def test_pieces_are_those_of_the_lines_one_by_one(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    for text, tokens in zip(texts, batch, strict=True):
        lines = [line + "\n" for line in text.split("\n")]
        lines[-1] = lines[-1][:-1]
        assert tokens.tolist() == [token for line in lines for token in tokenizer.encode(line).tolist()]


def test_space_mark_is_its_three_bytes(tokenizer):
    processor = spm.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
    tokens = tokenizer.encode("\u2581")
    assert [processor.id_to_piece(token) for token in tokens.tolist()] == ["<0xE2>", "<0x96>", "<0x81>"]
    assert tokenizer.decode([*tokens.tolist(), tokenizer.separator_id]) == "\u2581"


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800b")


def test_same_text_same_bytes(tokenizer):
    assert train_tokenizer([TEXT], 330).to_bytes() == tokenizer.to_bytes()


def test_serialized(tokenizer):
    other = SentencePieceTokenizer(tokenizer.to_bytes())
    assert other.fingerprint == tokenizer.fingerprint
    assert other.encode("quick fox").tolist() == tokenizer.encode("quick fox").tolist()


def test_long_lines_are_learned_from():
    # The trainer drops lines of over 4192 bytes; of those texts nothing else would be left.
    spaced = train_tokenizer(["abracadabra " * 1000], 275)
    assert len(spaced.encode(" abracadabra")) == 1
    assert len(train_tokenizer(["abcd" * 3000], 270).encode("abcdabcd")) <= 2


def test_text_without_spaces_gives_a_sound_model():
    assert train_tokenizer(["漢字" * 50], 264).decode(train_tokenizer(["漢字" * 50], 264).encode("a b ")) == "a b "


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (5000, r"vocab_size=5000.*largest possible vocabulary is \d+"),
        (100, r"=100.*smallest possible vocabulary is \d+"),
    ],
)
def test_impossible_size_says_what_is_possible(size, message):
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer([TEXT], size)
    possible = int(str(caught.value).split("vocabulary is ")[1].split(".")[0])
    assert train_tokenizer([TEXT], possible).vocab_size == possible


def test_unsound_models_are_refused():
    for content in (b"", b"not a model", train_tokenizer([TEXT], 330).to_bytes()[:-100]):
        with pytest.raises(UserError, match=r"^bad\.model: not a SentencePiece model"):
            SentencePieceTokenizer(content, "bad.model")


@pytest.mark.parametrize(
    "setting",
    [{"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False}, {"add_dummy_prefix": True},
     {"remove_extra_whitespaces": True}],
)  # fmt: skip
def test_models_that_change_text_are_refused(tmp_path, setting):
    sound = {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(tmp_path / "m"), model_type="bpe", minloglevel=3,
        vocab_size=330 if setting.get("byte_fallback", True) else 150,
        **{**sound, "add_dummy_prefix": False, **setting},
    )  # fmt: skip
    with pytest.raises(UserError, match="changes text"):
        SentencePieceTokenizer((tmp_path / "m.model").read_bytes())


def test_model_without_separator_is_refused(tmp_path):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(tmp_path / "m"), vocab_size=150, model_type="bpe",
        minloglevel=3, eos_id=-1, bos_id=-1,
    )  # fmt: skip
    with pytest.raises(UserError, match="no control piece"):
        SentencePieceTokenizer((tmp_path / "m.model").read_bytes())


def test_special_tokens_leave_the_rest_of_the_model_as_it_is(tokenizer):
    extended = tokenizer.with_special_tokens(["龍", "_start_"])
    before, after = (spm.SentencePieceProcessor(model_proto=model.to_bytes()) for model in (tokenizer, extended))
    assert [after.id_to_piece(n) for n in range(after.vocab_size())] == [
        *(before.id_to_piece(n) for n in range(330)), "龍", "_start_"
    ]  # fmt: skip
    assert [n for n in range(332) if after.is_control(n)] == [1, 330, 331]
    # A character without a piece is its bytes, also where it is the name of a special token.
    assert extended.encode("x龍").tolist() == tokenizer.encode("x龍").tolist()
