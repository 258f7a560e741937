"""Prompts in the cache of keys and values: where every way of decoding begins, and how it goes on by a token.

Prompts of different lengths share a batch: they are padded on the left, so that all rows write the same slot of the
cache at the same time. A row's positions count from its first real token, and its padding is never attended to; what
a row gives does not depend on the rows beside it.

Shapes: B batch, P padded prompt, S slots of the cache, T query position, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.model.attention import KVCache, cache_mask
from gpt1_jax.model.sharding import axis_size, batch_sharding
from gpt1_jax.model.transformer import GPT, Params, bind

_SMALLEST = 16  # prompts and caches are padded to a power of two, at least this, so that few shapes are compiled


class Cached(NamedTuple):
    """What has been read of each row, and the token that comes next."""

    cache: KVCache  # [L, B, S, K, H]; slots before `slot` are filled
    token_B: Int[Array, " B"]  # the newest token of each row, not yet in the cache
    slot: Int[Array, ""]  # where the newest token goes
    pads_B: Int[Array, " B"]  # slots of padding on the left of each row

    @property
    def position_B(self) -> Int[Array, " B"]:
        """The position of the newest token of each row."""
        return self.slot - self.pads_B


def prompt_room(config: Config, max_tokens: int) -> int:
    """How many tokens of a prompt the context holds beside ``max_tokens`` new ones.

    The context is that of the training, which has never seen the positions behind it.

    Raises:
        UserError: if there is no room for any, or nothing to generate, or the model is a masked one.
    """
    if config.model.objective == "masked":
        raise UserError(
            "model.objective=masked: this model fills in what is hidden in a text, and cannot continue one; "
            "generate with a run trained with model.objective=causal or prefix"
        )
    if max_tokens < 1:
        raise UserError(f"{max_tokens} tokens to generate: must be at least 1")
    if max_tokens >= config.context_length:
        name = "train" if config.train.context_length else "model"
        raise UserError(
            f"{max_tokens} tokens to generate leave no room for a prompt in {name}.context_length="
            f"{config.context_length}; ask for at most {config.context_length - 1}"
        )
    return config.context_length - max_tokens


def decoding_model(config: ModelConfig) -> ModelConfig:
    """The model as it decodes: layers in a row would have their slices of the weights copied for every token."""
    return config.model_copy(update={"scan_layers": True})


def pad(prompts: Sequence[np.ndarray], room: int, separator_id: int, params: Params) -> list[np.ndarray | jax.Array]:
    """Prompts as one array: left-padded, with rows added, to a shape that many other batches share.

    The devices that hold the weights share the rows, if these divide among them.

    Args:
        prompts: token ids; one without any becomes the separator, the start of a document.
        room: tokens to which each is cut, from the left.
        separator_id: the separator.
        params: the weights.

    Returns:
        tokens_BP, int32; pads_B, int32, the padding on the left of each row; real_B, bool, False in added rows.
    """
    fitted = [(prompt if len(prompt) else np.array([separator_id]))[-room:] for prompt in prompts]
    rows = 1 << max(0, len(fitted) - 1).bit_length()
    width = bucket(max((len(prompt) for prompt in fitted), default=1))
    tokens_BP = np.full((rows, width), separator_id, np.int32)
    pads_B = np.full(rows, width - 1, np.int32)
    for index, prompt in enumerate(fitted):
        pads_B[index] = width - len(prompt)
        tokens_BP[index, pads_B[index] :] = prompt
    return _on_devices([tokens_BP, pads_B, np.arange(rows) < len(fitted)], params)


def _on_devices(arrays: list[np.ndarray], params: Params) -> list[np.ndarray | jax.Array]:
    """Arrays of rows, the same on every host, split over the devices of the weights."""
    layout = jax.tree.leaves(params)[0].sharding
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    if not isinstance(mesh, Mesh) or len(arrays[0]) % axis_size(mesh, "batch"):
        return list(arrays)
    rows = batch_sharding(mesh)
    return [jax.make_array_from_callback(array.shape, rows, array.__getitem__) for array in arrays]


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BP: Int[Array, "B P"],
    pads_B: Int[Array, " B"],
    slots_of_new: int,
) -> Cached:
    """Fills the cache with all tokens of the prompts but the last, which decoding begins with.

    A prefix model reads the prompt as a prefix, so its last token too is there for the others to see; decoding writes
    the same keys and values once more.
    """
    model = bind(config, params)
    batch_size, width = tokens_BP.shape
    slots = width + slots_of_new
    prefix = config.objective == "prefix"
    count = width if prefix else width - 1
    slots_BT = jnp.broadcast_to(jnp.arange(count), (batch_size, count))
    _, cache = model(
        tokens_BP[:, :count],
        positions_BT=jnp.maximum(slots_BT - pads_B[:, None], 0),
        mask_BTS=cache_mask(jnp.full_like(slots_BT, width - 1) if prefix else slots_BT, pads_B, slots),
        cache=model.empty_cache(batch_size, slots),
        slot=jnp.int32(0),
    )
    assert cache is not None
    return Cached(cache, tokens_BP[:, -1], jnp.int32(width - 1), pads_B)


def advance(model: GPT, cached: Cached) -> tuple[Float[Array, "B V"], Cached]:
    """Reads the newest token of each row: the scores of the next one, float32, and the cache with it in.

    What comes back still has the same newest token; the caller puts the next one in its place.
    """
    slots = cached.cache.k_LBSKH.shape[2]
    last_B1 = jnp.full_like(cached.pads_B, cached.slot)[:, None]
    x_BTD, cache = model(
        cached.token_B[:, None],
        positions_BT=cached.position_B[:, None],
        mask_BTS=cache_mask(last_B1, cached.pads_B, slots),
        cache=cached.cache,
        slot=cached.slot,
    )
    assert cache is not None
    return model.logits(x_BTD[:, 0]), cached._replace(cache=cache, slot=cached.slot + 1)


def bucket(length: int) -> int:
    """The least power of two that holds ``length``, and at least the smallest."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array, also where its parts are on the devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
