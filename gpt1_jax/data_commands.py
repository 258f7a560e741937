"""The commands of the group ``gpt1 data``: what is in a corpus, and what a run has read of it."""

from typing import TYPE_CHECKING, Annotated

import typer
from etils import epath

from gpt1_jax.console import Json, Overrides, RunFolder, print_json, say
from gpt1_jax.errors import DamagedError, UserError

if TYPE_CHECKING:
    from gpt1_jax.data.corpus import Corpus
    from gpt1_jax.data.statistics import Statistics

data_app = typer.Typer(
    help="Look into a corpus, and at what a run has read of it.",
    no_args_is_help=True,
    epilog="Examples:\n\n  gpt1 data show runs/tiny --step 100",
)


CorpusFolder = Annotated[
    epath.Path,
    typer.Argument(
        metavar="CORPUS",
        help="A prepared corpus's folder, or the configuration that it was prepared with.",
        parser=epath.Path,
    ),
]


@data_app.command(
    epilog="Examples:\n\n  gpt1 data show runs/tiny --step 100\n\n  gpt1 data show runs/tiny --step 1 --json"
)
def show(
    run: RunFolder,
    step: Annotated[int, typer.Option(min=1, help="Which update, from 1; one still to come shows what it will read.")],
    as_json: Json = False,
) -> None:
    """Print what a step was trained on: each row's documents, where they are from, and their text."""
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.corpus import find_corpus
    from gpt1_jax.data.lineage import trace
    from gpt1_jax.training.history import order_at
    from gpt1_jax.training.run import CONFIG, check_is_run

    check_is_run(run)
    config = load_config(run / CONFIG)
    if step > config.train.steps:
        raise UserError(f"--step {step}: {run} has {config.train.steps} steps, the first of which is 1")
    order = order_at(run, step)
    corpus = find_corpus(order.corpus, config, run)
    tokenizer = corpus.tokenizer()
    rows = [
        {
            "example": row.example,
            "source": row.source,
            "epoch": row.epoch,
            "documents": [
                {
                    "identity": part.identity,
                    "split": part.split,
                    "position": part.position,
                    "tokens": [part.first, part.stop],
                    "of": part.length,
                    "ids": part.tokens.tolist(),
                    "text": tokenizer.decode(part.tokens),
                }
                for part in row.parts
            ],
        }
        for row in trace(corpus, order.windows(corpus), order.examples_of(step))
    ]
    if as_json:
        print_json({"run": str(run), "step": step, "corpus": str(corpus.folder), "rows": rows})
        return
    for row in rows:
        print(f"==== example {row['example']:,}, source {row['source']}, epoch {row['epoch']} " + "=" * 40)
        for part in row["documents"]:
            first, stop = part["tokens"]
            print(
                f"---- {part['identity']} ({part['split']} {part['position']:,}), tokens {first:,} to {stop:,} of "
                f"{part['of']:,}"
            )
            print(part["text"])


@data_app.command(
    epilog="Examples:\n\n  gpt1 data verify configs/tiny.yaml\n\n"
    "  gpt1 data verify data/prepared/python_docs-0123456789abcdef --json"
)
def verify(corpus: CorpusFolder, overrides: Overrides = None, as_json: Json = False) -> None:
    """Read every file of a corpus and compare it with the manifest; exit code 3 if any is not as it was written."""
    from gpt1_jax.data.integrity import verify_corpus

    opened = _open(corpus, overrides)
    problems = verify_corpus(opened)
    files = opened.manifest.files.values()
    size = sum(file.bytes for file in files)
    if as_json:
        found = [problem._asdict() for problem in problems]
        print_json({"corpus": str(opened.folder), "files": len(files), "bytes": size, "problems": found})
    else:
        print(f"{opened.folder}: {len(files):,} files, {size:,} bytes")
        for problem in problems:
            print(f"  {problem.file} {problem.what}")
    if problems:
        raise DamagedError(
            f"{opened.folder}: {len(problems)} file(s) are not as the manifest says; 'gpt1 prepare' with the "
            "configuration of the corpus rebuilds what is damaged or missing, and leaves what is not in the manifest"
        )
    say("every file is as it was written")


@data_app.command(
    epilog="Examples:\n\n  gpt1 data stats configs/tiny.yaml\n\n"
    "  gpt1 data stats data/prepared/python_docs-0123456789abcdef --top 50 --json"
)
def stats(
    corpus: CorpusFolder,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many domains, files or folders to name.")] = 10,
    as_json: Json = False,
) -> None:
    """Print what is in a corpus: documents, tokens, bytes per token, lengths, where documents are from, duplicates."""
    from gpt1_jax.data.statistics import statistics

    opened = _open(corpus, overrides)
    found = statistics(opened, top, lambda count: say(f"read {count:,} documents"))
    if as_json:
        splits = {split: counts.model_dump() for split, counts in found.splits.items()}
        print_json({"corpus": str(opened.folder), **found._asdict(), "splits": splits})
    else:
        _print_statistics(opened, found)


def _open(corpus: epath.Path, overrides: list[str] | None) -> "Corpus":
    """The corpus in a folder, or the one of a configuration."""
    from gpt1_jax.config_file import load_config
    from gpt1_jax.data.corpus import Corpus
    from gpt1_jax.data.prepare import corpus_dir

    if not corpus.is_dir():
        return Corpus(corpus_dir(load_config(corpus, overrides or ())))
    if overrides:
        raise UserError(f"{corpus} is a corpus, to which {overrides[0]} means nothing; give a configuration instead")
    return Corpus(corpus)


def _print_statistics(corpus: "Corpus", found: "Statistics") -> None:
    print(corpus.folder)
    for split, counts in found.splits.items():
        print(
            f"  {split}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.words:,} words, "
            f"{counts.bytes:,} bytes"
        )
    print(f"  {found.bytes_per_token:.3f} bytes per token")
    read = sum(source.read for source in corpus.manifest.sources)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in found.dropped.items()) or "none"
    print(f"  {read:,} inputs read, {100 * found.duplicate_rate:.2f} % of them duplicates; dropped: {dropped}")
    print("tokens of the training split, by source")
    for name, tokens in found.sources.items():
        print(f"  {tokens:>15,}  {name}")
    print("documents by their number of tokens")
    most = max(found.lengths.values())
    for length, count in found.lengths.items():
        print(f"  {length:>9,} to {2 * length - 1:>9,}  {count:>13,}  {'#' * round(40 * count / most)}")
    print("most documents are from")
    for origin, count in found.origins.items():
        print(f"  {count:>15,}  {origin}")
