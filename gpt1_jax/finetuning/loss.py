"""What fine-tuning minimises: L2 + lambda L1 (paper, Eq. 4 and 5), or of texts L1 alone, on what is to be learned.

Shapes: B batch, K sequences of an example, N = B K sequences, T position, D embedding, C classes.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gpt1_jax.config import Config
from gpt1_jax.finetuning.dataset import Batch
from gpt1_jax.model.attention_kernels import at_length
from gpt1_jax.model.cross_entropy import cross_entropy
from gpt1_jax.model.dropout import DropoutKey, dropout
from gpt1_jax.model.transformer import GPT, Params, bind
from gpt1_jax.task_config import MultipleChoice, Similarity
from gpt1_jax.training.gradient import LossAndGradient, micro_batches, sum_over_rows
from gpt1_jax.training.state import TrainState
from gpt1_jax.training.step import Metrics, step_key, update


def finetune_step(
    config: Config, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update, as :func:`gpt1_jax.training.step.train_step`."""
    found = finetune_gradient(config, state.params, batch, step_key(state))
    return update(config, optimizer, state, found)


def finetune_gradient(config: Config, params: Params, batch: Batch, key: jax.Array) -> LossAndGradient:
    """The loss of a batch, and its gradient by the parameters that are trained."""

    def loss(params: Params, rows: Batch, key: DropoutKey) -> jax.Array:
        return finetune_loss(config, params, rows, key)

    return sum_over_rows(config, loss, params, micro_batches(config, batch), key)


def finetune_loss(config: Config, params: Params, batch: Batch, key: DropoutKey | None) -> Float[Array, ""]:
    """The part of a batch's loss that comes from the rows at hand, in nats, or of numbers in squares.

    With a classifier: the mean over examples of the task's loss, and ``train.auxiliary`` times the language-model loss,
    which is a mean over each sequence's tokens, then over sequences (the authors' ``model`` in train.py). Of numbers
    the task's loss is the squared error; the paper does not say what it was.

    Args:
        config: the run.
        params: the weights.
        batch: its rows.
        key: of every dropout; None: without.
    """
    assert config.finetune is not None
    model, states_BKTD, classifier_key = _states(config, params, batch, key)
    weight = config.finetune.train.auxiliary if config.model.num_classes else 1.0
    total = jnp.zeros(())
    if weight:
        x_NTD = states_BKTD.reshape(-1, *states_BKTD.shape[2:])
        tokens_NT, weights_NT = (array.reshape(x_NTD.shape[:2]) for array in (batch.tokens_BKT, batch.weights_BKT))
        # The last position has nothing to predict; its weight is 0, and shapes that stay even split over devices.
        targets_NT = jnp.roll(tokens_NT, -1, axis=1)
        weights_NT = weight * jnp.roll(weights_NT, -1, axis=1)
        chunk, cap = config.model.loss_positions, config.model.logit_cap
        total += cross_entropy(x_NTD, model.output_table, targets_NT, weights_NT, chunk, cap)
    if config.model.num_classes:
        scores_BC = _scores(config, model, states_BKTD, batch, classifier_key)
        total += (batch.shares_B * _task_losses(config, scores_BC, jnp.asarray(batch.labels_B))).sum()
    return total


def task_scores(config: Config, params: Params, batch: Batch) -> Float[Array, "B C"]:
    """The scores of every class or answer, or of a number itself, float32, without dropout."""
    model, states_BKTD, _ = _states(config, params, batch, None)
    return _scores(config, model, states_BKTD, batch, None)


def _states(
    config: Config, params: Params, batch: Batch, key: DropoutKey | None
) -> tuple[GPT, Float[Array, "B K T D"], DropoutKey | None]:
    assert config.finetune is not None
    model = bind(at_length(config.model, batch.tokens_BKT.shape[2]), params)
    layers_key, classifier_key = [None] * 2 if key is None else key.split(2)
    choices = batch.tokens_BKT.shape[1]
    if layers_key is not None:
        layers_key = layers_key._replace(first_row=layers_key.first_row * choices)  # rows are sequences there
    tokens_NT = jnp.asarray(batch.tokens_BKT).reshape(-1, batch.tokens_BKT.shape[2])
    x_NTD, _ = model(tokens_NT, dropout_key=layers_key, frozen_layers=config.finetune.train.frozen_layers)
    return model, x_NTD.reshape(*batch.tokens_BKT.shape, -1), classifier_key


def _scores(
    config: Config, model: GPT, states_BKTD: Array, batch: Batch, key: DropoutKey | None
) -> Float[Array, "B C"]:
    assert config.finetune is not None
    last_BK11 = jnp.maximum(batch.last_BK, 0)[..., None, None]
    states_BKD = jnp.take_along_axis(states_BKTD, last_BK11, axis=2)[:, :, 0]
    if key is not None:
        # One mask for all sequences of an example, as in the authors' code.
        mask_BD = dropout(jnp.ones_like(states_BKD[:, 0]), config.model.classifier_dropout, key)
        states_BKD *= mask_BD[:, None]
    task = config.finetune.task
    if isinstance(task, MultipleChoice):
        scores_BK = model.classify(states_BKD)[..., 0]
        return jnp.where(batch.last_BK < 0, -jnp.inf, scores_BK)
    # The states of both orders are added element by element (paper, section 3.3).
    return model.classify(states_BKD.sum(1) if isinstance(task, Similarity) else states_BKD[:, 0])


def _task_losses(config: Config, scores_BC: Array, labels_B: Array) -> Float[Array, " B"]:
    assert config.finetune is not None
    if config.finetune.task.is_number:
        return jnp.square(scores_BC[:, 0] - labels_B)
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores_BC, labels_B.astype(jnp.int32))
