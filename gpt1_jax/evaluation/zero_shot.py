"""Tasks that a model is asked without training for them (paper, section 5 and figure 2, and two later benchmarks).

Every answer that a form allows is a continuation of its prompt, and what the model says is the likeliest of them:

- ``classification`` and ``entailment`` by answers: the log-probability of each class's answer behind the prompt;
- ``multiple_choice``: the mean log-probability of a token of each answer behind context and question;
- ``substitution``: the mean log-probability of a token of what follows each of the words put in (Winograd schemas);
- ``minimal_pair``: the log-probability of each of the two sentences (Warstadt et al. 2020, BLiMP). Of two equally
  likely ones the worse is taken to be said.

Two are told from one continuation: ``classification`` by the mean log-probability of a token of the text, against a
threshold, and ``last_word`` by whether greedy decoding gives it (Paperno et al. 2016, LAMBADA).

A prompt begins a document, so it stands behind a separator, as every document in training does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from gpt1_jax.config import Recipe
from gpt1_jax.data.examples import (
    Choices,
    Example,
    Examples,
    Labelled,
    LastWordRow,
    MinimalPairRow,
    SubstitutionRow,
    read_examples,
)
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.continuations import Prediction, Predictor, encode_behind
from gpt1_jax.evaluation.metrics import Measured, check_installed, measure
from gpt1_jax.evaluation.perplexity import exp
from gpt1_jax.task_config import (
    AnyTask,
    ByAnswers,
    ByLogProbability,
    Classification,
    Entailment,
    LabelledTask,
    LastWord,
    Metric,
    MinimalPair,
    MultipleChoice,
    Substitution,
)
from gpt1_jax.training.run import Run

_THRESHOLDS = 1000  # that are tried, at most


class Answer(NamedTuple):
    """What the model said to one example.

    Attributes:
        said: the number of the class or of the answer; of a last word whether all of it is greedy, of a minimal pair
            whether the better sentence is the likelier; where a fine-tuned model says that, a number or a text.
        right: what it should have said.
        scores: log-probabilities of the possible answers, in nats: of them whole, or of a token of them.
    """

    said: Any
    right: Any
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TaskFigures:
    """What a task gave on one of its splits.

    Attributes:
        task: the recipe's name.
        split: ``validation`` or ``test``.
        form: of the task.
        method: by what the answer was chosen.
        rows: examples that were asked.
        unlabelled: rows that were left out because they have no label.
        metrics: in per cent, by name, with 95 % intervals; of ``last_word`` also the word's ``perplexity``, exp of
            the mean nats of a word, which is not in per cent.
        threshold: the mean log-probability above which a text is accepted; None of any other method.
        answers: to every example, in the order of the table.
        places: where each is: its ``row`` in the table, from 1, and in a conversation its ``turn``, from 1.
    """

    task: str
    split: str
    form: str
    method: str
    rows: int
    unlabelled: int
    metrics: dict[str, Measured]
    threshold: float | None
    answers: tuple[Answer, ...]
    places: tuple[dict[str, int], ...]


def check_zero_shot(recipe: Recipe) -> None:
    """Checks that a recipe can be asked without training, before anything is read.

    Raises:
        UserError: if its form, or what it says, leaves no way to.
    """
    task = recipe.task
    match task:
        case MultipleChoice() | Substitution() | LastWord() | MinimalPair():
            pass
        case Classification() | Entailment() if task.zero_shot is None:
            raise UserError(
                f"{recipe.name}: the recipe does not say how to ask without training: add task.zero_shot, with a "
                "prompt and an answer for each class; or fine-tune first, with 'gpt1 finetune'"
            )
        case Classification(zero_shot=ByLogProbability(), train=None):
            raise UserError(
                f"{recipe.name}: task.zero_shot.by=log_probability takes its threshold from the rows of task.train; "
                "add that table"
            )
        case Classification() | Entailment() if not task.labels:
            raise UserError(f"{recipe.name}: task.labels is empty, and a number cannot be asked for; fine-tune first")
        case Classification() | Entailment():
            pass
        case _:
            raise UserError(
                f"{recipe.name}: task.form={task.form} cannot be asked without training; fine-tune first, with "
                "'gpt1 finetune', and evaluate the run that it makes"
            )
    check_installed(_metrics(task))


class ZeroShotEvaluator:
    """Asks a run the tasks of recipes.

    Raises:
        UserError: if the run is a masked model, which gives a text no probability.
    """

    def __init__(self, run: Run):
        self._run = run
        self._predictor = Predictor(run.config, run.mesh, run.tokenizer.separator_id)

    def __call__(self, recipe: Recipe, limit: int | None = None) -> list[TaskFigures]:
        """Asks the validation split of a task, and its test split if it has one.

        Args:
            recipe: the task, which :func:`check_zero_shot` has let through.
            limit: rows of each table, at most; None: all.

        Raises:
            UserError: if a table cannot be read, or a row of it cannot be asked.
        """
        task = limited(recipe.task, limit)
        threshold = None
        if isinstance(task, Classification) and isinstance(task.zero_shot, ByLogProbability):
            found = read_examples(task, "train")
            scores = [_scores(task, row)[0] for row in self._predictions(task, found, "train")]
            threshold = best_threshold(task.metrics[0], scores, [_right(example) for example in found.examples])
        return [self._ask(recipe, task, split, threshold) for split in ("validation", "test") if split in task.tables]

    def _ask(self, recipe: Recipe, task: AnyTask, split: str, threshold: float | None) -> TaskFigures:
        found = read_examples(task, split)
        answers = []
        for example, row in zip(found.examples, self._predictions(task, found, split), strict=True):
            scores = _scores(task, row)
            if threshold is not None:
                said = int(scores[0] > threshold)
            elif isinstance(task, LastWord):
                said = int(row[0].greedy.all())
            else:
                said = int(np.argmax(scores))  # of equal ones the first
            answers.append(Answer(said, _right(example), scores))
        said, right = [answer.said for answer in answers], [answer.right for answer in answers]
        resamples, seed = recipe.evaluation.resamples, recipe.seeds[0]
        classes = len(getattr(task, "labels", ()))
        metrics: dict[str, Measured] = {
            name: measure(name, said, right, resamples, seed, classes=classes) for name in _metrics(task)
        }
        if isinstance(task, LastWord):
            metrics["perplexity"] = word_perplexity([-answer.scores[0] for answer in answers], resamples, seed)
        return TaskFigures(
            task=recipe.name,
            split=split,
            form=task.form,
            method=_method(task),
            rows=len(answers),
            unlabelled=found.unlabelled,
            metrics=metrics,
            threshold=threshold,
            answers=tuple(answers),
            places=tuple({"row": row} for row in found.rows),
        )

    def _predictions(self, task: AnyTask, examples: Examples, split: str) -> list[list[Prediction]]:
        """Of each example, its continuations predicted."""
        asked = []
        for row, example in zip(examples.rows, examples.examples, strict=True):
            texts = _continuations(task, example)
            if not all(text.strip() for _, text in texts):
                raise UserError(f"task.{split}: row {row} leaves nothing to predict: {example}")
            asked.append([encode_behind(self._run.tokenizer, context, text) for context, text in texts])
        found = iter(self._predictor(self._run.params, [one for row in asked for one in row]))
        return [[next(found) for _ in row] for row in asked]


def best_threshold(metric: Metric, scores: Sequence[float], labels: Sequence[int]) -> float:
    """The threshold that is best by a metric, where what is above it is said to be of class 1.

    Half way between neighbouring scores, or below or above them all; of equally good ones the lowest. Of more than
    ``_THRESHOLDS`` scores, so many quantiles are tried.
    """
    levels = np.unique(scores)
    if len(levels) > _THRESHOLDS:
        levels = np.quantile(levels, np.linspace(0, 1, _THRESHOLDS))
    tried = [levels[0] - 1, *(levels[:-1] + levels[1:]) / 2, levels[-1]]
    found = [measure(metric, (np.asarray(scores) > level).astype(int), labels, resamples=0).value for level in tried]
    return float(tried[int(np.argmax(np.array(found, np.float64)))])


def word_perplexity(nats: Sequence[float], resamples: int, seed: int) -> Measured:
    """Exp of the mean nats of a word, and the ends of its 95 % interval."""
    low = high = None
    if resamples and len(nats) > 1:
        generator = np.random.default_rng(seed)
        drawn = stats.bootstrap((nats,), np.mean, n_resamples=resamples, method="percentile", rng=generator, batch=100)
        low, high = map(exp, drawn.confidence_interval)
    return Measured(exp(float(np.mean(nats))), low, high)


def _continuations(task: AnyTask, example: Example) -> list[tuple[str, str]]:
    """Contexts, and the texts behind them whose probabilities answer the question."""
    match task, example:
        case ((Classification() | Entailment()), Labelled(texts)):
            if not isinstance(task.zero_shot, ByAnswers):
                return [("", texts[0])]
            names = ("text",) if isinstance(task, Classification) else ("premise", "hypothesis")
            prompt = task.zero_shot.prompt.format(**dict(zip(names, texts, strict=True)))
            return [(prompt, answer) for answer in task.zero_shot.answers]
        case MultipleChoice(), Choices(context, question, answers):
            prompt = " ".join(filter(None, (context, question)))
            return [(prompt, f" {answer}" if prompt else answer) for answer in answers]
        case Substitution(), SubstitutionRow(text, options):
            before, _, after = text.partition(task.placeholder)
            return [(before + option, after) for option in options]
        case LastWord(), LastWordRow(text):
            word = text.split()[-1]
            return [(text.removesuffix(word), word)]
        case MinimalPair(), MinimalPairRow(good, bad):
            return [("", bad), ("", good)]
    raise AssertionError(f"check_zero_shot lets no {task.form} through")


def _scores(task: AnyTask, predictions: Sequence[Prediction]) -> tuple[float, ...]:
    whole = isinstance(task, LastWord | MinimalPair) or (
        isinstance(task, Classification | Entailment) and isinstance(task.zero_shot, ByAnswers)
    )
    return tuple(one.log_probability if whole else one.mean_log_probability for one in predictions)


def _right(example: Example) -> int:
    match example:
        case Labelled(label=label) | Choices(label=label) | SubstitutionRow(label=label):
            return int(label)
        case _:
            return 1  # the last word is greedy; the better sentence stands second


def _method(task: AnyTask) -> str:
    match task:
        case Classification(zero_shot=ByLogProbability()):
            return "mean log-probability of a token, above the threshold"
        case Classification() | Entailment():
            return "log-probability of each answer"
        case MultipleChoice():
            return "mean log-probability of a token of each answer"
        case Substitution():
            return "mean log-probability of a token behind each word"
        case LastWord():
            return "greedy decoding of the word"
        case _:
            return "log-probability of each sentence"


def _metrics(task: AnyTask) -> tuple[Metric, ...]:
    return task.metrics if isinstance(task, LabelledTask | MultipleChoice) else ("accuracy",)


def limited(task: AnyTask, limit: int | None) -> AnyTask:
    """The task with at most so many rows in each of its tables."""
    if limit is None:
        return task
    rows = {split: min(limit, table.rows or limit) for split, table in task.tables.items()}
    tables = {split: table.model_copy(update={"rows": rows[split]}) for split, table in task.tables.items()}
    return task.model_copy(update=tables)
