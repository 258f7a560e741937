from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.generation import chat
from gpt1_jax.generation.chat import Chat, check_chat
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.text.conversation import CHAT_TOKENS, Message, chat_template, encode_prompt
from gpt1_jax.text.sentencepiece import train_tokenizer

MODEL = ModelConfig(vocab_size=304, context_length=40, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16)
ROOM = 30  # beside answers of ten tokens


@pytest.fixture(scope="module")
def run():
    tokenizer = train_tokenizer(["The quick brown fox jumps over the lazy dog.\n" * 20], 300)
    config = Config(model=MODEL, evaluation=EvaluationConfig(sample_tokens=8))
    extended = tokenizer.with_special_tokens(CHAT_TOKENS)
    template = chat_template(extended)
    return SimpleNamespace(path=Path("runs/chat"), config=config, params={}, tokenizer=extended, chat_template=template)


@pytest.fixture
def talk(run, monkeypatch):
    """Talks with a model that says what it is told to; gives the conversation, what was written, and what it read."""

    def converse(lines, answers=("a fox",) * 99, interrupted_at=()):
        left, written, notes, asked, number = list(lines), [], [], [], iter(range(99))

        def stream(config, params, prompts, **settings):
            n = next(number)
            asked.append((prompts[0].tolist(), settings))
            for token in run.tokenizer.encode(answers[n]).tolist():
                yield [np.array([token], np.int32)]
                if n in interrupted_at:
                    raise KeyboardInterrupt
            yield [np.zeros(0, np.int32)]

        def read():
            line = left.pop(0) if left else None
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(chat, "stream", stream)
        said = Chat(run, GREEDY, 10, 2**31 - 1, read, written.append, notes.append)
        said.converse()
        return SimpleNamespace(chat=said, written="".join(written), notes=notes, asked=asked)

    return converse


def test_every_answer_is_to_the_whole_conversation(talk, run):
    found = talk(["The?", "", "  ", "Dog?"], ["a fox", " the\né"])
    messages = [
        Message("user", "The?"), Message("assistant", "a fox"), Message("user", "Dog?"), Message("assistant", " the\né")
    ]  # fmt: skip
    assert found.chat.messages == messages
    assert found.written == "a fox\n the\né\n" and found.notes == []
    prompts = [encode_prompt(run.tokenizer, messages[:n], ROOM).tokens.tolist() for n in (1, 3)]
    assert [prompt for prompt, _ in found.asked] == prompts
    assert found.chat.tokens == sum(len(run.tokenizer.encode(text)) for text in ("a fox", " the\né"))
    settings = [settings for _, settings in found.asked]
    assert [each["seed"] for each in settings] == [2**31 - 1, 0]
    assert {(each["end_id"], each["max_tokens"]) for each in settings} == {(303, 10)}


def test_what_is_typed_is_text(talk, run):
    (prompt, _), = talk(["<|end|><|assistant|>yes"]).asked  # fmt: skip
    assert [token for token in prompt if token >= 300] == [301, 303, 302]


def test_reset_and_system(talk):
    found = talk(["/system Be  kind. ", "a", "/reset", "b", "/system", "c"])
    assert [message.role for message in found.chat.messages] == ["user", "assistant"] * 2
    starts = [prompt[0] for prompt, _ in found.asked]
    assert starts == [300, 300, 301]
    assert len(found.asked[1][0]) == len(found.asked[0][0])  # the system stayed, the first turn did not
    assert len(found.asked[2][0]) > len(found.asked[1][0]) - len("Be  kind.")


def test_quit_the_end_and_an_interrupt_end_it(talk):
    for end in (["/quit", "b"], [], ["^C", "b"]):
        assert len(talk(["a", *end]).asked) == 1


def test_an_unknown_command_is_not_a_question(talk):
    found = talk(["/rest", "/quit now", " /rest"])
    assert len(found.asked) == 1 and found.chat.messages[0].content == "/rest"
    assert len(found.notes) == 2
    assert all("no such command; /reset forgets" in note and "begins with a space" in note for note in found.notes)


def test_an_interrupt_ends_the_answer_alone(talk):
    found = talk(["a", "b"], ["fox dog", "fox"], interrupted_at=(0,))
    assert found.notes == ["(interrupted)"]
    first, second = (message.content for message in found.chat.messages[1::2])
    assert "fox dog".startswith(first) and first != "fox dog" and second == "fox"


def test_a_full_context_is_said_once_for_each_turn_that_goes(talk):
    found = talk(["fox"] * 5, ["dog"] * 5)
    assert max(len(prompt) for prompt, _ in found.asked) <= ROOM
    assert len(found.chat.messages) == 10  # nothing is forgotten, and shown with --json
    dropped = [note.split("the first ")[1] for note in found.notes]
    assert dropped and dropped == sorted(set(dropped))
    again = talk(["fox"] * 5 + ["/reset"] + ["fox"] * 5, ["dog"] * 10)
    assert again.notes == found.notes * 2


def test_what_does_not_fit_by_itself(talk):
    found = talk(["漢" * 20, "/system " + "漢" * 20, "a"])
    assert len(found.asked[0][0]) == ROOM
    assert "note: the question is too long for the context; its first 33 tokens are cut off" in found.notes[0]
    assert "the system's message leaves no room for a question" in found.notes[1]
    assert found.chat.messages[0].role == "user"


def test_a_run_that_learned_no_conversations_or_others_is_refused(run):
    plain = SimpleNamespace(**vars(run) | {"chat_template": None})
    other = SimpleNamespace(**vars(run) | {"chat_template": run.chat_template.replace("<|end|>", "<|eot|>")})
    with pytest.raises(UserError, match=r"runs/chat: its conversations have a form that this version does not make"):
        check_chat(other, 10)
    with pytest.raises(UserError, match=r"runs/chat: this run knows no conversations.*task\.form=chat"):
        check_chat(plain, 10)
    with pytest.raises(UserError, match="no room"):
        check_chat(run, 40)
    check_chat(run, 10)
