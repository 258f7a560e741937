"""Cached decoding: a prefill of the prompts, then one compiled loop, in pieces for streaming or in one go.

Shapes: B batch, P padded prompt, C chunk of new tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.generation.prefill import Cached, advance, bucket, decoding_model, pad, prefill, prompt_room, to_host
from gpt1_jax.generation.sampling import Sampling, sample
from gpt1_jax.model.transformer import Params, bind


@dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
        tokens: the new tokens, int32, without the one that ended them.
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
    end_id: int | None = None,
) -> list[Completion]:
    """Continues every prompt to its end or for ``max_tokens``; arguments as in :func:`stream`."""
    room = prompt_room(config, max_tokens)
    pieces = stream(
        config,
        params,
        prompts,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        separator_id=separator_id,
        end_id=end_id,
        chunk=bucket(max_tokens),
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
    end_id: int | None = None,
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
        separator_id: the token between documents.
        end_id: a row ends where this token is drawn; None: the separator.
        chunk: new tokens between two reports.

    Returns:
        An iterator over reports: for each prompt its new tokens since the last one, int32, without the end.

    Raises:
        UserError: if ``max_tokens`` leaves no room for a prompt, or the model is a masked one; at the call, before
            anything is computed.
    """
    assert chunk > 0
    end = separator_id if end_id is None else end_id
    padded = pad(prompts, prompt_room(config, max_tokens), separator_id, params)
    model = decoding_model(config.model)
    begin = partial(_begin, config=model, slots_of_new=bucket(max_tokens))
    decode = partial(_decode, config=model, sampling=sampling, chunk=chunk)

    def pieces() -> Iterator[list[np.ndarray]]:
        state = begin(params, *padded, seed)
        left, ended = max_tokens, not len(prompts)
        while left and not ended:
            state, new_BC, count = decode(params, state, left, end)
            left -= int(count)
            rows = to_host(new_BC)[: len(prompts), : int(count)]
            yield [row[: np.argmax(np.append(row, end) == end)] for row in rows]
            ended = bool((rows[:, -1] == end).all())

    return pieces()


class _State(NamedTuple):
    """What the loop carries from token to token."""

    cached: Cached
    ended_B: Bool[Array, " B"]
    keys_B: Key[Array, " B"]


@partial(jax.jit, static_argnames=("config", "slots_of_new"))
def _begin(
    params: Params,
    tokens_BP: Int[Array, "B P"],
    pads_B: Int[Array, " B"],
    real_B: Bool[Array, " B"],
    seed: Int[Array, ""],
    *,
    config: ModelConfig,
    slots_of_new: int,
) -> _State:
    cached = prefill(config, params, tokens_BP, pads_B, slots_of_new)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(tokens_BP)))
    return _State(cached, ~real_B, keys_B)


@partial(jax.jit, static_argnames=("config", "sampling", "chunk"), donate_argnames="state")
def _decode(
    params: Params,
    state: _State,
    limit: Int[Array, ""],
    end_id: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    chunk: int,
) -> tuple[_State, Int[Array, "B C"], Int[Array, ""]]:
    """Decodes until ``limit`` or ``chunk`` tokens are new or every row has ended.

    Returns:
        The state, the new tokens (ends once a row has ended), and how many columns of them are filled.
    """
    model = bind(config, params)

    def unfinished(carry: tuple[_State, Array, Array]) -> Array:
        state, _, count = carry
        return (count < jnp.minimum(limit, chunk)) & ~state.ended_B.all()

    def step(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, new_BC, count = carry
        logits_BV, cached = advance(model, state.cached)
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, cached.position_B)
        token_B = jnp.where(state.ended_B, end_id, sample(logits_BV, keys_B, sampling))
        state = state._replace(cached=cached._replace(token_B=token_B), ended_B=token_B == end_id)
        return state, new_BC.at[:, count].set(token_B), count + 1

    new_BC = jnp.full((state.ended_B.shape[0], chunk), end_id, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, new_BC, jnp.int32(0)))
