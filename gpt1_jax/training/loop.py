"""The training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches, Examples
from gpt1_jax.errors import DivergedError, Interrupted, StalledError, UserError
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.model.transformer import Params, flops_per_token, num_parameters
from gpt1_jax.text.tokenizer import Tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.history import data_order, note_order
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.metrics import MetricsLog
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.progress import Progress
from gpt1_jax.training.recorder import Recorder
from gpt1_jax.training.run import check_run, write_config
from gpt1_jax.training.state import TrainState, abstract_state, init_state
from gpt1_jax.training.step import TrainStep, compile_train_step

# From the weights to the figures that metrics.jsonl gets.
Evaluate = Callable[[Params], Mapping[str, float]]


@dataclass(frozen=True)
class Lesson:
    """What a run learns from, and how.

    Attributes:
        fingerprint: of the data.
        corpus: fingerprint of the corpus of the pre-training; None: it is not known.
        origin: where the data is, for messages.
        summary: how much it is, in a few words.
        optimizer: of the run.
        examples: from the updates made and the examples read before, to the examples.
        compile: gives the step.
        tokens: how many tokens the first so many examples have.
        flops_per_token: model FLOPs of a token of them.
        params: weights to begin with; None: drawn ones.
        chat_template: the form of its conversations, Jinja, if it is of such.
    """

    fingerprint: str
    corpus: str | None
    origin: str
    summary: str
    optimizer: optax.GradientTransformation
    examples: Callable[[int, int], Examples]
    compile: Callable[[], TrainStep]
    tokens: Callable[[int], int]
    flops_per_token: int
    params: Callable[[], Params] | None = None
    chat_template: str | None = None


def train(
    config: Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    mesh: Mesh,
    evaluate: Evaluate,
    allow_changes: bool = False,
    hosts: Hosts | None = None,
) -> None:
    """Trains a run on a corpus, as :func:`learn`."""
    hosts = hosts or Hosts()
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def examples(step: int, read: int) -> Examples:
        order = data_order(config, corpus, step, read)
        hosts.first(lambda: note_order(config.run_dir, order))
        return order.windows(corpus)

    lesson = Lesson(
        fingerprint=corpus.manifest.fingerprint,
        corpus=corpus.manifest.fingerprint,
        origin=str(corpus.folder),
        summary=f"{corpus.manifest.splits['train'].tokens:,} training tokens",
        optimizer=optimizer,
        examples=examples,
        compile=lambda: compile_train_step(config, optimizer, mesh, tokenizer.separator_id),
        tokens=lambda examples: examples * config.context_length,
        flops_per_token=flops_per_token(config.model, config.context_length),
    )
    learn(config, lesson, tokenizer, mesh, evaluate, allow_changes, hosts)


def learn(
    config: Config,
    lesson: Lesson,
    tokenizer: Tokenizer,
    mesh: Mesh,
    evaluate: Evaluate,
    allow_changes: bool,
    hosts: Hosts,
) -> None:
    """Trains a run to ``train.steps``, from its newest checkpoint if it has one; a finished run is left as it is.

    Args:
        config: the run, every ``auto`` resolved.
        lesson: what it learns from.
        tokenizer: the one that its data was encoded with.
        mesh: the devices; checked against the configuration.
        evaluate: called every ``evaluation.every`` steps and after the last.
        allow_changes: go on with a run that another configuration or other data made.
        hosts: the processes that train it together.

    Raises:
        UserError: if the run was made by another configuration, or from other data or another tokenizer.
        StalledError: if the hosts see different checkpoints.
        DivergedError: if the loss or the gradient is no longer finite.
        Interrupted: after SIGTERM or Ctrl-C on any host, once a checkpoint is written.
    """
    # ---- run
    check_run(config, allow_changes)
    with Interruption(hosts) as interruption, Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        newest = _newest(checkpoints, hosts)
        begin = newest or 0
        if begin >= config.train.steps:
            return
        hosts.first(lambda: write_config(config))

        # ---- state
        if newest is None:
            params = lesson.params() if lesson.params else None
            state, read = init_state(config, lesson.optimizer, mesh, params), 0
        else:
            files = checkpoints.read_files(begin)
            _check_same_data(files, lesson, tokenizer, allow_changes)
            # The examples read so far are the position in the data, whatever the batch size was.
            state, read = _restored(checkpoints, begin, files, config, lesson.optimizer, mesh), files.examples

        # ---- input
        examples = lesson.examples(begin, read)
        batches = Batches(examples, config.train.batch_size, batch_sharding(mesh), read, config.data.prefetch)

        # ---- log
        # Metrics of steps after the checkpoint, which a killed process wrote, are dropped: those steps are made again.
        first = hosts.process == 0  # of the processes, the one that writes and shows
        with batches, MetricsLog(config, begin, first) as log, Progress(config, begin, first) as progress:
            progress.say(_summary(config, lesson, mesh, begin))

            # ---- step
            step_fn = lesson.compile()
            recorder = Recorder(config, begin, read, log, progress, lesson.tokens, lesson.flops_per_token)

            def save(step: int, state: TrainState) -> None:
                recorder.drain()  # a checkpoint is written only once every step before it is known to be finite
                position = read + (step - begin) * config.train.batch_size
                files = RunFiles(
                    config.to_yaml(),
                    tokenizer.to_bytes(),
                    position,
                    data=lesson.fingerprint,
                    corpus=lesson.corpus,
                    chat_template=lesson.chat_template,
                )
                with jax.transfer_guard("allow"):
                    checkpoints.save(step, state, files)

            # ---- loop
            step = begin
            try:
                with jax.transfer_guard("disallow"):
                    while step < config.train.steps and not interruption.after(step):
                        _, batch = next(batches)
                        state, metrics = step_fn(state, batch)
                        step += 1
                        recorder.add(step, metrics)
                        last = step == config.train.steps
                        if last or step % config.evaluation.every == 0:
                            recorder.drain()
                            with recorder.paused(), jax.transfer_guard("allow"):
                                figures = evaluate(state.params)
                            recorder.evaluation(step, figures)
                        if last or step % config.checkpoint.every == 0:
                            save(step, state)
                if checkpoints.latest() != step:
                    save(step, state)
            except DivergedError as error:
                raise DivergedError(f"{error}\n{_last_sound(checkpoints)}") from None
            checkpoints.wait()

    if interruption.requested and step < config.train.steps:
        raise Interrupted(
            f"{interruption.requested}: stopped after step {step}; its checkpoint is {checkpoints.path(step)}; "
            "run the same command again to go on"
        )


def _newest(checkpoints: Checkpoints, hosts: Hosts) -> int | None:
    """The step of the newest checkpoint; each host looks by itself, and shared storage may show it to some alone."""
    newest = hosts.gather(checkpoints.latest())
    if len(set(newest)) > 1:
        raise StalledError(
            f"{checkpoints.directory}: the hosts do not see the same newest checkpoint (steps {newest}, by host); run "
            "the same command again when their storage shows it to all"
        )
    return newest[0]


def _restored(
    checkpoints: Checkpoints,
    step: int,
    files: RunFiles,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    abstract = abstract_state(config, optimizer, mesh)
    if files.data is None:  # imported: weights alone
        return init_state(config, optimizer, mesh, checkpoints.restore_params(step, abstract.params))
    return checkpoints.restore_state(step, abstract)


def _check_same_data(files: RunFiles, lesson: Lesson, tokenizer: Tokenizer, allow_changes: bool) -> None:
    if files.tokenizer != tokenizer.to_bytes():
        raise UserError(
            f"{lesson.origin}: its tokenizer is not the one that the run's checkpoint was trained with, so its tokens "
            "mean other text; start another run with name=NEW, or prepare with data.tokenizer.file set to the "
            "checkpoint's run/tokenizer.model"
        )
    if files.data not in (None, lesson.fingerprint) and not allow_changes:
        raise UserError(
            f"{lesson.origin}: the run was trained on data with fingerprint {files.data}, this one has "
            f"{lesson.fingerprint}; start another run with name=NEW, or pass --allow-changes to go on with it"
        )


def _last_sound(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    latest = checkpoints.latest()
    if latest is None:
        return "the run has no checkpoint yet, so it starts again from the beginning"
    return f"the last sound checkpoint is {checkpoints.path(latest)}"


def _summary(config: Config, lesson: Lesson, mesh: Mesh, begin: int) -> str:
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{config.run_dir}: {num_parameters(config.model):,} parameters, {config.model.dtype}, "
        f"{mesh.size} {jax.devices()[0].device_kind} device(s) ({shape}), "
        f"{lesson.summary}, "
        f"steps {begin} to {config.train.steps}"
    )
