"""Speed of the whole train step beside transformers' GPT-1 in torch, in turn, in one run.

The step is forward, backward, clipping by global norm and AdamW, with dropout on, of the paper's 116.5 M model. Each
peer runs in a process of its own and makes one step at a time, in turn with the others, so that a machine whose speed
drifts treats them alike. The figure is the median step.

    make bench
    .venv/bin/python benchmarks/train_step.py --batch-size 4 --steps 8 --dtypes float32 bfloat16 --out result.json

torch computes bfloat16 by autocast, with float32 parameters, as this project does.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any


def ours(dtype: str, batch_size: int, context_length: int, overrides: list[str]) -> Callable[[], float]:
    """Returns a function that makes one step of this project and returns its loss."""
    import jax
    import numpy as np

    from gpt1_jax.config_file import parse_config
    from gpt1_jax.model.sharding import batch_sharding
    from gpt1_jax.training.mesh import make_mesh
    from gpt1_jax.training.optimizer import make_optimizer
    from gpt1_jax.training.state import init_state
    from gpt1_jax.training.step import compile_train_step

    config = parse_config(
        "",
        "benchmark",
        [
            f"model.dtype={dtype}",
            f"train.batch_size={batch_size}",
            f"train.context_length={context_length}",
            *overrides,
        ],
    )
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step_fn = compile_train_step(config, optimizer, mesh, separator_id=0)
    state = init_state(config, optimizer, mesh)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch_size, context_length + 1), np.int32)
    batch = jax.device_put(tokens, batch_sharding(mesh))

    def step() -> float:
        nonlocal state
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def torch_peer(dtype: str, batch_size: int, context_length: int, overrides: list[str]) -> Callable[[], float]:
    """The same with transformers' OpenAIGPTLMHeadModel and torch's fused AdamW."""
    import numpy as np
    import torch
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_positions=max(512, context_length))).train()
    model.to(device)  # pyrefly: ignore[bad-argument-type]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.5e-4, fused=True)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch_size, context_length + 1), np.int64)
    # Windows of the same length; the model shifts the labels itself, so one target a window is left out.
    ids = torch.from_numpy(tokens[:, :-1]).to(device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


_WARMUP = 3

PEERS: dict[str, Callable[..., Callable[[], float]]] = {"gpt1_jax": ours, "torch": torch_peer}


def worker(name: str, dtype: str, batch_size: int, context_length: int, overrides: list[str]) -> None:
    """Makes a step for every line on standard input, and answers with its seconds and loss."""
    from gpt1_jax.training.hardware import keep_freed_memory

    keep_freed_memory()  # for every peer: it spares torch page faults, too
    step = PEERS[name](dtype, batch_size, context_length, overrides)
    for _ in range(_WARMUP):  # compiles, allocates, and wakes the processor
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Runs the peers in turn and returns tokens a second of each."""
    workers: dict[str, subprocess.Popen[str]] = {}
    ask = {}
    for name in args.peers:
        command = [sys.executable, __file__, "--worker", name, "--dtypes", dtype, "--batch-size", str(args.batch_size)]
        command += ["--context-length", str(args.context_length), "--overrides", *args.overrides]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines, answers = workers[name].stdin, workers[name].stdout
        assert lines is not None and answers is not None
        if answers.readline().strip() != "ready":
            raise SystemExit(f"{name} did not start; run 'make bench' so that its packages are installed")
        ask[name] = lines, answers
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.steps):
        for name, (lines, answers) in ask.items():
            lines.write("\n")
            lines.flush()
            seconds[name].append(json.loads(answers.readline())["seconds"])
    for name, (lines, _) in ask.items():
        lines.close()
        workers[name].wait()
    tokens = args.batch_size * args.context_length
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(times),
            "best": tokens / min(times),
            "worst": tokens / max(times),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--context-length", type=int, default=512, help="tokens in a sequence (default 512)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each peer (default 5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--overrides", nargs="*", default=[], help="of this project's configuration")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.dtypes[0], args.batch_size, args.context_length, args.overrides)
        return
    results = {dtype: measure(args, dtype) for dtype in args.dtypes}
    print(f"tokens/s of the train step, batch {args.batch_size} x {args.context_length}, {platform.processor()}")
    print(f"{'dtype':<10}{'peer':<12}{'median':>8}{'worst':>8}{'best':>8}  ratio to torch")
    for dtype, peers in results.items():
        for name, figures in peers.items():
            ratio = figures["tokens_per_second"] / peers["torch"]["tokens_per_second"] if "torch" in peers else None
            row = "".join(f"{figures[key]:>8.0f}" for key in ("tokens_per_second", "worst", "best"))
            print(f"{dtype:<10}{name:<12}{row}  " + ("" if ratio is None else f"{ratio:.2f}"))
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"batch_size": args.batch_size, "context_length": args.context_length, **results}, file, indent=1)


if __name__ == "__main__":
    main()
