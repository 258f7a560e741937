"""The command ``gpt1 finetune``, and how its results are printed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from etils import epath

from gpt1_jax.console import Json, Overrides, print_json, say
from gpt1_jax.training.interrupt import Interruption

TaskFile = Annotated[
    epath.Path,
    typer.Argument(metavar="CONFIG", help="A YAML file with a task, such as data/tasks/sst2.yaml.", parser=epath.Path),
]


def finetune(
    config: TaskFile,
    overrides: Overrides = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run that another configuration made.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a run on a task, for each seed; choose the best epoch, measure it, and write its predictions."""
    with Interruption() as interruption:
        from gpt1_jax.config import FinetuneConfig
        from gpt1_jax.config_file import load
        from gpt1_jax.finetuning.finetune import finetune as finetune_runs
        from gpt1_jax.finetuning.finetune import summarize
        from gpt1_jax.training.compilation_cache import compilation_cache
        from gpt1_jax.training.hardware import keep_freed_memory
        from gpt1_jax.training.hosts import join
        from gpt1_jax.training.run import check_shared

        keep_freed_memory()
        settings = load(FinetuneConfig, config, overrides or ())
        with join(settings, say, interruption) as hosts, compilation_cache(settings):
            check_shared(settings, hosts)
            results = finetune_runs(settings, hosts, say, allow_changes)
            process = hosts.process
    if process:
        return
    summary = summarize(results)
    if as_json:
        print_json({"task": settings.name, "runs": results, "summary": summary})
    else:
        _print(results, summary)


def _print(results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    for split, metrics in results[0]["figures"].items():
        print(f"{split}: {results[0]['examples'][split]:,} examples, {results[0]['truncated'][split]:,} truncated")
        print(f"  {'seed':>6}  {'epoch':>5}" + "".join(f"  {metric:>24}" for metric in metrics))
        for run in results:
            cells = "".join(f"  {_cell(run['figures'][split][metric]):>24}" for metric in metrics)
            print(f"  {run['seed']:>6}  {run['epoch']:>5}{cells}")
        if len(results) > 1:
            for name in ("mean", "median"):
                found = summary.get(split, {})
                cells = (f"{found[metric][name]:.2f}" if metric in found else "-" for metric in metrics)
                print(f"  {name:>6}  {'':>5}" + "".join(f"  {cell:>24}" for cell in cells))
    for run in results:
        if found := run["perplexity"]:
            print(
                f"perplexity per token of {found['of']} ({found['tokens']:,} tokens), seed {run['seed']}: "
                f"{found['before']:,.2f} before, {found['after']:,.2f} after"
            )
    paths = ", ".join(run["run"] for run in results)
    print(f"\npredictions and results.json are in {paths}")


def _cell(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['value']:.2f}{interval}"
