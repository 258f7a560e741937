"""One update, as a pure function of the state and the batch.

Shapes: A micro-batch, B batch, T position, D embedding.
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.model.cross_entropy import cross_entropy
from gpt1_jax.model.objective import make_task
from gpt1_jax.model.transformer import Params, bind
from gpt1_jax.training.mesh import batch_sharding
from gpt1_jax.training.optimizer import learning_rate_schedule
from gpt1_jax.training.state import TrainState, abstract_state

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


def language_model_loss(
    config: Config, params: Params, tokens_BT: jax.Array, key: jax.Array, separator_id: int | None = None
) -> jax.Array:
    """Mean negative log-probability of the tokens that ``model.objective`` asks for, nats per token.

    Those are all but the first of each window in the causal case (paper, Eq. 1).

    Args:
        config: the run.
        params: the weights.
        tokens_BT: windows of context_length + 1 tokens.
        key: random key of every dropout, and of the objective's draws.
        separator_id: the token that ends every document; None will do where ``data.windows`` is not packed.
    """
    dropout_key, task_key = jax.random.split(key)
    packed = config.data.windows == "packed"
    assert separator_id is not None or not packed
    task = make_task(config.model, tokens_BT, task_key, separator_id if packed else None)
    model = bind(config.model, params)
    x_BTD, _ = model(task.inputs_BT, mask_BTS=task.mask_BTS, starts_BT=task.starts_BT, dropout_key=dropout_key)
    chunk, cap = config.model.loss_chunk, config.model.logit_cap
    return cross_entropy(x_BTD, model.output_table, task.targets_BT, task.weights_BT, chunk, cap)


def train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens_BT: jax.Array,
    separator_id: int | None = None,
) -> tuple[TrainState, Metrics]:
    """Gradient, clipping, update.

    Args:
        config: the run.
        optimizer: from :func:`gpt1_jax.training.optimizer.make_optimizer`.
        state: donated; use the returned one.
        tokens_BT: [batch_size, context_length + 1] int32.
        separator_id: as in :func:`language_model_loss`.

    Returns:
        The new state, and float32 scalars: loss (nats per token, before the update), grad_norm (before clipping),
        learning_rate (of this update).
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss, grads = _accumulated(config, state.params, tokens_BT, key, separator_id)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    metrics = {
        "loss": loss,
        "grad_norm": cast(jax.Array, optax.tree.norm(grads)),
        "learning_rate": learning_rate_schedule(config.optimizer, config.train.steps)(state.step),
    }
    return TrainState(state.step + 1, params, opt_state, state.key), metrics


def _accumulated(
    config: Config, params: Params, tokens_BT: jax.Array, key: jax.Array, separator_id: int | None
) -> tuple[jax.Array, Params]:
    """Loss and gradient of the batch, as the mean over ``train.accumulation`` micro-batches."""
    value_and_grad = jax.value_and_grad(
        lambda p, tokens, key: language_model_loss(config, p, tokens, key, separator_id)
    )
    count = config.train.accumulation
    if count == 1:
        return value_and_grad(params, tokens_BT, key)
    # Micro-batch a takes rows a, a + A, ...: so each device works on rows that it already holds.
    tokens_ABT = tokens_BT.reshape(-1, count, tokens_BT.shape[1]).swapaxes(0, 1)

    def add(total: tuple[jax.Array, Params], inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        tokens, index = inputs
        part = value_and_grad(params, tokens, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, part), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, (tokens_ABT, jnp.arange(count)))
    return jax.tree.map(lambda leaf: leaf / count, total)


def compile_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, separator_id: int | None = None
) -> jax.stages.Compiled:
    """Compiles the step for a mesh, the state donated; call it with (state, tokens_BT).

    The separator of packed windows is part of what is compiled; any number compiles to a step of the same cost.
    """
    state = abstract_state(config, optimizer, mesh)
    batch_shape = (config.train.batch_size, config.context_length + 1)
    tokens_BT = jax.ShapeDtypeStruct(batch_shape, jnp.int32, sharding=batch_sharding(mesh))
    step = jax.jit(
        lambda state, tokens_BT: train_step(config, optimizer, state, tokens_BT, separator_id),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
    )
    # On a CPU with AVX-512 the compiler would otherwise use half of each vector register; elsewhere it has no effect.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options: dict[str, str | bool] | None = {"xla_cpu_prefer_vector_width": "512"} if on_cpu else None
    return step.lower(state, tokens_BT).compile(compiler_options=options)
