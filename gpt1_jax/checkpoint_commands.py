"""The commands of the group ``gpt1 checkpoint``: which checkpoints a run has, and whether they are as written."""

from typing import Annotated

import typer

from gpt1_jax.console import Json, RunFolder, print_json, say
from gpt1_jax.errors import DamagedError, UserError

checkpoint_app = typer.Typer(
    help="Look at the checkpoints of a run, and verify them.",
    no_args_is_help=True,
    epilog="Examples:\n\n  gpt1 checkpoint list runs/tiny\n\n  gpt1 checkpoint verify runs/tiny",
)


@checkpoint_app.command(
    "list",
    epilog="Examples:\n\n  gpt1 checkpoint list runs/tiny\n\n  gpt1 checkpoint list gs://my-bucket/runs/gpt1 --json",
)
def list_(run: RunFolder, as_json: Json = False) -> None:
    """List the checkpoints of a run: step, time, size, and whether they are complete; their files are not read."""
    from gpt1_jax.training.checkpoint_folder import CheckpointFolder
    from gpt1_jax.training.run import check_is_run

    check_is_run(run)
    found = CheckpointFolder(run).listed()
    if as_json:
        print_json({"run": str(run), "checkpoints": [each._asdict() for each in found]})
        return
    if not found:
        say(f"{run}: no checkpoint yet")
    for each in found:
        print(f"{each.step:>9,}  {each.written or '':25}  {each.bytes:>16,} bytes  {each.state:10}  {each.name}")


@checkpoint_app.command(
    epilog="Examples:\n\n  gpt1 checkpoint verify runs/tiny\n\n  gpt1 checkpoint verify runs/tiny --step 2000 --json"
)
def verify(
    run: RunFolder,
    step: Annotated[int | None, typer.Option(min=0, help="Verify the checkpoint of this step alone.")] = None,
    as_json: Json = False,
) -> None:
    """Read every file of a run's checkpoints and compare it with their manifests; exit code 3 if any is damaged."""
    from gpt1_jax.training.checkpoint_folder import CheckpointFolder
    from gpt1_jax.training.checkpoint_manifest import problems_in
    from gpt1_jax.training.run import check_is_run

    check_is_run(run)
    folder = CheckpointFolder(run)
    steps = folder.steps()
    if not steps:
        raise UserError(f"{run}: the run has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {run} has checkpoints of steps {', '.join(map(str, steps))}")
    found = {each: problems_in(folder.checkpoint(each), each) for each in steps if step in (None, each)}
    if as_json:
        checkpoints = [
            {"step": each, "problems": [problem._asdict() for problem in problems]} for each, problems in found.items()
        ]
        print_json({"run": str(run), "checkpoints": checkpoints})
    else:
        for each, problems in found.items():
            print(f"{folder.checkpoint(each)}: {'damaged' if problems else 'sound'}")
            for problem in problems:
                print(f"  {problem.file} {problem.what}")
    if damaged := [str(each) for each, problems in found.items() if problems]:
        raise DamagedError(
            f"{run}: damaged checkpoints: {', '.join(damaged)}; the run goes on from its newest sound one, and moves "
            "newer ones aside"
        )
    say("every file is as it was written")
