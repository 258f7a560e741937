"""The training loop."""

import contextlib
import dataclasses
import functools
import platform
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
from gpt1_jax.training.double_check import Unequal, check_repeatable, double_checked
from gpt1_jax.training.history import RemainingWindows, data_order, note_order
from gpt1_jax.training.hosts import Hosts, Stopped
from gpt1_jax.training.metrics import METRICS, MetricsLog, read_records
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.progress import Progress
from gpt1_jax.training.recorder import Recorder
from gpt1_jax.training.rewinds import left_out, rewind
from gpt1_jax.training.run import check_run, write_config
from gpt1_jax.training.space import check_checkpoint_room
from gpt1_jax.training.spikes import Spike
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
        without = hosts.first(lambda: left_out(config, corpus.manifest.fingerprint, step))
        order = data_order(config, corpus, step, read, without)
        hosts.first(lambda: note_order(config.run_dir, order))
        return RemainingWindows(order, corpus)

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
        DamagedError: if the run has checkpoints and none is sound, or the last is not what was written.
        DivergedError: if the loss or the gradient is no longer finite, spikes do not end, or a step that is computed
            twice gives two results.
        Interrupted: after SIGTERM or Ctrl-C on any host, once a checkpoint is written.
    """
    check_repeatable(config, mesh)
    lesson = dataclasses.replace(lesson, compile=functools.cache(lesson.compile))  # once, however often it goes back
    while not _learn(config, lesson, tokenizer, mesh, evaluate, allow_changes, hosts):
        pass


def _learn(
    config: Config,
    lesson: Lesson,
    tokenizer: Tokenizer,
    mesh: Mesh,
    evaluate: Evaluate,
    allow_changes: bool,
    hosts: Hosts,
) -> bool:
    """Trains from the newest checkpoint on; False if it has gone back to before a spike, and is to be called again."""
    # ---- run
    deadlines = config.deadlines
    hosts.expect("reading the checkpoint, or drawing weights", deadlines.start)
    with Checkpoints(config.run_dir, config.checkpoint, hosts) as checkpoints:
        saved = newest = _newest(checkpoints, hosts)
        check_run(config, allow_changes)  # against the checkpoint that it goes on from
        begin = newest or 0
        # One that a signal has ended is made up for.
        evaluates = hosts.first(lambda: _lacks_evaluation(config, begin))
        if begin >= config.train.steps and not evaluates:
            return True
        layout = abstract_state(config, lesson.optimizer, mesh)
        hosts.first(lambda: check_checkpoint_room(config, layout, begin))
        state, read, seen = _state(config, lesson, tokenizer, mesh, layout, checkpoints, newest, allow_changes)
        hosts.first(lambda: write_config(config))  # what is refused has left the run as it was

        # ---- input
        examples = lesson.examples(begin, read)
        batches = Batches(examples, config.train.batch_size, batch_sharding(mesh), read, config.data.prefetch)

        # ---- log
        # Metrics of steps after the checkpoint, which a killed process wrote, are dropped: those steps are made again.
        first = hosts.process == 0  # of the processes, the one that writes and shows
        with batches, MetricsLog(config, begin, first) as log, Progress(config, begin, first) as progress:
            progress.say(_summary(config, lesson, mesh, begin))

            # ---- step
            hosts.expect("compiling", deadlines.start)
            step_fn = double_checked(lesson.compile(), config, begin, layout, mesh)
            recorder = Recorder(config, begin, read, log, progress, lesson.tokens, lesson.flops_per_token, *seen)

            def save(step: int, state: TrainState) -> None:
                nonlocal saved
                hosts.expect(f"saving step {step}", deadlines.save)
                recorder.drain()  # a checkpoint is written only once every step before it is known to be sound
                position = read + (step - begin) * config.train.batch_size
                files = RunFiles(
                    config.to_yaml(),
                    tokenizer.to_bytes(),
                    position,
                    data=lesson.fingerprint,
                    corpus=lesson.corpus,
                    chat_template=lesson.chat_template,
                    skipped=recorder.skipped,
                    losses=recorder.losses,
                )
                with jax.transfer_guard("allow"):
                    checkpoints.save(step, state, files)
                saved = step

            # ---- loop
            step = begin
            with hosts.training(), jax.transfer_guard("disallow"):
                try:
                    with contextlib.suppress(Stopped):  # an evaluation is made up for when the run goes on
                        if evaluates:
                            _record(recorder, step, evaluate, state)
                        while step < config.train.steps and not hosts.due():
                            hosts.expect(f"reading the batch of step {step + 1}", deadlines.step)
                            _, batch = next(batches)
                            hosts.expect(f"making step {step + 1}", deadlines.step)
                            state, metrics = step_fn(state, batch)
                            step += 1
                            checkpoints.raise_failure()
                            recorder.add(step, metrics)
                            last = step == config.train.steps
                            if last or step % config.evaluation.every == 0:
                                _record(recorder, step, evaluate, state)
                            if last or step % config.checkpoint.every == 0:
                                save(step, state)
                    if saved != step:
                        save(step, state)
                    hosts.expect(f"writing the checkpoint of step {step}, and reading it back", deadlines.save)
                    checkpoints.confirm(step)
                except (DivergedError, Spike, Unequal) as fault:
                    _go_back(fault, config, lesson, begin, read, checkpoints, mesh, hosts, progress)
                    return False

    _check_stopped(hosts, step, checkpoints)
    return True


def _record(recorder: Recorder, step: int, evaluate: Evaluate, state: TrainState) -> None:
    recorder.drain()
    with recorder.paused(), jax.transfer_guard("allow"):
        figures = evaluate(state.params)
    recorder.evaluation(step, figures)


def _check_stopped(hosts: Hosts, step: int, checkpoints: Checkpoints) -> None:
    if hosts.stopping:
        raise Interrupted(
            f"{hosts.stopping}: stopped after step {step}; its checkpoint is {checkpoints.path(step)}; "
            "run the same command again to go on"
        )


def _lacks_evaluation(config: Config, step: int) -> bool:
    """Whether the log of a run that goes on from a step has no figures of it, and should have them."""
    if step == 0 or (step % config.evaluation.every and step != config.train.steps) or step > config.train.steps:
        return False
    records = read_records(config.run_dir / METRICS, "step")
    of_steps = {"loss", "skipped"}
    return bool(records) and not any(record["step"] == step and not of_steps & record.keys() for record in records)


def _newest(checkpoints: Checkpoints, hosts: Hosts) -> int | None:
    """The step of the newest sound checkpoint; shared storage may show one to some hosts alone."""
    newest = hosts.gather(checkpoints.latest())
    if len(set(newest)) > 1:
        raise StalledError(
            f"{checkpoints.directory}: the hosts do not see the same newest checkpoint (steps {newest}, by host); run "
            "the same command again when their storage shows it to all"
        )
    return checkpoints.newest_sound()


def _state(
    config: Config,
    lesson: Lesson,
    tokenizer: Tokenizer,
    mesh: Mesh,
    layout: TrainState,
    checkpoints: Checkpoints,
    step: int | None,
    allow_changes: bool,
) -> tuple[TrainState, int, tuple[int, tuple[float, ...]]]:
    """The state to go on from, the examples read so far, and how the last steps went; ``step``: None, anew."""
    if step is None:
        params = lesson.params() if lesson.params else None
        return init_state(config, lesson.optimizer, mesh, params), 0, (0, ())
    files = checkpoints.read_files(step)
    _check_same_data(files, lesson, tokenizer, allow_changes)
    if files.data is None:  # imported: weights alone
        state = init_state(config, lesson.optimizer, mesh, checkpoints.restore_params(step, layout.params))
    else:
        state = checkpoints.restore_state(step, layout)
    # The examples read so far are the position in the data, whatever the batch size was.
    return state, files.examples, (files.skipped, files.losses)


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


def _go_back(
    fault: DivergedError | Spike | Unequal,
    config: Config,
    lesson: Lesson,
    begin: int,
    read: int,
    checkpoints: Checkpoints,
    mesh: Mesh,
    hosts: Hosts,
    progress: Progress,
) -> None:
    """Goes back to before a spike; anything else that goes wrong, and spikes without end, are the end of the run."""
    hosts.expect("reading the checkpoints, to go back to a sound one", config.deadlines.start)
    if isinstance(fault, Unequal):
        raise DivergedError(fault.blame(mesh, hosts.gather(platform.node()))) from None
    try:
        if isinstance(fault, DivergedError):
            raise fault
        made = rewind(config, lesson.fingerprint, fault, begin, read, checkpoints, hosts)
    except DivergedError as error:
        raise DivergedError(f"{error}\n{_last_sound(checkpoints)}") from None
    progress.say(f"{fault}: a spike; back to step {made.step}, and on without the batches around it")


def _last_sound(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    # Where steps were being skipped already, the weights may have been what was wrong.
    newest = checkpoints.newest_files(lambda files: not files.skipped)
    if newest is None:
        return "the run has no sound checkpoint yet, so start it again from the beginning"
    return f"the last sound checkpoint is {checkpoints.path(newest[0])}"


def _summary(config: Config, lesson: Lesson, mesh: Mesh, begin: int) -> str:
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{config.run_dir}: {num_parameters(config.model):,} parameters, {config.model.dtype}, "
        f"{mesh.size} {jax.devices()[0].device_kind} device(s) ({shape}), "
        f"{lesson.summary}, "
        f"steps {begin} to {config.train.steps}"
    )
