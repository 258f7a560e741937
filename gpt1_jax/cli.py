"""The commands. Each reads its arguments, checks them before any long work, and calls the stage that does the work.

Results go to standard output; logs, progress and errors to standard error.
"""

import dataclasses
import json
import logging
import math
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gpt1_jax.data.storage import FAULTS, write_atomically
from gpt1_jax.errors import GPT1Error, StorageError, UserError

# JAX takes seconds to import, so the stages are imported by the commands that use them, and --help is quick.
if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gpt1_jax.config import Config
    from gpt1_jax.data.collect import Progress
    from gpt1_jax.data.corpus import Corpus
    from gpt1_jax.evaluation.figures import Figures
    from gpt1_jax.training.loop import Evaluate
    from gpt1_jax.training.run import Run

app = typer.Typer(
    name="gpt1",
    help="GPT-1 in JAX: text in; a trained, evaluated, generating model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, such as train.steps=200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]


@app.command(
    epilog="Examples:\n\n  gpt1 prepare configs/tiny.yaml\n\n"
    "  gpt1 prepare configs/tiny.yaml data.cleaning.min_chars=200"
)
def prepare(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Turn a corpus into a tokenizer and sharded, checksummed tokens. Does nothing if that is done already."""
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.manifest import read_manifest
    from gpt1_jax.data.prepare import prepare as prepare_corpus

    folder = prepare_corpus(load_config(config, overrides or ()), progress=_prepare_progress())
    manifest = read_manifest(folder)
    if as_json:
        shown = manifest.model_dump(mode="json", include={"name", "fingerprint", "vocab_size", "sources", "splits"})
        _print_json({"path": str(folder), **shown})
        return
    print(folder)
    for source in manifest.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items()) or "none"
        print(f"  {source.name}: {source.read:,} documents read, {source.kept:,} kept; dropped: {dropped}")
    for split, counts in manifest.splits.items():
        print(
            f"  {split}: {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.words:,} words, "
            f"{counts.tokens:,} tokens"
        )


@app.command(
    epilog="Examples:\n\n  gpt1 train configs/tiny.yaml\n\n"
    "  gpt1 train configs/tiny.yaml name=wide model.embed_dim=384\n\n"
    "Stop it with Ctrl-C and run the same command again: it goes on where it stopped."
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run that another configuration or corpus made.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a run, preparing its corpus first if needed; then evaluate it, sample from it, and report."""
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.corpus import Corpus
    from gpt1_jax.data.prepare import prepare as prepare_corpus
    from gpt1_jax.text.tokenizer import SentencePieceTokenizer
    from gpt1_jax.training.hardware import keep_freed_memory, resolve_dtype
    from gpt1_jax.training.loop import train as train_run
    from gpt1_jax.training.mesh import check_mesh, make_mesh
    from gpt1_jax.training.run import check_run

    keep_freed_memory()
    settings = resolve_dtype(load_config(config, overrides or ()))
    mesh = make_mesh(settings.mesh)
    check_mesh(settings, mesh)
    check_run(settings, allow_changes)
    corpus = Corpus(prepare_corpus(settings, progress=_prepare_progress()))
    tokenizer = SentencePieceTokenizer.from_file(corpus.tokenizer_file)
    train_run(settings, corpus, tokenizer, mesh, _validation(settings, corpus, mesh), allow_changes)
    _finish(settings.run_dir, corpus, mesh, as_json)


@app.command(
    epilog="Examples:\n\n  gpt1 evaluate runs/tiny\n\n  gpt1 evaluate runs/tiny --text README.md --text LICENSE --json"
)
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
    as_json: Json = False,
) -> None:
    """Perplexity per token and per word, and bits per byte beside xz, each token counted once."""
    from gpt1_jax.evaluation.figures import evaluate_texts, read_texts
    from gpt1_jax.evaluation.perplexity import Evaluator
    from gpt1_jax.training.run import open_run

    if text and split:
        raise UserError(f"--text and --split {split} exclude each other: evaluate files or a split of the corpus")
    opened = open_run(run)
    config = opened.config
    if stride is not None:
        if stride > config.context_length:
            raise UserError(f"--stride {stride} is longer than the context, {config.context_length} tokens")
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"stride": stride})})
    if text:
        evaluator = Evaluator(config, opened.mesh, opened.tokenizer.separator_id)
        figures = evaluate_texts(evaluator, opened.params, read_texts(text), opened.tokenizer)
    else:
        figures = _evaluate_split(dataclasses.replace(opened, config=config), _corpus_of(opened), split or "validation")
    shown = dataclasses.asdict(figures)
    if as_json:
        _print_json(shown)
    else:
        _print_figures(shown)


@app.command(
    epilog='Examples:\n\n  gpt1 generate runs/tiny "The array"\n\n'
    '  gpt1 generate runs/tiny "Return the" --temperature 0.8 --top-k 40 --tokens 60 --seed 1'
)
def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; may be empty.")],
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens whose probabilities reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the random draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a text, printed as it is generated, up to the end of the document."""
    from gpt1_jax.generation.decode import prompt_room, stream
    from gpt1_jax.generation.detokenize import Detokenizer
    from gpt1_jax.generation.sampling import Sampling
    from gpt1_jax.training.run import open_run

    def show(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    sampling = Sampling(temperature, top_k, top_p)
    opened = open_run(run)
    ids = opened.tokenizer.encode(prompt)
    room = prompt_room(opened.config, tokens)
    if len(ids) > room:
        _say(f"warning: the prompt has {len(ids)} tokens, the context has room for {room}: its beginning is cut off")
    started = time.perf_counter()
    pieces = stream(
        opened.config,
        opened.params,
        [ids],
        sampling=sampling,
        max_tokens=tokens,
        seed=seed,
        separator_id=opened.tokenizer.separator_id,
    )
    detokenizer = Detokenizer(opened.tokenizer.decode, ids)
    completion, count = "", 0
    show(prompt)
    for (new,) in pieces:
        count += len(new)
        text = detokenizer.push(new)
        show(text)
        completion += text
    rest = detokenizer.flush()
    show(rest + "\n")
    if as_json:
        seconds = time.perf_counter() - started
        _print_json({"prompt": prompt, "completion": completion + rest, "tokens": count, "seconds": seconds})


@app.command(epilog="Examples:\n\n  gpt1 report runs/tiny\n\n  gpt1 report runs/tiny runs/wide --out comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the run.")] = None,
) -> None:
    """Write one self-contained HTML page, and PNGs: curves, samples, configuration; several runs side by side."""
    from gpt1_jax.reporting.report import write_report

    print(write_report(runs, out))


def _corpus_of(run: "Run") -> "Corpus":
    """The corpus that a run was trained on, found by its fingerprint: its sources may be gone or changed."""
    from gpt1_jax.data.corpus import Corpus

    root = Path(run.config.data.root)
    folders = list(root.glob(f"*-{run.corpus}"))
    if not folders:
        raise UserError(
            f"{root}: the corpus of {run.path} (fingerprint {run.corpus}) is not here; "
            "run from the folder that it was trained from, or evaluate text files with --text FILE"
        )
    return Corpus(folders[0])


def _prepare_progress() -> "Progress":
    """Says which stage the preparation is in, and every few seconds how far."""
    last = ("", 0.0)

    def show(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if stage != last[0] or now - last[1] > 5:
            last = (stage, now)
            of = f" of {total:,}" if total else ""
            _say(f"prepare: {stage}" + (f" ({done:,}{of})" if done else ""))

    return show


def _evaluate_split(run: "Run", corpus: "Corpus", split: Literal["train", "validation"]) -> "Figures":
    from gpt1_jax.data.prepare import read_documents
    from gpt1_jax.evaluation.figures import evaluate_split
    from gpt1_jax.evaluation.perplexity import Evaluator

    evaluator = Evaluator(run.config, run.mesh, run.tokenizer.separator_id)
    texts = (text for text, _ in read_documents(corpus.folder, split))
    return evaluate_split(evaluator, run.params, corpus.tokens(split), texts, split)


def _validation(config: "Config", corpus: "Corpus", mesh: "Mesh") -> "Evaluate":
    """The figures of the validation split while training."""
    from gpt1_jax.evaluation.perplexity import Evaluator

    evaluator = Evaluator(config, mesh, corpus.manifest.separator_id)
    counts = corpus.manifest.splits["validation"]
    stream = corpus.tokens("validation")

    def figures(params: Any) -> dict[str, float]:
        score = evaluator(params, stream, config.evaluation.max_tokens)
        loss = score.nats / score.tokens
        return {
            "validation_loss": loss,
            "validation_perplexity": score.perplexity,
            # Tokens per byte of the whole split, so that the figure is exact where all of it was evaluated.
            "validation_bits_per_byte": loss / math.log(2) * counts.tokens / counts.bytes,
        }

    return figures


def _finish(path: Path, corpus: "Corpus", mesh: "Mesh", as_json: bool) -> None:
    """Evaluates a trained run, samples from it, writes its report, and says what to do next.

    What a finished run already has is shown again, not made again.
    """
    from gpt1_jax.reporting.records import EVALUATION, SAMPLES, read_final, read_samples
    from gpt1_jax.reporting.report import write_report
    from gpt1_jax.training.run import open_run

    page = path / "report.html"
    opened = open_run(path, mesh)
    final, samples = read_final(path), read_samples(path)
    if not (final.get("step") == opened.step and samples and page.exists()):
        final = {"step": opened.step, **dataclasses.asdict(_evaluate_split(opened, corpus, "validation"))}
        samples = list(_samples(opened))
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        write_atomically(path / SAMPLES, "".join(lines).encode())
        write_report([path], final=final)
        write_atomically(path / EVALUATION, json.dumps(final).encode() + b"\n")  # last: it says that all is done
    sample = samples[0]
    if as_json:
        _print_json({"run": str(path), **final, "sample": sample, "report": str(page)})
        return
    print(f"\n{path} is trained: {opened.step:,} steps.\n")
    _print_figures(final)
    print("\nSample:")
    print(textwrap.indent((sample["prompt"] + sample["completion"]).strip(), "  "))
    print(
        f"\nNext:\n  .venv/bin/gpt1 generate {path} {json.dumps(sample['prompt'])} --temperature 0.8 --top-k 40\n"
        f"  .venv/bin/gpt1 evaluate {path} --text README.md\n"
        f"  .venv/bin/gpt1 train {path}/config.yaml name=longer train.steps={4 * opened.config.train.steps}\n"
        f"\nReport: {page}"
    )


def _samples(run: "Run") -> Iterator[dict[str, Any]]:
    from gpt1_jax.generation.decode import generate as generate_tokens
    from gpt1_jax.generation.sampling import Sampling

    prompts = run.config.evaluation.prompts
    encoded = [run.tokenizer.encode(prompt) for prompt in prompts]
    completions = generate_tokens(
        run.config,
        run.params,
        encoded,
        sampling=Sampling(temperature=0.8, top_k=40),
        max_tokens=run.config.evaluation.sample_tokens,
        seed=run.config.seed,
        separator_id=run.tokenizer.separator_id,
    )
    for prompt, ids, completion in zip(prompts, encoded, completions, strict=True):
        text = run.tokenizer.decode([*ids, *completion.tokens])
        yield {"step": run.step, "prompt": prompt, "completion": text[len(prompt) :]}


def _print_figures(figures: Mapping[str, Any]) -> None:
    words = "-" if figures["word_perplexity"] is None else f"{figures['word_perplexity']:,.2f}"
    print(f"{figures['split']}: {figures['documents']:,} documents")
    print(f"  perplexity       {figures['perplexity']:,.2f} per token  ({figures['tokens']:,} tokens)")
    print(f"  word perplexity  {words} per word  ({figures['words']:,} words)")
    xz = f"xz -9: {figures['xz_bits_per_byte']:.4f}"
    print(f"  bits per byte    {figures['bits_per_byte']:.4f}  ({figures['bytes']:,} bytes; {xz})")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Runs a command and exits with the code that scripts rely on."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax explains itself at length
    try:
        app()
    except GPT1Error as error:
        _say(f"gpt1: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        _say(f"gpt1: {error}; make room, get access or write elsewhere, and run the same command again")
        sys.exit(StorageError.exit_code)
