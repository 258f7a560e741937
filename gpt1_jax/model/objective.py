"""What a window of text gives the model to learn: which tokens it reads, which it predicts, and what it may see.

Shapes: B batch, W window, one token longer than T position, S key position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.segments import document_starts

# Devlin et al. 2019, "BERT", section 3.1.
_PREDICTED = 0.15  # of the tokens
_HIDDEN, _REPLACED = 0.8, 0.1  # of those; the rest are read as they are


class Task(NamedTuple):
    """One batch of predictions.

    Attributes:
        inputs_BT: what the model reads, int32.
        targets_BT: what it is to predict at each position, int32.
        weights_BT: of each prediction in the loss, float32; they sum to 1.
        mask_BTS: which keys each query may see; None: as the model has it without one.
        starts_BT: of packed windows, where in its row the document of each position begins; None: of contiguous ones.
    """

    inputs_BT: Int[Array, "B T"]
    targets_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"]
    mask_BTS: Bool[Array, "B T S"] | None
    starts_BT: Int[Array, "B T"] | None = None


def make_task(
    config: ModelConfig,
    tokens_BT: Int[Array, "B W"],
    key: Key[Array, ""],
    separator_id: Int[Array, ""] | int | None = None,
) -> Task:
    """The predictions that ``model.objective`` asks for.

    - ``causal``: the next token at every position (paper, Eq. 1).
    - ``masked``: 15 % of the tokens; of those 80 % are hidden, 10 % replaced by random tokens and 10 % left, and every
      position sees every other (Devlin et al. 2019). The first token of the window is not used.
    - ``prefix``: the next token behind a prefix whose tokens see each other (Raffel et al. 2020, "T5", section 3.2.1),
      of a length drawn for each row from 0 to T - 1; with 0 and 1 it is causal.

    Args:
        config: of the model.
        tokens_BT: windows of one token more than the model reads.
        key: random key of the draws; the causal objective has none. What is drawn depends on the global position
            alone, so it is the same on any mesh.
        separator_id: the token that ends every document of packed windows; None: the windows are contiguous.
    """
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    match config.objective:
        case "causal":
            weights_BT = jnp.full(targets_BT.shape, 1 / targets_BT.size, jnp.float32)
            task = Task(inputs_BT, targets_BT, weights_BT, None)
        case "masked":
            inputs_BT = targets_BT  # before some of them are hidden: a separator may be
            task = _masked(config, targets_BT, key)
        case "prefix":
            task = _prefix(inputs_BT, targets_BT, key)
    return task if separator_id is None else task._replace(starts_BT=document_starts(inputs_BT, separator_id))


def prefix_mask(prefix_B: Int[Array, " B"], length: int) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those up to its own position, and all of the prefix."""
    keys_S = jnp.arange(length)
    return (keys_S <= keys_S[:, None]) | (keys_S < prefix_B[:, None, None])


def _masked(config: ModelConfig, tokens_BT: Array, key: Array) -> Task:
    chosen_key, how_key, token_key = jax.random.split(key, 3)
    chosen_BT = jax.random.uniform(chosen_key, tokens_BT.shape) < _PREDICTED
    how_BT = jax.random.uniform(how_key, tokens_BT.shape)
    random_BT = jax.random.randint(token_key, tokens_BT.shape, 0, config.vocab_size)
    corrupted_BT = jnp.where(how_BT < _HIDDEN + _REPLACED, random_BT, tokens_BT)
    corrupted_BT = jnp.where(how_BT < _HIDDEN, config.mask_id, corrupted_BT)
    return Task(jnp.where(chosen_BT, corrupted_BT, tokens_BT), tokens_BT, _equal_weights(chosen_BT), None)


def _prefix(inputs_BT: Array, targets_BT: Array, key: Array) -> Task:
    batch, length = inputs_BT.shape
    prefix_B = jax.random.randint(key, (batch,), 0, length)
    # The target of position t is token t + 1, which must not be one that the prefix shows.
    predicted_BT = jnp.arange(length) >= prefix_B[:, None] - 1
    return Task(inputs_BT, targets_BT, _equal_weights(predicted_BT), prefix_mask(prefix_B, length))


def _equal_weights(predicted_BT: Array) -> Array:
    return predicted_BT / jnp.maximum(predicted_BT.sum(), 1).astype(jnp.float32)
