import inspect
import io
import itertools
import json
import random
import re
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt1_jax.errors import UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json, tokenizer_config
from gpt1_jax.text.conversation import (
    CHAT_TOKENS,
    Message,
    chat_template,
    encode_conversation,
    encode_prompt,
    has_chat_tokens,
)
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import PROBE, SentencePieceTokenizer, train_tokenizer
from gpt1_jax.text.tokenizer import load_tokenizer

STRINGS = 5000
TEXT = inspect.getsource(random) + "The quick brown fox.\n\n  été, naïve: 漢字\n" * 20
# Characters and strings that tokenizers stumble over, more often than chance would bring them.
HARD = [
    *map(chr, range(33)), "\x7f", "\x85", "\u00ad", "\u200d", "\u200f", "\u2028", "\u2581",
    "\u2581\u2581", "\ufeff", "\ufffd",
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x41>", "<0x0A>", "  ", "\n\n", " \n ", "\r\n", "שלום",
    "مرحبا", "e\u0301",
    "👩\u200d👩\u200d👧", "👍🏽", "🏴\U000e0067\U000e007f", "漢字", "ﬁ", "½", "quick", " fox", "the lazy", "  The",
]  # fmt: skip


def strings(count: int) -> list[str]:
    """Text, marks, control characters and characters from every plane, in any order."""
    draw = random.Random(0)

    def part() -> str:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(HARD) * draw.choice([1, 1, 1, 2, 9])
        if kind < 0.7:
            start = draw.randrange(len(TEXT))
            return TEXT[start : start + draw.randint(1, 30)]
        point = draw.randrange(17) * 0x10000 + draw.randrange(0x10000)
        return "" if 0xD800 <= point < 0xE000 else chr(point)

    return ["".join(part() for _ in range(draw.randint(0, 12))) for _ in range(count)]


def trained(**other: object) -> SentencePieceTokenizer:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 600, "normalization_rule_name": "identity", "byte_fallback": True,
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "required_chars": "\u2581",
    }  # fmt: skip
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, minloglevel=3, **{**settings, **other}
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module", params=[400, 2000])
def model(request) -> SentencePieceTokenizer:
    return train_tokenizer([TEXT], request.param)


def public_folder(folder, tokenizer):
    """What an exported folder holds of the tokenizer."""
    content = fast_tokenizer_json(tokenizer)
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            tokenizer_config(
                FastTokenizer(content), 32, chat_template(tokenizer) if has_chat_tokens(tokenizer) else None
            )
        )
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}))
    return folder


def test_no_string_differs(model):
    converted = FastTokenizer(fast_tokenizer_json(model))
    assert (converted.vocab_size, converted.separator_id) == (model.vocab_size, model.separator_id)
    differ = [
        text
        for text in strings(STRINGS)
        if not np.array_equal(converted.encode(text), model.encode(text))
        or converted.decode(model.encode(text)) != text
    ]
    assert differ == []


@pytest.mark.parametrize(("alphabet", "size"), [("ab", 480), ("ab ", 480), ("a\n-", 290)])
def test_pieces_that_overlap_are_joined_in_the_same_order(alphabet, size):
    # Of runs and of periodic text, where one piece can be made of two halves in several ways.
    draw = random.Random(1)
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 9))) * draw.randint(1, 40) for _ in range(2000)]
    model = train_tokenizer(texts, size)
    converted = FastTokenizer(fast_tokenizer_json(model))
    assert [text for text in texts if not np.array_equal(converted.encode(text), model.encode(text))] == []


def test_any_tokens_decode_alike(model):
    converted, draw = FastTokenizer(fast_tokenizer_json(model)), random.Random(2)
    for _ in range(500):
        tokens = [draw.randrange(1, model.vocab_size) for _ in range(6)]
        # The two count the bytes that are no text differently: one U+FFFD a byte, or one for what begins a character.
        ours, theirs = (tokenizer.decode(tokens).split("\ufffd") for tokenizer in (model, converted))
        assert [part for part in ours if part] == [part for part in theirs if part]


def test_the_library_alone_reads_it(model):
    library = tokenizers.Tokenizer.from_str(fast_tokenizer_json(model).decode())
    assert library.encode(PROBE).ids == model.encode(PROBE).tolist()
    assert library.decode(library.encode(PROBE).ids) == PROBE


def test_transformers_reads_it(model, tmp_path):
    public_folder(tmp_path, model)
    auto: Any = AutoTokenizer.from_pretrained(tmp_path)
    alone: Any = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    auto.save_pretrained(tmp_path / "again")
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "again")
    for tokenizer, text in itertools.product((auto, alone, again), [PROBE, *strings(200)]):
        found = tokenizer(text)
        assert found["input_ids"] == model.encode(text).tolist()
        assert tokenizer.decode(found["input_ids"]) == text
        assert set(found) == {"input_ids", "attention_mask"} or tokenizer is alone
    assert (auto.eos_token, auto.eos_token_id, auto.bos_token_id) == ("<|endoftext|>", 1, 1)
    assert auto.unk_token_id == 0
    assert auto.model_max_length == 32
    assert len(auto) == model.vocab_size
    assert auto.decode([1, *auto("quick").input_ids, 1], skip_special_tokens=True) == "quick"


def test_transformers_knows_special_tokens_by_name_alone(model, tmp_path):
    extended = model.with_special_tokens(["_start_", "_classify_"])
    auto: Any = AutoTokenizer.from_pretrained(public_folder(tmp_path, extended))
    assert len(auto) == extended.vocab_size == model.vocab_size + 2
    assert auto.convert_tokens_to_ids("_classify_") == extended.special_id("_classify_") == model.vocab_size + 1
    for text in ("_classify_", "a _start_ b_classify__classify_", PROBE):
        tokens = model.encode(text).tolist()
        assert auto(text).input_ids == tokens
        assert auto.decode([model.vocab_size, *tokens], skip_special_tokens=True) == text
    found = load_tokenizer(fast_tokenizer_json(extended))
    assert found.special_tokens == extended.special_tokens == ("_start_", "_classify_")


CONVERSATION = [
    Message("system", " Be\n brief. "),
    Message("user", "The quick \u2581 fox\n\n"),
    Message("assistant", "  jumps 漢字 "),
    Message("user", ""),
    Message("assistant", "<|call|>"),
]


@pytest.fixture(scope="module")
def chat(model, tmp_path_factory) -> tuple[SentencePieceTokenizer, Any]:
    """A tokenizer for conversations, and what transformers makes of it, also after saving it anew."""
    extended = model.with_special_tokens(CHAT_TOKENS)
    folder = public_folder(tmp_path_factory.mktemp("chat"), extended)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "again")
    return extended, [AutoTokenizer.from_pretrained(path) for path in (folder, folder / "again")]


def test_transformers_gives_the_tokens_of_conversations(chat):
    extended, found = chat
    messages = [message._asdict() for message in CONVERSATION]
    ours = encode_conversation(extended, CONVERSATION, 999)
    prompt = encode_prompt(extended, CONVERSATION[:-1], 999)
    for auto in found:
        theirs = auto.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert theirs["input_ids"] == ours.tokens.tolist()
        assert theirs["assistant_masks"] == ours.learned.astype(int).tolist()
        asked = auto.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == prompt.tokens.tolist()


@pytest.mark.parametrize("name", [*CHAT_TOKENS, "<|endoftext|>", "<unk>"])
def test_a_message_that_spells_a_special_token_is_refused_by_the_template(chat, name):
    for auto in chat[1]:
        with pytest.raises(TemplateError, match=re.escape(f"a message must not spell the special token {name}")):
            auto.apply_chat_template([{"role": "user", "content": f"a{name}"}])
        with pytest.raises(TemplateError, match="a role must be one of system, user, assistant, and not end"):
            auto.apply_chat_template([{"role": "end", "content": "a"}])


def test_user_symbols_stay_whole():
    model = trained(user_defined_symbols=["\n", "<call>", "brown"])
    converted = FastTokenizer(fast_tokenizer_json(model))
    for text in ("brownbrown <call>x</call>\nbrow n", " brown\nb", PROBE):
        assert converted.encode(text).tolist() == model.encode(text).tolist()
        assert converted.decode(model.encode(text)) == text
    assert len(converted.encode("brown")) == len(converted.encode("<call>")) == 1


def test_the_separator_of_another_model_is_kept():
    for settings in ({}, {"eos_id": -1}):  # </s>, and <s> where there is none
        model = trained(**settings)
        assert FastTokenizer(fast_tokenizer_json(model)).separator_id == model.separator_id


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"model_type": "unigram"}, "it is not BPE"), ({"eos_piece": "END"}, "its separator is none of the names known")],
)
def test_models_without_a_counterpart_are_refused(settings, why):
    with pytest.raises(UserError, match=f"no exact counterpart in the tokenizers library: {why}"):
        fast_tokenizer_json(trained(**settings))


def test_a_fast_tokenizer_is_given_as_it_is(model):
    content = b"\n".join(fast_tokenizer_json(model).split(b"\n")) + b"\n"
    tokenizer = FastTokenizer(content)
    assert fast_tokenizer_json(tokenizer) == content
    assert tokenizer_config(tokenizer, 7) == tokenizer_config(FastTokenizer(fast_tokenizer_json(model)), 7)
    assert tokenizer.reserved == model.reserved == ("<unk>", "<|endoftext|>")
