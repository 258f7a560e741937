"""The paper's optimizer as an Optax chain: clip, Adam with decoupled weight decay, warm-up and cosine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt1_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The rate of each update: linear from 0 over the warm-up, then cosine to 0 (paper, section 4.1).

    The rate of the first update (count 0) is 0 if there is a warm-up, as in the authors' code: ``schedule(t)`` is
    evaluated before ``t`` is increased.

    Args:
        config: peak rate and warm-up.
        steps: length of the run, in updates.

    Returns:
        A function from the number of updates already made to the rate of the next.
    """
    warmup = config.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - warmup) / max(1, steps - warmup), 0, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(count < warmup, count / max(1, warmup), cosine)

    return schedule


class AuthorsAdamState(NamedTuple):
    """Number of updates made, and running means of the gradient and of its square."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_authors_adam(b1: float, b2: float, eps: float, weight_decay: float) -> optax.GradientTransformation:
    r"""Adam as the authors wrote it, weight decay included.

    .. math::
        u_t = \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \left( \frac{m_t}{\sqrt{v_t} + \epsilon} + \lambda p \right)

    It differs from :func:`optax.adamw` in two ways: epsilon is added before the bias correction, and the decay is
    multiplied by the bias correction too. The decay acts on matrices and embeddings alone, see :func:`is_decayed`.

    References:
        ``adam`` in opt.py of openai/finetune-transformer-lm.
    """

    def init(params: Any) -> AuthorsAdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AuthorsAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AuthorsAdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def direction(m: jax.Array, v: jax.Array, p: jax.Array, decayed: bool) -> jax.Array:
            return correction * (m / (jnp.sqrt(v) + eps) + (weight_decay * p if decayed else 0))

        return jax.tree.map(direction, mu, nu, params, is_decayed(params)), AuthorsAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def is_decayed(params: Any) -> Any:
    """True for kernels and embeddings, False for biases and gains (paper, 4.1: "all non bias or gain weights")."""
    return jax.tree.map_with_path(lambda path, _: str(path[-1].key) not in ("bias", "scale"), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the rule, then the schedule.

    Args:
        config: the rule and its numbers.
        steps: length of the run, in updates.
    """
    if config.rule == "authors":
        rule = scale_by_authors_adam(config.beta1, config.beta2, config.epsilon, config.weight_decay)
    else:
        rule = optax.chain(
            optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
            optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        rule,
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
