"""Cached decoding: a prefill of the prompts, then one compiled loop, in pieces for streaming or in one go.

Prompts of different lengths share a batch: they are padded on the left, so that all rows write the same slot of the
cache at the same time. A row's positions count from its first real token, and its padding is never attended to; what
a row gives does not depend on the rows beside it.

Shapes: B batch, P padded prompt, S slots of the cache, C chunk of new tokens, T query position, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Int, Key

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.generation.sampling import Sampling, sample
from gpt1_jax.model.attention import KVCache, cache_mask
from gpt1_jax.model.transformer import Params, bind

_SMALLEST = 16  # prompts and caches are padded to a power of two, at least this, so that few shapes are compiled


@dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
        tokens: the new tokens, int32, without the separator that ended them.
        dropped: tokens cut from the left of the prompt, because the context had no room for them.
    """

    tokens: np.ndarray
    dropped: int


def generate(
    config: Config,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    sampling: Sampling,
    max_tokens: int,
    seed: int,
    separator_id: int,
) -> list[Completion]:
    """Continues every prompt to the end of its document or for ``max_tokens``; arguments as in :func:`stream`."""
    room = prompt_room(config, max_tokens)
    pieces = stream(
        config,
        params,
        prompts,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        separator_id=separator_id,
        chunk=_bucket(max_tokens),
    )
    joined = [np.concatenate(row) for row in zip(*pieces, strict=True)]
    return [Completion(row, max(0, len(prompt) - room)) for row, prompt in zip(joined, prompts, strict=True)]


def stream(
    config: Config,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    sampling: Sampling,
    max_tokens: int,
    seed: int,
    separator_id: int,
    chunk: int = 8,
) -> Iterator[list[np.ndarray]]:
    """Continues every prompt, and yields the new tokens as they come.

    Row i draws the token at position t with the key fold_in(fold_in(seed, i), t), so ``chunk``, the padding and the
    other rows do not change what it draws.

    Args:
        config: of the run; ``model.dtype`` must be resolved.
        params: of the model, on any devices.
        prompts: token ids of each prompt, int32. An empty prompt is the start of a document. A prompt longer than
            :func:`prompt_room` is cut from the left.
        sampling: how each token is chosen.
        max_tokens: new tokens for each prompt.
        seed: of the random draws.
        separator_id: the token between documents; a row ends where it is drawn.
        chunk: new tokens between two reports.

    Returns:
        An iterator over reports: for each prompt its new tokens since the last one, int32, without the separator.

    Raises:
        UserError: if ``max_tokens`` leaves no room for a prompt, or the model is a masked one; at the call, before
            anything is computed.
    """
    assert chunk > 0
    room = prompt_room(config, max_tokens)
    fitted = [(prompt if len(prompt) else np.array([separator_id]))[-room:] for prompt in prompts]
    # Layers in a row would have their slices of the stacked weights copied for every token.
    model = config.model.model_copy(update={"scan_layers": True})
    prefill = partial(_prefill, config=model, slots_of_new=_bucket(max_tokens))
    decode = partial(_decode, config=model, sampling=sampling, chunk=chunk)

    def pieces() -> Iterator[list[np.ndarray]]:
        state = prefill(params, *_pad(fitted, separator_id), seed)
        left, ended = max_tokens, not fitted
        while left and not ended:
            state, new_BC, count = decode(params, state, left, separator_id)
            left -= int(count)
            rows = _to_host(new_BC)[: len(fitted), : int(count)]
            yield [row[: np.argmax(np.append(row, separator_id) == separator_id)] for row in rows]
            ended = bool((rows[:, -1] == separator_id).all())

    return pieces()


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


class _State(NamedTuple):
    """What the loop carries from token to token."""

    cache: KVCache  # [L, B, S, K, H]; slots before `slot` are filled
    token_B: Int[Array, " B"]  # the newest token of each row, not yet in the cache
    ended_B: Bool[Array, " B"]
    slot: Int[Array, ""]  # where the newest token goes
    pads_B: Int[Array, " B"]  # slots of padding on the left of each row
    keys_B: Key[Array, " B"]


@partial(jax.jit, static_argnames=("config", "slots_of_new"))
def _prefill(
    params: Params,
    tokens_BP: Int[Array, "B P"],
    pads_B: Int[Array, " B"],
    real_B: Bool[Array, " B"],
    seed: Int[Array, ""],
    *,
    config: ModelConfig,
    slots_of_new: int,
) -> _State:
    """Fills the cache with all tokens of the prompts but the last, which the loop begins with.

    A prefix model reads the prompt as a prefix, so its last token too is there for the others to see; the loop writes
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
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch_size))
    return _State(cache, tokens_BP[:, -1], ~real_B, jnp.int32(width - 1), pads_B, keys_B)


@partial(jax.jit, static_argnames=("config", "sampling", "chunk"), donate_argnames="state")
def _decode(
    params: Params,
    state: _State,
    limit: Int[Array, ""],
    separator_id: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    chunk: int,
) -> tuple[_State, Int[Array, "B C"], Int[Array, ""]]:
    """Decodes until ``limit`` or ``chunk`` tokens are new or every row has ended.

    Returns:
        The state, the new tokens (separators once a row has ended), and how many columns of them are filled.
    """
    model = bind(config, params)
    slots = state.cache[0].shape[2]

    def unfinished(carry: tuple[_State, Array, Array]) -> Array:
        state, _, count = carry
        return (count < jnp.minimum(limit, chunk)) & ~state.ended_B.all()

    def step(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, new_BC, count = carry
        position_B = state.slot - state.pads_B
        x_BTD, cache = model(
            state.token_B[:, None],
            positions_BT=position_B[:, None],
            mask_BTS=cache_mask(jnp.full_like(position_B, state.slot)[:, None], state.pads_B, slots),
            cache=state.cache,
            slot=state.slot,
        )
        assert cache is not None
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, position_B + 1)
        token_B = sample(model.logits(x_BTD[:, 0]), keys_B, sampling)
        token_B = jnp.where(state.ended_B, separator_id, token_B)
        ended_B = token_B == separator_id
        state = state._replace(cache=cache, token_B=token_B, ended_B=ended_B, slot=state.slot + 1)
        return state, new_BC.at[:, count].set(token_B), count + 1

    new_BC = jnp.full((state.token_B.shape[0], chunk), separator_id, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, new_BC, jnp.int32(0)))


def _pad(prompts: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts as one array: left-padded, with rows added, to a shape that many other batches share.

    Returns:
        tokens_BP, int32; pads_B, int32, the padding on the left of each row; real_B, bool, False in added rows.
    """
    rows = 1 << max(0, len(prompts) - 1).bit_length()
    width = _bucket(max((len(prompt) for prompt in prompts), default=1))
    tokens_BP = np.full((rows, width), fill, np.int32)
    pads_B = np.full(rows, width - 1, np.int32)
    for index, prompt in enumerate(prompts):
        pads_B[index] = width - len(prompt)
        tokens_BP[index, pads_B[index] :] = prompt
    return tokens_BP, pads_B, np.arange(rows) < len(prompts)


def _bucket(length: int) -> int:
    """The least power of two that holds ``length``, and at least the smallest."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def _to_host(array: Array) -> np.ndarray:
    """The whole of an array, also where its parts are on the devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
