"""The command ``gpt1 evaluate``, and how figures are printed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from etils import epath

from gpt1_jax.console import Json, RunFolder, print_json
from gpt1_jax.errors import UserError

if TYPE_CHECKING:
    from gpt1_jax.evaluation.zero_shot import TaskFigures
    from gpt1_jax.training.run import Run


def evaluate(
    run: RunFolder,
    text: Annotated[
        list[Path] | None, typer.Option(help="Evaluate a UTF-8 text file instead of a split; may be repeated.")
    ] = None,
    split: Annotated[
        Literal["train", "validation"] | None, typer.Option(help="The split of the run's corpus; else validation.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; smaller gives each token more context.")
    ] = None,
    task: Annotated[
        list[epath.Path] | None,
        typer.Option(
            metavar="RECIPE",
            help="Ask a task instead, trained for it or not; may be repeated.",
            parser=epath.Path,
        ),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Ask a task of lm-eval, or of its YAML file, instead; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each table of a task, for a quick look; else all.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="With --task: write what was said to each row, as JSON lines.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Perplexity per token and per word, and bits per byte beside xz, each token counted once; or scores of tasks.

    Tasks of lm-eval, the public evaluation harness, need an extra: pip install 'gpt1-jax[harness]'.
    """
    _check(text, split, stride, task, harness, limit, predictions)
    if task:
        _evaluate_tasks(run, task, limit, predictions, as_json)
    elif harness:
        _evaluate_in_harness(run, harness, limit, as_json)
    else:
        _evaluate_text(run, text, split, stride, as_json)


def _check(
    text: Sequence[Path] | None,
    split: str | None,
    stride: int | None,
    task: Sequence[epath.Path] | None,
    harness: Sequence[str] | None,
    limit: int | None,
    predictions: Path | None,
) -> None:
    """Refuses options that exclude each other, and those that nothing would read."""
    what = {"--text": text, "--split": split, "--task": task, "--harness": harness}
    given = [f"{option} {value if isinstance(value, str) else value[0]}" for option, value in what.items() if value]
    if len(given) > 1:
        raise UserError(
            f"{given[0]} and {given[1]} exclude each other: evaluate files, a split of the corpus, or tasks"
        )
    if stride is not None and (task or harness):
        raise UserError(f"--stride {stride} is of texts, and a task has none; leave it out")
    if limit is not None and not (task or harness):
        raise UserError(f"--limit {limit} is of tasks; give one with --task or --harness, or leave it out")
    if predictions and not task:
        raise UserError(f"--predictions {predictions} is of --task; give a recipe, or leave it out")
    if predictions and not predictions.absolute().parent.is_dir():
        raise UserError(f"--predictions {predictions}: there is no folder {predictions.parent}; make it first")


def _evaluate_text(
    folder: epath.Path,
    text: list[Path] | None,
    split: Literal["train", "validation"] | None,
    stride: int | None,
    as_json: bool,
) -> None:
    from gpt1_jax.evaluation.figures import evaluate_texts, read_texts
    from gpt1_jax.evaluation.perplexity import Evaluator
    from gpt1_jax.finish import corpus_of, split_figures
    from gpt1_jax.training.run import open_run

    run = open_run(folder)
    config = run.config
    if stride is not None:
        if stride > config.context_length:
            raise UserError(f"--stride {stride} is longer than the context, {config.context_length} tokens")
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"stride": stride})})
    if text:
        evaluator = Evaluator(config, run.mesh, run.tokenizer.separator_id)
        figures = evaluate_texts(evaluator, run.params, read_texts(text), run.tokenizer)
    else:
        figures = split_figures(dataclasses.replace(run, config=config), corpus_of(run), split or "validation")
    shown = dataclasses.asdict(figures)
    if as_json:
        print_json(shown)
    else:
        print_figures(shown)


def _evaluate_tasks(
    folder: epath.Path, recipes: Sequence[epath.Path], limit: int | None, predictions: Path | None, as_json: bool
) -> None:
    from gpt1_jax.config import Recipe
    from gpt1_jax.config_file import load
    from gpt1_jax.data.storage import write_atomically
    from gpt1_jax.evaluation.zero_shot import ZeroShotEvaluator, check_zero_shot
    from gpt1_jax.finetuning.evaluate import can_answer, check_finetuned, evaluate_finetuned
    from gpt1_jax.training.run import open_run

    asked = [load(Recipe, recipe) for recipe in recipes]
    run = open_run(folder)
    untrained = [recipe for recipe in asked if not can_answer(run, recipe)]
    for recipe in asked:
        if recipe in untrained:
            check_zero_shot(recipe)
        else:
            check_finetuned(run, recipe)
    ask = ZeroShotEvaluator(run) if untrained else None
    found: list[TaskFigures] = []
    for recipe in asked:
        for result in ask(recipe, limit) if ask and recipe in untrained else evaluate_finetuned(run, recipe, limit):
            found.append(result)
            if not as_json:
                _print_task(result)
    if as_json:
        print_json(_of_run(run) | {"tasks": [_shown(result) for result in found]})
    if predictions:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for result in found for line in _lines(result)]
        write_atomically(predictions, "".join(lines).encode())


def _evaluate_in_harness(folder: epath.Path, tasks: Sequence[str], limit: int | None, as_json: bool) -> None:
    try:
        from gpt1_jax.evaluation.harness import check_tasks, evaluate_in_harness
    except ImportError as error:
        raise UserError(
            f"--harness needs the library 'lm_eval', which cannot be imported ({error}); install it with: "
            "pip install 'gpt1-jax[harness]'"
        ) from None
    from gpt1_jax.training.run import open_run

    known = check_tasks(tasks)
    run = open_run(folder)
    found = evaluate_in_harness(run, known, tasks, limit)
    if as_json:
        print_json(_of_run(run) | {"tasks": found})
        return
    for name, metrics in found.items():
        numbers = {metric: value for metric, value in metrics.items() if isinstance(value, float)}
        print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in numbers.items()))


def _of_run(run: "Run") -> dict[str, Any]:
    return {"run": str(run.path), "step": run.step}


def _shown(result: "TaskFigures") -> dict[str, Any]:
    """A result as JSON, without the answers to single rows."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    del fields["answers"], fields["places"]
    return fields | {"metrics": {name: measured._asdict() for name, measured in result.metrics.items()}}


def _lines(result: "TaskFigures") -> list[dict[str, Any]]:
    asked = {"task": result.task, "split": result.split}
    return [asked | place | answer._asdict() for place, answer in zip(result.places, result.answers, strict=True)]


def _print_task(result: "TaskFigures") -> None:
    metrics = []
    for name, (value, low, high) in result.metrics.items():
        interval = "" if low is None or high is None else f" ({low:,.2f} to {high:,.2f})"
        metrics.append(f"{name} " + ("undefined" if value is None else f"{value:,.2f}") + interval)
    threshold = "" if result.threshold is None else f" {result.threshold:.4f}"
    print(f"{result.task}, {result.split}, {result.rows:,} rows: {', '.join(metrics)}; by {result.method}{threshold}")


def print_figures(figures: Mapping[str, Any]) -> None:
    """Prints the figures of texts, as JSON has them, for a reader."""
    print(f"{figures['split']}: {figures['documents']:,} documents")
    if figures.get("pseudo_perplexity") is not None:
        print(f"  pseudo-perplexity {figures['pseudo_perplexity']:,.2f} per token  ({figures['tokens']:,} tokens)")
        print("  a masked model gives a text no probability: no perplexity, no bits per byte")
        return
    words = "-" if figures["word_perplexity"] is None else f"{figures['word_perplexity']:,.2f}"
    print(f"  perplexity       {figures['perplexity']:,.2f} per token  ({figures['tokens']:,} tokens)")
    print(f"  word perplexity  {words} per word  ({figures['words']:,} words)")
    xz = f"xz -9: {figures['xz_bits_per_byte']:.4f}"
    print(f"  bits per byte    {figures['bits_per_byte']:.4f}  ({figures['bytes']:,} bytes; {xz})")
    if figures.get("limit_nats") is not None:
        excess = f"{figures['excess_nats_per_document']:,.2f} nats per document ({figures['excess_percent']:.1f} %)"
        print(f"  limit            {figures['limit_nats']:,.1f} nats; excess {excess}")
