"""The optimizer as an Optax chain: clipping by global norm, an update rule, decoupled weight decay, a schedule.

The defaults are the paper's: Adam with decoupled weight decay, linear warm-up and cosine. The layers' parameters are
stacked, and every rule takes each layer's matrix as a matrix of its own, its heads joined.

Shapes: L layers, D embedding, N heads, H head size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gpt1_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    r"""The rate of each update: linear from 0 over the warm-up, then as ``optimizer.schedule`` says.

    After ``t`` of ``T`` updates, with ``W`` of warm-up and a decay fraction ``f``, the peak rate is multiplied by

    - ``cosine``: :math:`(1 + \cos \pi x) / 2` with :math:`x = (t - W) / (T - W)` (paper, section 4.1);
    - ``linear``: :math:`1 - x`;
    - ``constant``: 1;
    - ``warmup_stable_decay``: 1, then :math:`(T - t) / (f T)` over the last ``f T`` updates (Hu et al. 2024, MiniCPM,
      section 4), or over all that the warm-up leaves if that is fewer;
    - ``inverse_square_root``: :math:`\sqrt{W / t}`, ``W`` and ``t`` being at least 1 (Vaswani et al. 2017, section
      5.3). It does not reach 0.

    The rate of the first update (count 0) is 0 if there is a warm-up, as in the authors' code: ``schedule(t)`` is
    evaluated before ``t`` is increased.

    Deviation: MiniCPM's descent is exponential; here it is linear to 0, a form that Hägele et al. 2024 ("Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations") study. Vaswani et al. derive the peak from the
    width; here it is ``optimizer.learning_rate``.

    Args:
        config: schedule, peak rate, warm-up and decay fraction.
        steps: length of the run, in updates.

    Returns:
        A function from the number of updates already made to the rate of the next.
    """
    warmup = config.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        after_warmup = _share_of_peak(config, steps, count)
        return config.learning_rate * jnp.where(count < warmup, count / max(1, warmup), after_warmup)

    return schedule


def _share_of_peak(config: OptimizerConfig, steps: int, count: jax.Array) -> jax.Array:
    warmup = config.warmup_steps
    progress = jnp.clip((count - warmup) / max(1, steps - warmup), 0, 1)
    match config.schedule:
        case "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return jnp.ones_like(count)
        case "warmup_stable_decay":
            descent = min(config.decay_fraction * steps, steps - warmup)
            return jnp.clip((steps - count) / max(1, descent), 0, 1)
        case "inverse_square_root":
            first = max(1, warmup)
            return jnp.sqrt(first / jnp.maximum(first, count))


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


def scale_by_adafactor() -> optax.GradientTransformation:
    r"""Adafactor's direction: the gradient over the root of its mean square, kept by row and by column alone.

    For one layer's matrix of n rows and m columns, [D, N * H] where it has heads, :math:`b_t = 1 - t^{-0.8}` and
    :math:`\epsilon = 10^{-30}`,

    .. math::
        R_t &= b_t R_{t-1} + (1 - b_t) (G_t^2 + \epsilon) 1_m / m \\
        C_t &= b_t C_{t-1} + (1 - b_t) 1_n^\top (G_t^2 + \epsilon) / n \\
        U_t &= G_t / \sqrt{R_t C_t / \mathrm{mean}(R_t)}, \qquad u_t = U_t / \max(1, \mathrm{rms}(U_t))

    so n + m numbers are stored instead of n m. A vector keeps the mean squares of all its elements.

    Deviation: the rate is ``optimizer.learning_rate`` by its schedule, and is not multiplied by the root mean square of
    the parameter. There is no momentum, as in the paper's algorithms 4 to 6.

    References:
        Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithms 4 to 6.
    """
    whole = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    layer_by_layer = optax.GradientTransformation(jax.vmap(whole.init), jax.vmap(whole.update))
    rule = optax.partition({"stacked": layer_by_layer, "whole": whole}, _labels(_is_stacked, "stacked", "whole"))

    def init(params: Any) -> Any:
        return rule.init(jax.tree.map_with_path(_joined_heads, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads, weights = (jax.tree.map_with_path(_joined_heads, tree) for tree in (updates, params))
        directions, state = rule.update(grads, state, weights)
        return jax.tree.map(lambda direction, g: direction.reshape(g.shape), directions, updates), state

    return optax.GradientTransformation(init, update)


def scale_by_muon_or_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    r"""Muon's direction for the layers' matrices; Adam's for embeddings, the output projection and all vectors.

    For one layer's matrix of n rows and m columns, [D, N * H] where it has heads, and b = 0.95,

    .. math::
        M_t &= b M_{t-1} + (1 - b) G_t \\
        N_t &= b M_t / (1 - b^{t+1}) + (1 - b) G_t / (1 - b^t), \qquad X_0 = N_t / \lVert N_t \rVert_F \\
        X_k &= (3.4445 - 4.7750 A + 2.0315 A^2) X_{k-1}, \qquad A = X_{k-1} X_{k-1}^\top \\
        u_t &= 0.2 \sqrt{\max(n, m)} X_5

    The five steps, of Newton and Schulz, bring all singular values near 1. The scale gives ``u`` a root mean square of
    about 0.2, as Adam's direction has, so one rate and one weight decay serve both.

    Deviation: both terms of the Nesterov momentum are corrected for their bias, as Optax has it; Jordan's is
    :math:`N_t = b M_t + (1 - b) G_t`. The products are in float32, not in bfloat16.

    Args:
        b1: Adam's decay of the mean of the gradient.
        b2: Adam's decay of the mean of its square.
        eps: Adam's epsilon.

    References:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Liu et al. 2025, "Muon is
        Scalable for LLM Training", section 2.2, for the scale.
    """
    muon = optax.chain(
        scale_by_muon(beta=0.95, ns_steps=5, nesterov=True, weight_dimension_numbers=_matrix_axes),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(_with_rms_of_adam, updates)),
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return optax.partition({"muon": muon, "adam": adam}, _labels(_is_layer_matrix, "muon", "adam"))


def _labels(test: Callable[[Any], bool], yes: str, no: str) -> Callable[[Any], Any]:
    return lambda params: jax.tree.map_with_path(lambda path, _: yes if test(path) else no, params)


def _is_stacked(path: Any) -> bool:
    return any(entry.key == "blocks" for entry in path)


def _is_layer_matrix(path: Any) -> bool:
    return _is_stacked(path) and path[-1].key == "kernel"


def _first_column(path: Any, kernel: jax.Array) -> int:
    """Where the columns begin in the shape of a stacked kernel: [L, rows..., columns...]."""
    # Attention's output, [L, N, H, D], has the heads among its rows; no other kernel has more than one axis of rows.
    return kernel.ndim - 1 if path[-2].key == "out" else 2


def _matrix_axes(kernels: Any) -> Any:
    """The axes of rows and columns of every stacked kernel; what is left, the layers, is a batch of matrices."""

    def axes(path: Any, kernel: jax.Array) -> MuonDimensionNumbers:
        first_column = _first_column(path, kernel)
        return MuonDimensionNumbers(tuple(range(1, first_column)), tuple(range(first_column, kernel.ndim)))

    return jax.tree.map_with_path(axes, kernels)


def _with_rms_of_adam(path: Any, orthogonal: jax.Array) -> jax.Array:
    return 0.2 * math.sqrt(max(_joined_heads(path, orthogonal).shape[1:])) * orthogonal


def _joined_heads(path: Any, leaf: jax.Array) -> jax.Array:
    """A stacked kernel as [L, rows, columns], a stacked vector as [L, size], any other leaf as it is."""
    if not _is_stacked(path):
        return leaf
    rows = (math.prod(leaf.shape[1 : _first_column(path, leaf)]),) if _is_layer_matrix(path) else ()
    return leaf.reshape(leaf.shape[0], *rows, -1)


def make_optimizer(
    config: OptimizerConfig, steps: int, scales: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    r"""Clipping by global norm, then the rule, then the schedule.

    With the rule's direction ``u``, the rate :math:`\eta_t` and the weight decay :math:`\lambda`, which acts on kernels
    and embeddings alone (:func:`is_decayed`), a parameter becomes :math:`p - \eta_t (u + \lambda p)` (Loshchilov &
    Hutter 2019, "Decoupled Weight Decay Regularization"). The directions:

    - ``adamw``: :math:`\hat m / (\sqrt{\hat v} + \epsilon)` (Kingma & Ba 2015, algorithm 1);
    - ``authors``: :func:`scale_by_authors_adam`, which has a decay of its own;
    - ``lion``: :math:`\mathrm{sign}(b_1 m_{t-1} + (1 - b_1) g_t)`, then :math:`m_t = b_2 m_{t-1} + (1 - b_2) g_t` (Chen
      et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2: betas 0.9 and 0.99, a rate 3 to 10
      times smaller and a decay as many times larger than AdamW's);
    - ``adafactor``: :func:`scale_by_adafactor`;
    - ``muon``: :func:`scale_by_muon_or_adam`.

    Args:
        config: the rule and its numbers. Adafactor reads neither betas nor epsilon, Lion reads no epsilon, and Muon
            reads them for its Adam part.
        steps: length of the run, in updates.
        scales: from a tree of parameters to what the rate of each is multiplied by (training/trained.py); None: 1.
    """
    b1, b2, epsilon = config.beta1, config.beta2, config.epsilon
    if config.rule == "authors":
        rule = scale_by_authors_adam(b1, b2, epsilon, config.weight_decay)
    else:
        directions = {
            "adamw": optax.scale_by_adam(b1, b2, epsilon),
            "lion": optax.scale_by_lion(b1, b2),
            "adafactor": scale_by_adafactor(),
            "muon": scale_by_muon_or_adam(b1, b2, epsilon),
        }
        decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
        rule = optax.chain(directions[config.rule], decay)
    chain = [
        optax.clip_by_global_norm(config.clip_norm),
        rule,
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    ]
    if scales is not None:
        scaled = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales(updates)))
        chain = [*chain, scaled]
    return optax.chain(*chain)
