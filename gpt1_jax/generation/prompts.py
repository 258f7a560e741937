"""What a model is asked, in the form in which it was trained: text to go on from, or a source to turn into a target."""

from typing import NamedTuple

import numpy as np

from gpt1_jax.config import Config
from gpt1_jax.errors import UserError
from gpt1_jax.generation.prefill import prompt_room
from gpt1_jax.task_config import Chat, TextToText
from gpt1_jax.text.special_tokens import DELIMITER, START
from gpt1_jax.text.tokenizer import Tokenizer

_TOKENS = 64  # new ones, at most, where nothing says how many


class Prompt(NamedTuple):
    """A prompt as tokens.

    Attributes:
        tokens: int32.
        dropped: tokens that were left out, for want of room.
    """

    tokens: np.ndarray
    dropped: int


def turns_texts(config: Config) -> bool:
    """Whether the run was trained to turn a text into another, rather than to go on."""
    return isinstance(config.task, TextToText)


def new_tokens(config: Config) -> int:
    """How many new tokens to ask for, at most, if nobody says."""
    task = config.task
    if isinstance(task, TextToText):
        return task.target_tokens
    return task.answer_tokens if isinstance(task, Chat) else _TOKENS


def beams_of(config: Config) -> tuple[int | None, float | None]:
    """The beams that a run's task asks for, and their length penalty; None: it draws, or is greedy."""
    task = config.task
    return (task.beams, task.length_penalty) if isinstance(task, TextToText) and task.beams > 1 else (None, None)


def source_room(task: TextToText, context_length: int) -> int:
    """Most tokens of a source: start, delimiter and a whole target fit beside it."""
    return context_length - task.target_tokens - 2


def prompt_ids(config: Config, tokenizer: Tokenizer, text: str, max_tokens: int) -> Prompt:
    """The tokens of a prompt; the separator ends what follows, whatever the form.

    A text to go on from loses its beginning where the context has no room for it. A source is put in the form of the
    training, ``_start_ source _delimiter_``, and loses its end, as it did there.

    Args:
        config: of the run.
        tokenizer: of the run.
        text: the prompt.
        max_tokens: new tokens, at most.

    Raises:
        UserError: if they leave no room, or the model is a masked one.
    """
    room, ids = prompt_room(config, max_tokens), tokenizer.encode(text)
    if not isinstance(config.task, TextToText):
        return Prompt(ids[-room:], max(0, len(ids) - room))
    room = min(room - 2, source_room(config.task, config.context_length))
    if room < 1:
        raise UserError(f"{max_tokens} tokens to generate leave no room for a source; ask for fewer")
    start, delimiter = (np.array([tokenizer.special_id(name)], np.int32) for name in (START, DELIMITER))
    return Prompt(np.concatenate([start, ids[:room], delimiter]), max(0, len(ids) - room))
