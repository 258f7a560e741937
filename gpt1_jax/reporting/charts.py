"""The curves of a report, as PNG pictures. Figures are objects on an Agg canvas: nothing global is touched."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gpt1_jax.reporting.records import Record, RunRecords

XAxis = Literal["step", "tokens"]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")  # Okabe & Ito 2008
_INK, _GRID = "#333333", "#e4e4e4"
_TICKS = (1, 2, 2.5, 5, 10)
_SMOOTHED_FROM = 40  # points; fewer are drawn as they are


@dataclass(frozen=True)
class Reference:
    """A horizontal line at a final figure.

    Attributes:
        label: what it is.
        height: of the line, from the final figures; None: no line.
        below: whether the label stands under the line, clear of curves that stay above it.
    """

    label: str
    height: Callable[[Record], float | None]
    below: bool = False


@dataclass(frozen=True)
class Chart:
    """One quantity over the course of training.

    Attributes:
        file: stem of the picture's name.
        title: what it shows.
        unit: of the y axis.
        key: in the records.
        evaluation: whether it is measured in evaluations, not in steps.
        overlay: key of an evaluation's quantity that is drawn into the same picture.
        references: lines to hold the curves against.
        noisy: whether a smoothed curve is drawn over the raw one.
        log: whether the y axis is logarithmic where values span more than a factor of three.
        from_zero: whether the y axis begins at 0.
        scale: factor from the records' unit to this one.
    """

    file: str
    title: str
    unit: str
    key: str
    evaluation: bool = False
    overlay: str | None = None
    references: tuple[Reference, ...] = ()
    noisy: bool = False
    log: bool = False
    from_zero: bool = False
    scale: float = 1.0


def limit(final: Record) -> float | None:
    """Nats per token that no model goes below, where the final figures tell of a limit."""
    return final["limit_nats"] / final["tokens"] if final.get("limit_nats") else None


def _perplexity_limit(final: Record) -> float | None:
    nats = limit(final)
    return None if nats is None else math.exp(nats)


def _byte_limit(final: Record) -> float | None:
    return final["limit_nats"] / math.log(2) / final["bytes"] if final.get("limit_nats") else None


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "nats per token",
        "loss",
        overlay="validation_loss",
        references=(Reference("limit", limit, below=True),),
        noisy=True,
    ),
    Chart(
        "perplexity",
        "Validation perplexity",
        "perplexity per token",
        "validation_perplexity",
        True,
        references=(Reference("limit", _perplexity_limit, below=True),),
        log=True,
    ),
    Chart(
        "pseudo_perplexity",
        "Validation pseudo-perplexity of a masked model",
        "pseudo-perplexity per token",
        "validation_pseudo_perplexity",
        True,
        log=True,
    ),
    Chart(
        "bits_per_byte",
        "Validation bits per byte",
        "bits per byte",
        "validation_bits_per_byte",
        True,
        references=(
            Reference("xz", lambda final: final.get("xz_bits_per_byte")),
            Reference("limit", _byte_limit, below=True),
        ),
    ),
    Chart("learning_rate", "Learning rate", "learning rate", "learning_rate"),
    Chart("grad_norm", "Gradient norm, before clipping", "global norm", "grad_norm", noisy=True, log=True),
    Chart("tokens_per_second", "Throughput", "tokens per second", "tokens_per_second", noisy=True, from_zero=True),
    Chart("mfu", "Model FLOPs utilisation", "% of the devices' peak", "mfu", noisy=True, from_zero=True, scale=100),
)


def draw(chart: Chart, runs: Sequence[RunRecords], x_axis: XAxis) -> bytes | None:
    """Draws a chart of several runs.

    Args:
        chart: what to draw.
        runs: in the order of the legend.
        x_axis: ``step`` or ``tokens``.

    Returns:
        The picture as PNG, or None if no run has the quantity.
    """
    curves = [_curve(run.evaluations if chart.evaluation else run.steps, x_axis, chart.key) for run in runs]
    if not any(len(x) for x, _ in curves):
        return None
    figure = Figure(figsize=(6.4, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = []  # the values that the limits of the y axis must hold
    for colour, run, (x, y) in zip(cycle(_COLOURS), runs, curves, strict=False):
        if not len(x):
            continue
        y = y * chart.scale
        style = "o-" if chart.evaluation or len(x) == 1 else "-"
        if chart.noisy and len(x) >= _SMOOTHED_FROM:
            axes.plot(x, y, "-", color=colour, alpha=0.25, linewidth=0.8)
            y = smoothed(y)
        axes.plot(x, y, style, color=colour, linewidth=1.6, markersize=3.5, label=run.name)
        shown.append(y)
        if chart.overlay:
            x, y = _curve(run.evaluations, x_axis, chart.overlay)
            axes.plot(x, y, "o--", color=colour, linewidth=1.2, markersize=3.5, label=f"{run.name}, validation")
            shown.append(y)
    for reference in chart.references:
        heights = dict.fromkeys(reference.height(run.final) for run in runs)
        values = [value for value in heights if value is not None]
        for value in values:
            axes.axhline(value, color=_INK, linewidth=1.2, linestyle=":")
            axes.annotate(
                reference.label,
                (0.99, value),
                xytext=(0, -11 if reference.below else 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=_INK,
            )
        shown.append(np.array(values, np.float64))
    _finish(axes, chart, x_axis, np.concatenate(shown))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of the points around each, a fiftieth of them all; of those that there are at the ends."""
    window = np.ones(2 * max(1, len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def short(value: float) -> str:
    """A number as 1.5K, 20M or 3.1B; small ones in three digits."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _curve(records: Sequence[Record], x_axis: XAxis, key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record[x_axis], record[key]) for record in records if record.get(key) is not None]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x, y


def _finish(axes: Axes, chart: Chart, x_axis: XAxis, shown: np.ndarray) -> None:
    """Scales, labels and colours."""
    low, high = _limits(shown)
    if chart.log and low > 0 and high > 3 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = 0.0 if chart.from_zero else low - margin
        axes.set_ylim(max(bottom, 0.0) if low >= 0 else bottom, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlim(left=0)
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_xlabel("tokens" if x_axis == "tokens" else "steps", fontsize=10, color=_INK)
    axes.set_ylabel(chart.unit, fontsize=10, color=_INK)
    axes.tick_params(labelsize=9, colors=_INK, which="both", length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The range of the values; a few far above the others (the first steps, a spike) may leave the picture."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    most = float(np.quantile(values, 0.99))
    if high - low > 3 * (most - low) > 0:
        high = low + 1.5 * (most - low)
    return low, high if math.isfinite(high) else most
