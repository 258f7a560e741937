"""The state of a run on the devices: born sharded, donated to every step."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt1_jax.config import Config
from gpt1_jax.model.sharding import also_split_over, replicated, tree_shardings
from gpt1_jax.model.transformer import Params, init_params, parameter_axes
from gpt1_jax.training.trained import split


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        step: batches read, int32; the optimizer's own counts leave out those that were skipped.
        params: the weights, float32.
        opt_state: the optimizer's state, of the parameters that are trained.
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
    opt_state = optimizer.init(split(config, params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(run_key))


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layouts of the state; nothing is allocated.

    A leaf of the optimizer's state lies where the parameter does whose path it ends with and whose shape it has, as
    every moment; with ``mesh.shard_optimizer`` it is split over ``data``, too (Rajbhandari et al. 2020, "ZeRO", stage
    1). All else is whole on every device: counters, and statistics smaller than their parameter.
    """
    shapes = jax.eval_shape(lambda: new_state(config, optimizer))
    layouts = tree_shardings(mesh, parameter_axes(config.model), shapes.params)
    laid_out = jax.tree.map(lambda s, layout: s.update(sharding=layout), shapes.params, layouts)
    params = dict(jax.tree.leaves_with_path(laid_out))
    whole = replicated(mesh)

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owners = (params.get(path[start:]) for start in range(len(path)))
        sharding = next((owner.sharding for owner in owners if owner and owner.shape == leaf.shape), whole)
        if config.mesh.shard_optimizer and path[0].name == "opt_state":
            sharding = also_split_over(sharding, "data", leaf.shape)
        return leaf.update(sharding=sharding)

    return jax.tree.map_with_path(placed, shapes)


def init_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, params: Params | None = None
) -> TrainState:
    """The initial state, each device its own part; the values do not depend on the mesh.

    Args:
        config: the run.
        optimizer: of the run.
        mesh: the devices.
        params: weights, donated, to begin with in the place of drawn ones.
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

    def state(params: Params | None) -> TrainState:
        drawn = new_state(config, optimizer)
        if params is None:
            return drawn
        # What is replaced is never computed.
        return dataclasses.replace(drawn, params=params, opt_state=optimizer.init(split(config, params)[0]))

    return jax.jit(state, donate_argnums=0, out_shardings=layouts)(params)
