"""What a run shows while it goes on."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import rich.console
import rich.progress

from gpt1_jax.config import Config


class Progress:
    """A bar on a terminal, plain lines elsewhere; both on standard error.

    Args:
        config: the run.
        step: the step that the run goes on from.
        shows: whether to show anything; of the processes of a run one does.
    """

    def __init__(self, config: Config, step: int, shows: bool = True):
        self._shows = shows
        self._console = rich.console.Console(stderr=True)
        self._steps = config.train.steps
        mode = config.logging.progress
        self._bar: rich.progress.Progress | None = None
        if shows and (mode == "bar" or (mode == "auto" and sys.stderr.isatty())):
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=self._steps, completed=step, figures="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shows:
            print(line, file=sys.stderr, flush=True)

    def show(self, record: Mapping[str, Any], seconds_left: float) -> None:
        """Shows a logged step, and the time that the rest of the run will take at its rate."""
        figures = f"loss {record['loss']:.4f} · {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            figures += f" · MFU {record['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], figures=figures)
        else:
            self.say(f"step {record['step']:>7}/{self._steps} · {figures} · {duration(seconds_left)} left")


def duration(seconds: float) -> str:
    """Seconds as 4:05, or as 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
