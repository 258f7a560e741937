"""A run as a folder that the public ``transformers`` library loads with its Auto classes; needs neither it nor torch.

Several traps of the format change logits or tokens without a word; docs/interop.md lists them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt1_jax.errors import UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json, tokenizer_config
from gpt1_jax.interop.layout import PREFIX, inexpressible, public_shapes, public_tensors
from gpt1_jax.interop.model_card import model_card
from gpt1_jax.interop.safetensors_files import write_weights
from gpt1_jax.interop.staging import staged
from gpt1_jax.model.layers import INIT_STD, NORM_EPSILON
from gpt1_jax.text.conversation import END, has_chat_tokens
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer
from gpt1_jax.training.run import Run

CONFIG, TOKENIZER, OWN_TOKENIZER = "config.json", "tokenizer.json", "tokenizer.model"
OWN_KEY = "gpt1_jax"  # in config.json: what the public format has no key for
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def export_huggingface(run: Run, out: Path, figures: Mapping[str, Any], max_shard_bytes: int) -> list[str]:
    """Writes a run in the public format; the folder is there whole or not at all.

    Args:
        run: the run; its weights are fetched from the devices one tensor at a time.
        out: the folder to make.
        figures: of the run's final evaluation, for the model card; may be empty.
        max_shard_bytes: most bytes of tensors in one file, unless a single tensor has more.

    Returns:
        The names of the files with weights.

    Raises:
        UserError: if the folder is not empty, or the public class cannot be this model; before anything is written.
    """
    check_expressible(run)
    tokenizer_json = fast_tokenizer_json(run.tokenizer)
    tokenizer_settings = tokenizer_config(FastTokenizer(tokenizer_json), run.config.context_length)
    special = {key: tokenizer_settings[key] for key in _SPECIAL_TOKENS if tokenizer_settings.get(key)}
    shapes = {PREFIX + name: shape for name, shape in public_shapes(run.config.model).items()}
    with staged(out) as folder:
        names = write_weights(
            folder, shapes, ((PREFIX + name, tensor) for name, tensor in public_tensors(run.params)), max_shard_bytes
        )
        _write_json(folder / CONFIG, public_config(run))
        _write_json(folder / "generation_config.json", _generation_config(run))
        _write_json(folder / "tokenizer_config.json", tokenizer_settings)
        _write_json(folder / "special_tokens_map.json", special)
        (folder / TOKENIZER).write_bytes(tokenizer_json)
        if isinstance(run.tokenizer, SentencePieceTokenizer):
            (folder / OWN_TOKENIZER).write_bytes(run.tokenizer.to_bytes())
        (folder / "README.md").write_text(model_card(run, figures, out.absolute().name), encoding="utf-8")
    return names


def check_expressible(run: Run) -> None:
    """Checks that the public class can be this model.

    Raises:
        UserError: naming every key that is in the way.
    """
    found = inexpressible(run.config.model)
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
        "architectures": ["OpenAIGPTLMHeadModel"],
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
        OWN_KEY: {
            "run": run.config.name,
            "step": run.step,
            "context_length": run.config.context_length,
            "tokenizer_fingerprint": run.tokenizer.fingerprint,
        },
    }


def _generation_config(run: Run) -> dict[str, Any]:
    separator = run.tokenizer.separator_id
    ends = [separator, run.tokenizer.special_id(END)] if has_chat_tokens(run.tokenizer) else separator
    # The public class has no cache of keys and values.
    return {"bos_token_id": separator, "eos_token_id": ends, "pad_token_id": separator, "use_cache": False}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
