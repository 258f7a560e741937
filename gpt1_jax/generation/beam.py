"""Beam search: several hypotheses for each prompt, extended side by side in one compiled loop.

A hypothesis that has ended is scored by log P / ((5 + length) / 6)^alpha, where length counts its new tokens, the end
among them (Wu et al. 2016, "Google's Neural Machine Translation System", equation 14, without the coverage term).

At each token the K live hypotheses are extended by every token, and ranked by log P. Of the best K, those that end have
ended; the best K of those that do not end live on. The search for a prompt is over when K have ended, when no live one
can still beat the best that has ended, or after ``max_tokens``, when the live ones count as they are. So one beam is
greedy decoding. The second rule changes no result: log P only falls, so a live hypothesis scores at most its log P of
now over the penalty of the greatest length.

Shapes: B batch, P padded prompt, K beams, E candidates (twice the beams), C most new tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.generation.decode import Completion
from gpt1_jax.generation.prefill import Cached, advance, bucket, decoding_model, pad, prefill, prompt_room, to_host
from gpt1_jax.model.transformer import GPT, Params, bind


@dataclass(frozen=True)
class Found(Completion):
    """The best text that was found to follow one prompt.

    Attributes:
        score: its log P, in nats, over the penalty of its length.
    """

    score: float


def beam_search(
    config: Config,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    beams: int,
    length_penalty: float,
    max_tokens: int,
    separator_id: int,
    end_id: int | None = None,
) -> list[Found]:
    """Continues every prompt with the best-scored text that is found.

    Args:
        config: of the run; ``model.dtype`` must be resolved.
        params: of the model, on any devices.
        prompts: token ids of each prompt, int32. An empty prompt is the start of a document. A prompt longer than
            :func:`prompt_room` is cut from the left.
        beams: hypotheses for each prompt.
        length_penalty: alpha; 0 compares by log P alone, which prefers short texts.
        max_tokens: new tokens for each prompt.
        separator_id: the token between documents.
        end_id: a text ends with this token; None: the separator.

    Raises:
        UserError: if a setting is out of range, ``max_tokens`` leaves no room for a prompt, or the model is a masked
            one.
    """
    check_beams(beams, length_penalty)
    room = prompt_room(config, max_tokens)
    best = _search(
        params,
        *pad(prompts, room, separator_id, params),
        max_tokens,
        length_penalty,
        separator_id if end_id is None else end_id,
        config=decoding_model(config.model),
        beams=beams,
        slots_of_new=bucket(max_tokens),
    )
    rows = zip(prompts, *map(to_host, best), strict=False)  # without those that padding added
    return [Found(tokens[:length], max(0, len(prompt) - room), float(score)) for prompt, tokens, length, score in rows]


def check_beams(beams: int, length_penalty: float) -> None:
    """Checks the settings of a beam search.

    Raises:
        UserError: naming every setting that is out of range.
    """
    problems = []
    if beams < 1:
        problems.append(f"beams={beams}: must be at least 1; 1 takes the likeliest token each time")
    if not (math.isfinite(length_penalty) and length_penalty >= 0):
        problems.append(f"length_penalty={length_penalty}: must be at least 0; 0 compares by probability alone")
    if problems:
        raise UserError("\n".join(problems))


class _Best(NamedTuple):
    """The best hypothesis of each prompt, of those that have ended."""

    tokens_BC: Int[Array, "B C"]
    length_B: Int[Array, " B"]  # without the end
    score_B: Float[Array, " B"]  # -inf: none


class _State(NamedTuple):
    """What the loop carries from token to token."""

    cached: Cached  # of B * K rows
    tokens_BKC: Int[Array, "B K C"]  # of the live hypotheses, best first
    logp_BK: Float[Array, "B K"]  # -inf: no hypothesis
    best: _Best
    ended_B: Int[Array, " B"]  # how many have
    count: Int[Array, ""]  # new tokens of each live hypothesis


@partial(jax.jit, static_argnames=("config", "beams", "slots_of_new"))
def _search(
    params: Params,
    tokens_BP: Int[Array, "B P"],
    pads_B: Int[Array, " B"],
    real_B: Bool[Array, " B"],
    limit: Int[Array, ""],
    alpha: Float[Array, ""],
    end_id: Int[Array, ""],
    *,
    config: ModelConfig,
    beams: int,
    slots_of_new: int,
) -> _Best:
    model = bind(config, params)
    state = _begin(prefill(config, params, tokens_BP, pads_B, slots_of_new), real_B, beams, slots_of_new)

    def unfinished(state: _State) -> Array:
        return (state.count < limit) & jnp.isfinite(state.logp_BK).any()

    def step(state: _State) -> _State:
        return _step(model, state, limit, alpha, end_id)

    state = jax.lax.while_loop(unfinished, step, state)
    score_B = state.logp_BK[:, 0] / _penalty(limit, alpha)
    return _better(state.best, score_B, state.tokens_BKC[:, 0], limit)


def _begin(cached: Cached, real_B: Array, beams: int, slots_of_new: int) -> _State:
    """The prompts, each with one live hypothesis that has no tokens; none in the rows that padding added."""
    batch_size = len(real_B)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), cached.cache)
    token_B, pads_B = (jnp.repeat(x, beams) for x in (cached.token_B, cached.pads_B))
    tokens_BKC = jnp.zeros((batch_size, beams, slots_of_new), jnp.int32)
    none_B = jnp.full(batch_size, -jnp.inf)
    return _State(
        cached=Cached(cache, token_B, cached.slot, pads_B),
        tokens_BKC=tokens_BKC,
        logp_BK=jnp.full((batch_size, beams), -jnp.inf).at[:, 0].set(jnp.where(real_B, 0.0, none_B)),
        best=_Best(tokens_BKC[:, 0], jnp.zeros(batch_size, jnp.int32), none_B),
        ended_B=jnp.zeros(batch_size, jnp.int32),
        count=jnp.int32(0),
    )


def _step(model: GPT, state: _State, limit: Array, alpha: Array, end_id: Array) -> _State:
    """Extends every live hypothesis by a token."""
    batch_size, beams, _ = state.tokens_BKC.shape
    logits_BV, cached = advance(model, state.cached)
    logp_BKV = jax.nn.log_softmax(logits_BV).reshape(batch_size, beams, -1) + state.logp_BK[..., None]
    # At most one extension of each hypothesis ends, so twice the beams hold as many that do not.
    logp_BE, index_BE = jax.lax.top_k(logp_BKV.reshape(batch_size, -1), 2 * beams)
    parent_BE, token_BE = jnp.divmod(index_BE, logp_BKV.shape[-1])
    ends_BE = token_BE == end_id

    ended_BK = (ends_BE & jnp.isfinite(logp_BE))[:, :beams]
    first_B1 = ended_BK.argmax(-1, keepdims=True)  # all are equally long, so the likeliest is the best
    score_B1 = jnp.take_along_axis(logp_BE, first_B1, 1) / _penalty(state.count + 1, alpha)
    score_B = jnp.where(ended_BK.any(-1), score_B1[:, 0], -jnp.inf)
    parent_B1 = jnp.take_along_axis(parent_BE, first_B1, 1)
    ended_tokens_BC = jnp.take_along_axis(state.tokens_BKC, parent_B1[..., None], 1)[:, 0]
    best = _better(state.best, score_B, ended_tokens_BC, state.count)
    ended_B = state.ended_B + ended_BK.sum(-1)

    logp_BK, live_BK = jax.lax.top_k(jnp.where(ends_BE, -jnp.inf, logp_BE), beams)
    over_B = (ended_B >= beams) | (best.score_B >= logp_BK[:, 0] / _penalty(limit, alpha))
    parent_BK, token_BK = (jnp.take_along_axis(x, live_BK, 1) for x in (parent_BE, token_BE))
    tokens_BKC = jnp.take_along_axis(state.tokens_BKC, parent_BK[..., None], 1).at[:, :, state.count].set(token_BK)
    return _State(
        cached=_follow(cached, parent_BK, state.tokens_BKC.shape[-1])._replace(token_B=token_BK.ravel()),
        tokens_BKC=tokens_BKC,
        logp_BK=jnp.where(over_B[:, None], -jnp.inf, logp_BK),
        best=best,
        ended_B=ended_B,
        count=state.count + 1,
    )


def _follow(cached: Cached, parent_BK: Int[Array, "B K"], new: int) -> Cached:
    """The cache with each hypothesis in the place of its parent; only the ``new`` last slots differ among those."""

    def of_parents(x_LRSKH: Array) -> Array:
        # Within each prompt's beams, so that prompts on other devices are not asked for.
        x_LBKSKH = x_LRSKH[:, :, -new:].reshape(len(x_LRSKH), *parent_BK.shape, new, *x_LRSKH.shape[3:])
        taken = jnp.take_along_axis(x_LBKSKH, parent_BK[None, :, :, None, None, None], 2)
        return x_LRSKH.at[:, :, -new:].set(taken.reshape(*x_LRSKH.shape[:2], new, *x_LRSKH.shape[3:]))

    return cached._replace(cache=jax.tree.map(of_parents, cached.cache))


def _better(best: _Best, score_B: Array, tokens_BC: Array, length: Array) -> _Best:
    """The best of each prompt, where these of one length may be better."""
    better_B = score_B > best.score_B
    return _Best(
        jnp.where(better_B[:, None], tokens_BC, best.tokens_BC),
        jnp.where(better_B, length, best.length_B),
        jnp.where(better_B, score_B, best.score_B),
    )


def _penalty(length: Array, alpha: Array) -> Array:
    return ((5.0 + length) / 6.0) ** alpha
