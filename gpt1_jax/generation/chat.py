"""A conversation with a run: each line is a question, its answer is written as it is generated.

The whole conversation is read anew for each answer, cut by whole turns where the context is too short for it
(:mod:`gpt1_jax.text.conversation`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from gpt1_jax.errors import UserError
from gpt1_jax.generation.decode import stream
from gpt1_jax.generation.detokenize import Detokenizer
from gpt1_jax.generation.prefill import prompt_room
from gpt1_jax.generation.sampling import Sampling
from gpt1_jax.text.conversation import END, Message, chat_template, encode_prompt
from gpt1_jax.training.run import Run

COMMANDS = "/reset forgets the conversation, /system TEXT sets what stands before it, /quit ends"


def check_chat(run: Run, max_tokens: int) -> None:
    """Checks that a run can be talked to.

    Raises:
        UserError: if it was not trained on conversations, or on others than this version makes, or the new tokens leave
            no room for a question.
    """
    if run.chat_template is None:
        raise UserError(
            f"{run.path}: this run knows no conversations; fine-tune it with task.form=chat, or give it a text to go "
            "on from"
        )
    if run.chat_template != chat_template(run.tokenizer):
        raise UserError(
            f"{run.path}: its conversations have a form that this version does not make (chat_template.jinja in its "
            "checkpoint); use the version that trained it, or fine-tune it again"
        )
    prompt_room(run.config, max_tokens)


@dataclass
class Chat:
    """A conversation.

    Args:
        run: one that :func:`check_chat` lets pass.
        sampling: how each token is chosen.
        max_tokens: of each answer.
        seed: of the random draws; answer n draws with seed + n.
        read: gives the next line, or None at the end.
        write: takes pieces of the answers.
        note: takes a line about the conversation.

    Attributes:
        messages: what was said since the last reset, and what the system says.
        tokens: new tokens of all answers.
    """

    run: Run
    sampling: Sampling
    max_tokens: int
    seed: int
    read: Callable[[], str | None]
    write: Callable[[str], None]
    note: Callable[[str], None]
    messages: list[Message] = field(default_factory=list, init=False)
    tokens: int = field(default=0, init=False)
    _answers: int = field(default=0, init=False)
    _dropped: int = field(default=0, init=False)  # turns that the last prompt had no room for

    def converse(self) -> None:
        """Answers line by line, to the end of the lines, ``/quit``, or an interrupt while waiting for a line."""
        while True:
            try:
                line = self.read()
            except KeyboardInterrupt:
                return
            if line is None or line == "/quit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif question := line.strip():  # as messages are learned from; a space before "/" has done its work
                self._answer(question)

    def _obey(self, line: str) -> None:
        command, _, text = line.partition(" ")
        system = [message for message in self.messages if message.role == "system"]
        if line == "/reset":
            self.messages, self._dropped = system, 0
        elif command == "/system":
            self._set_system(text.strip())
        else:
            self.note(f"{command}: no such command; {COMMANDS}; a line that begins with a space is a question")

    def _set_system(self, text: str) -> None:
        """Puts a message before the conversation, in the place of what is there; an empty one takes it away."""
        said = [message for message in self.messages if message.role != "system"]
        system = [Message("system", text)] if text else []
        try:
            encode_prompt(self.run.tokenizer, [*system, Message("user", "")], self._room)
        except UserError as error:
            self.note(str(error))
        else:
            self.messages = system + said

    @property
    def _room(self) -> int:
        return prompt_room(self.run.config, self.max_tokens)

    def _answer(self, question: str) -> None:
        """Answers; an interrupt ends the answer where it is, and the conversation goes on."""
        self.messages.append(Message("user", question))
        prompt = encode_prompt(self.run.tokenizer, self.messages, self._room)
        self._note_what_is_cut(prompt.dropped_turns, prompt.cut_tokens)
        pieces = stream(
            self.run.config,
            self.run.params,
            [prompt.tokens],
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            seed=(self.seed + self._answers) % 2**31,
            separator_id=self.run.tokenizer.separator_id,
            end_id=self.run.tokenizer.special_id(END),
        )
        detokenizer, texts = Detokenizer(self.run.tokenizer.decode), []

        def show(text: str) -> None:
            texts.append(text)
            self.write(text)

        try:
            for (new,) in pieces:
                self.tokens += len(new)
                show(detokenizer.push(new))
        except KeyboardInterrupt:
            self.note("(interrupted)")
        show(detokenizer.flush())
        self.write("\n")
        self._answers += 1
        self.messages.append(Message("assistant", "".join(texts)))

    def _note_what_is_cut(self, dropped_turns: int, cut_tokens: int) -> None:
        if dropped_turns > self._dropped:
            self.note(f"note: the context is full; the model no longer sees the first {dropped_turns} turn(s)")
        self._dropped = dropped_turns
        if cut_tokens:
            self.note(f"note: the question is too long for the context; its first {cut_tokens} tokens are cut off")
