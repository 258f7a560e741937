"""What surrounds the training of a run: its figures on the way, and at its end the evaluation, samples and report."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from etils import epath
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.data.corpus import Corpus, find_corpus
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.manifest import Split
from gpt1_jax.data.storage import write_atomically
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.figures import Figures, evaluate_split
from gpt1_jax.evaluation.perplexity import Evaluator
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import Sampling
from gpt1_jax.reporting.records import EVALUATION, SAMPLES, Record, read_final, read_samples
from gpt1_jax.reporting.report import write_report
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.loop import Evaluate
from gpt1_jax.training.run import Run, open_run

_PAGE = "report.html"


@dataclass(frozen=True)
class Finished:
    """A run at its end.

    Attributes:
        run: opened.
        final: its figures on the validation split, and the step that they are of.
        samples: completions of ``evaluation.prompts``; none of a masked model, which cannot continue a text.
        report: the page.
    """

    run: Run
    final: Record
    samples: list[Record]
    report: epath.Path


def validation_figures(config: Config, corpus: Corpus, mesh: Mesh, hosts: Hosts | None = None) -> Evaluate:
    """What evaluates the validation split while training: loss in nats per token, perplexity, bits per byte."""
    between = partial((hosts or Hosts()).between, "evaluating", config.deadlines.evaluation)
    evaluator = Evaluator(config, mesh, corpus.manifest.separator_id, between)
    counts = corpus.manifest.splits["validation"]
    stream = corpus.tokens("validation")

    def figures(params: Any) -> dict[str, float]:
        score = evaluator(params, stream, config.evaluation.max_tokens)
        loss = score.nats / score.tokens
        if score.pseudo:
            return {"validation_loss": loss, "validation_pseudo_perplexity": score.perplexity}
        return {
            "validation_loss": loss,
            "validation_perplexity": score.perplexity,
            # Tokens per byte of the whole split, so that the figure is exact where all of it was evaluated.
            "validation_bits_per_byte": loss / math.log(2) * counts.tokens / counts.bytes,
        }

    return figures


def split_figures(run: Run, corpus: Corpus, split: Split, between: Callable[[], None] = lambda: None) -> Figures:
    """The figures of a whole split of the corpus that a run was trained on; ``between`` is called before each batch."""
    evaluator = Evaluator(run.config, run.mesh, run.tokenizer.separator_id, between)
    texts = (text for text, _ in read_documents(corpus.folder, split, corpus.sums))
    return evaluate_split(evaluator, run.params, corpus.tokens(split), texts, split)


def corpus_of(run: Run) -> Corpus:
    """The corpus that a run was trained on.

    Raises:
        UserError: if it has none, or the corpus is not there.
    """
    if run.corpus is None:
        raise UserError(
            f"{run.path}: this run was imported, so it has no corpus yet; evaluate text files with --text FILE, or "
            f"train it with 'gpt1 train {run.path}/config.yaml'"
        )
    return find_corpus(run.corpus, run.config, run.path)


def is_finished(path: epath.Path, steps: int) -> bool:
    """Whether a run has nothing left to do: its last checkpoint is sound, evaluated, sampled from and reported on."""
    final = read_final(path).get("step", -1)
    if final < steps or not (path / _PAGE).exists():
        return False
    with Checkpoints(path) as checkpoints:
        return checkpoints.latest() == final and not checkpoints.problems(final)


def finished_run(path: epath.Path, mesh: Mesh, hosts: Hosts) -> Finished | None:
    """What a finished run has, read; None but in process 0."""
    run = open_run(path, mesh, hosts=hosts)
    return None if hosts.process else Finished(run, read_final(path), read_samples(path), path / _PAGE)


def finish(path: epath.Path, corpus: Corpus, mesh: Mesh, hosts: Hosts | None = None) -> Finished | None:
    """Evaluates a trained run, samples from it and writes its report; None but in process 0, which writes."""
    hosts = hosts or Hosts()
    page = path / _PAGE
    run = open_run(path, mesh, hosts=hosts)
    seconds = run.config.deadlines.evaluation
    hosts.expect("reading the text that was held out", seconds)
    figures = split_figures(run, corpus, "validation", partial(hosts.between, "evaluating", seconds))
    final = {"step": run.step, **dataclasses.asdict(figures)}
    hosts.expect("drawing samples, and writing the report", seconds)
    samples = list(_samples(run))
    if hosts.process:
        return None
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_atomically(path / SAMPLES, "".join(lines).encode())
    write_report([path], final=final)
    write_atomically(path / EVALUATION, json.dumps(final).encode() + b"\n")  # last: it says that all is done
    return Finished(run, final, samples, page)


def _samples(run: Run) -> Iterator[Record]:
    if run.config.model.objective == "masked":
        return
    prompts = run.config.evaluation.prompts
    encoded = [run.tokenizer.encode(prompt) for prompt in prompts]
    completions = generate(
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
        yield {"step": run.step, "prompt": prompt, "completion": text[len(run.tokenizer.decode(ids)) :]}
