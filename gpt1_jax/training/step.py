"""One update, as a pure function of the state and the batch.

A step whose loss or gradient norm is not finite is skipped: it changes nothing but the number of batches read, so the
data and the random key go on, and parameters, moments and rate are as they were.

Shapes: B batch, T position.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.model.sharding import batch_sharding
from gpt1_jax.training.gradient import LossAndGradient, loss_and_gradient
from gpt1_jax.training.optimizer import learning_rate_schedule
from gpt1_jax.training.state import TrainState, abstract_state
from gpt1_jax.training.trained import merge, rate_scales, split

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


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
        separator_id: as in :func:`gpt1_jax.training.gradient.loss_and_gradient`.

    Returns:
        The new state, and scalars: loss (nats per token, before the update), grad_norm (before clipping),
        learning_rate (of this update), all float32, and skipped (whether there was no update).
    """
    found = loss_and_gradient(config, state.params, tokens_BT, step_key(state), separator_id)
    return update(config, optimizer, state, found)


def step_key(state: TrainState) -> jax.Array:
    """The random key of the next batch."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def update(
    config: Config, optimizer: optax.GradientTransformation, state: TrainState, found: LossAndGradient
) -> tuple[TrainState, Metrics]:
    """Clipping and update, by the gradient of the parameters that are trained; returns as :func:`train_step`."""
    loss, grads = found
    scales = rate_scales(config)
    if scales is not None:  # what is not trained has no part in the norm
        grads = jax.tree.map(lambda g, scale: jnp.where(scale == 0, 0, g), grads, scales(grads))
    trained, others = split(config, state.params)
    norm = cast(jax.Array, optax.tree.norm(grads))
    skipped = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates), opt_state
    # A choice of each element, and not of a branch: it is part of the loop that writes the element in its place.
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(skipped, old, new), updated, (trained, state.opt_state)
    )
    # The state before: its count of updates leaves out what was skipped, which state.step does not.
    updates_made = optax.tree.get(state.opt_state, "ScaleByScheduleState").count
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": learning_rate_schedule(config.optimizer, config.train.steps)(updates_made),
        "skipped": skipped,
    }
    return TrainState(state.step + 1, merge(trained, others), opt_state, state.key), metrics


def compile_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, separator_id: int | None = None
) -> jax.stages.Compiled:
    """Compiles the step for a mesh, the state donated; call it with (state, tokens_BT).

    The separator of packed windows is part of what is compiled; any number compiles to a step of the same cost.
    """
    batch_shape = (config.train.batch_size, config.context_length + 1)
    tokens_BT = jax.ShapeDtypeStruct(batch_shape, jnp.int32, sharding=batch_sharding(mesh))
    return compile_step(
        lambda state, tokens_BT: train_step(config, optimizer, state, tokens_BT, separator_id),
        abstract_state(config, optimizer, mesh),
        tokens_BT,
        mesh,
    )


def compile_step(step: TrainStep, state: TrainState, batch: Any, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step for a mesh, the state donated.

    Args:
        step: a pure function.
        state: shapes and layouts of the state.
        batch: shapes and layouts of a batch.
        mesh: the devices.
    """
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
    )
    # On a CPU with AVX-512 the compiler would otherwise use half of each vector register; elsewhere it has no effect.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options: dict[str, str | bool] | None = {"xla_cpu_prefer_vector_width": "512"} if on_cpu else None
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch).compile(compiler_options=options)
