"""A run as a folder that the public ``transformers`` library loads with its Auto classes; needs neither it nor torch.

Several traps of the format change logits or tokens without a word; docs/interop.md lists them.
"""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from gpt1_jax.errors import UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json, tokenizer_config
from gpt1_jax.interop.finetuned import (
    LANGUAGE_MODEL,
    architecture,
    head_config,
    head_tensors,
    merged_run,
    with_input_form,
)
from gpt1_jax.interop.layout import PREFIX, inexpressible, public_shapes, public_tensors
from gpt1_jax.interop.model_card import model_card
from gpt1_jax.interop.safetensors_files import write_weights
from gpt1_jax.interop.staging import staged
from gpt1_jax.interop.task_card import task_card
from gpt1_jax.model.layers import INIT_STD, NORM_EPSILON
from gpt1_jax.text.conversation import END
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.training.run import Run

CONFIG, TOKENIZER, OWN_TOKENIZER = "config.json", "tokenizer.json", "tokenizer.model"
OWN_KEY = "gpt1_jax"  # in config.json: what the public format has no key for
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def export_huggingface(run: Run, out: Path, figures: Mapping[str, Any], max_shard_bytes: int) -> list[str]:
    """Writes a run in the public format; the folder is there whole or not at all.

    Args:
        run: the run; its weights are fetched from the devices one tensor at a time.
        out: the folder to make.
        figures: of the run's final evaluation, or of a fine-tuned run its results, for the model card; may be empty.
        max_shard_bytes: most bytes of tensors in one file, unless a single tensor has more.

    Returns:
        The names of the files with weights.

    Raises:
        UserError: if the folder is not empty, or the public class cannot be this model; before anything is written.
    """
    check_expressible(run)
    run, task = merged_run(run), run.config.task
    tokenizer_json = fast_tokenizer_json(run.tokenizer)
    if task:
        tokenizer_json = with_input_form(tokenizer_json, task, run.tokenizer)
    heads = head_tensors(run)
    shapes = {PREFIX + name: shape for name, shape in public_shapes(run.config.model).items()}
    shapes |= {name: tensor.shape for name, tensor in heads.items()}
    tensors = chain(((PREFIX + name, tensor) for name, tensor in public_tensors(run.params)), heads.items())
    with staged(out) as folder:
        names = write_weights(folder, shapes, tensors, max_shard_bytes)
        _write_json(folder / CONFIG, public_config(run))
        if architecture(run) == LANGUAGE_MODEL:
            _write_json(folder / "generation_config.json", _generation_config(run))
        settings = _tokenizer_settings(run, tokenizer_json)
        _write_json(folder / "tokenizer_config.json", settings)
        special = {key: settings[key] for key in _SPECIAL_TOKENS if settings.get(key)}
        _write_json(folder / "special_tokens_map.json", special)
        (folder / TOKENIZER).write_bytes(tokenizer_json)
        if tokenizer_json != (own := run.tokenizer.to_bytes()):
            (folder / OWN_TOKENIZER).write_bytes(own)
        name = out.absolute().name
        card = task_card(run, figures, name) if task else model_card(run, figures, name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return names


def check_expressible(run: Run) -> None:
    """Checks that the public class can be this model.

    Raises:
        UserError: naming every key that is in the way.
    """
    # Low-rank updates are merged, and the classifier is the head's.
    found = inexpressible(run.config.model.model_copy(update={"lora": None, "num_classes": None}))
    if found:
        raise UserError(
            f"{run.path}: the public class of GPT-1 would compute other logits from these weights, for it has the "
            "paper's architecture alone, with model.mlp_dim four times model.embed_dim; this run has "
            f"{', '.join(found)}; export it with --format stablehlo"
        )


def public_config(run: Run) -> dict[str, Any]:
    """What config.json says."""
    model, separator = run.config.model, run.tokenizer.separator_id
    return {
        "architectures": [architecture(run)],
        "model_type": "openai-gpt",
        "vocab_size": model.vocab_size,
        "n_positions": model.context_length,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "afn": "gelu",  # its tanh form; "gelu_new" names the same in other classes and nothing in this one
        "layer_norm_epsilon": NORM_EPSILON,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": INIT_STD,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **head_config(run),
        OWN_KEY: {
            "run": run.config.name,
            "step": run.step,
            "context_length": run.config.context_length,
            "tokenizer_fingerprint": run.tokenizer.fingerprint,
        },
    }


def _generation_config(run: Run) -> dict[str, Any]:
    separator = run.tokenizer.separator_id
    end = run.tokenizer.special_id(END) if run.chat_template else separator
    # The public class has no cache of keys and values.
    return {"bos_token_id": separator, "eos_token_id": end, "pad_token_id": separator, "use_cache": False}


def _tokenizer_settings(run: Run, tokenizer_json: bytes) -> dict[str, Any]:
    settings = tokenizer_config(FastTokenizer(tokenizer_json), run.config.context_length, run.chat_template)
    if run.config.model.num_classes:
        # Positions count from the first column, so padding stands on the right, where no token sees it.
        settings |= {"pad_token": settings["eos_token"], "padding_side": "right"}
    return settings


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
