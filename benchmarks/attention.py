"""Speed of causal attention alone, forward and with its backward pass, beside torch's and cuDNN's, in turn, in one run.

Queries, keys and values are [B, T, N, H]; by default those of the paper's model at a batch of 64 on a GPU, fewer on a
CPU. What is measured:

    gpt1_jax NAME   the function that the model calls, with NAME as ``model.attention``
    jax NAME        jax.nn.dot_product_attention, with NAME as its implementation
    torch NAME      torch's scaled_dot_product_attention, with NAME as its backend

TFLOP/s count the scores that causal attention needs, half of all: 2 B N T^2 H forward, and 2.5 times that backward. The
ratio is to the fastest of those that are not this project's.

    make bench
    .venv/bin/python benchmarks/attention.py --shape 4 512 12 64 --measure "gpt1_jax xla" "torch default" --out out.json

A GPU needs the extras bench and cuda in one environment.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)
sys.path.insert(0, folder.rpartition("/")[0])

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.in_turn import Peer, Seconds, measure, serve
from benchmarks.machine import described, gpu

WARMUP = 3


def jax_window(function: Callable[..., Any], shape: list[int], dtype: str, backward: bool, calls: int) -> Callable:
    """A window of calls of a function of queries, keys and values in JAX."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, gradient = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys)

    def with_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull_back = jax.vjp(function, q, k, v)
        return out, pull_back(gradient)

    compiled = jax.jit(with_gradients if backward else function).lower(q, k, v).compile()

    def window(count: int = calls) -> None:
        out = None
        for _ in range(count):
            out = compiled(q, k, v)
        jax.block_until_ready(out)

    return window


def of_gpt1_jax(name: str, *how: Any) -> Callable:
    """This project's attention."""
    from gpt1_jax.model.attention import dot_product_attention

    return jax_window(partial(dot_product_attention, implementation=name), *how)


def of_jax(name: str, *how: Any) -> Callable:
    """JAX's own."""
    import jax

    return jax_window(partial(jax.nn.dot_product_attention, is_causal=True, implementation=name), *how)


def of_torch(name: str, shape: list[int], dtype: str, backward: bool, calls: int) -> Callable:
    """torch's, of tensors in the layout that a model's projections give."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    backends = {
        "default": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        "cudnn": [SDPBackend.CUDNN_ATTENTION],
        "flash": [SDPBackend.FLASH_ATTENTION],
    }
    on = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, dtype)}
    q, k, v = (torch.randn(*shape, requires_grad=backward, **on).transpose(1, 2) for _ in range(3))
    gradient = torch.randn(*shape, **on).transpose(1, 2)

    def window(count: int = calls) -> None:
        with sdpa_kernel(backends[name]), torch.set_grad_enabled(backward):
            for _ in range(count):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                if backward:
                    torch.autograd.grad(out, (q, k, v), gradient)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return window


LIBRARIES = {"gpt1_jax": of_gpt1_jax, "jax": of_jax, "torch": of_torch}


def work(what: str, shape: list[int], dtype: str, backward: bool, calls: int) -> None:
    """In a process of its own."""

    def make() -> tuple[Callable, dict[str, Any]]:
        library, _, name = what.partition(" ")
        window = LIBRARIES[library](name, shape, dtype, backward, calls)
        window(WARMUP)
        return window, {}

    serve(make)


def row(what: str, seconds: Seconds, shape: list[int], backward: bool, calls: int) -> dict[str, Any]:
    """The figures of one implementation."""
    batch, length, heads, size = shape
    flops = 2 * batch * heads * length**2 * size * (3.5 if backward else 1)
    return {
        "pass": "both" if backward else "forward",
        "what": what,
        "milliseconds": 1000 * seconds.median / calls,
        "tflops_per_second": flops * calls / seconds.median / 1e12,
        "best": flops * calls / seconds.best / 1e12,
        "worst": flops * calls / seconds.worst / 1e12,
    }


def main() -> None:
    """Prints a table, and writes JSON."""
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
        return
    card = gpu()
    on_gpu = ["gpt1_jax xla", "gpt1_jax cudnn", "jax cudnn", "torch cudnn", "torch flash"]
    chosen = on_gpu if card else ["gpt1_jax xla", "torch default"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = [64 if card else 4, 512, 12, 64]
    parser.add_argument("--shape", type=int, nargs=4, default=shape, help="B T N H (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(default %(default)s)")
    parser.add_argument("--measure", nargs="+", default=chosen, metavar="'LIBRARY NAME'", help="(default %(default)s)")
    parser.add_argument("--calls", type=int, default=100 if card else 5, help="in a window (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each (default %(default)s)")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    for what in args.measure:
        if what.partition(" ")[0] not in LIBRARIES:
            parser.error(f"--measure: {what!r} is not a library and a name; the libraries are {', '.join(LIBRARIES)}")
    rows = []
    for backward in (False, True):
        peers = []
        for what in args.measure:
            settings = json.dumps([what, args.shape, args.dtype, backward, args.calls])
            # JAX would take three quarters of a card's memory at its start.
            memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            peer = Peer(what, [sys.executable, __file__, "--worker", settings], memory)
            if peer.facts() is None:
                raise SystemExit(f"{what} ran out of memory; --shape")
            peers.append(peer)
        seconds = measure(peers, args.rounds)
        rows += [row(what, seconds[what], args.shape, backward, args.calls) for what in args.measure]
    for figures in rows:
        others = [other for other in rows if other["pass"] == figures["pass"] and not other["what"].startswith("gpt1")]
        fastest = max((other["tflops_per_second"] for other in others), default=None)
        figures["ratio"] = fastest and figures["tflops_per_second"] / fastest
    head = described() | {"shape": args.shape, "dtype": args.dtype}
    print(f"causal attention, {head['device']}, {args.dtype} {args.shape}")
    print(f"{'pass':<9}{'what':<18}{'ms':>9}{'TFLOP/s':>9}{'worst':>9}{'best':>9}{'ratio':>7}")
    for figures in rows:
        print(f"{figures['pass']:<9}{figures['what']:<18}{figures['milliseconds']:>9.3f}", end="")
        print("".join(f"{figures[key]:>9.3f}" for key in ("tflops_per_second", "worst", "best")), end="")
        print("" if figures["ratio"] is None else f"{figures['ratio']:>7.2f}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({**head, "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
