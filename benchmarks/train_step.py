"""Speed of the whole train step beside transformers' models in torch, in turn, in one run.

The step is forward, backward, clipping by global norm and AdamW, of the paper's 116.5 M model, with float32 parameters;
torch computes bfloat16 by autocast. The peers:

    gpt1_jax     this project
    torch        transformers' GPT-1, the same model, as it comes
    torch-gpt2   transformers' GPT-2 of the same size with torch.compile and scaled-dot-product attention; the
                 environment variable TORCH_COMPILE_MODE is the mode of torch.compile

A peer makes a window of steps, with one wait for the device at its end, then the next peer makes one. The figure is
that of the median window. MFU holds a peer's tokens/s, times this project's count of model FLOPs for a token, against
the card's dense bfloat16 peak. On a GPU, besides a batch of 64, each peer has the best batch that fits: doubled, alone
on the card, until it no longer fits or is no longer faster.

    make bench
    .venv/bin/python benchmarks/train_step.py --batch-size 4 --rounds 8 --dtypes float32 bfloat16 --out result.json

What is not said on the command line is chosen for a GPU where torch sees one, else for a CPU. A GPU needs the extras
bench and cuda in one environment.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)
sys.path.insert(0, folder.rpartition("/")[0])

import argparse
import json
from functools import partial
from typing import Any

from benchmarks.in_turn import Peer, Seconds, measure, serve
from benchmarks.machine import described, gpu
from benchmarks.train_step_peers import PEERS, Step
from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config

BASELINES = ("torch-gpt2", "torch")  # the first of them that is measured is what ratios are to
WARMUP = 3  # steps: they compile, allocate, and wake the processor


def configuration(args: argparse.Namespace, dtype: str, dropout: str, batch_size: int) -> list[str]:
    """The settings of one measurement, as overrides of this project's defaults."""
    rates = [] if dropout == "on" else ["model.dropout=0.0", "model.attention_dropout=0.0"]
    return [
        f"model.dtype={dtype}",
        f"model.context_length={max(512, args.context_length)}",
        f"train.context_length={args.context_length}",
        "evaluation.sample_tokens=1",  # nothing is sampled: so that any context is valid
        f"train.batch_size={batch_size}",
        *rates,
        *args.overrides,
    ]


def start(args: argparse.Namespace, name: str, overrides: list[str], alone: bool = False) -> Peer:
    """Starts a peer, which shares the card unless it is alone."""
    # JAX would take three quarters of a card's memory at its start.
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Peer(name, [sys.executable, __file__, "--worker", name, str(args.window), *overrides], memory)


def work(name: str, window: int, overrides: list[str]) -> None:
    """In a peer's process."""

    def make() -> tuple[Any, dict[str, Any]]:
        step: Step = PEERS[name](parse_config("", "benchmark", overrides))
        step.steps(WARMUP)
        return partial(step.steps, window), {"parameters": step.parameters, "peak_bytes": step.peak_bytes()}

    serve(make)


def row(config: Config, window: int, name: str, seconds: Seconds, facts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The figures of one peer."""
    tokens = config.train.batch_size * config.context_length * window
    return {
        "dtype": config.model.dtype,
        "peer": name,
        "batch_size": config.train.batch_size,
        "tokens_per_second": tokens / seconds.median,
        "best": tokens / seconds.best,
        "worst": tokens / seconds.worst,
        **facts,
        **more,
    }


def same_batch(args: argparse.Namespace, dtype: str, dropout: str) -> list[dict[str, Any]]:
    """Every peer at the batch that was asked for, in turn."""
    overrides = configuration(args, dtype, dropout, args.batch_size)
    facts, peers = {}, []
    for name in args.peers:
        peer = start(args, name, overrides)
        said = peer.facts()
        if said is None:
            raise SystemExit(f"a batch of {args.batch_size} does not fit: {name} ran out of memory; --batch-size")
        facts[name] = said
        peers.append(peer)
    config = parse_config("", "benchmark", overrides)
    return [
        row(config, args.window, name, seconds, facts[name], dropout=dropout, batch="given")
        for name, seconds in measure(peers, args.rounds).items()
    ]


def best_batch(args: argparse.Namespace, dtype: str, dropout: str, name: str) -> dict[str, Any] | None:
    """A peer alone at the batch at which it is fastest; None where not even the given one fits."""
    best, batch_size = None, args.batch_size
    while True:
        overrides = configuration(args, dtype, dropout, batch_size)
        peer = start(args, name, overrides, alone=True)
        facts = peer.facts()
        if facts is None:
            peer.end()
            return best
        config = parse_config("", "benchmark", overrides)
        seconds = measure([peer], args.rounds)[name]
        figures = row(config, args.window, name, seconds, facts, dropout=dropout, batch="best")
        if best is not None and figures["tokens_per_second"] <= best["tokens_per_second"]:
            return best
        best, batch_size = figures, 2 * batch_size


def hold(rows: list[dict[str, Any]], flops_per_token: int, peak: float | None) -> None:
    """Adds to each row its ratio to the baseline's, and its MFU where it computes in bfloat16 on a known card."""
    for figures in rows:
        alike = [other for other in rows if all(other[key] == figures[key] for key in ("dtype", "dropout", "batch"))]
        speeds = {other["peer"]: other["tokens_per_second"] for other in alike}
        baseline = next((speeds[name] for name in BASELINES if name in speeds), None)
        figures["ratio"] = baseline and figures["tokens_per_second"] / baseline
        known = peak is not None and figures["dtype"] == "bfloat16"
        figures["mfu"] = figures["tokens_per_second"] * flops_per_token / peak if known else None


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows."""
    print(f"{'dtype':<10}{'dropout':<9}{'batch':<13}{'peer':<12}{'tokens/s':>10}{'worst':>10}{'best':>10}", end="")
    print(f"{'ratio':>7}{'MFU':>7}{'GB':>7}")
    for figures in rows:
        batch = f"{figures['batch_size']}{', best' if figures['batch'] == 'best' else ''}"
        print(f"{figures['dtype']:<10}{figures['dropout']:<9}{batch:<13}{figures['peer']:<12}", end="")
        print("".join(f"{figures[key]:>10,.0f}" for key in ("tokens_per_second", "worst", "best")), end="")
        gigabytes = figures["peak_bytes"] and figures["peak_bytes"] / 1e9
        optional = (figures["ratio"], ".2f"), (figures["mfu"], ".3f"), (gigabytes, ".1f")
        print("".join(f"{'' if value is None else format(value, form):>7}" for value, form in optional))


def arguments(on_gpu: bool) -> argparse.ArgumentParser:
    """The command line, with the defaults of a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = ["gpt1_jax", "torch-gpt2"] if on_gpu else ["gpt1_jax", "torch"]
    dtypes = ["bfloat16"] if on_gpu else ["float32", "bfloat16"]
    dropout = ["on", "off"] if on_gpu else ["on"]
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4, help="sequences (default %(default)s)")
    parser.add_argument("--context-length", type=int, default=512, help="tokens in a sequence (default %(default)s)")
    parser.add_argument(
        "--window", type=int, default=10 if on_gpu else 1, help="steps in a window (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="windows of each peer (default %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=dtypes, help="(default %(default)s)")
    parser.add_argument("--dropout", nargs="+", choices=["on", "off"], default=dropout, help="(default %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=peers, help="(default %(default)s)")
    parser.add_argument(
        "--search", action=argparse.BooleanOptionalAction, default=on_gpu, help="for the best batch, too"
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="of this project's configuration, for every peer")
    parser.add_argument("--out", help="write the figures as JSON")
    return parser


def main() -> None:
    """Prints a table, and writes JSON."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
        return
    from gpt1_jax.model.transformer import flops_per_token
    from gpt1_jax.training.hardware import PEAK_FLOPS

    card = gpu()
    args = arguments(card is not None).parse_args()
    rows = []
    for dtype in args.dtypes:
        for dropout in args.dropout:
            rows += same_batch(args, dtype, dropout)
            if args.search:
                found = [best_batch(args, dtype, dropout, peer) for peer in args.peers]
                rows += [figures for figures in found if figures is not None]
    config = parse_config("", "benchmark", configuration(args, args.dtypes[0], "on", args.batch_size))
    flops, peak = flops_per_token(config.model, config.context_length), PEAK_FLOPS.get(card) if card else None
    hold(rows, flops, peak)
    head = described()
    head |= {"context_length": config.context_length, "flops_per_token": flops, "peak_flops": peak}
    print(f"train step, {head['device']}, context {config.context_length}, {flops:,} model FLOPs a token")
    table(rows)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({**head, "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
