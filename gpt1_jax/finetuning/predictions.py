"""What a fine-tuned model answers to every example of a split, and how good that is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.data.examples import Examples, ExampleStream, read_examples
from gpt1_jax.data.loader import global_batch
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.metrics import Measured, measure
from gpt1_jax.finetuning.dataset import Batch, Dataset, width_for
from gpt1_jax.finetuning.forms import encode
from gpt1_jax.finetuning.loss import task_scores
from gpt1_jax.generation.beam import beam_search
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.model.sharding import axis_size, batch_sharding, replicated
from gpt1_jax.model.transformer import Params
from gpt1_jax.task_config import Chat, LearnableTask, Task, TextToText
from gpt1_jax.text.conversation import END, encode_prompt
from gpt1_jax.text.special_tokens import DELIMITER
from gpt1_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Questions:
    """What a model is asked to write.

    Attributes:
        prompts: token ids.
        references: the text that should follow each.
        places: where each is, as :class:`Answers` has them.
    """

    prompts: list[np.ndarray]
    references: list[str]
    places: list[dict[str, int]]


@dataclass(frozen=True)
class Split:
    """A split of a task, read and encoded.

    Attributes:
        name: train, validation or test.
        unlabelled: rows left out because they have no label.
        rows: the number of each example's row in the table, from 1; of the training split none.
        dataset: the examples as tokens.
        questions: of a task that is answered with texts, unless the split is only learned from.
    """

    name: str
    unlabelled: int
    rows: list[int]
    dataset: Dataset
    questions: Questions | None


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        predictions: a class, number, answer or text for each example.
        references: what they should be.
        scores: of every class or answer; None of texts.
        places: where each is: its ``row`` in the table, from 1, and in a conversation its ``turn``, from 1.
    """

    predictions: list[Any]
    references: list[Any]
    scores: np.ndarray | None
    places: list[dict[str, int]]


def read_split(task: LearnableTask, name: str, tokenizer: Tokenizer, context_length: int) -> Split:
    """Reads and encodes a split of a task.

    Raises:
        UserError: if its table cannot be read, or an example of it is amiss.
    """
    if name == "train":  # as large as it may be, and no text of it is needed again
        stream = ExampleStream(task, name)
        dataset = Dataset(encode(task, (example for _, example in stream), tokenizer, context_length))
        return Split(name, stream.unlabelled, [], dataset, None)
    found = read_examples(task, name)
    dataset = Dataset(encode(task, found.examples, tokenizer, context_length))
    asked = questions(task, name, found, dataset, tokenizer, context_length)
    return Split(name, found.unlabelled, found.rows, dataset, asked)


def questions(
    task: Task, split: str, found: Examples, dataset: Dataset, tokenizer: Tokenizer, context_length: int
) -> Questions | None:
    """The prompts of a split, of conversations one for each answer, behind the true turns before; of classes None.

    Args:
        task: the form.
        split: name of the split.
        found: the examples as its table has them.
        dataset: the same as tokens.
        tokenizer: with the form's special tokens.
        context_length: most tokens of a prompt and its answer.

    Raises:
        UserError: if a conversation's system message leaves no room for a question.
    """
    if isinstance(task, TextToText):
        delimiter = tokenizer.special_id(DELIMITER)
        whole = [dataset.sequences(number)[0] for number in range(len(dataset))]
        prompts = [tokens[: int(np.argmax(tokens == delimiter)) + 1] for tokens in whole]
        return Questions(prompts, [example.target for example in found.examples], _places(found.rows))
    if not isinstance(task, Chat):
        return None
    asked = Questions([], [], [])
    for row, example in zip(found.rows, found.examples, strict=True):
        answers = [place for place, message in enumerate(example.messages) if message.role == "assistant"]
        for turn, place in enumerate(answers, 1):
            try:
                prompt = encode_prompt(tokenizer, example.messages[:place], context_length - task.answer_tokens)
            except UserError as error:
                raise UserError(f"task.{split}: row {row}: {error}") from None
            asked.prompts.append(prompt.tokens)
            asked.references.append(example.messages[place].content)
            asked.places.append({"row": row, "turn": turn})
    return asked


def _places(rows: Sequence[int]) -> list[dict[str, int]]:
    return [{"row": row} for row in rows]


class Predictor:
    """Answers the examples of one split; what it compiles serves every call.

    Args:
        config: the fine-tuned run.
        split: of its task.
        tokenizer: of the run.
        mesh: the devices.
        between: called before every batch; what it raises ends the work.
    """

    def __init__(
        self, config: Config, split: Split, tokenizer: Tokenizer, mesh: Mesh, between: Callable[[], None] = lambda: None
    ):
        assert config.finetune is not None
        self._between = between
        self._config, self._task, self._split = config, config.finetune.task, split
        self._tokenizer, self._mesh = tokenizer, mesh
        self._scores = jax.jit(lambda params, batch: task_scores(config, params, batch), out_shardings=replicated(mesh))

    def answers(self, params: Params) -> Answers:
        """What the model with these weights answers."""
        if asked := self._split.questions:
            return Answers(self._generate(params, asked.prompts), asked.references, None, asked.places)
        scores_NC = self._all_scores(params)
        labels, places = self._split.dataset.labels_N, _places(self._split.rows)
        if self._task.is_number:
            return Answers(scores_NC[:, 0].tolist(), labels.tolist(), scores_NC, places)
        return Answers(scores_NC.argmax(1).tolist(), labels.astype(int).tolist(), scores_NC, places)

    def measured(self, answers: Answers, resamples: int) -> dict[str, Measured]:
        """Every metric of the task."""
        classes = len(getattr(self._task, "labels", ()))
        return {
            metric: measure(metric, answers.predictions, answers.references, resamples, classes=classes)
            for metric in self._task.metrics
        }

    def _all_scores(self, params: Params) -> np.ndarray:
        """Scores of all examples, in their order; they are computed in the order of their lengths."""
        dataset, devices = self._split.dataset, axis_size(self._mesh, "batch")
        multiple = axis_size(self._mesh, "sequence")
        wanted = max(1, self._config.evaluation.batch_size // dataset.choices)
        size = -(-min(wanted, len(dataset)) // devices) * devices
        order = np.argsort(dataset.lengths_N, kind="stable")
        found = []
        for start in range(0, len(order), size):
            self._between()
            numbers = order[start : start + size]
            width = width_for(int(dataset.lengths_N[numbers].max()), self._config.context_length, multiple)
            padded = np.append(numbers, np.full(size - len(numbers), -1))
            batch = global_batch(_Rows(dataset, padded, width), 0, size, batch_sharding(self._mesh))
            with jax.set_mesh(self._mesh):
                found.append(self._scores(params, batch))
        scores = np.concatenate([np.asarray(part) for part in found])[: len(order)]
        return scores[np.argsort(order)]

    def _generate(self, params: Params, prompts: list[np.ndarray]) -> list[str]:
        """The texts behind the prompts, in their order, greedily or by beams; those of like lengths share a batch."""
        task, config = self._task, self._config
        assert isinstance(task, TextToText | Chat)
        texts = isinstance(task, TextToText)
        settings = {
            "max_tokens": task.target_tokens if texts else task.answer_tokens,
            "separator_id": self._tokenizer.separator_id,
            "end_id": self._tokenizer.separator_id if texts else self._tokenizer.special_id(END),
        }
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        found: dict[int, str] = {}
        for start in range(0, len(order), config.evaluation.batch_size):
            self._between()
            numbers = order[start : start + config.evaluation.batch_size].tolist()
            some = [prompts[number] for number in numbers]
            if isinstance(task, TextToText) and task.beams > 1:
                beams = {"beams": task.beams, "length_penalty": task.length_penalty}
                completions = beam_search(config, params, some, **beams, **settings)
            else:
                completions = generate(config, params, some, sampling=GREEDY, seed=0, **settings)
            texts_of = (self._tokenizer.decode(completion.tokens).strip() for completion in completions)
            found |= dict(zip(numbers, texts_of, strict=True))
        return [found[number] for number in range(len(prompts))]


class _Rows:
    """Examples of a dataset in a given order, as the loader asks for them."""

    def __init__(self, dataset: Dataset, numbers: np.ndarray, width: int):
        self._dataset, self._numbers, self._width = dataset, numbers, width

    def examples(self, indices: np.ndarray) -> Batch:
        return self._dataset.batch(self._numbers[indices], self._width, len(self._numbers))
