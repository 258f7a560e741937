"""A run as compiled functions in StableHLO, called from plain JAX with none of this project's code.

The batch, the number of tokens and the size of the cache are symbolic; the weights are arguments, in weights.npz.

Shapes: B batch, T tokens of one call, S slots of the cache, V vocabulary.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Bool

from gpt1_jax.config import ModelConfig
from gpt1_jax.interop.finetuned import INPUTS, labels_of, merged_run
from gpt1_jax.interop.staging import staged
from gpt1_jax.model.attention import KVCache, cache_mask
from gpt1_jax.model.transformer import Params, bind
from gpt1_jax.task_config import MultipleChoice, Similarity
from gpt1_jax.text.special_tokens import CLASSIFY
from gpt1_jax.training.run import Run

PLATFORMS = ("cpu", "tpu", "cuda")
WEIGHTS, MANIFEST, TOKENIZER = "weights.npz", "manifest.json", "tokenizer.model"
Dtype = Literal["float32", "bfloat16"]
_Flat = dict[str, Any]  # arrays by dotted name


@dataclass(frozen=True)
class _Function:
    """One exported function: what it does, its exported form, and the names of its arguments and results."""

    does: str
    exported: export.Exported
    inputs: dict[str, Any]
    outputs: tuple[str, ...]


def export_stablehlo(run: Run, out: Path, dtype: Dtype = "float32") -> list[str]:
    """Writes the forward pass, unless the model is a masked one the decoding step, and the classifier if it has one.

    Args:
        run: the run.
        out: the folder to make; it is there whole or not at all.
        dtype: of the products, and of the cache. The weights are float32.

    Returns:
        The names of the functions.

    Raises:
        UserError: if the folder is not empty.
    """
    run = merged_run(run)
    # A loop over the layers compiles sooner, and reads the stacked weights where they are.
    config = run.config.model.model_copy(update={"dtype": dtype, "scan_layers": True, "remat": "none"})
    with staged(out) as folder:
        functions = {"forward": _forward(config, run.params)}
        if config.objective != "masked":
            functions["decode"] = _decode(config, run.params)
        if config.num_classes:
            functions["classify"] = _classify(run, config)
        for name, function in functions.items():
            (folder / _file(name)).write_bytes(function.exported.serialize())
        _write_weights(folder / WEIGHTS, flatten_dict(run.params, sep="."))
        (folder / TOKENIZER).write_bytes(run.tokenizer.to_bytes())
        manifest = _manifest(run, config, functions)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(run, config, out.absolute().name), encoding="utf-8")
    return list(functions)


def _forward(config: ModelConfig, params: Params) -> _Function:
    def forward(weights: _Flat, tokens_BT: Array) -> Array:
        model = bind(config, unflatten_dict(weights, sep="."))
        x_BTD, _ = model(tokens_BT, mask_BTS=_visible(config, tokens_BT.shape[1]))
        return model.logits(x_BTD)

    batch, length = export.symbolic_shape("b, t", constraints=[f"t <= {config.context_length}"])
    inputs = {"weights": _abstract_weights(params), "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32)}
    does = "tokens [b, t] to the scores of the token after each, [b, t, vocabulary]"
    if config.objective == "masked":
        does = f"tokens [b, t], {config.mask_id} for a hidden one, to the scores of each, [b, t, vocabulary]"
    return _exported(forward, does, inputs, ("logits",))


def _decode(config: ModelConfig, params: Params) -> _Function:
    def decode(
        weights: _Flat, cache: _Flat, tokens_BT: Array, slot: Array, pads_B: Array
    ) -> tuple[Array, dict[str, Array]]:
        model = bind(config, unflatten_dict(weights, sep="."))
        slots = cache["k"].shape[2]
        slots_BT = slot + jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        last_BT = slots_BT[:, -1:] if config.objective == "prefix" else slots_BT
        x_BTD, new = model(
            tokens_BT,
            positions_BT=jnp.maximum(slots_BT - pads_B[:, None], 0),
            mask_BTS=cache_mask(last_BT, pads_B, slots),
            cache=KVCache(cache["k"], cache["v"]),
            slot=slot,
        )
        assert new is not None
        return model.logits(x_BTD[:, -1]), {"k": new[0], "v": new[1]}

    batch, length, slots = export.symbolic_shape("b, t, s", constraints=["t <= s"])
    shape = jax.eval_shape(lambda params: bind(config, params).empty_cache(1, 1), params)[0]
    cache = jax.ShapeDtypeStruct((shape.shape[0], batch, slots, *shape.shape[3:]), shape.dtype)
    inputs = {
        "weights": _abstract_weights(params),
        "cache": {"k": cache, "v": cache},
        "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "slot": jax.ShapeDtypeStruct((), jnp.int32),
        "pads": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    does = (
        "writes t tokens of each row into the cache from the slot on; gives the scores of the token after the last of "
        "them, [b, vocabulary], and the new cache. Slots below pads are padding on the left of a row"
    )
    if config.objective == "prefix":
        does += ". The tokens of one call see each other: give a whole prompt in one call, then token by token"
    return _exported(decode, does, inputs, ("logits", "cache"))


def _classify(run: Run, config: ModelConfig) -> _Function:
    def classify(weights: _Flat, tokens_BT: Array, last_B: Array) -> Array:
        model = bind(config, unflatten_dict(weights, sep="."))
        x_BTD, _ = model(tokens_BT, mask_BTS=_visible(config, tokens_BT.shape[1]))
        return model.classify(jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0])

    batch, length = export.symbolic_shape("b, t", constraints=[f"t <= {config.context_length}"])
    inputs = {
        "weights": _abstract_weights(run.params),
        "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "last": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    does = f"tokens [b, t], and the place of {CLASSIFY} in each row, [b], to {_answers(run)}, [b, classes]"
    return _exported(classify, does, inputs, ("scores",))


def _answers(run: Run) -> str:
    """What the classifier's outputs are."""
    task = run.config.task
    assert task is not None
    if isinstance(task, MultipleChoice):
        return "the score of one answer"
    found = "a number" if task.is_number else f"the scores of {', '.join(labels_of(task))}"
    return f"{found} in one order, to be added to that of the other order" if isinstance(task, Similarity) else found


def _exported(function: Callable, does: str, inputs: dict[str, Any], outputs: tuple[str, ...]) -> _Function:
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*inputs.values())
    return _Function(does, exported, inputs, outputs)


def _visible(config: ModelConfig, length: Any) -> Bool[Array, "1 T S"]:
    """Given, because the model's own causal attention works in blocks of a known number of tokens."""
    if config.objective == "masked":
        return jnp.ones((1, 1, length), bool)
    positions_T = jnp.arange(length)
    return (positions_T <= positions_T[:, None])[None]


def _abstract_weights(params: Params) -> _Flat:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flatten_dict(params, sep="."))


def _write_weights(path: Path, weights: _Flat) -> None:
    """As :func:`numpy.savez`, one array at a time on the host."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, leaf in weights.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(jax.device_get(leaf)), allow_pickle=False)


def _file(function: str) -> str:
    return f"{function}.stablehlo"


def _manifest(run: Run, config: ModelConfig, functions: Mapping[str, _Function]) -> dict[str, Any]:
    def described(leaf: Any) -> dict[str, Any]:
        shape = [dim if isinstance(dim, int) else str(dim) for dim in leaf.shape]
        return {"shape": shape, "dtype": str(leaf.dtype)}

    def arguments(function: _Function) -> dict[str, Any]:
        weightless = {name: value for name, value in function.inputs.items() if name != "weights"}
        return {"weights": WEIGHTS, **jax.tree.map(described, weightless)}

    def results(function: _Function) -> dict[str, Any]:
        tree = jax.tree.unflatten(function.exported.out_tree, function.exported.out_avals)
        parts = tree if len(function.outputs) > 1 else (tree,)
        return dict(zip(function.outputs, jax.tree.map(described, tuple(parts)), strict=True))

    return {
        "run": run.config.name,
        "step": run.step,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "separator_id": run.tokenizer.separator_id,
        "special_tokens": {name: run.tokenizer.special_id(name) for name in run.tokenizer.special_tokens},
        "labels": list(labels_of(run.config.task)),
        "tokenizer_fingerprint": run.tokenizer.fingerprint,
        "functions": {
            name: {"file": _file(name), "does": f.does, "arguments": arguments(f), "results": results(f)}
            for name, f in functions.items()
        },
        "weights": {name: described(leaf) for name, leaf in flatten_dict(run.params, sep=".").items()},
    }


def _readme(run: Run, config: ModelConfig, name: str) -> str:
    masked = config.objective == "masked"
    notes = {
        "causal": "",
        "masked": f"\nThe model fills in what is hidden: {config.mask_id} stands for a hidden token.\n",
        "prefix": (
            "\nThe model was trained on texts whose beginning is seen whole. `decode` lets the tokens of one call see\n"
            "each other, so give it a prompt in one call; `forward` lets no token see a later one.\n"
        ),
    }
    examples = _FORWARD_EXAMPLE + _DECODE_EXAMPLE * (not masked) + _CLASSIFY_EXAMPLE * bool(config.num_classes)
    return f"""# {name}

Step {run.step:,} of the gpt1_jax run `{run.config.name}`, as functions in StableHLO, lowered for
{", ".join(PLATFORMS)}. They need `jax`, and `flatbuffers`, with which jax reads them.

`{MANIFEST}` gives the shape of every argument and result. The batch `b`, the number of tokens `t` (at most
{config.context_length}) and the slots `s` are yours to choose. Products are in {config.dtype}, logits are float32.
`{TOKENIZER}` is the serialized tokenizer.

In this folder:

```python
{examples}```
{notes[config.objective]}{_task_note(run)}"""


def _task_note(run: Run) -> str:
    finetune = run.config.finetune
    if finetune is None:
        return ""
    note = (
        f"\nThe model was fine-tuned on `{finetune.name}`. It reads {INPUTS[finetune.task.form]};\n"
        f"`{MANIFEST}` has the numbers of these tokens under `special_tokens`.\n"
    )
    if run.config.model.num_classes:
        note += f"`classify` gives {_answers(run)}.\n"
    return note


_FORWARD_EXAMPLE = """import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

manifest = json.loads(Path("manifest.json").read_text())
with np.load("weights.npz") as archive:
    weights = {name: jax.device_put(archive[name]) for name in archive}


def load(name):
    content = Path(manifest["functions"][name]["file"]).read_bytes()
    return jax.jit(export.deserialize(bytearray(content)).call)


# Scores of the next token after each of two texts of five tokens.
forward = load("forward")
tokens = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
logits = forward(weights, tokens)
print(logits.shape)
"""

_DECODE_EXAMPLE = """
# Four more tokens of each, greedily, with a cache. Shorter prompts are padded on the left, by so many slots.
decode = load("decode")
batch, length, new = *tokens.shape, 4
spec = manifest["functions"]["decode"]["arguments"]["cache"]["k"]
layers, _, _, heads, size = spec["shape"]
shape = (layers, batch, length + new, heads, size)
cache = {part: jnp.zeros(shape, spec["dtype"]) for part in ("k", "v")}
pads = np.array([0, 2], np.int32)
logits, cache = decode(weights, cache, tokens, np.int32(0), pads)
for slot in range(length, length + new):
    token = np.asarray(logits.argmax(-1), np.int32)
    print(slot, token)
    logits, cache = decode(weights, cache, token[:, None], np.int32(slot), pads)
"""

_CLASSIFY_EXAMPLE = """
# What the classifier makes of each, padded on the right: it reads at the place of `_classify_`.
classify = load("classify")
last = np.array([4, 2], np.int32)
print(classify(weights, tokens, last).shape)
"""
