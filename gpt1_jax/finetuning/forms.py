"""The input of every task form, token by token (paper, figure 1 and section 3.3).

    classification    _start_ text _classify_
    entailment        _start_ premise _delimiter_ hypothesis _classify_
    similarity        both orders: _start_ first _delimiter_ second _classify_, and second before first
    multiple_choice   for each answer: _start_ context question _delimiter_ answer _classify_
    text_to_text      _start_ source _delimiter_ target and the separator
    chat              as text/conversation.py has it

Long texts keep their beginnings: two texts have at most half of the context less two tokens each, as the authors'
train.py has it (``transform_roc``), and one text the context less two. Of a context with a question it is the context
that is cut.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt1_jax.data.examples import Choices, Conversation, Example, Labelled, Pair
from gpt1_jax.errors import UserError
from gpt1_jax.generation.prompts import source_room
from gpt1_jax.task_config import Chat, Similarity, Task, TextToText
from gpt1_jax.text.conversation import CHAT_TOKENS, encode_conversation
from gpt1_jax.text.special_tokens import CLASSIFY, DELIMITER, START
from gpt1_jax.text.tokenizer import Tokenizer

_AT_ONCE = 1000  # examples whose texts are encoded in one call


class Encoded(NamedTuple):
    """An example as tokens.

    Attributes:
        sequences: one, or one for each order or answer; int32 each.
        learned: of each sequence, which tokens the language-model loss counts; the first never, it has no context.
        label: class, number, or right answer; 0 where the form has none.
        truncated: whether something was left out for want of room.
    """

    sequences: tuple[np.ndarray, ...]
    learned: tuple[np.ndarray, ...]
    label: float
    truncated: bool


def special_tokens(task: Task) -> tuple[str, ...]:
    """The tokens that a form appends to the vocabulary."""
    if isinstance(task, Chat):
        return CHAT_TOKENS
    return (START, DELIMITER) if isinstance(task, TextToText) else (START, DELIMITER, CLASSIFY)


def check_room(task: Task, context_length: int) -> None:
    """Checks that a context has room for anything at all.

    Raises:
        UserError: if it has not.
    """
    needed, key = 8, "the form"
    if isinstance(task, TextToText):
        needed, key = task.target_tokens + 3, f"task.target_tokens={task.target_tokens}"
    elif isinstance(task, Chat):
        needed, key = task.answer_tokens + 8, f"task.answer_tokens={task.answer_tokens}"
    if context_length < needed:
        raise UserError(f"{key} needs at least {needed} tokens, and the base's context has {context_length}; lower it")


def encode(
    task: Task,
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    context_length: int,
) -> Iterator[Encoded]:
    """The examples of a task as tokens, in their order, as they are asked for.

    Args:
        task: the form.
        examples: of that form, one that has tokens.
        tokenizer: with the form's special tokens.
        context_length: most tokens of a sequence.
    """
    form = _Form(task, tokenizer, context_length)
    rest = iter(examples)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield from form.encode(some)


class _Form:
    def __init__(self, task: Task, tokenizer: Tokenizer, context_length: int):
        self._task, self._tokenizer, self._context_length = task, tokenizer, context_length
        if not isinstance(task, Chat):
            self._special = {name: tokenizer.special_id(name) for name in special_tokens(task)}

    def encode(self, examples: Sequence) -> Iterator[Encoded]:
        first = examples[0]
        if isinstance(first, Conversation):
            return map(self._conversation, examples)
        if isinstance(first, Choices):
            return self._choices(examples)
        if isinstance(first, Pair):
            return self._pairs(examples)
        return self._labelled(examples)

    def _labelled(self, examples: Sequence[Labelled]) -> Iterator[Encoded]:
        texts = iter(self._tokenizer.encode_batch([text for example in examples for text in example.texts]))
        both = isinstance(self._task, Similarity)
        for example in examples:
            parts = [next(texts) for _ in example.texts]
            orders = [parts, parts[::-1]] if both else [parts]
            yield self._classified([self._cut(order) for order in orders], example.label)

    def _choices(self, examples: Sequence[Choices]) -> Iterator[Encoded]:
        texts = self._tokenizer.encode_batch(
            [
                text
                for example in examples
                for text in (example.context, f" {example.question}" * bool(example.question), *example.answers)
            ]
        )
        left = iter(texts)
        room = self._context_length // 2 - 2
        for example in examples:
            context, question = next(left), next(left)
            over = len(context) + len(question) > room
            asked = np.concatenate([context[: max(0, room - len(question))], question[:room]])
            answers = [next(left) for _ in example.answers]
            cuts = [([asked, answer[:room]], over or len(answer) > room) for answer in answers]
            yield self._classified(cuts, example.label)

    def _pairs(self, examples: Sequence[Pair]) -> Iterator[Encoded]:
        assert isinstance(self._task, TextToText)
        texts = iter(self._tokenizer.encode_batch([text for example in examples for text in example]))
        room, most = source_room(self._task, self._context_length), self._task.target_tokens
        for _ in examples:
            source, target = next(texts), np.append(next(texts), np.int32(self._tokenizer.separator_id))
            prompt = np.concatenate([[self._special[START]], source[:room], [self._special[DELIMITER]]])
            tokens = np.concatenate([prompt, target[:most]]).astype(np.int32)
            learned = np.arange(len(tokens)) >= len(prompt)
            yield Encoded((tokens,), (learned,), 0.0, len(source) > room or len(target) > most)

    def _conversation(self, example: Conversation) -> Encoded:
        found = encode_conversation(self._tokenizer, example.messages, self._context_length)
        return Encoded((found.tokens,), (found.learned,), 0.0, bool(found.dropped_turns or found.cut_tokens))

    def _cut(self, parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], bool]:
        room = self._context_length // 2 - 2 if len(parts) > 1 else self._context_length - 2
        return [part[:room] for part in parts], any(len(part) > room for part in parts)

    def _classified(self, cuts: Sequence[tuple[list[np.ndarray], bool]], label: float) -> Encoded:
        start, delimiter, classify = (np.array([self._special[n]]) for n in (START, DELIMITER, CLASSIFY))
        sequences = []
        for parts, _ in cuts:
            between = [piece for part in parts for piece in (delimiter, part)][1:]
            sequences.append(np.concatenate([start, *between, classify]).astype(np.int32))
        learned = tuple(np.arange(len(sequence)) > 0 for sequence in sequences)
        return Encoded(tuple(sequences), learned, float(label), any(cut for _, cut in cuts))
