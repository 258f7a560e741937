"""The tensors of the public format (``OpenAIGPTLMHeadModel`` of transformers): names, shapes, both directions.

Kernels are (inputs, outputs) in both, so nothing is transposed; the public format joins queries, keys and values in
one kernel and keeps the layers apart. The output projection is the token embedding and is not stored.

Shapes: D embedding, F MLP, L layers, N heads, H head size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.transformer import Params

# Keys whose values the public class can take. In all others it has the paper's choice, which is our default.
_EXPRESSIBLE = frozenset(
    {"vocab_size", "context_length", "num_layers", "embed_dim", "num_heads", "mlp_dim", "dropout", "attention_dropout"}
    | {"dtype", "attention", "scan_layers", "remat", "loss_chunk"}  # how it is computed
    | {"special_tokens", "classifier_dropout"}  # which tokens the last are, and what acts in fine-tuning alone
)

# Of one layer: our module, its public name, and the public names of our parameters of it.
_LAYER = (
    ("ln_1", "ln_1", {"scale": "weight", "bias": "bias"}),
    ("mlp_in", "mlp.c_fc", {"kernel": "weight", "bias": "bias"}),
    ("mlp_out", "mlp.c_proj", {"kernel": "weight", "bias": "bias"}),
    ("ln_2", "ln_2", {"scale": "weight", "bias": "bias"}),
)
TOKENS, POSITIONS = "tokens_embed.weight", "positions_embed.weight"
PREFIX = "transformer."


def inexpressible(config: ModelConfig) -> list[str]:
    """The keys, with their values, that make a model which the public class cannot be, as ``model.key=value``."""
    default = ModelConfig()
    found = {name: value for name, value in config if name not in _EXPRESSIBLE and value != getattr(default, name)}
    if config.num_kv_heads == config.num_heads:
        found.pop("num_kv_heads", None)
    if config.mlp_dim != 4 * config.embed_dim:
        found["mlp_dim"] = config.mlp_dim
    return [f"model.{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in found.items()]


def public_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name without ``transformer.``, in the order in which they are written."""
    embed, mlp = config.embed_dim, config.mlp_dim
    layer = {
        "attn.c_attn.weight": (embed, 3 * embed),
        "attn.c_attn.bias": (3 * embed,),
        "attn.c_proj.weight": (embed, embed),
        "attn.c_proj.bias": (embed,),
        "ln_1.weight": (embed,),
        "ln_1.bias": (embed,),
        "mlp.c_fc.weight": (embed, mlp),
        "mlp.c_fc.bias": (mlp,),
        "mlp.c_proj.weight": (mlp, embed),
        "mlp.c_proj.bias": (embed,),
        "ln_2.weight": (embed,),
        "ln_2.bias": (embed,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        TOKENS: (config.vocab_size, embed),
        POSITIONS: (config.context_length, embed),
    }
    for index in range(config.num_layers):
        shapes |= {f"h.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def public_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name without ``transformer.``, float32, in the order of :func:`public_shapes`.

    One at a time is on the host, whatever devices the parameters are on.
    """
    yield TOKENS, _to_host(params["embedding"]["token_kernel"])
    yield POSITIONS, _to_host(params["embedding"]["position_kernel"])
    blocks = params["blocks"]
    attention = blocks["attention"]
    for index in range(blocks["ln_1"]["scale"].shape[0]):

        def layer(leaf: Any, index: int = index) -> np.ndarray:
            return _to_host(leaf[index])

        three = [attention[name] for name in ("query", "key", "value")]
        embed = blocks["ln_1"]["scale"].shape[1]
        kernel = [layer(linear["kernel"]).reshape(embed, -1) for linear in three]  # [D, N, H] to [D, D]
        yield f"h.{index}.attn.c_attn.weight", np.concatenate(kernel, axis=1)
        yield f"h.{index}.attn.c_attn.bias", np.concatenate([layer(linear["bias"]).reshape(-1) for linear in three])
        yield f"h.{index}.attn.c_proj.weight", layer(attention["out"]["kernel"]).reshape(-1, embed)
        yield f"h.{index}.attn.c_proj.bias", layer(attention["out"]["bias"])
        for module, public, names in _LAYER:
            for name, public_name in names.items():
                yield f"h.{index}.{public}.{public_name}", layer(blocks[module][name])


def params_from(read: Callable[[str], np.ndarray], config: ModelConfig) -> Params:
    """The parameters as float32 arrays on the host, from tensors that have been checked against the shapes.

    Args:
        read: gives a tensor by its name without ``transformer.``; called once for each.
        config: of the model.
    """
    layers, embed, heads, size = config.num_layers, config.embed_dim, config.num_heads, config.head_dim

    def empty(*shape: int) -> np.ndarray:
        return np.empty((layers, *shape), np.float32)

    names = ("query", "key", "value")
    qkv = {name: {"kernel": empty(embed, heads, size), "bias": empty(heads, size)} for name in names}
    out = {"kernel": empty(heads, size, embed), "bias": empty(embed)}
    blocks: dict[str, Any] = {"attention": {**qkv, "out": out}}
    shapes = public_shapes(config)
    for module, public, names in _LAYER:
        blocks[module] = {name: empty(*shapes[f"h.0.{public}.{public_name}"]) for name, public_name in names.items()}
    for index in range(layers):
        for name, public_name in (("kernel", "weight"), ("bias", "bias")):
            joined = read(f"h.{index}.attn.c_attn.{public_name}")
            for linear, part in zip(qkv.values(), np.split(joined, 3, axis=-1), strict=True):
                linear[name][index] = part.reshape(linear[name].shape[1:])
            out[name][index] = read(f"h.{index}.attn.c_proj.{public_name}").reshape(out[name].shape[1:])
        for module, public, names in _LAYER:
            for name, public_name in names.items():
                blocks[module][name][index] = read(f"h.{index}.{public}.{public_name}")
    embedding = {
        "token_kernel": read(TOKENS).astype(np.float32, copy=False),
        "position_kernel": read(POSITIONS).astype(np.float32, copy=False),
    }
    return {"embedding": embedding, "blocks": blocks}


def _to_host(array: Any) -> np.ndarray:
    return np.asarray(jax.device_get(array), np.float32)
