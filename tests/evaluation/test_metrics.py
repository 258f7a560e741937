import math
import sys

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.metrics import Measured, check_installed, measure


def value(metric, predictions, references):
    return measure(metric, predictions, references, resamples=0).value


def test_metrics_of_classes():
    said, right = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # 3 true, 1 false positive, 1 true, 1 false negative
    assert value("accuracy", said, right) == pytest.approx(100 * 4 / 6)
    assert value("f1", said, right) == pytest.approx(75)
    assert value("matthews", said, right) == pytest.approx(100 * (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_f1_of_more_than_two_classes_is_the_mean_of_all():
    said, right = [0, 1, 2, 2, 0, 1], [0, 1, 2, 1, 2, 1]
    of_classes = [2 / 3, 0.8, 0.5]
    assert measure("f1", said, right, 0, classes=3).value == pytest.approx(100 * np.mean(of_classes))


def test_f1_goes_by_the_classes_of_the_task_and_not_by_those_that_occur():
    said, right = [1, 1, 0, 0], [1, 0, 0, 0]
    assert measure("f1", said, right, 0, classes=2).value == pytest.approx(100 * 2 / 3)
    assert measure("f1", said, right, 0, classes=3).value == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)


def test_correlations():
    said, right = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]
    assert value("spearman", said, right) == pytest.approx(100)
    assert value("spearman", said, right[::-1]) == pytest.approx(-100)
    assert value("pearson", said, right) == pytest.approx(100 * 25 / math.sqrt(5 * 129))


def test_metrics_of_texts():
    said = ["the cat sat on the mat", "a dog runs"]
    right = ["the cat sat on a mat", "a dog ran"]
    assert value("exact_match", [" yes\n", "no", "Yes"], ["yes", "yes ", "yes"]) == pytest.approx(100 / 3)
    assert value("bleu", said, right) == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)
    assert value("chrf", said, right) == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)
    assert value("rouge1", said, right) == pytest.approx(100 * (5 / 6 + 2 / 3) / 2)
    assert value("rouge2", said, right) == pytest.approx(100 * (3 / 5 + 1 / 2) / 2)
    assert value("rougeL", ["b a c"], ["a b c"]) == pytest.approx(100 * 2 / 3)
    assert value("rouge1", ["He walks"], ["he walked"]) == 100  # stemmed, whatever the case


def test_undefined_values_warn_of_nothing():
    assert measure("matthews", [0, 0, 0], [0, 1, 0], 10) == Measured(0, 0, 0)
    assert measure("matthews", [1, 1], [1, 1], 10) == Measured(0, 0, 0)
    assert measure("f1", [0, 0], [0, 0], 10) == Measured(0, 0, 0)
    assert measure("pearson", [1.0, 1.0], [1.0, 2.0], 10) == Measured(None, None, None)
    assert measure("spearman", [1.0, 2.0], [2.0, 2.0], 10) == Measured(None, None, None)
    assert measure("pearson", [1.0], [2.0], 10) == Measured(None, None, None)
    nearly = value("pearson", [1.0, 1.0 + 3e-16, 1.0], [1.0, 2.0, 3.0])
    assert nearly is None or math.isfinite(nearly)
    assert measure("bleu", [""], ["word"], 10) == Measured(0, 0, 0)


def test_an_interval_of_draws():
    said, right = [1] * 80 + [0] * 20, [1] * 100
    found = measure("accuracy", said, right, resamples=4000, seed=3)
    deviation = 100 * math.sqrt(0.8 * 0.2 / 100)
    assert found.value == 80
    assert found.low == pytest.approx(80 - 1.96 * deviation, abs=0.8)
    assert found.high == pytest.approx(80 + 1.96 * deviation, abs=0.8)
    assert measure("accuracy", said, right, 50, seed=3) == measure("accuracy", said, right, 50, seed=3)
    assert measure("accuracy", said, right, 50, seed=3) != measure("accuracy", said, right, 50, seed=4)
    assert measure("accuracy", said, right, 0) == Measured(80, None, None)


WORDS = "a big cat saw the dog".split()
REFERENCES = {
    "accuracy": lambda draw: draw.integers(3, size=30),
    "f1": lambda draw: draw.integers(2, size=30),
    "matthews": lambda draw: draw.integers(3, size=30),
    "pearson": lambda draw: draw.random(30),
    "spearman": lambda draw: draw.integers(5, size=30).astype(float),
    "exact_match": lambda draw: [str(draw.choice(WORDS)) for _ in range(30)],
    "bleu": lambda draw: [" ".join(draw.choice(WORDS, 6)) for _ in range(30)],
    "chrf": lambda draw: [" ".join(draw.choice(WORDS, 6)) for _ in range(30)],
    "rouge1": lambda draw: [" ".join(draw.choice(WORDS, 6)) for _ in range(30)],
    "rouge2": lambda draw: [" ".join(draw.choice(WORDS, 6)) for _ in range(30)],
    "rougeL": lambda draw: [" ".join(draw.choice(WORDS, 6)) for _ in range(30)],
}


@pytest.mark.parametrize("metric", REFERENCES)
def test_intervals_are_those_of_the_metric_of_drawn_examples(metric):
    draw = np.random.default_rng(1)
    said, right = REFERENCES[metric](draw), REFERENCES[metric](draw)
    generator, values = np.random.default_rng(7), []
    for _ in range(20):
        examples = generator.integers(30, size=30)
        values.append(value(metric, [said[n] for n in examples], [right[n] for n in examples]))
    found = measure(metric, said, right, resamples=20, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert found.low <= found.value <= found.high


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_f1_is_that_of_the_last_of_two_classes(pairs):
    said, right = zip(*pairs, strict=True)
    assert value("f1", said, right) == pytest.approx(100 * f1_score(right, said, pos_label=1, zero_division=0.0))


def test_spearman_is_the_correlation_of_ranks():
    draw = np.random.default_rng(0)
    said, right = draw.integers(5, size=40), draw.random(40)
    ranks = scipy.stats.rankdata(said), scipy.stats.rankdata(right)
    assert value("spearman", said, right) == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("metric", "module", "library"),
    [
        ("f1", "sklearn.metrics", "sklearn"),
        ("pearson", "scipy.stats", "scipy"),
        ("bleu", "sacrebleu", "sacrebleu"),
        ("rougeL", "rouge_score.rouge_scorer", "rouge_score"),
    ],
)
def test_a_missing_library_is_named_with_the_extra(monkeypatch, metric, module, library):
    check_installed(["accuracy", metric])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"task\.metrics={metric} needs the library '{library}'.*gpt1-jax\[tasks\]"):
        check_installed(["accuracy", metric])
    check_installed(["accuracy", "exact_match"])
