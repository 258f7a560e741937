"""The state of a run on the devices: born sharded, donated to every step."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.model.transformer import Params, init_params, parameter_axes
from gpt1_jax.training.mesh import replicated, tree_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        step: updates made, int32.
        params: the weights, float32.
        opt_state: the optimizer's state.
        key: data of the random key of the whole run, uint32; a step's key is folded in from it and never stored.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


def new_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Draws the initial state from ``config.seed``; trace it under jit to place it."""
    params_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = init_params(config.model, params_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(run_key))


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layouts of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: new_state(config, optimizer))
    params = tree_shardings(mesh, parameter_axes(config.model), shapes.params)
    whole = replicated(mesh)
    # Moments lie where their parameters lie; counters are whole everywhere.
    opt_state = optax.tree.map_params(
        optimizer.init, lambda _, layout: layout, shapes.opt_state, params, transform_non_params=lambda _: whole
    )
    layouts = dataclasses.replace(jax.tree.map(lambda _: whole, shapes), params=params, opt_state=opt_state)
    return jax.tree.map(lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), shapes, layouts)


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Draws the initial state, each device its own part; the values do not depend on the mesh."""
    layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: new_state(config, optimizer), out_shardings=layouts)()
