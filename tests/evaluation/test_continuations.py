import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainConfig
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation import continuations
from gpt1_jax.evaluation.continuations import Continuation, Predictor, encode_behind
from gpt1_jax.model.transformer import bind
from gpt1_jax.training.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=97, context_length=40, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32", loss_chunk=7
)
SEPARATOR, STD = 3, 0.2
ASKED = (1, 6, 2, 7, 1, 5, 3, 4, 2, 6, 7)  # lengths of contexts, asked on eight devices too


def config(batch_size: int = 4, windows: str = "contiguous", **train: int) -> Config:
    evaluation = EvaluationConfig(batch_size=batch_size, sample_tokens=4)
    return Config(model=MODEL, evaluation=evaluation, data=DataConfig(windows=windows), train=TrainConfig(**train))


@pytest.fixture(scope="module")
def params(draw_params):
    return draw_params(MODEL, STD)


@cache
def predictor(batch_size: int = 4, context_length: int | None = None) -> Predictor:
    settings = config(batch_size, context_length=context_length) if context_length else config(batch_size)
    return Predictor(settings, make_mesh(MeshConfig(), jax.devices()[:1]), SEPARATOR)


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([length, seed]).integers(4, 97, length, dtype=np.int32)


@partial(jax.jit, static_argnums=2)
def _logits(params, tokens_BT, config):
    model = bind(config, params)
    return model.logits(model(tokens_BT)[0])


def naive(params, read: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats of the last tokens, and whether they are the likeliest, from what is read to predict them, by NumPy."""
    padded = np.zeros((1, MODEL.context_length), np.int32)
    padded[0, : len(read)] = read
    logits = np.asarray(_logits(params, padded, MODEL), np.float64)[0, len(read) - len(tokens) : len(read)]
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens)), tokens]
    return nats, logits.argmax(-1) == tokens


def check(params, found, read, tokens):
    nats, greedy = naive(params, read, tokens)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5, atol=1e-5)
    assert found.greedy.tolist() == greedy.tolist()
    np.testing.assert_allclose(found.log_probability, -nats.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.mean_log_probability, -nats.mean(), rtol=1e-5)


def test_predictions_are_those_of_the_logits_in_the_order_asked_for(params):
    lengths = [(1, 1), (9, 30), (2, 14), (30, 10), (1, 16), (16, 1), (5, 2), (12, 5), (39, 1)]
    asked = [Continuation(ids(before, 1), ids(after, 2)) for before, after in lengths]
    found = predictor()(params, asked)
    assert len(found) == len(asked)
    for (context, tokens), prediction in zip(asked, found, strict=True):
        check(params, prediction, np.concatenate([context, tokens])[:-1], tokens)


def greedy_tokens(params, context: np.ndarray, count: int) -> np.ndarray:
    read = context.tolist()
    for _ in range(count):
        padded = np.zeros((1, MODEL.context_length), np.int32)
        padded[0, : len(read)] = read
        read.append(int(np.asarray(_logits(params, padded, MODEL))[0, len(read) - 1].argmax()))
    return np.array(read[len(context) :], np.int32)


def test_greedy_tokens_are_known_as_such(params):
    context = ids(6)
    likeliest = greedy_tokens(params, context, 4)
    other = likeliest.copy()
    other[2] = (other[2] + 1) % 97
    found, changed = predictor()(params, [Continuation(context, likeliest), Continuation(context, other)])
    assert found.greedy.tolist() == [True] * 4
    assert changed.greedy[:3].tolist() == [True, True, False]


def test_a_long_context_is_cut_from_the_left(params):
    context, tokens = ids(60), ids(8)
    (found,) = predictor()(params, [Continuation(context, tokens)])
    check(params, found, np.concatenate([context, tokens])[-41:-1], tokens)


def test_the_context_is_that_of_the_training(params):
    context, tokens = ids(20), ids(5)
    (found,) = predictor(context_length=12)(params, [Continuation(context, tokens)])
    check(params, found, np.concatenate([context, tokens])[-13:-1], tokens)


def test_a_long_continuation_is_predicted_in_stretches_each_behind_all_that_fits(params):
    tokens = ids(100)
    (found,) = predictor()(params, [Continuation(np.array([SEPARATOR]), tokens)])
    joined = np.append(np.int32(SEPARATOR), tokens)
    stretches = [(joined[:40], 0, 40), (joined[40:80], 40, 80), (joined[60:100], 80, 100)]
    for read, begin, end in stretches:
        nats, greedy = naive(params, read, tokens[begin:end])
        np.testing.assert_allclose(found.nats[begin:end], nats, rtol=1e-5, atol=1e-5)
        assert found.greedy[begin:end].tolist() == greedy.tolist()
    assert len(found.nats) == 100


def test_few_shapes_are_compiled_and_equal_sequences_are_predicted_once(params, monkeypatch):
    traced = []
    monkeypatch.setattr(continuations, "bind", lambda *args: traced.append(args) or bind(*args))
    settings = config()
    settings = settings.model_copy(update={"model": MODEL.model_copy(update={"loss_chunk": 9})})  # not compiled before
    fresh = Predictor(settings, make_mesh(MeshConfig(), jax.devices()[:1]), SEPARATOR)
    rows: list[int] = []
    monkeypatch.setattr(fresh, "_predict", lambda *args, f=fresh._predict: rows.append(args[1].shape) or f(*args))
    same = [Continuation(ids(3, 5), ids(4, 6))] * 9
    cut_elsewhere = [Continuation(np.concatenate([ids(3, 5), ids(4, 6)[:2]]), ids(4, 6)[2:])]
    found = fresh(params, same + cut_elsewhere)
    assert rows == [(4, 17)]
    np.testing.assert_array_equal(found[0].nats[2:], found[-1].nats)
    fresh(params, [Continuation(ids(1), ids(length)) for length in range(1, 60)])
    assert len(traced) == 3  # of 16, 32 and all 40 positions


def test_nothing_to_predict_is_no_work(params):
    assert predictor()(params, []) == []


def test_packed_windows_hide_what_is_before_a_separator(params):
    packed = Predictor(config(windows="packed"), make_mesh(MeshConfig(), jax.devices()[:1]), SEPARATOR)
    alone, behind = np.append(np.int32(SEPARATOR), ids(4)), np.concatenate([ids(7), [SEPARATOR], ids(4)])
    first, second = packed(params, [Continuation(one.astype(np.int32), ids(5)) for one in (alone, behind)])
    np.testing.assert_allclose(first.nats, second.nats, rtol=1e-5)
    check(params, first, np.concatenate([alone, ids(5)])[:-1], ids(5))


def test_a_masked_model_is_refused():
    settings = config()
    masked = settings.model_copy(update={"model": MODEL.model_copy(update={"objective": "masked"})})
    with pytest.raises(UserError, match="gives a text no probability"):
        Predictor(masked, make_mesh(MeshConfig(), jax.devices()[:1]), SEPARATOR)


class Letters:
    """Pairs of letters are tokens, from the left; so are a space with the letter behind it, and a single letter."""

    separator_id = SEPARATOR

    def encode(self, text: str) -> np.ndarray:
        pairs = [text[begin : begin + 2] for begin in range(0, len(text), 2)]
        return np.array([sum(map(ord, pair)) for pair in pairs], np.int32)


def test_a_text_is_cut_where_its_context_alone_ends():
    def cut(context: str, text: str) -> tuple[list[int], list[int]]:
        found = encode_behind(Letters(), context, text)
        return found.context.tolist(), found.tokens.tolist()

    ab, cd, c, space_e, e = (sum(map(ord, text)) for text in ("ab", "cd", "c", " e", "e"))
    assert cut("abcd", " e") == ([SEPARATOR, ab, cd], [space_e])
    assert cut("abcd ", "e") == ([SEPARATOR, ab, cd], [space_e])
    assert cut("", "abcd") == ([SEPARATOR], [ab, cd])
    assert cut("abc", "d") == ([SEPARATOR, ab], [cd])  # a token across the border is the text's, if it is all there is
    assert cut("abc", "de") == ([SEPARATOR, ab, cd], [e])
    assert c != cd


_ON_MESH = """
import json
import jax
import numpy as np
from gpt1_jax.config import MeshConfig
from gpt1_jax.evaluation.continuations import Continuation, Predictor
from gpt1_jax.model.sharding import tree_shardings
from gpt1_jax.model.transformer import parameter_axes
from gpt1_jax.training.mesh import make_mesh
from conftest import random_params
from test_continuations import ASKED, MODEL, SEPARATOR, STD, config, ids

asked = [Continuation(ids(length), ids(length + 1)) for length in ASKED]
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
params = random_params(MODEL, STD)
placed = jax.device_put(params, tree_shardings(mesh, parameter_axes(MODEL), params))
found = Predictor(config(6), mesh, SEPARATOR)(placed, asked)  # 8 rows: a multiple of the 4 that a batch is split over
print(json.dumps([[one.nats.tolist(), one.greedy.tolist()] for one in found]))
"""


def test_eight_devices_give_what_one_gives(params):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ON_MESH], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = predictor()(params, [Continuation(ids(length), ids(length + 1)) for length in ASKED])
    for one, (nats, greedy) in zip(expected, json.loads(run.stdout), strict=True):
        np.testing.assert_allclose(nats, one.nats, rtol=1e-5, atol=1e-5)
        assert greedy == one.greedy.tolist()
