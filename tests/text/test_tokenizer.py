import numpy as np
import pytest

from gpt1_jax.errors import UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer, train_tokenizer
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
