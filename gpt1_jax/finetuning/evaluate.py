"""What a fine-tuned run answers to the task of a recipe, which may be another dataset of the same form."""

from gpt1_jax.config import Recipe
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.metrics import check_installed
from gpt1_jax.evaluation.zero_shot import Answer, TaskFigures, limited
from gpt1_jax.finetuning.forms import check_room
from gpt1_jax.finetuning.predictions import Predictor, read_split
from gpt1_jax.task_config import AnyTask, LastWord, MinimalPair, Substitution
from gpt1_jax.training.run import Run


def can_answer(run: Run, recipe: Recipe) -> bool:
    """Whether a run was fine-tuned to the form of a recipe's task, and to as many classes.

    Raises:
        UserError: if it was, but to other classes or in another order; to say nothing would be to take one for another.
    """
    if run.config.finetune is None or run.config.finetune.task.form != recipe.task.form:
        return False
    learned, asked = _classes(run.config.finetune.task), _classes(recipe.task)
    if len(learned) != len(asked):
        return False
    if learned != asked:
        raise UserError(
            f"{recipe.name}: task.labels={list(asked)}, but {run.path} was fine-tuned with {list(learned)}, and knows "
            "its classes by their places; give the recipe the run's labels, in the run's order"
        )
    return True


def check_finetuned(run: Run, recipe: Recipe) -> None:
    """Checks that a run that :func:`can_answer` can be asked, before anything is read.

    Raises:
        UserError: if a library of a metric is missing, or the context has no room for an answer.
    """
    task = recipe.task
    assert not isinstance(task, Substitution | LastWord | MinimalPair)
    check_installed(task.metrics)
    check_room(task, run.config.context_length)


def evaluate_finetuned(run: Run, recipe: Recipe, limit: int | None = None) -> list[TaskFigures]:
    """Asks the validation split of a task, and its test split if it has one.

    Args:
        run: one that :func:`can_answer`.
        recipe: the task, which :func:`check_finetuned` has let through; what it says of training is not read.
        limit: rows of each table, at most; None: all.

    Raises:
        UserError: if a table cannot be read, or an example of it is amiss.
    """
    task = limited(recipe.task, limit)
    assert run.config.finetune is not None and not isinstance(task, Substitution | LastWord | MinimalPair)
    finetune = run.config.finetune.model_copy(update={"task": task})
    config = run.config.model_copy(update={"finetune": finetune})
    found = []
    for name in ("validation", "test"):
        if name in task.tables:
            split = read_split(task, name, run.tokenizer, config.context_length)
            predictor = Predictor(config, split, run.tokenizer, run.mesh)
            answers = predictor.answers(run.params)
            scores = [()] * len(answers.predictions) if answers.scores is None else map(tuple, answers.scores.tolist())
            found.append(
                TaskFigures(
                    task=recipe.name,
                    split=name,
                    form=task.form,
                    method="fine-tuning",
                    rows=len(answers.predictions),
                    unlabelled=split.unlabelled,
                    metrics=predictor.measured(answers, recipe.evaluation.resamples),
                    threshold=None,
                    answers=tuple(map(Answer, answers.predictions, answers.references, scores)),
                    places=tuple(answers.places),
                )
            )
    return found


def _classes(task: AnyTask) -> tuple[str, ...]:
    """The labels that a classifier has outputs for; those of multiple choice are of the answers' places."""
    return getattr(task, "labels", ()) if task.form != "multiple_choice" else ()
