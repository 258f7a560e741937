"""From the scores of the next token to a token: greedy, or drawn at a temperature from the top k or the top p.

Shapes: B batch, V vocabulary, K candidates in order of falling probability.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gpt1_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, so that compiled code can depend on it.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores the other settings.
        top_k: only the k likeliest tokens can be drawn; None: all.
        top_p: of those, only the smallest set of the likeliest whose probabilities reach p can be drawn (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1); 1: all.

    Raises:
        UserError: naming every setting that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature}: must be at least 0; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k}: must be at least 1; leave it out to draw from every token")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be above 0 and at most 1; 1 draws from every token")
        if problems:
            raise UserError("\n".join(problems))


GREEDY = Sampling(temperature=0.0)


def sample(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Chooses one token a row.

    Drawn by the Gumbel trick: the largest of logit plus noise. A token's noise depends on the row's key and on the
    token alone, not on its rank, so rounding in the logits can change the choice only where two sums are nearly equal.

    Args:
        logits_BV: scores, float32.
        keys_B: a random key a row; greedy sampling ignores them.
        sampling: how to choose.

    Returns:
        Token ids, int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(keys_B)
    # The largest logit is taken off first: a division by a tiny temperature then underflows to -inf and never to NaN.
    logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
    logits_BK, tokens_BK = candidates(logits_BV, sampling)
    noise_BK = jnp.take_along_axis(noise_BV, tokens_BK, axis=-1)
    choice_B1 = jnp.argmax(logits_BK + noise_BK, axis=-1, keepdims=True)
    return jnp.take_along_axis(tokens_BK, choice_B1, axis=-1)[:, 0]


def candidates(logits_BV: Float[Array, "B V"], sampling: Sampling) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """The tokens that top k and top p leave, likeliest first; of equal ones the lower id comes first.

    Args:
        logits_BV: scores, already divided by the temperature.
        sampling: of which ``top_k`` and ``top_p`` are read.

    Returns:
        Their logits, -inf where a token is left out, and their ids, int32. K is ``top_k``, or V without it.
    """
    vocab_size = logits_BV.shape[-1]
    logits_BK, tokens_BK = jax.lax.top_k(logits_BV, min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p < 1:
        probs_BK = jax.nn.softmax(logits_BK, axis=-1)
        # A token stays while those before it have not yet reached p: the first always does.
        before_BK = jnp.cumsum(probs_BK, axis=-1) - probs_BK
        keep_BK = (before_BK < sampling.top_p).at[:, 0].set(True)
        logits_BK = jnp.where(keep_BK, logits_BK, -jnp.inf)
    return logits_BK, tokens_BK
