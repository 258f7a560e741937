"""What a fine-tuned run answers to the task of a recipe, which may be another dataset of the same form."""

from gpt1_jax.config import Recipe
from gpt1_jax.evaluation.metrics import check_installed
from gpt1_jax.evaluation.zero_shot import Answer, TaskFigures, limited
from gpt1_jax.finetuning.predictions import Predictor, read_split
from gpt1_jax.task_config import AnyTask, LastWord, MinimalPair, Substitution
from gpt1_jax.training.run import Run


def can_answer(run: Run, task: AnyTask) -> bool:
    """Whether a run was fine-tuned to the form of a task, and to as many classes."""
    if run.config.finetune is None:
        return False
    learned = run.config.finetune.task
    return learned.form == task.form and _classes(learned) == _classes(task)


def evaluate_finetuned(run: Run, recipe: Recipe, limit: int | None = None) -> list[TaskFigures]:
    """Asks the validation split of a task, and its test split if it has one.

    Args:
        run: one that :func:`can_answer`.
        recipe: the task; what it says of training is not read.
        limit: rows of each table, at most; None: all.

    Raises:
        UserError: if a table cannot be read, or a library of a metric is missing.
    """
    task = limited(recipe.task, limit)
    assert run.config.finetune is not None and not isinstance(task, Substitution | LastWord | MinimalPair)
    check_installed(task.metrics)
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
                )
            )
    return found


def _classes(task: AnyTask) -> int:
    return len(getattr(task, "labels", ())) if task.form != "multiple_choice" else 0
