import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.errors import UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer, train_tokenizer
from gpt1_jax.text.special_tokens import CLASSIFY, DELIMITER, START
from gpt1_jax.text.tokenizer import Tokenizer, load_tokenizer, read_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\nHow vexingly quick daft zebras jump!\n" * 20


@pytest.fixture(scope="module")
def model() -> SentencePieceTokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, FastTokenizer])
def test_either_kind_is_told_by_its_content(model, kind, tmp_path):
    content = model.to_bytes() if kind is SentencePieceTokenizer else fast_tokenizer_json(model)
    (tmp_path / "anything").write_bytes(content)
    for tokenizer in (load_tokenizer(content), read_tokenizer(tmp_path / "anything")):
        assert isinstance(tokenizer, kind)
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.to_bytes() == content
        assert (tokenizer.vocab_size, tokenizer.separator_id) == (300, 1)
        assert tokenizer.encode("quick fox").tolist() == model.encode("quick fox").tolist()
        assert all(
            np.array_equal(*pair)
            for pair in zip(tokenizer.encode_batch(["a", ""]), model.encode_batch(["a", ""]), strict=True)
        )


def test_files_that_are_neither_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: this tokenizer cannot be read: No such file"):
        read_tokenizer(tmp_path / "nowhere.json")
    for content in (b"", b"not a model", model.to_bytes()[:-100], b'{"model": {}}', fast_tokenizer_json(model)[:-100]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match=r"/bad: "):
            read_tokenizer(tmp_path / "bad")


NAMES = (START, DELIMITER, CLASSIFY)
SPELT = st.lists(st.sampled_from([*NAMES, "_start", "_", "<|endoftext|>", "<unk>", " ", "\n", "\u2581", "quick", "é"]))
ANY = st.one_of(SPELT.map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module", params=["sentencepiece", "fast"])
def plain(request, model) -> Tokenizer:
    return model if request.param == "sentencepiece" else FastTokenizer(fast_tokenizer_json(model))


def test_special_tokens_are_behind_the_last_in_order(plain):
    extended = plain.with_special_tokens(NAMES)
    assert (plain.special_tokens, extended.special_tokens) == ((), NAMES)
    assert [extended.special_id(name) for name in NAMES] == [300, 301, 302]
    assert (extended.vocab_size, extended.separator_id) == (303, plain.separator_id)
    assert extended.fingerprint != plain.fingerprint
    with pytest.raises(KeyError, match="_start_"):
        plain.special_id(START)


def test_special_tokens_that_are_there_stay(plain):
    first = plain.with_special_tokens([CLASSIFY, CLASSIFY])
    assert first.with_special_tokens([CLASSIFY]) is first
    assert plain.with_special_tokens([]) is plain
    both = first.with_special_tokens([START, CLASSIFY, DELIMITER])
    assert both.special_tokens == (CLASSIFY, START, DELIMITER)
    assert both.special_id(CLASSIFY) == first.special_id(CLASSIFY) == 300


@settings(max_examples=200, deadline=None)
@given(text=ANY)
def test_text_stays_text_with_special_tokens(plain, text):
    extended = plain.with_special_tokens(NAMES)
    stored = load_tokenizer(extended.to_bytes())
    tokens = plain.encode(text)
    assert stored.special_tokens == NAMES and type(stored) is type(plain)
    for tokenizer in (extended, stored):
        assert tokenizer.encode(text).tolist() == tokens.tolist()
        assert tokenizer.decode([300, *tokens.tolist(), 302, 1]) == tokenizer.decode(tokens) == text


def test_names_of_text_cannot_be_special(plain, model):
    fast = FastTokenizer(fast_tokenizer_json(model))
    piece = next(name for name in map(fast.token, range(259, 300)) if len(name) > 1 and name.isalpha())
    for name in ("<|endoftext|>", "<unk>", piece, ""):
        with pytest.raises(UserError, match="cannot be a special token of this tokenizer: its vocabulary"):
            plain.with_special_tokens([START, name])
