"""GPT-1: the decoder-only transformer of Radford et al. 2018, as an NNX module.

The layers' parameters are stacked, a leading dimension ``layers`` on each, whether the layers run in a compiled loop
(``model.scan_layers``) or in a row: both forms share one initialisation and one checkpoint.

Shapes: B batch, T query position, S key position, D embedding, L layers, K heads of keys, H head size, V vocabulary, C
classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.attention import KVCache
from gpt1_jax.model.block import Block
from gpt1_jax.model.dropout import DropoutKey
from gpt1_jax.model.embedding import Embedding
from gpt1_jax.model.layers import make_norm, normal, soft_cap
from gpt1_jax.model.products import product
from gpt1_jax.model.segments import same_document
from gpt1_jax.model.sharding import constrain

_HIDDEN_AXES = ("batch", "sequence", None)

Params = dict[str, Any]  # nested dicts of arrays, by module and parameter name


class GPT(nnx.Module):
    """The transformer without an objective: tokens in, hidden states or logits out."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embedding = Embedding(config, dtype, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype, rngs)

        self.blocks = stacked(rngs)
        for _, node in nnx.iter_graph(self.blocks):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=("layers", *node.axes))
        self.ln_f = make_norm(config, config.embed_dim) if config.norm_position == "pre" else None
        shape = (config.vocab_size, config.embed_dim)
        self.output_kernel = None if config.tied_output else normal(rngs, shape, ("vocab", "embed"))
        classes = config.num_classes
        self.classifier_kernel = normal(rngs, (config.embed_dim, classes), ("embed", "classes")) if classes else None
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        mask_BTS: Bool[Array, "#B #T S"] | None = None,
        starts_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        slot: Int[Array, ""] | None = None,
        dropout_key: DropoutKey | None = None,
        frozen_layers: int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Runs the layers.

        Args:
            tokens_BT: token ids, int32.
            positions_BT: position of each token; None means 0 to T - 1.
            mask_BTS: which keys each query may see; None means causal, or all for a masked model.
            starts_BT: where in the row the document of each token begins: it sees that document alone, and its
                position counts from there. None: a row is one document, and ``positions_BT`` counts.
            cache: keys and values of every layer, [L, B, S, K, H], for decoding; see :func:`empty_cache`.
            slot: with a cache, the slot of the first of the T tokens.
            dropout_key: random key; None switches every dropout off.
            frozen_layers: the parameters of the lowest so many have no gradient; it goes back through them, to the
                embeddings, some of which may be new.

        Returns:
            The last hidden states in the compute dtype, and the updated cache (None if none was given).
        """
        if mask_BTS is None and self.config.objective == "masked":
            mask_BTS = jnp.ones((1, 1, tokens_BT.shape[1]), bool)
        if starts_BT is not None:
            assert positions_BT is None and cache is None, "packed windows are for training and evaluation"
            positions_BT = jnp.arange(tokens_BT.shape[1]) - starts_BT
            if mask_BTS is not None:
                mask_BTS &= same_document(starts_BT)
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        embedding_key, layers_key = [None] * 2 if dropout_key is None else dropout_key.split(2)
        x_BTD = constrain(self.embedding(tokens_BT, positions_BT, embedding_key), _HIDDEN_AXES)
        definition, stack = nnx.split(self.blocks)

        def layer(x_BTD: Array, cache: KVCache | None, params: Any, index: Array | int) -> tuple[Array, KVCache | None]:
            key = None if layers_key is None else layers_key.fold_in(index)
            block = nnx.merge(definition, params)
            x_BTD, cache = block(
                x_BTD,
                positions_BT,
                mask_BTS=mask_BTS,
                starts_BT=starts_BT,
                cache=cache,
                layer=index,
                slot=slot,
                dropout_key=key,
            )
            return constrain(x_BTD, _HIDDEN_AXES), cache

        if self.config.remat == "full":
            layer = jax.checkpoint(layer)
        x_BTD, cache = self._run(layer, x_BTD, cache, jax.lax.stop_gradient(stack), 0, frozen_layers)
        x_BTD, cache = self._run(layer, x_BTD, cache, stack, frozen_layers, self.config.num_layers)
        return x_BTD if self.ln_f is None else self.ln_f(x_BTD), cache

    def _run(
        self, layer: Callable, x_BTD: Array, cache: KVCache | None, stack: Any, first: int, stop: int
    ) -> tuple[Array, KVCache | None]:
        """The layers from ``first`` to before ``stop``, in a compiled loop or in a row."""
        if first == stop:
            return x_BTD, cache
        num_layers = self.config.num_layers
        if not self.config.scan_layers:
            for index, params in list(enumerate(_unstack(stack, num_layers)))[first:stop]:
                x_BTD, cache = layer(x_BTD, cache, params, index)
            return x_BTD, cache
        part = stack if stop - first == num_layers else jax.tree.map(lambda leaf: leaf[first:stop], stack)
        # The whole cache is carried, so that a layer writes its new slots in place.
        return jax.lax.scan(
            lambda carry, inputs: (layer(*carry, *inputs), None), (x_BTD, cache), (part, jnp.arange(first, stop))
        )[0]

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """The output projection, float32: the token embedding, or a table of its own."""
        return (self.embedding.token_kernel if self.output_kernel is None else self.output_kernel)[...]

    def logits(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of every token, float32: the hidden states times the transposed output table."""
        return soft_cap(product("...D,VD->...V", x_BTD, self.output_table), self.config.logit_cap)

    def classify(self, state_BD: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """Scores of every class, float32 (paper, Eq. 3).

        Deviation: the authors' code adds a bias, which their paper does not have.
        """
        assert self.classifier_kernel is not None, "the model has no classifier"
        return product("...D,DC->...C", state_BD, self.classifier_kernel[...])

    def empty_cache(self, batch_size: int, slots: int) -> KVCache:
        """A cache of zeros with room for ``slots`` positions, [L, B, S, K, H] in the compute dtype."""
        shape = (self.config.num_layers, batch_size, slots, self.config.kv_heads, self.config.head_dim)
        return KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))


def _unstack(tree: Any, size: int) -> list[Any]:
    """The ``size`` slices of every leaf along its first dimension.

    ``lax.split`` rather than indexing: its gradient is one concatenation, that of indexing a sum of padded arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    pieces = [[piece[0] for piece in jax.lax.split(leaf, (1,) * size)] for leaf in leaves]
    return [structure.unflatten([column[i] for column in pieces]) for i in range(size)]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of the products. The configuration must be resolved: ``auto`` is an error of the code."""
    assert config.dtype != "auto", "resolve model.dtype before building the model"
    return jnp.dtype(config.dtype)


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Draws the initial parameters, float32: N(0, 0.02^2), biases 0, gains 1 (paper, section 4.1)."""
    model = GPT(config, compute_dtype(config), nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind(config: ModelConfig, params: Params) -> GPT:
    """The module with the given parameters, inside or outside of a traced function."""
    definition, _ = nnx.split(_abstract(config))
    return nnx.merge(definition, params)


def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axis names of every parameter, a tuple for each, in the structure of the parameters."""
    state = nnx.state(_abstract(config), nnx.Param)
    axes = jax.tree.map(lambda p: p.axes, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.to_pure_dict(axes)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return nnx.to_pure_dict(nnx.state(_abstract(config), nnx.Param))


def _abstract(config: ModelConfig) -> GPT:
    return nnx.eval_shape(lambda: GPT(config, compute_dtype(config), nnx.Rngs(params=0)))


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the model learns."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: ModelConfig, context_length: int) -> int:
    """Model FLOPs of one training token, forward and backward, without recomputation.

    Six for each weight of a matrix product (the output projection among them, the embedding look-ups not), and
    12 L D T for the scores and the attended values (Chowdhery et al. 2022, PaLM, appendix B).
    """
    widths = 2 * config.embed_dim + 2 * config.kv_heads * config.head_dim  # of queries and output; keys and values
    widths += (3 if config.activation == "swiglu" else 2) * config.mlp_dim
    matrices = (config.num_layers * widths + config.vocab_size) * config.embed_dim
    return 6 * matrices + 12 * config.num_layers * config.embed_dim * context_length
