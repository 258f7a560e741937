"""The train step in JAX and in torch: forward, backward, clipping by global norm and AdamW.

Each peer takes the sizes, rates and dtype of a configuration of this project.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from gpt1_jax.config import Config


class Step(NamedTuple):
    """A train step that is ready."""

    steps: Callable[[int], float]  # makes so many, waits for the device once, at the end, and returns the loss
    parameters: int
    peak_bytes: Callable[[], int | None]  # of the device's memory, so far; None: not known


def gpt1_jax(config: Config) -> Step:
    """This project's step, as the loop calls it."""
    import jax
    import numpy as np

    from gpt1_jax.model.sharding import batch_sharding
    from gpt1_jax.model.transformer import num_parameters
    from gpt1_jax.training.choices import resolve
    from gpt1_jax.training.hardware import keep_freed_memory
    from gpt1_jax.training.mesh import make_mesh
    from gpt1_jax.training.optimizer import make_optimizer
    from gpt1_jax.training.state import init_state
    from gpt1_jax.training.step import compile_train_step

    keep_freed_memory()
    config, _ = resolve(config)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step_fn = compile_train_step(config, optimizer, mesh, separator_id=0)
    state = init_state(config, optimizer, mesh)
    batch = jax.device_put(_tokens(config, config.context_length + 1).astype(np.int32), batch_sharding(mesh))

    def steps(count: int) -> float:
        nonlocal state
        metrics = {}
        for _ in range(count):
            state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def peak_bytes() -> int | None:
        statistics = jax.devices()[0].memory_stats()
        return statistics and statistics["peak_bytes_in_use"]

    return Step(steps, num_parameters(config.model), peak_bytes)


def torch_gpt1(config: Config) -> Step:
    """GPT-1 of transformers as it comes: the same model, not compiled, with an attention of separate operations."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = config.model
    sizes = {"n_positions": model.context_length, "n_embd": model.embed_dim, "n_layer": model.num_layers}
    rates = {"resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": model.attention_dropout}
    settings = OpenAIGPTConfig(vocab_size=model.vocab_size, n_head=model.num_heads, **sizes, **rates)
    return _torch_step(OpenAIGPTLMHeadModel(settings), config)


def torch_gpt2(config: Config) -> Step:
    """GPT-2 of transformers at this size, as fast as torch makes it.

    With torch.compile, scaled-dot-product attention without a mask, and a vocabulary padded to a multiple of 64, for
    which matrix products are much faster; the padding does not count as FLOPs.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # As "sdpa" it would be given a mask inside torch.compile (before torch 2.14), and with a mask torch cannot use its
    # fastest kernels. For a name that transformers does not know no mask is made, and without one it is causal.
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)

    model = config.model
    sizes = {"n_positions": model.context_length, "n_embd": model.embed_dim, "n_layer": model.num_layers}
    rates = {"resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": model.attention_dropout}
    settings = GPT2Config(
        vocab_size=-(-model.vocab_size // 64) * 64,
        n_head=model.num_heads,
        n_inner=model.mlp_dim,
        use_cache=False,
        **sizes,
        **rates,
    )
    mode = os.environ.get("TORCH_COMPILE_MODE", "default")
    gpt2 = AutoModelForCausalLM.from_config(settings, attn_implementation="causal_sdpa")
    return _torch_step(gpt2, config, lambda model: torch.compile(model, mode=mode))


def _torch_step(model: Any, config: Config, compiled: Callable[[Any], Any] = lambda model: model) -> Step:
    """A step of a torch model, with float32 parameters, bfloat16 by autocast, and torch's fused AdamW."""
    import torch

    from gpt1_jax.training.hardware import keep_freed_memory

    keep_freed_memory()  # it spares torch page faults, too
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX multiplies float32 there
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.train().to(device)
    forward = compiled(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, fused=True)
    # The model shifts the labels itself, so one target a window is left out.
    ids = torch.from_numpy(_tokens(config, config.context_length)).to(device)
    bfloat16 = config.model.dtype == "bfloat16"

    def steps(count: int) -> float:
        loss = torch.zeros(())
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                loss = forward(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return Step(steps, sum(p.numel() for p in model.parameters()), peak_bytes)


def _tokens(config: Config, length: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, config.model.vocab_size, (config.train.batch_size, length))


PEERS: dict[str, Callable[[Config], Step]] = {"gpt1_jax": gpt1_jax, "torch": torch_gpt1, "torch-gpt2": torch_gpt2}
