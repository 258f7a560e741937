"""Weights that were trained elsewhere, as a run: the public format, and the authors' release.

Everything is checked before anything is written, and what is wrong is told in one message.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt1_jax.config import CheckpointConfig, Config, EvaluationConfig, ModelConfig, as_yaml
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.storage import AnyPath, is_remote, write_atomically
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.interop.finetuned import HEADS
from gpt1_jax.interop.layout import POSITIONS, PREFIX, TOKENS, inexpressible, params_from, public_shapes
from gpt1_jax.interop.original import is_original, read_original
from gpt1_jax.interop.original_tokenizer import read_original_tokenizer
from gpt1_jax.interop.safetensors_files import Weights
from gpt1_jax.interop.staging import check_new, in_bucket, staged
from gpt1_jax.model.layers import NORM_EPSILON
from gpt1_jax.outside import parse_json, read_bounded
from gpt1_jax.text.conversation import chat_template, has_chat_tokens
from gpt1_jax.text.tokenizer import MOST_BYTES, Tokenizer, read_tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.checkpoint_orbax import CHAT_TEMPLATE
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.run import CONFIG

TOKENIZER = "tokenizer.model"  # in the run's folder, whichever kind it is
# The public class's names of what our configuration has, and its default of each.
_SIZES = {
    "vocab_size": ("vocab_size", 40478),
    "n_positions": ("context_length", 512),
    "n_embd": ("embed_dim", 768),
    "n_layer": ("num_layers", 12),
    "n_head": ("num_heads", 12),
}
_DROPOUTS = {"resid_pdrop": "dropout", "attn_pdrop": "attention_dropout"}
_TANH_GELU = ("gelu", "gelu_new")
# Buffers that old versions of the public library stored.
_BUFFER = re.compile(r"h\.\d+\.attn\.bias|position_ids")
_HEAD = "lm_head.weight"
_MOST_JSON = 10_000_000  # bytes of config.json
_MOST_PROBLEMS = 100  # told at once


@dataclass(frozen=True)
class _Source:
    """A model elsewhere.

    Attributes:
        values: what it fixes of our configuration, by dotted key.
        shapes: of its tensors, by the names that they are stored under.
        read: gives a tensor by that name, float32.
        tokenizer: its tokenizer.
        problems: what is wrong with it.
        tied: whether the output projection is the token embedding though it is not stored.
        chat_template: of its conversations, Jinja, if it has one.
    """

    values: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokenizer: Tokenizer
    problems: list[str]
    tied: bool = True
    chat_template: str | None = None


def import_run(
    folder: Path, run_dir: AnyPath, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> Config:
    """Makes a run of a model that was trained elsewhere; the run is there whole or not at all.

    Args:
        folder: with a model in the public format, or the authors' release.
        run_dir: the run to make, local or in a bucket.
        overrides: of the run's configuration, ``section.key=value`` each, but for what the model itself fixes.
        say: prints a line, on what of the model is left out.

    Returns:
        The run's configuration.

    Raises:
        UserError: if the run exists, or the model is not one that this project can be; naming everything that is wrong.
        DamagedError: if a file is missing, truncated or altered.
    """
    run_dir = epath.Path(run_dir)
    check_new(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one that holds a model (docs/interop.md)")
    source = _read_original(folder) if is_original(folder) else _read_public(folder)
    values = {**source.values, "model.special_tokens": _appended(source.tokenizer)}
    config, _ = resolve(_run_config(values, folder, run_dir, overrides))
    stored, problems = _check_tensors(source, config.model)
    if source.tokenizer.vocab_size != config.model.vocab_size:
        problems.append(
            f"the tokenizer has {source.tokenizer.vocab_size} tokens, but the model's vocabulary is "
            f"{config.model.vocab_size}"
        )
    _refuse(folder, source.problems + problems)
    if heads := [name for name in HEADS if name in source.shapes]:
        say(
            f"{folder}: its classifier ({', '.join(heads)}) is left out: a run gets one by 'gpt1 finetune'; the "
            "transformer below it is imported"
        )
    template = source.chat_template
    if template and not (has_chat_tokens(source.tokenizer) and template == chat_template(source.tokenizer)):
        say(f"{folder}: its chat template is left out: conversations have another form here (docs/finetuning.md)")
        template = None
    params = params_from(lambda name: source.read(stored[name]), config.model)
    with in_bucket(run_dir, say) if is_remote(run_dir) else staged(Path(run_dir)) as made:
        files = RunFiles(
            config.to_yaml(), source.tokenizer.to_bytes(), examples=0, data=None, corpus=None, chat_template=template
        )
        with Checkpoints(made, CheckpointConfig()) as checkpoints:
            checkpoints.save_imported(params, files)
            checkpoints.confirm(0)
        write_atomically(made / TOKENIZER, files.tokenizer)
        write_atomically(made / CONFIG, files.config.encode())
    return config


def _appended(tokenizer: Tokenizer) -> int:
    """How many of the last tokens are special: those that fine-tuning appended."""
    special = {tokenizer.special_id(name) for name in tokenizer.special_tokens}
    return next(count for count in range(len(special) + 1) if tokenizer.vocab_size - 1 - count not in special)


def _read_public(folder: Path) -> _Source:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no model here: neither config.json, as transformers writes it, nor params_shapes.json, as in "
            "the authors' release"
        )
    public = _read_json(path)
    values, problems = _public_values(public)
    _refuse(folder, problems)  # without sizes nothing else can be checked
    weights = Weights(folder)
    tokenizer, differences = _public_tokenizer(folder, public)
    problems = [*_departures(public), *weights.problems(), *differences]
    tied = public.get("tie_word_embeddings", True) is not False
    return _Source(values, weights.shapes, weights.read, tokenizer, problems, tied, _chat_template(folder))


def _read_original(folder: Path) -> _Source:
    tensors, tokenizer = read_original(folder)
    names = {name.removeprefix(PREFIX): name for name in tensors}
    for needed in (TOKENS, POSITIONS):
        assert needed in names, needed
    vocab_size, embed_dim = tensors[names[TOKENS]].shape
    layers = {name.split(".")[1] for name in names if name.startswith("h.")}
    values = {
        "model.vocab_size": vocab_size,
        "model.context_length": tensors[names[POSITIONS]].shape[0],
        "model.embed_dim": embed_dim,
        "model.num_layers": len(layers),
        "model.mlp_dim": 4 * embed_dim,
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _Source(values, shapes, tensors.__getitem__, tokenizer, [])


def _public_values(public: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What config.json fixes of our configuration, and what in it cannot be read."""
    values: dict[str, Any] = {}
    problems = []
    if public.get("model_type") != "openai-gpt":
        problems.append(f"config.json: model_type={json.dumps(public.get('model_type'))}: expected openai-gpt")
    for name, (ours, default) in _SIZES.items():
        size = public.get(name, default)
        if type(size) is not int or size < 1:
            problems.append(f"config.json: {name}={json.dumps(size)}: expected a whole number above 0")
        values[f"model.{ours}"] = size
    for name, ours in _DROPOUTS.items():
        rate = public.get(name, getattr(ModelConfig(), ours))
        if type(rate) not in (int, float) or not 0 <= rate < 1:
            problems.append(f"config.json: {name}={json.dumps(rate)}: expected a number from 0 to below 1")
        values[f"model.{ours}"] = rate
    if not problems:
        values["model.mlp_dim"] = 4 * values["model.embed_dim"]
        if values["model.embed_dim"] % values["model.num_heads"]:
            problems.append(f"config.json: n_head={public.get('n_head')} does not divide n_embd={public.get('n_embd')}")
    context = _own(public).get("context_length", values["model.context_length"])
    if not problems and type(context) is int and 1 < context < values["model.context_length"]:
        values["train.context_length"] = context  # what the positions were trained for
    return values, problems


def _departures(public: Mapping[str, Any]) -> list[str]:
    """Where config.json says that the model computes something else than ours."""
    problems = []
    if (afn := public.get("afn", "gelu")) not in _TANH_GELU:
        problems.append(f"config.json: afn={json.dumps(afn)}: expected gelu, which is its tanh form")
    if (epsilon := public.get("layer_norm_epsilon", NORM_EPSILON)) != NORM_EPSILON:
        problems.append(f"config.json: layer_norm_epsilon={json.dumps(epsilon)}: expected {NORM_EPSILON}")
    if (embedding := public.get("embd_pdrop", 0.1)) != (residual := public.get("resid_pdrop", 0.1)):
        problems.append(
            f"config.json: embd_pdrop={json.dumps(embedding)} and resid_pdrop={json.dumps(residual)}: here one key, "
            "model.dropout, sets both; make them equal in the file (they act in training alone)"
        )
    return problems


def _public_tokenizer(folder: Path, public: Mapping[str, Any]) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the folder, ours if it has one, and where its forms disagree."""
    own, fast = folder / TOKENIZER, folder / "tokenizer.json"
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if own.is_file():
        tokenizer = read_tokenizer(own)
        problems = []
        if fast.is_file() and (size := _fast_size(fast)) != tokenizer.vocab_size:
            problems.append(f"{own.name} has {tokenizer.vocab_size} tokens, but {fast.name} has {size}")
        expected = _own(public).get("tokenizer_fingerprint", tokenizer.fingerprint)
        if expected != tokenizer.fingerprint:
            problems.append(
                f"{own.name} has the SHA-256 {tokenizer.fingerprint}, but config.json says that the model was trained "
                f"with {expected}"
            )
        return tokenizer, problems
    if vocabulary.is_file() and merges.is_file():
        return read_original_tokenizer(vocabulary, merges), []
    if fast.is_file():
        return read_tokenizer(fast), []
    raise UserError(
        f"{folder}: no tokenizer here; expected {own.name}, {vocabulary.name} with {merges.name}, or {fast.name}"
    )


def _chat_template(folder: Path) -> str | None:
    """The chat template, from either of the two places where transformers writes it."""
    file, settings = folder / CHAT_TEMPLATE, folder / "tokenizer_config.json"
    if file.exists():
        return file.read_text(encoding="utf-8", errors="replace")  # it is compared, and never used as it is
    found = _read_json(settings).get("chat_template") if settings.exists() else None
    return found if isinstance(found, str) else None


def _fast_size(path: Path) -> int:
    try:
        return tokenizers.Tokenizer.from_buffer(read_bounded(path, MOST_BYTES)).get_vocab_size()
    except Exception as error:  # of any type: the library raises bare ones
        raise DamagedError(f"{path}: not a tokenizer of the tokenizers library: {error}; fetch it again") from None


def _run_config(values: Mapping[str, Any], folder: Path, run_dir: epath.Path, overrides: Sequence[str]) -> Config:
    """The run's configuration: what the model fixes, the user's overrides, and the defaults.

    Raises:
        UserError: if an override is not valid, or contradicts the model.
    """
    fixed = {
        "name": run_dir.name,
        "runs_dir": str(run_dir.parent),
        "data.tokenizer.file": str(run_dir / TOKENIZER),
        **{key: value for key, value in values.items() if key not in _open_keys()},
    }
    context = values.get("train.context_length", values["model.context_length"])
    sample_tokens = max(1, min(EvaluationConfig().sample_tokens, context // 2))
    start = {**values, **fixed, "evaluation.sample_tokens": sample_tokens}
    config = parse_config(as_yaml(unflatten_dict(start, sep=".")), str(run_dir / CONFIG), overrides)
    found = flatten_dict(config.model_dump(mode="json"), sep=".")
    problems = [
        f"{key}={json.dumps(found[key])}: it is {json.dumps(value)}, by the imported model or the run's path"
        for key, value in fixed.items()
        if found[key] != value
    ]
    others = [departure for departure in inexpressible(config.model) if not departure.startswith("model.mlp_dim")]
    problems += [f"{departure}: imported weights have the paper's architecture" for departure in others]
    _refuse(folder, problems)
    return config


def _open_keys() -> set[str]:
    """What a model elsewhere suggests, and an override may change: it acts in training alone."""
    return {f"model.{key}" for key in _DROPOUTS.values()} | {"train.context_length"}


def _check_tensors(source: _Source, model: ModelConfig) -> tuple[dict[str, str], list[str]]:
    """The stored name of every tensor that we need, by its name without prefix, and what does not fit."""
    expected = public_shapes(model)
    stored: dict[str, str] = {}
    problems = []
    head = None
    for name, shape in source.shapes.items():
        short = name.removeprefix(PREFIX)
        if short in stored:
            problems.append(f"{short}: there twice, with and without the prefix {PREFIX}")
        elif short in expected:
            stored[short] = name
            problems += _of_shape(name, shape, expected[short])
        elif name == _HEAD:
            head = name
        elif name not in HEADS and not _BUFFER.fullmatch(short):
            problems.append(f"{name}: a tensor that GPT-1 does not have, of shape {_shown(shape)}")
    if head is not None and TOKENS not in stored and source.tied:
        stored[TOKENS] = head  # of the two that are one, some of the public classes store this
        head = None
        problems += _of_shape(_HEAD, source.shapes[_HEAD], expected[TOKENS])
    problems += [
        f"{PREFIX}{short}: missing; expected the shape {_shown(shape)}"
        for short, shape in expected.items()
        if short not in stored
    ]
    return stored, problems + _check_head(source, head, stored)


def _of_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> list[str]:
    if tuple(found) == tuple(expected):
        return []
    return [f"{name}: expected the shape {_shown(expected)}, found {_shown(found)}"]


def _check_head(source: _Source, head: str | None, stored: Mapping[str, str]) -> list[str]:
    """Whether the output projection is the token embedding."""
    if head is None:
        return [] if source.tied else [f"config.json: tie_word_embeddings=false, but {_HEAD} is missing"]
    if TOKENS not in stored or np.array_equal(source.read(head), source.read(stored[TOKENS])):
        return []
    return [
        f"{_HEAD}: differs from {TOKENS}, found the shape {_shown(source.shapes[head])}; here the output "
        "projection is the token embedding, as in the paper"
    ]


def _own(public: Mapping[str, Any]) -> Mapping[str, Any]:
    """What our export added to config.json."""
    own = public.get("gpt1_jax")
    return own if isinstance(own, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_bounded(path, _MOST_JSON))
    except ValueError as error:  # not JSON, not UTF-8, or too long
        raise DamagedError(f"{path}: not JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: expected a JSON object; fetch it again")
    return value


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        shown = [f"  {problem}" for problem in problems[:_MOST_PROBLEMS]]
        if left := len(problems) - len(shown):
            shown.append(f"  and {left:,} more")
        raise UserError("\n".join([f"{folder}: cannot be imported:", *shown]))


def _shown(shape: Sequence[int]) -> str:
    return json.dumps(list(shape))
