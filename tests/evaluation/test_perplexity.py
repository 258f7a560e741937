import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gpt1_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainConfig
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation import perplexity
from gpt1_jax.evaluation.perplexity import Evaluator
from gpt1_jax.model.transformer import bind, init_params
from gpt1_jax.training.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=97, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32", loss_chunk=5
)
SEPARATOR = 3


class Stream:
    """An array that notes how much of it is read at once."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.longest = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self.tokens)
        self.longest = max(self.longest, stop - start)
        return self.tokens[start:stop]


def config(stride: int | None = None, batch_size: int = 4, context_length: int | None = None) -> Config:
    evaluation = EvaluationConfig(stride=stride, batch_size=batch_size, sample_tokens=4)
    return Config(model=MODEL, evaluation=evaluation, train=TrainConfig(context_length=context_length))


def stream(length: int) -> Stream:
    return Stream(np.random.default_rng(length).integers(0, 97, length, dtype=np.int32))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf * 4, init_params(MODEL, jax.random.key(0)))


@cache
def evaluator(stride: int | None = None, batch_size: int = 4, context_length: int | None = None) -> Evaluator:
    return Evaluator(config(stride, batch_size, context_length), one_device(), SEPARATOR)


def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@partial(jax.jit, static_argnums=2)
def _log_probs(params, tokens_BT, config):
    model = bind(config, params)
    return jax.nn.log_softmax(model.logits(model(tokens_BT)[0]))


def naive_nats(params, tokens: np.ndarray, context_length: int, stride: int) -> float:
    """One token at a time, a whole forward pass for each, the window of each found from the definition."""
    total, text = 0.0, [SEPARATOR, *tokens.tolist()]
    for target in range(1, len(text)):
        # The first window k * stride that reaches the target.
        start = next(k * stride for k in range(target) if target <= k * stride + context_length)
        window = text[start:target]
        padded = jnp.array([window + [0] * (16 - len(window))])
        total -= float(_log_probs(params, padded, MODEL)[0, len(window) - 1, text[target]])
    return total


@pytest.mark.parametrize("stride", [None, 16, 7, 1])
@pytest.mark.parametrize("length", [1, 16, 17, 75])
def test_nats_are_those_of_a_loop_over_tokens(params, length, stride):
    tokens = stream(length)
    score = evaluator(stride)(params, tokens)
    assert score.tokens == length
    np.testing.assert_allclose(score.nats, naive_nats(params, tokens.tokens, 16, stride or 16), rtol=2e-6)


def variation_of(
    objective: str, stride: int | None = None, mask_period: int = 7, windows: str = "contiguous"
) -> tuple[Evaluator, Config]:
    model = MODEL.model_copy(update={"objective": objective})
    evaluation = EvaluationConfig(stride=stride, batch_size=4, sample_tokens=4, mask_period=mask_period)
    settings = Config(model=model, evaluation=evaluation, data=DataConfig(windows=windows))
    return Evaluator(settings, one_device(), SEPARATOR), settings


def naive_pseudo_nats(config: Config, params, tokens: np.ndarray) -> float:
    """Every token hidden in turn, with those of its window that are hidden with it, in windows of their true length."""
    period, stride = config.evaluation.mask_period, config.evaluation.stride or 16
    total, counted = 0.0, 0
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + 16]
        for position in range(max(0, counted - start), len(window)):
            hidden = np.arange(len(window)) % period == position % period
            inputs = np.where(hidden, config.model.mask_id, window)
            log_probs = _log_probs(params, jnp.asarray(inputs)[None], config.model)
            total -= float(log_probs[0, position, window[position]])
        counted = max(counted, start + len(window))
    return total


@pytest.mark.parametrize(("length", "stride", "period"), [(1, None, 7), (17, None, 3), (40, 9, 7), (20, None, 16)])
def test_pseudo_nats_are_those_of_each_token_hidden(length, stride, period):
    evaluate, settings = variation_of("masked", stride, period)
    params = jax.tree.map(lambda leaf: leaf * 4, init_params(settings.model, jax.random.key(0)))
    tokens = stream(length)
    score = evaluate(params, tokens)
    assert score.tokens == length
    np.testing.assert_allclose(score.nats, naive_pseudo_nats(settings, params, tokens.tokens), rtol=5e-6)


def test_a_prefix_model_is_evaluated_without_a_prefix(params):
    evaluate, _ = variation_of("prefix")
    assert evaluate(params, stream(40)) == evaluator()(params, stream(40))


@pytest.mark.parametrize("objective", ["causal", "prefix", "masked"])
def test_packed_documents_that_fit_their_windows_cost_what_each_costs_alone(objective):
    # With a period of the whole window a masked model has one token hidden at a time, alone as in the window.
    packed, settings = variation_of(objective, mask_period=16, windows="packed")
    alone, _ = variation_of(objective, mask_period=16)
    params = jax.tree.map(lambda leaf: leaf * 4, init_params(settings.model, jax.random.key(0)))
    tokens = np.random.default_rng(1).integers(4, 97, 64, dtype=np.int32)
    ends = [5, 12, 16, 17, 26, 32, 48, 50, 64]  # no document lies in two windows
    tokens[np.array(ends) - 1] = SEPARATOR
    if objective == "masked":  # which reads no token before its window, and a separator with the document after it
        ends = sorted({*(end - 1 for end in ends), 16, 32, 48, 64})
    pieces = np.split(tokens, ends)[:-1]
    expected = [alone(params, Stream(piece)) for piece in pieces if len(piece)]
    found = packed(params, Stream(tokens))
    assert found.tokens == sum(score.tokens for score in expected) == 64
    np.testing.assert_allclose(found.nats, sum(score.nats for score in expected), rtol=2e-6)
    assert abs(alone(params, Stream(tokens)).nats - found.nats) > 1


def test_uniform_model_costs_log_vocab_a_token(params):
    uniform = jax.tree.map(jnp.zeros_like, params)
    score = evaluator()(uniform, stream(50))
    np.testing.assert_allclose(score.nats, 50 * np.log(97), rtol=1e-6)


def test_windows_have_the_training_context(params):
    tokens = stream(40)
    score = evaluator(context_length=6)(params, tokens)
    np.testing.assert_allclose(score.nats, naive_nats(params, tokens.tokens, 6, 6), rtol=2e-6)


def test_the_beginning_alone(params):
    tokens = stream(75)
    beginning = evaluator()(params, tokens, max_tokens=37)
    assert beginning == evaluator()(params, Stream(tokens.tokens[:37]))
    assert evaluator()(params, tokens, max_tokens=1000) == evaluator()(params, tokens)


def test_the_batch_size_does_not_matter(params):
    scores = [evaluator(5, batch_size)(params, stream(90)) for batch_size in (1, 4)]
    for score in scores[1:]:
        assert score.tokens == 90
        np.testing.assert_allclose(score.nats, scores[0].nats, rtol=1e-6)


def test_one_compilation_serves_every_length_and_reads_are_short(params, monkeypatch):
    traced = []
    monkeypatch.setattr(perplexity, "bind", lambda *args: traced.append(args) or bind(*args))
    fresh = Evaluator(config(), one_device(), SEPARATOR)
    for length in (3, 64, 200):
        tokens = stream(length)
        fresh(params, tokens)
        assert tokens.longest <= 17
    assert len(traced) == 1


def test_an_empty_stream_is_refused(params):
    with pytest.raises(UserError, match="no tokens"):
        evaluator()(params, Stream(np.zeros(0, np.int32)))


_ON_MESH = """
import json
import jax
from gpt1_jax.config import MeshConfig
from gpt1_jax.evaluation.perplexity import Evaluator
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import Sampling
from gpt1_jax.model.sharding import tree_shardings
from gpt1_jax.model.transformer import init_params, parameter_axes
from gpt1_jax.training.mesh import make_mesh
from test_perplexity import MODEL, SEPARATOR, config, stream

prompts = [stream(5).tokens, stream(2).tokens, stream(8).tokens]
params = jax.tree.map(lambda leaf: leaf * 4, init_params(MODEL, jax.random.key(0)))
results = []
for devices, shape in [(1, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, tensor=2))]:
    mesh = make_mesh(shape, jax.devices()[:devices])
    placed = jax.device_put(params, tree_shardings(mesh, parameter_axes(MODEL), params))
    score = Evaluator(config(9, 6), mesh, SEPARATOR)(placed, stream(100))
    completions = generate(
        config(), placed, prompts, sampling=Sampling(0.5, 20), max_tokens=6, seed=1, separator_id=SEPARATOR
    )
    results.append([score.nats, score.tokens, [c.tokens.tolist() for c in completions]])
print(json.dumps(results))
"""


def test_eight_devices_give_what_one_gives():
    """Evaluation and generation with the weights split three ways."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ON_MESH], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (nats_1, tokens_1, generated_1), (nats_8, tokens_8, generated_8) = json.loads(run.stdout)
    np.testing.assert_allclose(nats_8, nats_1, rtol=1e-6)
    assert tokens_8 == tokens_1 == 100
    assert generated_8 == generated_1
