"""The commands. Each reads its arguments, checks them before any long work, and calls the stage that does the work.

Results go to standard output; logs, progress and errors to standard error.
"""

import json
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from etils import epath

from gpt1_jax.checkpoint_commands import checkpoint_app
from gpt1_jax.console import Json, Overrides, RunFolder, print_json, say
from gpt1_jax.data.storage import is_remote, storage_fault
from gpt1_jax.data_commands import data_app
from gpt1_jax.errors import GPT1Error, UserError
from gpt1_jax.evaluate_command import evaluate, print_figures
from gpt1_jax.finetune_command import finetune
from gpt1_jax.generate_command import generate
from gpt1_jax.plan_command import plan
from gpt1_jax.training.interrupt import Interruption

# JAX takes seconds to import, so the stages are imported by the commands that use them, and --help is quick.
if TYPE_CHECKING:
    from gpt1_jax.data.prepare import Progress
    from gpt1_jax.finish import Finished
    from gpt1_jax.training.hosts import Hosts

app = typer.Typer(
    name="gpt1",
    help="GPT-1 in JAX: text in; a trained, evaluated, generating model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.command(
    epilog="Examples:\n\n  gpt1 plan configs/gpt1.yaml --topology v5e:4x4\n\n"
    "  gpt1 plan configs/gpt1.yaml --topology v5p-128 --slices 2 train.batch_size=4096 --json"
)(plan)
app.command(
    epilog="Examples:\n\n  gpt1 evaluate runs/tiny\n\n"
    "  gpt1 evaluate runs/tiny --text README.md --text LICENSE --json\n\n"
    "  gpt1 evaluate runs/gpt1 --task data/tasks/sst2.yaml --task data/tasks/cola.yaml --predictions said.jsonl\n\n"
    "  gpt1 evaluate runs/gpt1 --harness lambada_openai --harness blimp --limit 100"
)(evaluate)

app.command(
    epilog="Examples:\n\n  gpt1 finetune data/tasks/sst2.yaml base=runs/gpt1\n\n"
    "  gpt1 finetune data/tasks/rte.yaml base=runs/gpt1 name=rte 'seeds=[0, 1, 2]' train.auxiliary=0 --json\n\n"
    "  gpt1 finetune data/tasks/sst2.yaml base=runs/gpt1 name=lora 'model.lora={}' optimizer.learning_rate=1e-3\n\n"
    "Stop it with Ctrl-C and run the same command again: it goes on where it stopped."
)(finetune)

ConfigFile = Annotated[
    epath.Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.", parser=epath.Path)
]


@app.command(
    epilog="Examples:\n\n  gpt1 prepare configs/tiny.yaml\n\n"
    "  gpt1 prepare configs/tiny.yaml data.cleaning.min_chars=200"
)
def prepare(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Turn a corpus into a tokenizer and sharded, checksummed tokens; of one that is there, rebuild what is damaged."""
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.manifest import read_manifest
    from gpt1_jax.data.prepare import prepare as prepare_corpus

    settings = load_config(config, overrides or ())
    folder = prepare_corpus(settings, progress=_prepare_progress(), check=settings.data.verify)
    manifest = read_manifest(folder)
    if as_json:
        shown = manifest.model_dump(mode="json", include={"name", "fingerprint", "vocab_size", "sources", "splits"})
        print_json({"path": str(folder), **shown})
        return
    print(folder)
    for source in manifest.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items()) or "none"
        cut = "".join(f"; {what} cut off {count:,}" for what, count in source.cut.items())
        print(f"  {source.name}: {source.read:,} documents read, {source.kept:,} kept; dropped: {dropped}{cut}")
    for split, counts in manifest.splits.items():
        print(
            f"  {split}: {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.words:,} words, "
            f"{counts.tokens:,} tokens"
        )


@app.command(
    epilog="Examples:\n\n  gpt1 train configs/tiny.yaml\n\n"
    "  gpt1 train configs/tiny.yaml name=wide model.embed_dim=384\n\n"
    "  gpt1 train configs/tiny.yaml --restart 3\n\n"
    "Stop it with Ctrl-C and run the same command again: it goes on where it stopped."
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run that another configuration or corpus made.")
    ] = False,
    restart: Annotated[
        int | None,
        typer.Option(min=0, help="Start again after a fault; at most so many times in a row without a new checkpoint."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a run, preparing its corpus first if needed; then evaluate it, sample from it, and report."""
    if restart is not None:
        from gpt1_jax.supervisor import supervise

        options = ["--allow-changes"] * allow_changes + ["--json"] * as_json
        raise typer.Exit(supervise(config, overrides or (), options, restart))
    with Interruption() as interruption:
        finished = _train(config, overrides or (), allow_changes, interruption)
    if finished:
        _print_finished(finished, as_json)


def _train(
    config: epath.Path, overrides: Sequence[str], allow_changes: bool, interruption: Interruption
) -> "Finished | None":
    from gpt1_jax.config import DistributedConfig
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.corpus import Corpus
    from gpt1_jax.data.prepare import prepare as prepare_corpus
    from gpt1_jax.finish import finish, finished_run, is_finished, validation_figures
    from gpt1_jax.training.choices import resolve
    from gpt1_jax.training.compilation_cache import compilation_cache
    from gpt1_jax.training.hardware import keep_freed_memory
    from gpt1_jax.training.hosts import join
    from gpt1_jax.training.lock import sole_writer
    from gpt1_jax.training.loop import train as train_run
    from gpt1_jax.training.mesh import check_mesh, make_mesh
    from gpt1_jax.training.run import check_pretraining, check_run, check_shared

    keep_freed_memory()
    settings = load_config(config, overrides)
    check_pretraining(settings)
    with join(settings, say, interruption) as hosts, compilation_cache(settings):
        hosts.expect("finding the devices", settings.deadlines.start)
        # Where a process is belongs to this start, and not to the run.
        settings, choices = resolve(settings.model_copy(update={"distributed": DistributedConfig()}))
        mesh = make_mesh(settings.mesh)
        check_mesh(settings, mesh)
        check_shared(settings, hosts)
        check_run(settings, allow_changes)
        for choice in choices if hosts.process == 0 else ():
            say(str(choice))
        if hosts.first(lambda: is_finished(settings.run_dir, settings.train.steps)):
            return finished_run(settings.run_dir, mesh, hosts)
        with sole_writer(settings.run_dir, hosts, say):
            hosts.expect("preparing the corpus", settings.deadlines.start)
            prepared = hosts.first(lambda: str(prepare_corpus(settings, progress=_watched(_prepare_progress(), hosts))))
            corpus = Corpus(epath.Path(prepared), settings.data.verify, settings.data.readers)
            tokenizer = corpus.tokenizer()
            evaluate = validation_figures(settings, corpus, mesh, hosts)
            train_run(settings, corpus, tokenizer, mesh, evaluate, allow_changes, hosts)
            hosts.expect("reading the last checkpoint", settings.deadlines.start)
            return finish(settings.run_dir, corpus, mesh, hosts)


app.command(
    epilog='Examples:\n\n  gpt1 generate runs/tiny "The array"\n\n'
    '  gpt1 generate runs/tiny "Return the" --temperature 0.8 --top-k 40 --tokens 60 --seed 1\n\n'
    '  gpt1 generate runs/tiny "Return the" --beams 4\n\n'
    "  gpt1 generate runs/chat --chat"
)(generate)


@app.command(epilog="Examples:\n\n  gpt1 report runs/tiny\n\n  gpt1 report runs/tiny runs/wide --out comparison.html")
def report(
    runs: Annotated[list[epath.Path], typer.Argument(metavar="RUN...", help="Folders of runs.", parser=epath.Path)],
    out: Annotated[
        epath.Path | None,
        typer.Option(help="The page to write; by default report.html in the run.", parser=epath.Path),
    ] = None,
) -> None:
    """Write one self-contained HTML page, and PNGs: curves, samples, configuration; several runs side by side."""
    from gpt1_jax.reporting.report import write_report

    print(write_report(runs, out))


@app.command(
    epilog="Examples:\n\n  gpt1 export runs/tiny exported/tiny\n\n"
    "  gpt1 export runs/tiny exported/tiny-hlo --format stablehlo --dtype bfloat16"
)
def export(
    run: RunFolder,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make; it must not hold anything.")],
    to: Annotated[
        Literal["huggingface", "stablehlo"],
        typer.Option("--format", help="What transformers loads, or functions that plain JAX calls."),
    ] = "huggingface",
    max_shard_size: Annotated[
        str | None, typer.Option(help="huggingface: most bytes of weights in one file, such as 500MB; else 5GB.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="stablehlo: of the products and of the cache; else float32."),
    ] = None,
) -> None:
    """Write a run as a folder that needs nothing of this project: weights, configuration, tokenizer, README."""
    from gpt1_jax.interop.huggingface import export_huggingface
    from gpt1_jax.interop.stablehlo import export_stablehlo
    from gpt1_jax.interop.staging import check_new
    from gpt1_jax.reporting.records import read_final
    from gpt1_jax.training.run import open_run, read_results

    if to == "huggingface" and dtype:
        raise UserError(f"--dtype {dtype}: weights go to --format huggingface as they are, float32; leave it out")
    if to == "stablehlo" and max_shard_size:
        raise UserError(f"--max-shard-size {max_shard_size}: --format stablehlo writes one file; leave it out")
    if is_remote(out):
        raise UserError(f"OUT {out}: a run is exported to this machine; give a local folder, and copy it from there")
    shard_bytes = _bytes(max_shard_size or "5GB", "--max-shard-size")
    folder = Path(out)
    check_new(folder)
    opened = open_run(run)
    if to == "huggingface":
        figures = read_results(run) if opened.config.finetune else read_final(run)
        files = export_huggingface(opened, folder, figures, shard_bytes)
        made = f"weights in {len(files)} file(s)"
    else:
        made = " and ".join(export_stablehlo(opened, folder, dtype or "float32"))
    print(f"{out}: step {opened.step:,} of {run}, {made}; {out}/README.md says how to use it")


@app.command(
    "import",
    epilog="Examples:\n\n  gpt1 import exported/tiny runs/again\n\n"
    "  gpt1 import openai-gpt runs/gpt1 train.steps=20000 optimizer.warmup_steps=200",
)
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A model as transformers writes it, or the authors' release.")
    ],
    run: Annotated[
        epath.Path, typer.Argument(metavar="RUN", help="The run to make, such as runs/gpt1.", parser=epath.Path)
    ],
    overrides: Overrides = None,
) -> None:
    """Make a run of a GPT-1 that was trained elsewhere: it evaluates, generates, fine-tunes and trains on."""
    from gpt1_jax.interop.importing import import_run

    config = import_run(folder, run, overrides or (), say)
    print(
        f"{run} is imported: {config.model.num_layers} layers of width {config.model.embed_dim}, "
        f"{config.model.vocab_size:,} tokens.\n"
        f"\nNext:\n  .venv/bin/gpt1 evaluate {run} --text README.md\n"
        f'  .venv/bin/gpt1 generate {run} "The" --temperature 0.8 --top-k 40\n'
        f"  .venv/bin/gpt1 train {run}/config.yaml train.steps=20000"
    )


def _bytes(text: str, option: str) -> int:
    """A size such as 500MB or 5GB, in powers of 1000; a plain number is bytes."""
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if not found or not int(found[1]):
        raise UserError(f"{option} {text}: expected a size such as 500MB or 5GB")
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def _prepare_progress() -> "Progress":
    """Says which stage the preparation is in, and every few seconds how far."""
    last = ("", 0.0)

    def show(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if stage != last[0] or now - last[1] > 5:
            last = (stage, now)
            of = f" of {total:,}" if total else ""
            say(f"prepare: {stage}" + (f" ({done:,}{of})" if done else ""))

    return show


def _watched(progress: "Progress", hosts: "Hosts") -> "Progress":
    """The same, and each part that is counted has the time of a whole start; what is not counted has no deadline."""

    def show(stage: str, done: int, total: int | None) -> None:
        progress(stage, done, total)
        hosts.renew(counted=total is not None)

    return show


def _print_finished(finished: "Finished", as_json: bool) -> None:
    """A run's figures, the first of its samples, and what to do next."""
    run, path = finished.run, finished.run.path
    sample = finished.samples[0] if finished.samples else None
    if as_json:
        print_json({"run": str(path), **finished.final, "sample": sample, "report": str(finished.report)})
        return
    print(f"\n{path} is trained: {run.step:,} steps.\n")
    print_figures(finished.final)
    if sample:
        print("\nSample:")
        print(textwrap.indent((sample["prompt"] + sample["completion"]).strip(), "  "))
    print("\nNext:")
    if sample:
        print(f"  .venv/bin/gpt1 generate {path} {json.dumps(sample['prompt'])} --temperature 0.8 --top-k 40")
    print(
        f"  .venv/bin/gpt1 evaluate {path} --text README.md\n"
        f"  .venv/bin/gpt1 train {path}/config.yaml name=longer train.steps={4 * run.config.train.steps}\n"
        f"\nReport: {finished.report}"
    )


def main() -> None:
    """Runs a command and exits with the code that scripts rely on."""
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev").glob("vfio/*")):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu, if installed, complains that there is no TPU
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax explains itself at length, and logs what it raises
    try:
        app()
    except GPT1Error as error:
        say(f"gpt1: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        say(f"gpt1: {fault}")
        sys.exit(fault.exit_code)
