"""The command ``gpt1 plan``, and how a plan is printed."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from etils import epath

from gpt1_jax.console import Json, Overrides, print_json, say

if TYPE_CHECKING:
    from gpt1_jax.planning.plan import Plan

ConfigFile = Annotated[
    epath.Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/gpt1.yaml.", parser=epath.Path)
]


def _list(asked: bool) -> None:
    from gpt1_jax.planning.topologies import table

    if asked:
        print(table())
        raise typer.Exit


def plan(
    config: ConfigFile,
    topology: Annotated[
        str, typer.Option(help="A TPU slice, such as v5e:4x4, v5e-16 or v4-32; or cpu:8; or gpu, this machine's.")
    ],
    overrides: Overrides = None,
    slices: Annotated[int, typer.Option(help="How many TPU slices of this kind train together.")] = 1,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Look for the largest batch, and for what to change.")
    ] = True,
    list_: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list, help="Print the TPU slices that exist.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile the train step for devices that need not be there: does it fit, how long will it take, what is to change.

    Nothing is trained, and no corpus is needed. TPU slices are compiled for by libtpu: pip install 'gpt1-jax[tpu]'.
    """
    from gpt1_jax.config_file import load_config
    from gpt1_jax.planning.devices import open_target
    from gpt1_jax.planning.plan import make_plan
    from gpt1_jax.training.run import check_pretraining

    settings = load_config(config, overrides or ())
    check_pretraining(settings)
    found = make_plan(settings, open_target(topology, slices), search, say)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_plan(found, search)


def print_plan(plan: "Plan", searched: bool) -> None:
    """Prints a plan on one screen."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "nothing split"
    several = f"{plan.slices} slices, " if plan.slices > 1 else ""
    flops = f"{plan.model_flops_per_token / 1e9:.3f} GFLOP a token"
    print(f"{plan.topology}: {several}{plan.chips} {'chip' if plan.chips == 1 else 'chips'} ({mesh})")
    print(f"{plan.parameters:,} parameters, {plan.dtype}, {flops}")
    print(f"{plan.batch_size:,} sequences, {plan.tokens_per_step:,} tokens in an update")
    _print_memory(plan, searched)
    _print_collectives(plan)
    _print_time(plan)


def _print_memory(plan: "Plan", searched: bool) -> None:
    donated = {None: "", True: ", all of the state donated", False: "; NOT ALL OF THE STATE IS DONATED"}
    limit = "" if plan.hbm_bytes is None else f" of {plan.hbm_bytes / 2**30:.3f} GiB"
    verdict = {True: "it fits", False: "IT DOES NOT FIT", None: "whether it fits is not known here"}
    print("\nmemory of a chip")
    _line("arguments", _bytes(plan.argument_bytes), f"state and batch{donated[plan.state_donated]}")
    _line("temporaries", _bytes(plan.temporary_bytes))
    if plan.code_bytes:
        _line("program", _bytes(plan.code_bytes))
    _line("peak", _bytes(plan.peak_bytes) + limit, verdict[plan.fits])
    if plan.largest_batch is not None:
        print(f"  train.batch_size={plan.largest_batch} fits, and is about the largest")
    if plan.change:
        seconds = plan.change.step_seconds
        taken = "" if seconds is None else f", {1000 * seconds:.1f} ms a step (estimate)"
        print(f"  it fits with {' '.join(plan.change.overrides)}: {plan.change.peak_bytes / 2**30:.3f} GiB{taken}")
    elif plan.fits is False and searched:
        print("  nothing that was tried makes it fit: take more chips, larger ones, or a smaller model")


def _print_collectives(plan: "Plan") -> None:
    if plan.collectives is None:
        return
    print("\nexchanges between chips in a step" + ("; times are estimates" if plan.collectives else ": none"))
    for exchange in plan.collectives:
        seconds = "" if exchange.seconds is None else _seconds(exchange.seconds)
        place = "in a loop" if exchange.in_loop else "outside loops"
        between = ", between slices" if exchange.network == "slices" else ""
        count = f"{exchange.count:,} {exchange.kind}"
        _line(count, f"{_bytes(exchange.bytes)}{seconds}", place + between)
    for what in plan.step_without:
        print(f"  neither here nor below: {what}")


def _print_time(plan: "Plan") -> None:
    parts = plan.step_parts
    if parts is None or plan.step_seconds is None or plan.hours is None or plan.chip_hours is None:
        why = "not known: it does not fit" if plan.fits is False else f"not known on {plan.topology.partition(':')[0]}"
        print(f"\ntime of a step: {why}")
        return
    print("\ntime of a step, an estimate")
    _line("program", _seconds(parts.compute), "by the TPU compiler's own estimates")
    _line("kernels", _seconds(parts.kernels), "by their arithmetic and bytes")
    _line("rest", _seconds(parts.uncosted), "by bytes, where the compiler has no estimate")
    waited = {"memory": "for data from memory", "links": "for exchanges over links", "slices": "for other slices"}
    for way, seconds in parts.waits.items():
        if way != "slices" or plan.slices > 1:
            _line("waits", _seconds(seconds), f"{waited[way]}, by bytes")
    _line("in all", _seconds(plan.step_seconds))
    mfu = "not known" if plan.mfu is None else f"{plan.mfu:.3f}"
    print("\nthe run, an estimate, without evaluations and checkpoints")
    print(f"  {plan.tokens_per_second:,.0f} tokens/s, MFU {mfu}")
    print(f"  {plan.hours:,.1f} hours, {plan.chip_hours:,.1f} chip-hours")


def _line(name: str, figures: str, text: str = "") -> None:
    print(f"  {name:<18}{figures}  {text}".rstrip())


def _bytes(count: int) -> str:
    return f"{count / 2**30:9.3f} GiB"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:9.2f} ms"
