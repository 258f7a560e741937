"""The gradient of a batch, summed over micro-batches and over devices.

Over the mesh axes that replicate the model, each device works on its own rows as if it were alone, and the sum of
gradients is written out here: once for each update, in the dtype of ``train.gradient_dtype``. Left to the compiler it
would be part of every product whose result is a weight's gradient, in float32. Along all other axes the compiler
splits the work by the rules of model/sharding.py.

Shapes: A micro-batches, B batch, G groups of rows, T position.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt1_jax.config import Config
from gpt1_jax.model.cross_entropy import cross_entropy
from gpt1_jax.model.dropout import DropoutKey
from gpt1_jax.model.objective import Task, make_task
from gpt1_jax.model.sharding import REPLICAS, automatic_axes
from gpt1_jax.model.transformer import Params, bind
from gpt1_jax.training.trained import merge, split

LossAndGradient = tuple[jax.Array, Params]
Loss = Callable[[Params, Any, DropoutKey], jax.Array]


def loss_and_gradient(
    config: Config, params: Params, tokens_BT: jax.Array, key: jax.Array, separator_id: int | None = None
) -> LossAndGradient:
    """Mean negative log-probability of the tokens that ``model.objective`` asks for, nats per token, and its gradient.

    Those are all but the first of each window in the causal case (paper, Eq. 1). With ``train.accumulation`` it is the
    mean over micro-batches.

    Args:
        config: the run.
        params: the weights.
        tokens_BT: windows of context_length + 1 tokens.
        key: random key of every dropout, and of the objective's draws.
        separator_id: the token that ends every document; None will do where ``data.windows`` is not packed.
    """
    dropout_key, task_key = jax.random.split(key)
    tasks = _tasks(config, tokens_BT, task_key, separator_id)
    return sum_over_rows(config, partial(_language_model_loss, config), params, tasks, dropout_key)


def sum_over_rows(config: Config, loss: Loss, params: Params, batch: Any, key: jax.Array) -> LossAndGradient:
    """The sum of a loss over all rows of a batch, and its gradient by the parameters that are trained.

    Args:
        config: the run.
        loss: of the parameters, some rows of a micro-batch, and the key of their dropout: a sum over those rows.
        params: the weights.
        batch: a tree of arrays [micro-batches, rows, ...].
        key: random key of every dropout.
    """
    # In order, a single device too must run what one of several does.
    smallest = 1 if config.train.deterministic_groups else 2
    sizes = {axis: size for axis, size in automatic_axes().items() if axis in REPLICAS and size >= smallest}
    replicas = tuple(sizes)

    def on_replica(params: Params, batch: Any, dropout_key: jax.Array) -> LossAndGradient:
        rows = jax.tree.leaves(batch)[0].shape[1]
        first_row = jax.lax.axis_index(replicas) * rows if replicas else 0
        key = DropoutKey(dropout_key, first_row)
        if config.train.deterministic_groups:
            return _in_order(config, loss, params, batch, key, sizes)
        part = _of_rows(config, loss, params, batch, key)
        return _summed(_rounded(config, part), replicas) if replicas else part

    if not replicas:
        return on_replica(params, batch, key)
    whole, rows = PartitionSpec(), PartitionSpec(None, replicas)
    return jax.shard_map(
        on_replica,
        in_specs=(whole, rows, whole),
        out_specs=whole,
        axis_names=set(replicas),
        check_vma=False,
    )(params, batch, key)


def micro_batches(config: Config, batch: Any) -> Any:
    """A tree of arrays [rows, ...] as one of [micro-batches, rows, ...]."""
    count = config.train.accumulation
    # Micro-batch a takes rows a, a + A, ...: so each device works on rows that it already holds.
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _tasks(config: Config, tokens_BT: jax.Array, key: jax.Array, separator_id: int | None) -> Task:
    """What each micro-batch has to learn, a leading dimension A on every array; all weights sum to 1."""
    packed = config.data.windows == "packed"
    assert separator_id is not None or not packed
    count = config.train.accumulation
    tokens_ABT = micro_batches(config, tokens_BT)
    tasks = jax.vmap(lambda tokens_BT, key: make_task(config.model, tokens_BT, key, separator_id if packed else None))(
        tokens_ABT, jax.random.split(key, count)
    )
    return tasks._replace(weights_BT=tasks.weights_BT / count)


def _language_model_loss(config: Config, params: Params, task: Task, key: DropoutKey) -> jax.Array:
    model = bind(config.model, params)
    x_BTD, _ = model(task.inputs_BT, mask_BTS=task.mask_BTS, starts_BT=task.starts_BT, dropout_key=key)
    chunk, cap = config.model.loss_positions, config.model.logit_cap
    return cross_entropy(x_BTD, model.output_table, task.targets_BT, task.weights_BT, chunk, cap)


def _of_rows(config: Config, loss: Loss, params: Params, batch: Any, key: DropoutKey) -> LossAndGradient:
    """The part of the loss and of its gradient that comes from the rows at hand, of every micro-batch."""
    trained, others = split(config, params)

    def of_trained(trained: Params, rows: Any, key: DropoutKey) -> jax.Array:
        return loss(merge(trained, others), rows, key)

    def add(total: LossAndGradient, inputs: tuple[Any, jax.Array]) -> tuple[LossAndGradient, None]:
        rows, index = inputs
        part = jax.value_and_grad(of_trained)(trained, rows, key.fold_in(index))
        return jax.tree.map(jnp.add, total, part), None

    if config.train.accumulation == 1:
        return jax.value_and_grad(of_trained)(trained, jax.tree.map(lambda x: x[0], batch), key)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, zeros, (batch, jnp.arange(config.train.accumulation)))[0]


def _in_order(
    config: Config, loss: Loss, params: Params, batch: Any, key: DropoutKey, replicas: dict[str, int]
) -> LossAndGradient:
    """The sum over ``train.deterministic_groups`` groups of rows, each computed apart and added in order.

    So neither the shapes that are computed with nor the order of the sum depend on the number of devices.
    """
    groups = config.train.deterministic_groups
    assert groups is not None
    here = groups // math.prod(replicas.values())
    batch_G = jax.tree.map(lambda x: x.reshape(x.shape[0], here, -1, *x.shape[2:]).swapaxes(0, 1), batch)
    rows = jax.tree.leaves(batch_G)[0].shape[2]
    # The same program for each group on any number of devices: a loop whose turns the compiler cannot count, over one
    # group more than there are. A loop of a single turn, or over a single group, it would take apart.
    turns = jax.lax.optimization_barrier(jnp.int32(here))
    batch_G = jax.tree.map(lambda x: jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1)), batch_G)

    def of_group(index: jax.Array) -> LossAndGradient:
        batch = jax.tree.map(lambda x: x[index], batch_G)
        key_of_group = key._replace(first_row=key.first_row + index * rows)
        return _rounded(config, _of_rows(config, loss, params, batch, key_of_group))

    def store(index: jax.Array, parts_G: LossAndGradient) -> LossAndGradient:
        return jax.tree.map(lambda parts, part: parts.at[index].set(part), parts_G, of_group(index))

    empty_G = jax.tree.map(lambda x: jnp.zeros((here + 1, *x.shape), x.dtype), jax.eval_shape(of_group, 0))
    parts_G = jax.tree.map(lambda x: x[:here], jax.lax.fori_loop(0, turns, store, empty_G))
    if replicas:
        parts_G = jax.lax.all_gather(parts_G, tuple(replicas), tiled=True)
    return jax.tree.map(lambda x: reduce(jnp.add, x), _float32(parts_G))


def _summed(part: LossAndGradient, replicas: tuple[str, ...]) -> LossAndGradient:
    """The sum over devices, float32."""

    def as_it_is(part: LossAndGradient) -> LossAndGradient:
        return _float32(jax.lax.psum(part, replicas))

    def in_float32(part: LossAndGradient) -> LossAndGradient:
        return jax.lax.psum(_float32(part), replicas)

    # XLA's CPU backend aborts on a sum over devices in bfloat16.
    return jax.lax.platform_dependent(part, cpu=in_float32, default=as_it_is)


def _rounded(config: Config, part: LossAndGradient) -> LossAndGradient:
    """The gradient in the dtype in which devices add it up: of an ``auto`` that nobody has resolved, float32."""
    loss, gradient = part
    dtype = "bfloat16" if config.train.gradient_dtype == "bfloat16" else "float32"
    return loss, jax.tree.map(lambda g: g.astype(dtype), gradient)


def _float32(part: LossAndGradient) -> LossAndGradient:
    return jax.tree.map(lambda x: x.astype(jnp.float32), part)
