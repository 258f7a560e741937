"""Fine-tuning from its beginning to its results: a run for each seed, and what all of them are worth together."""

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.data.corpus import find_corpus
from gpt1_jax.data.storage import write_atomically, write_changed
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.figures import ArrayTokens, read_texts
from gpt1_jax.evaluation.metrics import check_installed
from gpt1_jax.evaluation.perplexity import Evaluator, Tokens
from gpt1_jax.finetuning.dataset import Batch
from gpt1_jax.finetuning.folder import check_epochs, check_folder
from gpt1_jax.finetuning.forms import check_room, special_tokens
from gpt1_jax.finetuning.loss import finetune_step
from gpt1_jax.finetuning.order import EpochOrder
from gpt1_jax.finetuning.predictions import Answers, Predictor, Split, read_split
from gpt1_jax.finetuning.start import first_params, run_config
from gpt1_jax.model.sharding import axis_size
from gpt1_jax.model.transformer import Params, flops_per_token
from gpt1_jax.reporting.report import write_report
from gpt1_jax.task_config import Chat
from gpt1_jax.text.conversation import chat_template
from gpt1_jax.text.tokenizer import Tokenizer
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.lock import sole_writer
from gpt1_jax.training.loop import Lesson, learn
from gpt1_jax.training.mesh import check_mesh, make_mesh
from gpt1_jax.training.metrics import METRICS, read_records
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.run import RESULTS, Run, check_run, open_run, read_results
from gpt1_jax.training.state import TrainState, abstract_state
from gpt1_jax.training.step import Metrics, TrainStep, compile_step
from gpt1_jax.training.trained import rate_scales

Record = dict[str, Any]


@dataclass(frozen=True)
class _Text:
    """What perplexity is measured on before and after, so that forgetting shows.

    Attributes:
        name: of the text.
        tokens: of the text.
        before: perplexity of the base, per token.
    """

    name: str
    tokens: Tokens
    before: float


@dataclass(frozen=True)
class _Job:
    """What the runs of all seeds share."""

    config: FinetuneConfig
    base: str
    corpus: str | None
    tokenizer: Tokenizer
    mesh: Mesh
    splits: Mapping[str, Split]
    text: _Text | None
    hosts: Hosts
    allow_changes: bool


def finetune(
    config: FinetuneConfig, hosts: Hosts, say: Callable[[str], None], allow_changes: bool = False
) -> list[Record]:
    """Fine-tunes a run on a task, once for each seed; what is done already is read and not made again.

    Args:
        config: task, base and settings.
        hosts: the processes that do it together.
        say: prints a line.
        allow_changes: go on with runs that another configuration made, and measure them again.

    Returns:
        What results.json holds of each run: task, seed, best epoch and its step, the metrics of every epoch, those of
        the best on every split with their intervals, counts, and the perplexity before and after.

    Raises:
        UserError: before anything is trained, if something of the configuration, the task or the base is amiss.
    """
    check_folder(config)
    hosts.expect("finding the devices, and reading the base and the tables", config.deadlines.start)
    base, mesh = _open_base(config, hosts)
    config = config.model_copy(update={"base_step": base.step})
    tokenizer = base.tokenizer.with_special_tokens(special_tokens(config.task))
    context_length = base.config.context_length
    check_room(config.task, context_length)
    splits = _read_splits(config, tokenizer, context_length, hosts)
    multiple = axis_size(mesh, "sequence")
    configs = []
    for seed in config.seeds:
        order = EpochOrder(splits["train"].dataset, config.train.batch_size, seed, context_length, multiple)
        found, choices = resolve(run_config(config, base.config, tokenizer, order.steps_per_epoch, seed))
        check_mesh(found, mesh)
        check_run(found, allow_changes)
        check_epochs(found)
        configs.append(found)
    tell = say if hosts.process == 0 else lambda line: None
    done = [run for run in configs if not allow_changes and hosts.first((run.run_dir / RESULTS).exists)]
    for run in done:
        tell(f"{run.run_dir}: done already, and not measured again; delete its {RESULTS} to have that")
    for line in (*map(str, choices), *_counts(splits)):
        tell(line)
    text = _text(config, base, hosts, tell) if len(done) < len(configs) else None
    with contextlib.nullcontext() if len(done) == len(configs) else sole_writer(config.run_dir, hosts, say):
        job = _Job(config, str(base.path), base.corpus, tokenizer, mesh, splits, text, hosts, allow_changes)
        del base  # its weights are read again for each seed, and take no memory in between
        results = [read_results(run.run_dir) if run in done else _run(job, run) for run in configs]
        if len(results) > 1 and hosts.process == 0:
            summary = {"task": config.name, "runs": results, "summary": summarize(results)}
            write_changed(config.run_dir / RESULTS, json.dumps(summary, indent=1).encode() + b"\n")
    return results


def summarize(results: list[Record]) -> Record:
    """Mean, median, least and greatest value of each metric over the runs of several seeds, by split."""
    found: Record = {}
    for split, metrics in results[0]["figures"].items():
        for metric in metrics:
            values = [run["figures"][split][metric]["value"] for run in results]
            if None not in values:
                found.setdefault(split, {})[metric] = {
                    "mean": statistics.fmean(values),
                    "median": statistics.median(values),
                    "low": min(values),
                    "high": max(values),
                }
    return found


def compile_by_width(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainStep:
    """The step, which is compiled when a batch of a new width comes, the state donated."""
    abstract = abstract_state(config, optimizer, mesh)
    compiled: dict[int, jax.stages.Compiled] = {}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        width = batch.tokens_BKT.shape[2]
        if width not in compiled:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
            compiled[width] = compile_step(partial(finetune_step, config, optimizer), abstract, shapes, mesh)
        return compiled[width](state, batch)

    return step


def _open_base(config: FinetuneConfig, hosts: Hosts) -> tuple[Run, Mesh]:
    if config.base is None:
        raise UserError(
            "base: not given: which run to begin with, such as base=runs/tiny; 'gpt1 train' and 'gpt1 import' make one"
        )
    if config.task.train is None:
        raise UserError("task.train: not given: there is nothing to learn from; 'gpt1 evaluate --task' needs none")
    check_installed(config.task.metrics)
    mesh = make_mesh(config.mesh)
    return open_run(config.base, mesh, config.base_step, hosts), mesh


def _counts(splits: Mapping[str, Split]) -> list[str]:
    return [
        f"task.{name}: {len(split.dataset):,} examples, {split.dataset.truncated:,} of them truncated"
        + f", {split.unlabelled:,} rows without a label left out" * bool(split.unlabelled)
        for name, split in splits.items()
    ]


def _read_splits(config: FinetuneConfig, tokenizer: Tokenizer, context_length: int, hosts: Hosts) -> dict[str, Split]:
    """The tables of a task, on every host; process 0 reads first, and so fetches what is fetched once.

    Raises:
        UserError: naming the hosts whose tables are not those of process 0.
    """
    found: dict[str, Split] = {}

    def read() -> None:
        for name in config.task.tables:
            found[name] = read_split(config.task, name, tokenizer, context_length)

    hosts.first(read)
    if not found:
        read()
    sums = hosts.gather({name: split.dataset.fingerprint for name, split in found.items()})
    others = [process for process, sum_ in enumerate(sums) if sum_ != sums[0]]
    if others:
        raise UserError(
            f"task: process(es) {', '.join(map(str, others))} read other examples than process 0; give all hosts the "
            "same files"
        )
    return found


def _text(config: FinetuneConfig, base: Run, hosts: Hosts, say: Callable[[str], None]) -> _Text | None:
    """The texts of the configuration, else the validation split of the base's corpus, else nothing."""
    if config.evaluation.texts:
        encoded = base.tokenizer.encode_batch(list(read_texts(config.evaluation.texts)))
        ended = [np.append(tokens, np.int32(base.tokenizer.separator_id)) for tokens in encoded]
        name, tokens = ", ".join(config.evaluation.texts), ArrayTokens(np.concatenate(ended))
    elif base.corpus is None:
        say(f"perplexity before and after is not measured: {base.path} has no corpus; set evaluation.texts to have it")
        return None
    else:
        corpus, missing = None, ""
        try:
            corpus = find_corpus(base.corpus, base.config, base.path)
        except UserError as error:
            missing = str(error)
        # All hosts measure it, or none: they do it together.
        missing = next(filter(None, hosts.gather(missing)), "")
        if corpus is None or missing:
            say(f"perplexity before and after is not measured: {missing}; or set evaluation.texts")
            return None
        name, tokens = f"validation split of {corpus.folder}", corpus.tokens("validation")
    between = partial(hosts.between, "evaluating", config.deadlines.evaluation)
    evaluator = Evaluator(base.config, base.mesh, base.tokenizer.separator_id, between)
    return _Text(name, tokens, evaluator(base.params, tokens, config.evaluation.max_tokens).perplexity)


def _run(job: _Job, config: Config) -> Record:
    """Fine-tunes with one seed, chooses the best epoch, and measures it."""
    between = partial(job.hosts.between, "evaluating", config.deadlines.evaluation)
    validation = Predictor(config, job.splits["validation"], job.tokenizer, job.mesh, between)

    def evaluate(params: Params) -> dict[str, float]:
        measured = validation.measured(validation.answers(params), resamples=0)
        # A metric that is undefined, as where all answers are one number, is worse than any other value.
        return {f"validation_{name}": -100.0 if m.value is None else m.value for name, m in measured.items()}

    lesson = _lesson(job, config)
    learn(config, lesson, job.tokenizer, job.mesh, evaluate, job.allow_changes, job.hosts)
    job.hosts.expect("measuring the best epoch", config.deadlines.evaluation)
    epochs = _epochs(job, config, evaluate)
    best = best_epoch(epochs, job.config.task.metrics[0])
    run = open_run(config.run_dir, job.mesh, best["step"], job.hosts)
    figures, files = {}, {}
    for name, split in job.splits.items():
        if name != "train":
            predictor = (
                validation if name == "validation" else Predictor(config, split, job.tokenizer, job.mesh, between)
            )
            answers = predictor.answers(run.params)
            measured = predictor.measured(answers, config.finetune.evaluation.resamples if config.finetune else 0)
            figures[name] = {metric: found._asdict() for metric, found in measured.items()}
            files[f"predictions-{name}.jsonl"] = _lines(answers)
    record = {
        "run": str(config.run_dir),
        "task": job.config.name,
        "base": job.base,
        "base_step": job.config.base_step,
        "seed": config.seed,
        "step": best["step"],
        "epoch": best["epoch"],
        "epochs": epochs,
        "examples": {name: len(split.dataset) for name, split in job.splits.items()},
        "truncated": {name: split.dataset.truncated for name, split in job.splits.items()},
        "unlabelled": {name: split.unlabelled for name, split in job.splits.items()},
        "figures": figures,
        "perplexity": _perplexity(job, config, run),
    }
    if job.hosts.process == 0:
        for name, lines in files.items():
            write_atomically(config.run_dir / name, lines)
        # Last: it says that all is done, and which checkpoint is the run's.
        write_atomically(config.run_dir / RESULTS, json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        write_report([config.run_dir])
    return record


def best_epoch(epochs: Sequence[Record], metric: str) -> Record:
    """The epoch that is best on the validation split by a metric, the first of equals."""
    return max(epochs, key=lambda epoch: epoch[f"validation_{metric}"])


def _lesson(job: _Job, config: Config) -> Lesson:
    train = job.splits["train"].dataset
    multiple = axis_size(job.mesh, "sequence")
    order = EpochOrder(train, config.train.batch_size, config.seed, config.context_length, multiple)
    optimizer = make_optimizer(config.optimizer, config.train.steps, rate_scales(config))
    return Lesson(
        fingerprint=train.fingerprint,
        corpus=job.corpus,
        origin=f"task.train of {job.config.name}",
        summary=f"{len(train):,} training examples",
        optimizer=optimizer,
        examples=lambda step, read: order,
        compile=lambda: compile_by_width(config, optimizer, job.mesh),
        tokens=order.tokens,
        flops_per_token=flops_per_token(config.model, int(train.lengths_N.mean())),
        params=lambda: first_params(config, open_run(job.base, job.mesh, job.config.base_step, job.hosts)),
        chat_template=chat_template(job.tokenizer) if isinstance(job.config.task, Chat) else None,
    )


def _epochs(job: _Job, config: Config, evaluate: Callable[[Params], dict[str, float]]) -> list[Record]:
    """The metrics of every epoch on the validation split, in their order.

    An epoch of whose metrics the log lacks one, as where it was made with others, is measured again.
    """
    names = [f"validation_{metric}" for metric in job.config.task.metrics]
    steps = range(config.checkpoint.every, config.train.steps + 1, config.checkpoint.every)

    def logged() -> list[dict[str, float] | None]:
        records = [record for record in read_records(config.run_dir / METRICS, "step") if record.keys() >= set(names)]
        figures = {record["step"]: {name: record[name] for name in names} for record in records}
        return [figures.get(step) for step in steps]

    known = job.hosts.first(logged)  # all hosts measure the same epochs, for they do it together

    def measured(step: int) -> dict[str, float]:
        return evaluate(open_run(config.run_dir, job.mesh, step, job.hosts).params)

    return [
        {"epoch": number, "step": step, **(figures or measured(step))}
        for number, (step, figures) in enumerate(zip(steps, known, strict=True), 1)
    ]


def _lines(answers: Answers) -> bytes:
    scores = answers.scores if answers.scores is not None else [None] * len(answers.predictions)
    lines = []
    for place, prediction, reference, score in zip(
        answers.places, answers.predictions, answers.references, scores, strict=True
    ):
        line = {**place, "prediction": prediction, "reference": reference}
        if score is not None:
            line["scores"] = [float(s) for s in score if np.isfinite(s)]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _perplexity(job: _Job, config: Config, run: Run) -> Record | None:
    if job.text is None:
        return None
    between = partial(job.hosts.between, "evaluating", config.deadlines.evaluation)
    evaluator = Evaluator(config, job.mesh, job.tokenizer.separator_id, between)
    score = evaluator(run.params, job.text.tokens, job.config.evaluation.max_tokens)
    return {"of": job.text.name, "tokens": score.tokens, "before": job.text.before, "after": score.perplexity}
