"""What a fine-tuned model answers to every example of a split, and how good that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.data.examples import Conversation, Pair
from gpt1_jax.data.loader import global_batch
from gpt1_jax.evaluation.metrics import Measured, measure
from gpt1_jax.finetuning.dataset import Batch, Dataset, width_for
from gpt1_jax.finetuning.forms import DELIMITER, labels_are_numbers
from gpt1_jax.finetuning.loss import task_scores
from gpt1_jax.generation.beam import beam_search
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.model.sharding import axis_size, batch_sharding, replicated
from gpt1_jax.model.transformer import Params
from gpt1_jax.task_config import Chat, TextToText
from gpt1_jax.text.conversation import END, encode_prompt
from gpt1_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """A split of a task, read and encoded.

    Attributes:
        name: train, validation or test.
        examples: as its table has them.
        unlabelled: rows left out because they have no label.
        dataset: the examples as tokens.
    """

    name: str
    examples: Sequence[Any]
    unlabelled: int
    dataset: Dataset


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        predictions: a class, number, answer or text for each example.
        references: what they should be.
        scores: of every class or answer; None of texts.
    """

    predictions: list[Any]
    references: list[Any]
    scores: np.ndarray | None


class Predictor:
    """Answers the examples of one split; what it compiles serves every call.

    Args:
        config: the fine-tuned run.
        split: of its task.
        tokenizer: of the run.
        mesh: the devices.
    """

    def __init__(self, config: Config, split: Split, tokenizer: Tokenizer, mesh: Mesh):
        assert config.finetune is not None
        self._config, self._task, self._split = config, config.finetune.task, split
        self._tokenizer, self._mesh = tokenizer, mesh
        self._scores = jax.jit(lambda params, batch: task_scores(config, params, batch), out_shardings=replicated(mesh))

    def answers(self, params: Params) -> Answers:
        """What the model with these weights answers."""
        if isinstance(self._task, TextToText | Chat):
            return self._texts(params)
        scores_NC = self._all_scores(params)
        labels = self._split.dataset.labels_N
        if labels_are_numbers(self._task):
            return Answers(scores_NC[:, 0].tolist(), labels.tolist(), scores_NC)
        return Answers(scores_NC.argmax(1).tolist(), labels.astype(int).tolist(), scores_NC)

    def measured(self, answers: Answers, resamples: int) -> dict[str, Measured]:
        """Every metric of the task."""
        return {
            metric: measure(metric, answers.predictions, answers.references, resamples) for metric in self._task.metrics
        }

    def _all_scores(self, params: Params) -> np.ndarray:
        """Scores of all examples, in their order; they are computed in the order of their lengths."""
        dataset, devices = self._split.dataset, axis_size(self._mesh, "batch")
        wanted = max(1, self._config.evaluation.batch_size // dataset.choices)
        size = -(-min(wanted, len(dataset)) // devices) * devices
        order = np.argsort(dataset.lengths_N, kind="stable")
        found = []
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            width = width_for(int(dataset.lengths_N[numbers].max()), self._config.context_length)
            padded = np.append(numbers, np.full(size - len(numbers), -1))
            batch = global_batch(_Rows(dataset, padded, width), 0, size, batch_sharding(self._mesh))
            with jax.set_mesh(self._mesh):
                found.append(self._scores(params, batch))
        scores = np.concatenate([np.asarray(part) for part in found])[: len(order)]
        return scores[np.argsort(order)]

    def _texts(self, params: Params) -> Answers:
        """Greedy, or by beams where the task says so; of a conversation each answer, behind the true turns before."""
        prompts, references = [], []
        for number, example in enumerate(self._split.examples):
            if isinstance(example, Pair):
                sequence = self._split.dataset.sequences(number)[0]
                prompts.append(sequence[: self._prompt_length(sequence)])
                references.append(example.target)
            else:
                asked, answers = self._turns(example)
                prompts += asked
                references += answers
        return Answers(self._generate(params, prompts), references, None)

    def _generate(self, params: Params, prompts: list[np.ndarray]) -> list[str]:
        """The texts behind the prompts, in their order; prompts of like lengths share a batch."""
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

    def _prompt_length(self, sequence: np.ndarray) -> int:
        return int(np.argmax(sequence == self._tokenizer.special_id(DELIMITER))) + 1

    def _turns(self, example: Conversation) -> tuple[list[np.ndarray], list[str]]:
        assert isinstance(self._task, Chat)
        room = self._config.context_length - self._task.answer_tokens
        places = [place for place, message in enumerate(example.messages) if message.role == "assistant"]
        asked = [encode_prompt(self._tokenizer, example.messages[:place], room).tokens for place in places]
        return asked, [example.messages[place].content for place in places]


class _Rows:
    """Examples of a dataset in a given order, as the loader asks for them."""

    def __init__(self, dataset: Dataset, numbers: np.ndarray, width: int):
        self._dataset, self._numbers, self._width = dataset, numbers, width

    def examples(self, indices: np.ndarray) -> Batch:
        return self._dataset.batch(self._numbers[indices], self._width, len(self._numbers))
