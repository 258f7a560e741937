"""Conversations as tokens: the chat template, for training, for generation, and as Jinja for transformers.

A message is the token of its role, its text, and ``<|end|>``: ``<|user|>Hello<|end|><|assistant|>Hi<|end|>``. Role and
end are special tokens, which no text encodes to: whatever a user types is text.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt1_jax.errors import UserError
from gpt1_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|end|>"
CHAT_TOKENS = (*(f"<|{role}|>" for role in ROLES), END)


class Message(NamedTuple):
    """What one side says: ``role`` is one of ``ROLES``."""

    role: str
    content: str


class Encoded(NamedTuple):
    """A conversation as tokens.

    Attributes:
        tokens: int32, shape (tokens,).
        learned: which of them are learned, bool: the texts of the assistant, and the end of each.
        dropped_turns: turns left out for want of room, the oldest.
        cut_tokens: tokens cut off the one turn that is left, because it alone is too long.
    """

    tokens: np.ndarray
    learned: np.ndarray
    dropped_turns: int
    cut_tokens: int


class _Turn(NamedTuple):
    """A question and its answer, as tokens; no answer: it is to come."""

    user: list[int]
    assistant: list[int] | None


def has_chat_tokens(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the special tokens of conversations."""
    return set(CHAT_TOKENS) <= set(tokenizer.special_tokens)


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], context_length: int) -> Encoded:
    """A conversation to learn from, in at most ``context_length`` tokens.

    The oldest turns, a turn being a question and its answer, are left out until the rest fits; the system's message
    stays. If a single turn does not fit, its question is cut from the left, and after that the whole from the right.
    A last question without an answer has nothing to learn, and is left out.

    Args:
        tokenizer: one with ``CHAT_TOKENS``.
        messages: a system's message or none, then questions of the user and answers of the assistant in turn.
        context_length: most tokens.

    Raises:
        UserError: if the messages are not in that order, or there is no answer among them.
    """
    _check_order(messages)
    if messages[-1].role == "user":
        messages = messages[:-1]
    if not messages or messages[-1].role != "assistant":
        raise UserError("messages: there is no answer of the assistant to learn from")
    encoded = _fitted(tokenizer, messages, context_length)
    over = max(0, len(encoded.tokens) - context_length)
    return encoded._replace(
        tokens=encoded.tokens[:context_length],
        learned=encoded.learned[:context_length],
        cut_tokens=encoded.cut_tokens + over,
    )


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> Encoded:
    """A conversation to answer, in at most ``room`` tokens: it ends with the token of the assistant's role.

    What does not fit is left out as in :func:`encode_conversation`.

    Args:
        tokenizer: one with ``CHAT_TOKENS``.
        messages: a system's message or none, then questions and answers in turn, a question last.
        room: most tokens.

    Raises:
        UserError: if the messages are not in that order, or the system's message alone leaves no room.
    """
    _check_order(messages)
    if messages[-1].role != "user":
        raise UserError(f"messages: the last is of the {messages[-1].role}; a question of the user must be last")
    encoded = _fitted(tokenizer, messages, room)
    if len(encoded.tokens) > room:
        raise UserError(
            f"the system's message leaves no room for a question: the context has room for {room} tokens, and it takes "
            f"{len(encoded.tokens)} with an empty question; shorten it, or ask for fewer new tokens"
        )
    return encoded


def chat_template(tokenizer: Tokenizer) -> str:
    """The same form as a Jinja template, for ``apply_chat_template`` of transformers.

    That method renders a text and then looks for special tokens in it, so it cannot tell the template's own from those
    that a message spells: a message that spells one is refused, and never read as that token.

    Args:
        tokenizer: one with ``CHAT_TOKENS``.
    """
    return (
        f"{{%- set special = {json.dumps(tokenizer.reserved, ensure_ascii=False)} -%}}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] not in {json.dumps(ROLES)} -%}}"
        "{{- raise_exception('a role must be one of " + ", ".join(ROLES) + ", and not ' + message['role']) -}}"
        "{%- endif -%}"
        "{%- for name in special -%}{%- if name in message['content'] -%}"
        "{{- raise_exception('a message must not spell the special token ' + name) -}}"
        "{%- endif -%}{%- endfor -%}"
        "{{- '<|' + message['role'] + '|>' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        f"{{%- generation -%}}{{{{- message['content'] + '{END}' -}}}}{{%- endgeneration -%}}"
        f"{{%- else -%}}{{{{- message['content'] + '{END}' -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )


def _check_order(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("messages: there are none")
    start = messages[0].role == "system"
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise UserError(f"messages[{number}]: {message.role!r} is no role; the roles are {', '.join(ROLES)}")
        expected = "system" if number < start else ("user", "assistant")[(number - start) % 2]
        if message.role != expected:
            raise UserError(
                f"messages[{number}] is of the {message.role} where one of the {expected} must be: a system's message "
                "or none, then user and assistant in turn"
            )


def _fitted(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> Encoded:
    """The conversation without what of it must go to leave ``room`` tokens, if questions alone make it so."""
    ids = {role: tokenizer.special_id(f"<|{role}|>") for role in ROLES}
    end = tokenizer.special_id(END)
    texts = [tokens.tolist() for tokens in tokenizer.encode_batch([message.content for message in messages])]
    system = [ids["system"], *texts.pop(0), end] if messages[0].role == "system" else []
    turns = [_Turn(user, assistant) for user, assistant in zip(texts[::2], [*texts[1::2], None], strict=False)]
    lengths = [len(turn.user) + 3 + (0 if turn.assistant is None else len(turn.assistant) + 1) for turn in turns]
    dropped, excess = 0, len(system) + sum(lengths) - room
    while excess > 0 and dropped < len(turns) - 1:
        excess -= lengths[dropped]
        dropped += 1
    cut = min(max(0, excess), len(turns[dropped].user))
    turns[dropped] = turns[dropped]._replace(user=turns[dropped].user[cut:])
    tokens, learned = list(system), [False] * len(system)
    for turn in turns[dropped:]:
        asked = [ids["user"], *turn.user, end, ids["assistant"]]
        answered = [] if turn.assistant is None else [*turn.assistant, end]
        tokens += asked + answered
        learned += [False] * len(asked) + [True] * len(answered)
    return Encoded(np.array(tokens, np.int32), np.array(learned, bool), dropped, cut)
