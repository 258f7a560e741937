"""Metrics of tasks, by well-known libraries, with a 95 % interval by resampling the examples.

All are in per cent, as in the paper's tables. The libraries are an extra (``tasks``), imported when used; ``accuracy``
and ``exact_match`` need none.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt1_jax.errors import UserError
from gpt1_jax.task_config import Metric

_INTERVAL = (2.5, 97.5)  # percentiles


class Measured(NamedTuple):
    """A metric in per cent, and the ends of its interval; None where it is undefined, or none was asked for."""

    value: float | None
    low: float | None
    high: float | None


# A value of how often each example counts, int64, shape (examples,).
_Score = Callable[[np.ndarray], float | None]


def check_installed(metrics: Iterable[Metric]) -> None:
    """Imports what metrics need, so that a library that is not there is known before long work.

    Raises:
        UserError: if one cannot be imported.
    """
    for metric in metrics:
        library = _METRICS[metric][1]
        if library is None:
            continue
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UserError(
                f"task.metrics={metric} needs the library '{library.partition('.')[0]}', which cannot be imported "
                f"({error}); install it with: pip install 'gpt1-jax[tasks]'"
            ) from None


def measure(
    metric: Metric,
    predictions: Sequence[Any],
    references: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
    *,
    classes: int = 2,
) -> Measured:
    """A metric of predictions against references, and its percentile bootstrap interval (Efron 1979).

    Metrics of classes compare their numbers. ``f1`` is that of the last class where the task has two, and else the
    mean of those of the classes that occur. ``matthews`` is 0 where it is undefined, because all predictions or all
    references are of one class; ``pearson`` and ``spearman`` are None where all are one number. ``exact_match`` leaves
    out surrounding white space. ``bleu`` and ``chrf`` are those of the whole corpus, with sacrebleu's defaults;
    ``rouge`` is the mean F1 of the examples, with stemming.

    Args:
        metric: its name.
        predictions: classes, numbers or texts, one an example.
        references: what they should be.
        resamples: sets of as many examples, drawn with replacement, whose values give the interval; 0: no interval.
        seed: of the draws. Equal seeds draw equal examples, whatever the metric.
        classes: of the task, of which some may not occur; only ``f1`` asks for them.
    """
    assert len(predictions) == len(references) > 0
    examples = len(references)
    options = {"classes": classes} if metric == "f1" else {}
    score = _METRICS[metric][0](predictions, references, **options)
    value = score(np.ones(examples, np.int64))
    if value is None or not resamples:
        return Measured(value, None, None)
    generator = np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(examples, size=examples), minlength=examples) for _ in range(resamples))
    values = [found for counts in drawn if (found := score(counts)) is not None]
    low, high = np.percentile(values, _INTERVAL).tolist() if values else (None, None)
    return Measured(value, low, high)


def _mean(scores: Sequence[float]) -> _Score:
    each = 100.0 * np.asarray(scores, np.float64)
    return lambda counts: float(counts @ each / counts.sum())


def _accuracy(predictions: Sequence[int], references: Sequence[int]) -> _Score:
    return _mean([said == right for said, right in zip(predictions, references, strict=True)])


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> _Score:
    return _mean([said.strip() == right.strip() for said, right in zip(predictions, references, strict=True)])


def _f1(predictions: Sequence[int], references: Sequence[int], classes: int) -> _Score:
    average = "binary" if classes == 2 else "macro"
    return _of_classes("f1_score", average=average, zero_division=0.0)(predictions, references)


def _of_classes(name: str, **options: Any) -> Callable[[Sequence[int], Sequence[int]], _Score]:
    """A metric of scikit-learn, of the different pairs of prediction and reference, weighted by their counts."""

    def prepare(predictions: Sequence[int], references: Sequence[int]) -> _Score:
        metric = getattr(importlib.import_module("sklearn.metrics"), name)
        pairs, pair_of = np.unique(np.stack([predictions, references]), axis=1, return_inverse=True)

        def score(counts: np.ndarray) -> float:
            weights = np.bincount(pair_of, weights=counts)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where there is one class alone
                return 100.0 * float(metric(pairs[1], pairs[0], sample_weight=weights, **options))

        return score

    return prepare


def _correlation(name: str) -> Callable[[Sequence[float], Sequence[float]], _Score]:
    def prepare(predictions: Sequence[float], references: Sequence[float]) -> _Score:
        correlate = getattr(importlib.import_module("scipy.stats"), name)
        pairs = np.stack([predictions, references]).astype(np.float64)

        def score(counts: np.ndarray) -> float | None:
            said, right = np.repeat(pairs, counts, axis=1)
            if np.ptp(said) == 0 or np.ptp(right) == 0:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where all are nearly one number
                found = float(correlate(said, right).statistic)
            return 100.0 * found if math.isfinite(found) else None

        return score

    return prepare


def _of_corpus(name: str) -> Callable[[Sequence[str], Sequence[str]], _Score]:
    """A metric of sacrebleu, of the sums of what it counts in each example."""

    def prepare(predictions: Sequence[str], references: Sequence[str]) -> _Score:
        library = importlib.import_module("sacrebleu")
        metric = library.BLEU(force=True) if name == "BLEU" else library.CHRF()  # force: no advice on tokenization
        statistics = np.asarray(metric._extract_corpus_statistics(predictions, [references]), np.int64)
        return lambda counts: float(metric._compute_score_from_stats((counts @ statistics).tolist()).score)

    return prepare


def _rouge(name: str) -> Callable[[Sequence[str], Sequence[str]], _Score]:
    def prepare(predictions: Sequence[str], references: Sequence[str]) -> _Score:
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)
        pairs = zip(predictions, references, strict=True)
        return _mean([scorer.score(right, said)[name].fmeasure for said, right in pairs])

    return prepare


# How a metric is prepared for predictions and references, and the module that it needs.
_METRICS: dict[Metric, tuple[Callable[..., _Score], str | None]] = {
    "accuracy": (_accuracy, None),
    "f1": (_f1, "sklearn.metrics"),
    "matthews": (_of_classes("matthews_corrcoef"), "sklearn.metrics"),
    "pearson": (_correlation("pearsonr"), "scipy.stats"),
    "spearman": (_correlation("spearmanr"), "scipy.stats"),
    "exact_match": (_exact_match, None),
    "bleu": (_of_corpus("BLEU"), "sacrebleu"),
    "chrf": (_of_corpus("CHRF"), "sacrebleu"),
    "rouge1": (_rouge("rouge1"), "rouge_score.rouge_scorer"),
    "rouge2": (_rouge("rouge2"), "rouge_score.rouge_scorer"),
    "rougeL": (_rouge("rougeL"), "rouge_score.rouge_scorer"),
}
