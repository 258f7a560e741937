"""Which parameters a run trains, and how fast: all of them alike, but where fine-tuning says otherwise.

A tree of some of the parameters has None in the place of the others, which JAX takes for an empty tree: so what is not
trained has no gradient, no moments, and no part in what devices add up.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt1_jax.config import Config
from gpt1_jax.model.transformer import Params

_ADDED = ("lora_in", "lora_out", "classifier_kernel")  # by fine-tuning: always trained
_TABLES = ("token_kernel", "output_kernel")  # with a row for each token, those of the special tokens last


def split(config: Config, params: Params) -> tuple[Params, Params]:
    """The parameters that are trained, and the others."""
    if config.finetune is None:
        return params, jax.tree.map(lambda _: None, params)
    chosen = jax.tree.map_with_path(lambda path, _: _is_trained(config, _names(path)), params)
    trained = jax.tree.map(lambda leaf, is_trained: leaf if is_trained else None, params, chosen)
    return trained, jax.tree.map(lambda leaf, is_trained: None if is_trained else leaf, params, chosen)


def merge(trained: Params, others: Params) -> Params:
    """The whole tree again."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, others, is_leaf=lambda leaf: leaf is None)


def rate_scales(config: Config) -> Callable[[Any], Any] | None:
    r"""What the rate of each parameter is multiplied by, as a function of the tree; None: 1, everywhere.

    With a decay :math:`d` and L layers counted from 0, layer i has :math:`d^{L-1-i}` and the embeddings :math:`d^L`
    (Howard & Ruder 2018, "ULMFiT", section 3.2; Clark et al. 2020, "ELECTRA", appendix). The lowest
    ``frozen_layers`` have 0. Where the embeddings are frozen, the rows of special tokens are not: they are new.
    """
    finetune = config.finetune
    if finetune is None or (_embeddings_learn(config) and finetune.optimizer.layer_decay == 1):
        return None
    layers, decay = config.model.num_layers, finetune.optimizer.layer_decay

    def scale(path: Any, leaf: jax.Array) -> jax.Array | float:
        names = _names(path)
        if "blocks" in names:
            index_L = jnp.arange(layers)
            scale_L = jnp.where(index_L >= finetune.train.frozen_layers, decay ** (layers - 1 - index_L), 0.0)
            return scale_L.reshape(-1, *[1] * (leaf.ndim - 1))
        if names[-1] in _TABLES and not _table_learns(config, names[-1]):
            rows_V = jnp.arange(leaf.shape[0])
            return (rows_V >= leaf.shape[0] - config.model.special_tokens).astype(jnp.float32)[:, None]
        return decay**layers if "embedding" in names else 1.0

    return lambda tree: jax.tree.map_with_path(scale, tree)


def _is_trained(config: Config, names: list[str]) -> bool:
    assert config.finetune is not None
    if names[-1] in _ADDED:
        return True
    if names[-1] in _TABLES:
        return _table_learns(config, names[-1]) or config.model.special_tokens > 0
    if config.model.lora:
        return False
    if "blocks" in names:
        return config.finetune.train.frozen_layers < config.model.num_layers
    return _embeddings_learn(config) or "embedding" not in names


def _embeddings_learn(config: Config) -> bool:
    return config.finetune is not None and not config.model.lora and not config.finetune.train.frozen_layers


def _table_learns(config: Config, name: str) -> bool:
    """Whether all rows of a table are trained; an output projection of its own is above all layers."""
    return _embeddings_learn(config) or (name == "output_kernel" and not config.model.lora)


def _names(path: Any) -> list[str]:
    return [entry.key for entry in path]
