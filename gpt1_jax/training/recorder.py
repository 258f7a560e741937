"""Reads the metrics of each step when they are long since ready, checks them, and hands them to log and display."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax

from gpt1_jax.config import Config
from gpt1_jax.errors import DivergedError
from gpt1_jax.training.double_check import UNEQUAL, Unequal
from gpt1_jax.training.hardware import peak_flops
from gpt1_jax.training.metrics import MetricsLog, Stopwatch
from gpt1_jax.training.progress import Progress
from gpt1_jax.training.spikes import SpikeRule
from gpt1_jax.training.step import Metrics

# Steps whose metrics are still unread. The host runs this far ahead of the devices, so that they never wait for it,
# and no further, so that a signal is answered and a loss that is not finite is seen soon.
_IN_FLIGHT = 2


class Recorder:
    """Follows the steps of a run from a few steps behind.

    Args:
        config: the run.
        step: batches read before.
        examples: examples read before.
        log: where records are written.
        progress: where they are shown.
        tokens: how many tokens the first so many examples have.
        flops_per_token: model FLOPs of a token of them.
        skipped: of the steps before, how many of the last were skipped, in a row.
        losses: of the steps before, as :attr:`losses` was.

    Attributes:
        skipped: of the steps read, how many of the last were skipped, in a row.
    """

    def __init__(
        self,
        config: Config,
        step: int,
        examples: int,
        log: MetricsLog,
        progress: Progress,
        tokens: Callable[[int], int],
        flops_per_token: int,
        skipped: int = 0,
        losses: Sequence[float] = (),
    ):
        self._config = config
        self._log, self._progress = log, progress
        self._begin, self._examples = step, examples
        self._tokens_of, self._flops_per_token = tokens, flops_per_token
        self._unread: deque[tuple[int, Metrics]] = deque()
        self.skipped, self._spikes = skipped, SpikeRule(config.train.spikes, losses)
        self._clock = Stopwatch(log.seconds)
        self._last_step, self._last_seconds = step, log.seconds
        peak = peak_flops(config)
        self._peak_flops = peak and peak * jax.device_count()

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the steps read, the last losses that the next is judged by."""
        return tuple(self._spikes.losses)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched; reads those of an older one, and raises as drain."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._unread.append((step, metrics))
        while len(self._unread) > _IN_FLIGHT:
            self._read()

    def drain(self) -> None:
        """Reads what is left, and has the log keep it.

        Raises:
            DivergedError: if too many steps in a row were skipped.
            Spike: if a step's loss is one.
            Unequal: if a step that was computed twice has given two results.
        """
        while self._unread:
            self._read()
        self._log.flush()

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes and shows the figures of an evaluation."""
        self._log.write({"step": step, "tokens": self._tokens(step), **figures})
        self._log.flush()
        self._progress.say(
            f"step {step:>7}/{self._config.train.steps} · "
            + " · ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the training time."""
        started = self._clock.seconds()
        yield
        self._clock.leave_out(self._clock.seconds() - started)

    def _tokens(self, step: int) -> int:
        return self._tokens_of(self._examples + (step - self._begin) * self._config.train.batch_size)

    def _read(self) -> None:
        step, metrics = self._unread.popleft()
        found = jax.device_get(metrics)
        if UNEQUAL in found and (unequal_D := found.pop(UNEQUAL)).any():
            raise Unequal(step, unequal_D)
        skipped = bool(found.pop("skipped"))
        figures = {name: float(value) for name, value in found.items()}
        if skipped:
            self._skip(step, figures)
            return
        self.skipped = 0
        self._spikes.judge(step, figures["loss"])
        if step == 1 or step % self._config.train.log_every == 0 or step == self._config.train.steps:
            self._write(step, figures)

    def _skip(self, step: int, figures: dict[str, float]) -> None:
        self.skipped += 1
        what = f"step {step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}"
        # Neither figure goes into the log: JSON has no name for what is not finite.
        self._log.write({"step": step, "tokens": self._tokens(step), "skipped": self.skipped})
        if self.skipped >= self._config.train.max_skipped_steps:
            warmup = "warmup_fraction" if self._config.finetune else "warmup_steps"
            raise DivergedError(
                f"{what}: the run has diverged: {self.skipped} step(s) in a row were skipped "
                f"(train.max_skipped_steps); lower optimizer.learning_rate={self._config.optimizer.learning_rate} or "
                f"raise optimizer.{warmup}"
            )
        self._progress.say(f"{what}: skipped, {self.skipped} in a row")

    def _write(self, step: int, figures: dict[str, float]) -> None:
        seconds = self._clock.seconds()
        tokens = self._tokens(step) - self._tokens(self._last_step)
        rate = tokens / max(seconds - self._last_seconds, 1e-9)
        record = {
            "step": step,
            **figures,
            "tokens": self._tokens(step),
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._peak_flops if self._peak_flops else None,
        }
        self._last_step, self._last_seconds = step, seconds
        self._log.write(record)
        left = self._tokens(self._config.train.steps) - self._tokens(step)
        self._progress.show(record, left / rate)
