"""An update that is not finite changes nothing, to the bit, by any rule: given gradients, no model is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.training.optimizer import make_optimizer
from gpt1_jax.training.state import TrainState, new_state
from gpt1_jax.training.step import update

MODEL = "{vocab_size: 20, context_length: 8, num_layers: 2, embed_dim: 8, num_heads: 2, mlp_dim: 12, dtype: float32}"
TASK = "{task: {form: classification, text: t, label: l, labels: [a, b], validation: {kind: files, paths: [x]}}}"


def config_of(rule: str, finetuned: bool) -> Config:
    return parse_config(
        f"model: {MODEL}\ntrain: {{steps: 20}}\noptimizer: {{warmup_steps: 4, learning_rate: 0.01, rule: {rule}}}\n"
        "evaluation: {sample_tokens: 4}\n" + f"finetune: {TASK}" * finetuned,
        "c",
    )


def bits(state: TrainState) -> list[bytes]:
    parts = jax.tree.leaves((state.params, state.opt_state, state.key))
    return [np.asarray(leaf).tobytes() for leaf in parts]


@pytest.mark.parametrize(
    ("rule", "finetuned"),
    [("authors", False), ("muon", False), ("adamw", True)],
)
def test_what_is_not_finite_changes_nothing(rule, finetuned):
    config = config_of(rule, finetuned)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    quick = {"xla_backend_optimization_level": 0}
    step = jax.jit(lambda *given: update(config, optimizer, given[0], given[1:]), compiler_options=quick)
    state = jax.jit(lambda: new_state(config, optimizer), compiler_options=quick)()

    def grads(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), state.params)

    for seed in range(2):
        state, metrics = step(state, jnp.float32(3.0), grads(seed))
        assert not metrics["skipped"]
    before, expected, rate = bits(state), *step(state, jnp.float32(3.0), grads(9))
    assert float(rate["learning_rate"]) == pytest.approx(0.005)  # of the third update, of four of warm-up
    for loss, value in [(3.0, jnp.nan), (3.0, jnp.inf), (jnp.nan, 1.0), (jnp.inf, 1.0), (-jnp.inf, jnp.nan)]:
        bad = grads(5)
        bad["blocks"]["mlp_in"]["kernel"] = bad["blocks"]["mlp_in"]["kernel"].at[1, 2, 3].set(value)
        state, metrics = step(state, jnp.float32(loss), bad)
        assert metrics["skipped"] and bits(state) == before
    assert int(state.step) == 2 + 5  # the batches are read
    found, metrics = step(state, jnp.float32(3.0), grads(9))
    assert bits(found) == bits(expected) != before
    assert metrics["learning_rate"] == rate["learning_rate"] and not metrics["skipped"]
