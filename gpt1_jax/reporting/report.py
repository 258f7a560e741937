"""The report of one or several runs: one HTML page that needs nothing beside it, and its pictures as PNG files."""

import base64
import dataclasses
import statistics
from collections.abc import Sequence

import jinja2
from etils import epath
from flax.traverse_util import flatten_dict

from gpt1_jax.data.storage import AnyPath, make_folder, write_atomically
from gpt1_jax.errors import UserError
from gpt1_jax.model.transformer import num_parameters
from gpt1_jax.reporting.charts import CHARTS, XAxis, draw, limit, short
from gpt1_jax.reporting.records import Record, RunRecords, read_runs

_X_AXES: tuple[XAxis, ...] = ("step", "tokens")


def write_report(runs: Sequence[AnyPath], out: AnyPath | None = None, final: Record | None = None) -> epath.Path:
    """Writes the report of runs; several share every picture.

    Args:
        runs: their folders, local or in a bucket.
        out: the page; None: ``report.html`` in the run's folder, or in the folder above if there are several. The
            pictures go into a folder beside it, of the same name without ``.html``.
        final: the runs' final figures, where they are not on disk yet.

    Returns:
        The page's path.

    Raises:
        UserError: if a folder holds no run or no metrics yet, or the page's name does not end in ``.html``.
        DamagedError: if a file is not what training writes.
    """
    folders = [epath.Path(run) for run in runs]
    records = read_runs(folders)
    page = epath.Path(out) if out else (folders[0] if len(runs) == 1 else folders[0].parent) / "report.html"
    if page.suffix != ".html":
        raise UserError(f"{page}: the name of a page must end in .html, such as {page.name}.html")
    if final is not None:
        records = [dataclasses.replace(record, final=final) for record in records]
    folder = page.with_suffix("")
    make_folder(folder)
    charts = []
    for chart in CHARTS:
        inline = {}
        for x_axis in _X_AXES:
            file = folder / f"{chart.file}_by_{x_axis}.png"
            picture = draw(chart, records, x_axis)
            if picture is None:
                file.unlink(missing_ok=True)  # of an earlier report
            else:
                write_atomically(file, picture)
                inline[x_axis] = base64.b64encode(picture).decode()
        if inline:
            charts.append({"title": chart.title, "pictures": inline})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpt1_jax.reporting", "."),
        autoescape=True,  # what a model writes may look like HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        title=" · ".join(record.name for record in records),
        runs=records,
        headline=_headline(records),
        charts=charts,
        differences=_differences(records),
    )
    write_atomically(page, html.encode())
    return page


def _headline(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """The rows of the first table: what is measured, and its value for each run; rows with no value are left out."""
    columns = [_figures(run) | _of_task(run.results) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name) or "–" for column in columns]) for name in names]  # noqa: RUF001
    return [row for row in rows if any(value != "–" for value in row[1])]  # noqa: RUF001


def _figures(run: RunRecords) -> dict[str, str | None]:
    last, evaluation = run.steps[-1], run.evaluations[-1] if run.evaluations else {}
    # The final evaluation reads the whole split; those while training may stop at evaluation.max_tokens.
    final = run.final if run.final.get("split") == "validation" else {}
    rates = [step["tokens_per_second"] for step in run.steps if step.get("tokens_per_second")]
    shares = [100 * step["mfu"] for step in run.steps if step.get("mfu")]
    # Counting does not depend on the dtype, which a configuration may leave open.
    model = run.config.model.model_copy(update={"dtype": "float32"})
    return {
        "Parameters": f"{num_parameters(model):,}",
        "Steps": f"{last['step']:,} of {run.config.train.steps:,}",
        "Tokens seen": f"{last['tokens']:,}",
        "Training loss, nats per token": _shown(last["loss"], ".3f"),
        "Validation loss, nats per token": _shown(evaluation.get("validation_loss"), ".3f"),
        "Validation perplexity, per token": _shown(
            final.get("perplexity", evaluation.get("validation_perplexity")), ",.2f"
        ),
        "Validation pseudo-perplexity, per token": _shown(
            final.get("pseudo_perplexity", evaluation.get("validation_pseudo_perplexity")), ",.2f"
        ),
        "Validation perplexity, per word": _shown(final.get("word_perplexity"), ",.2f"),
        "Validation bits per byte": _shown(
            final.get("bits_per_byte", evaluation.get("validation_bits_per_byte")), ".3f"
        ),
        "the same of xz": _shown(final.get("xz_bits_per_byte"), ".3f"),
        "Limit of the validation loss, nats per token": _shown(limit(final), ".4f"),
        "Excess over the limit": _shown(final.get("excess_percent"), ".1f", " %"),
        "Excess over the limit, nats per document": _shown(final.get("excess_nats_per_document"), ",.2f"),
        "Tokens per second, median": short(statistics.median(rates)) if rates else None,
        "Model FLOPs utilisation, median": _shown(statistics.median(shares) if shares else None, ".1f", " %"),
        "Training time": _duration(last.get("seconds")),
    }


def _of_task(results: Record) -> dict[str, str | None]:
    """What a fine-tuned run is worth."""
    if not results:
        return {}
    found: dict[str, str | None] = {"Task": results["task"], "Begun with": results["base"]}
    found["Best epoch"] = f"{results['epoch']} of {len(results['epochs'])}"
    for split, metrics in results["figures"].items():
        for metric, figure in metrics.items():
            low, high = _shown(figure["low"], ".2f"), _shown(figure["high"], ".2f")
            interval = f" ({low} to {high})" if low and high else ""
            found[f"{split.capitalize()} {metric}, per cent"] = _shown(figure["value"], ".2f", interval)
    if perplexity := results["perplexity"]:
        found["Perplexity before"] = _shown(perplexity["before"], ",.2f")
        found["Perplexity after"] = _shown(perplexity["after"], ",.2f")
    return found


def _shown(value: float | None, spec: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{spec}}{unit}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _differences(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """The keys of the configuration in which the runs differ, and their values."""
    columns = [flatten_dict(run.config.model_dump(mode="json"), sep=".") for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [str(column.get(key, "")) for column in columns]) for key in keys if key != "name"]
    return [row for row in rows if len(set(row[1])) > 1]
