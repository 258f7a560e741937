"""The numbers of the public implementation: logits, gradients, updates, generation, perplexity."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt1_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from gpt1_jax.evaluation.figures import evaluate_texts
from gpt1_jax.evaluation.perplexity import Evaluator
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.interop.huggingface import export_huggingface
from gpt1_jax.interop.layout import public_tensors
from gpt1_jax.model.transformer import bind
from gpt1_jax.training.gradient import loss_and_gradient
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.run import Run
from gpt1_jax.training.state import TrainState
from gpt1_jax.training.step import train_step

# Beside the odd size of the fixture: heads of 8 in a short context, and more positions than attention has in a block.
SIZES = {
    "odd": {},
    "short": {"num_layers": 2, "embed_dim": 40, "num_heads": 5, "mlp_dim": 160, "context_length": 25},
    "long": {"num_layers": 4, "embed_dim": 24, "num_heads": 2, "mlp_dim": 96, "context_length": 139},
}
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model runs no faster on more, and JAX has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_torch(run: Run, folder: Path) -> Any:
    """The run, exported and loaded by the public library."""
    from transformers import AutoModelForCausalLM

    export_huggingface(run, folder, {}, 10**9)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens_of(run: Run, rows: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, rows, length])
    return rng.integers(0, run.config.model.vocab_size, (rows, length), dtype=np.int32)


@partial(jax.jit, static_argnums=0)
def our_logits(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens_BT)[0])


def their_logits(model: Any, tokens_BT: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(tokens_BT).long()).logits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits(make_run, tmp_path, size, seed):
    run = make_run(seed=seed, **SIZES[size])
    tokens_BT = tokens_of(run, 4, run.config.model.context_length, seed)
    ours = np.asarray(our_logits(run.config.model, run.params, tokens_BT))
    with torch.no_grad():
        theirs = their_logits(in_torch(run, tmp_path / "out"), tokens_BT).numpy()
    assert 0.5 < ours.std() < 2
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_logits_at_full_size(make_run, tmp_path):
    sizes = {"vocab_size": 40478, "context_length": 512, "num_layers": 12, "embed_dim": 768, "num_heads": 12}
    run = make_run(std=0.03, mlp_dim=3072, **sizes)
    tokens_BT = tokens_of(run, 1, 512)
    ours = np.asarray(our_logits(run.config.model, run.params, tokens_BT))
    with torch.no_grad():
        theirs = their_logits(in_torch(run, tmp_path / "out"), tokens_BT).numpy()
    assert 0.5 < ours.std() < 2
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def their_loss(model: Any, tokens_BT: np.ndarray) -> torch.Tensor:
    logits_BTV = their_logits(model, tokens_BT[:, :-1])
    targets_BT = torch.from_numpy(tokens_BT[:, 1:]).long()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def training(run: Run, **optimizer: Any) -> Config:
    """Without dropout, and compiled sooner."""
    model = run.config.model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0, "scan_layers": True})
    train = TrainConfig(steps=20, batch_size=4)
    settings = OptimizerConfig(learning_rate=2.5e-4, warmup_steps=2, **optimizer)
    return run.config.model_copy(update={"model": model, "train": train, "optimizer": settings})


def by_name(tree: Any) -> Tensors:
    """Ours by public names, the biases of the keys apart from those beside them."""
    return split_bias(dict(public_tensors(tree)))


def split_bias(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("attn.c_attn.bias"):
            query, key, value = np.split(tensor, 3)
            found |= {f"{name}.query": query, f"{name}.key": key, f"{name}.value": value}
        else:
            found[name] = tensor
    return found


def torch_by_name(model: Any, of: Callable[[Any], torch.Tensor]) -> Tensors:
    named = model.transformer.named_parameters()
    return split_bias({name: of(parameter).detach().numpy() for name, parameter in named})


@pytest.mark.parametrize("size", SIZES)
def test_gradients(make_run, tmp_path, size):
    gradient = None
    for seed in range(3):
        run = make_run(seed=seed, std=0.1, **SIZES[size])
        config = training(run)
        gradient = gradient or jax.jit(partial(loss_and_gradient, config))
        tokens_BT = tokens_of(run, 4, run.config.model.context_length + 1, seed)
        ours = by_name(gradient(run.params, tokens_BT, jax.random.key(0))[1])
        model = in_torch(run, tmp_path / str(seed))
        their_loss(model, tokens_BT).backward()
        theirs = torch_by_name(model, lambda parameter: parameter.grad)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            if name.endswith(".key"):  # softmax does not see what is the same for all keys
                scale = np.linalg.norm(theirs[name.replace(".key", ".query")])
                assert np.linalg.norm(ours[name]) < 1e-5 * scale and np.linalg.norm(expected) < 1e-5 * scale, name
            else:
                difference = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
                assert difference < 2e-6, (name, difference)


def clip(model: Any, norm: float) -> None:
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    for parameter in model.parameters():
        parameter.grad *= min(1.0, norm / total)


class AuthorsAdam:
    """``adam`` of opt.py in openai/finetune-transformer-lm, statement by statement."""

    def __init__(self, model: Any, b1: float, b2: float, e: float, l2: float):
        self.parameters = list(model.parameters())
        self.b1, self.b2, self.e, self.l2, self.t = b1, b2, e, l2, 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.t += 1
        lrt = rate * math.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.copy_(self.b1 * m + (1 - self.b1) * p.grad)
            v.copy_(self.b2 * v + (1 - self.b2) * p.grad * p.grad)
            update = m / (v.sqrt() + self.e)
            if p.ndim > 1:
                update = update + self.l2 * p
            p.copy_(p - lrt * update)


class TorchAdamW:
    """torch's own, with decay on all that is neither bias nor gain."""

    def __init__(self, model: Any, b1: float, b2: float, e: float, l2: float):
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": l2}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(b1, b2), eps=e)

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


def their_rate(settings: OptimizerConfig, steps: int, t: int) -> float:
    if t < settings.warmup_steps:
        return settings.learning_rate * t / settings.warmup_steps
    progress = (t - settings.warmup_steps) / (steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("size", ["odd", "short"])
@pytest.mark.parametrize(("rule", "restated"), [("adamw", TorchAdamW), ("authors", AuthorsAdam)])
def test_eight_updates(make_run, tmp_path, rule, restated, size):
    step = optimizer = None
    for seed in range(2):
        run = make_run(seed=seed, std=0.1, **SIZES[size])
        config = training(run, rule=rule)
        settings = config.optimizer
        if step is None:
            optimizer = make_optimizer(settings, config.train.steps)
            step = jax.jit(partial(train_step, config, optimizer))
        state = TrainState(jnp.int32(0), run.params, optimizer.init(run.params), jax.random.key_data(jax.random.key(0)))
        model = in_torch(run, tmp_path / str(seed))
        theirs = restated(model, settings.beta1, settings.beta2, settings.epsilon, settings.weight_decay)
        for t in range(8):
            tokens_BT = tokens_of(run, 4, run.config.model.context_length + 1, seed=100 * seed + t)
            state, metrics = step(state, tokens_BT)
            model.zero_grad()
            loss = their_loss(model, tokens_BT)
            loss.backward()
            assert math.isclose(float(metrics["loss"]), loss.item(), rel_tol=1e-5)
            clip(model, settings.clip_norm)
            theirs.step(their_rate(settings, config.train.steps, t))
        before, ours = by_name(run.params), by_name(state.params)
        for name, expected in torch_by_name(model, lambda parameter: parameter).items():
            if not name.endswith(".key"):  # their gradient is rounding alone, which Adam scales up
                assert np.abs(expected - before[name]).max() > 2e-4, name
                np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_greedy_generation(make_run, tmp_path):
    run = make_run(std=0.1, context_length=100)
    separator = run.tokenizer.separator_id
    embedding = run.params["embedding"]
    embedding["position_kernel"] *= 30  # so that no text repeats itself
    embedding["token_kernel"] = embedding["token_kernel"].at[separator].set(0.0)  # nor ends
    prompts = [tokens_of(run, 1, length, seed=2)[0] for length in [*range(1, 20), 42]]
    ours = generate(run.config, run.params, prompts, sampling=GREEDY, max_tokens=50, seed=0, separator_id=separator)
    model = in_torch(run, tmp_path / "out")
    drawn = set()
    for prompt, completion in zip(prompts, ours, strict=True):
        given = torch.from_numpy(prompt).long()[None]
        theirs = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, use_cache=False, max_new_tokens=50
        )
        assert completion.tokens.tolist() == theirs[0, len(prompt) :].tolist()
        assert len(completion.tokens) == 50
        drawn |= set(completion.tokens.tolist())
    assert len(drawn) > 40


def test_perplexity(make_run, tmp_path):
    run = make_run()
    text = "The cat sat on the mat, and a dog ran over the hill.\n" * 40
    figures = evaluate_texts(
        Evaluator(run.config, run.mesh, run.tokenizer.separator_id), run.params, [text], run.tokenizer
    )
    separator, length = run.tokenizer.separator_id, run.config.context_length
    stream = np.array([separator, *run.tokenizer.encode(text), separator], np.int32)
    model = in_torch(run, tmp_path / "out")
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, length):
            window = stream[start : start + length + 1]
            nats += their_loss(model, window[None]).item() * (len(window) - 1)
    tokens = len(stream) - 1
    assert figures.tokens == tokens > 10 * length
    assert math.isclose(figures.perplexity, math.exp(nats / tokens), rel_tol=1e-5)
