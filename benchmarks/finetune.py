"""Time of one epoch of fine-tuning the paper's 116.5 M model on SST-2, beside transformers' class in torch, in one run.

Both do the same: the same token ids, batches of 32 sentences of nearly equal lengths, dropout 0.1, the loss of the
classifier alone (which is all that transformers' class has), clipping, AdamW on float32 parameters, bfloat16 products.
This project is timed with the paper's auxiliary language-model loss, too, which the other lacks. Compiling is not
timed. Weights are drawn: no figure depends on them.

    .venv/bin/python benchmarks/finetune.py --tokenizer runs/hour/checkpoints/4800/run/tokenizer.model \
        task.train='{kind: files, paths: [train.csv]}' task.validation='{kind: files, paths: [dev.csv]}'

What follows the options overrides data/tasks/sst2.yaml. It needs the extra bench.
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
from typing import Any

import numpy as np

from benchmarks.in_turn import Peer, measure, serve
from benchmarks.machine import described
from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.config_file import load
from gpt1_jax.finetuning.dataset import Dataset
from gpt1_jax.finetuning.order import EpochOrder
from gpt1_jax.finetuning.start import run_config

RECIPE = "data/tasks/sst2.yaml"
Window = tuple[Callable[[], object], dict[str, Any]]


def read(args: argparse.Namespace, auxiliary: float) -> tuple[Config, Dataset, EpochOrder]:
    """The run's configuration, its training examples, and their order."""
    from gpt1_jax.data.examples import read_examples
    from gpt1_jax.finetuning.forms import encode, special_tokens
    from gpt1_jax.text.tokenizer import read_tokenizer

    overrides = [f"train.auxiliary={auxiliary}", f"model.dtype={args.dtype}", "train.epochs=1", *args.overrides]
    config = load(FinetuneConfig, RECIPE, overrides)
    plain = read_tokenizer(args.tokenizer)
    tokenizer = plain.with_special_tokens(special_tokens(config.task))
    examples = read_examples(config.task, "train").examples
    # A base that is never opened: the paper's model, of the tokenizer at hand.
    keys = {"evaluation": {"sample_tokens": 1}, "model": {"vocab_size": plain.vocab_size}}
    base = Config.model_validate_json(json.dumps(keys))
    dataset = Dataset(encode(config.task, examples[: args.rows], tokenizer, base.context_length))
    order = EpochOrder(dataset, config.train.batch_size, 0, base.context_length)
    found = run_config(config, base, tokenizer, order.steps_per_epoch, 0)
    # The paper's vocabulary, whatever the tokenizer's: the products with it are part of what is timed.
    model = found.model.model_copy(update={"vocab_size": Config().model.vocab_size + len(tokenizer.special_tokens)})
    return found.model_copy(update={"model": model}), dataset, order


def gpt1_jax(args: argparse.Namespace, auxiliary: float) -> Window:
    """This project, as its loop has it: batches by the loader, one compiled step for each width."""
    import jax

    from gpt1_jax.data.loader import Batches
    from gpt1_jax.finetuning.finetune import compile_by_width
    from gpt1_jax.model.sharding import batch_sharding
    from gpt1_jax.training.choices import resolve
    from gpt1_jax.training.hardware import keep_freed_memory
    from gpt1_jax.training.mesh import make_mesh
    from gpt1_jax.training.optimizer import make_optimizer
    from gpt1_jax.training.state import init_state

    keep_freed_memory()
    config, dataset, order = read(args, auxiliary)
    config, _ = resolve(config)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, config.train.steps)
    step_fn = compile_by_width(config, optimizer, mesh)
    state = init_state(config, optimizer, mesh)

    def epoch(chosen: Callable[[int], bool] = lambda width: True) -> None:
        nonlocal state
        with Batches(order, config.train.batch_size, batch_sharding(mesh)) as batches:
            for _ in range(config.train.steps):
                _, batch = next(batches)
                if chosen(batch.tokens_BKT.shape[2]):
                    state, _ = step_fn(state, batch)
        jax.block_until_ready(state)

    seen: set[int] = set()
    epoch(lambda width: width not in seen and not seen.add(width))  # the first batch of each width: it is compiled
    facts = {"steps": config.train.steps, "examples": len(dataset), "widths": sorted(seen)}
    return epoch, facts


def torch_gpt1(args: argparse.Namespace) -> Window:
    """Transformers' OpenAIGPTForSequenceClassification, as it comes, in the same batches."""
    import torch
    from transformers import OpenAIGPTConfig, OpenAIGPTForSequenceClassification

    from gpt1_jax.training.hardware import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config, dataset, order = read(args, 0.0)
    model = config.model
    labels: dict[str, Any] = {"num_labels": 2}
    sizes = {"n_positions": model.context_length, "n_embd": model.embed_dim, "n_layer": model.num_layers}
    settings = OpenAIGPTConfig(vocab_size=model.vocab_size, n_head=model.num_heads, pad_token_id=0, **sizes, **labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = OpenAIGPTForSequenceClassification(settings)
    network.train().to(device)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, fused=True)
    size = config.train.batch_size

    def steps(count: int) -> None:
        for step in range(count):
            batch = order.examples(np.arange(step * size, (step + 1) * size))
            longest = int(batch.last_BK.max()) + 1  # no wider than its longest sentence
            tokens = torch.from_numpy(batch.tokens_BKT[:, 0, :longest]).long().to(device)
            mask = torch.arange(longest)[None] <= torch.from_numpy(batch.last_BK)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                labels = torch.from_numpy(batch.labels_B).long().to(device)
                loss = network(tokens, attention_mask=mask.to(device), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    steps(2)
    return lambda: steps(config.train.steps), {"steps": config.train.steps, "examples": len(dataset)}


PEERS: dict[str, Callable[[argparse.Namespace], Window]] = {
    "gpt1_jax": lambda args: gpt1_jax(args, 0.0),
    "gpt1_jax, auxiliary loss": lambda args: gpt1_jax(args, 0.5),
    "transformers": torch_gpt1,
}


def main() -> None:
    """Measures the peers, prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.model")
    parser.add_argument("--rows", type=int, default=6920, help="training sentences")
    parser.add_argument("--rounds", type=int, default=1, help="epochs of each, in turn")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    args, args.overrides = parser.parse_known_args()
    if args.serve:
        serve(lambda: PEERS[args.serve](args))
        return
    results = {}
    command = [sys.executable, *sys.argv]
    for name in args.peers:  # one after the other: together they would not fit into a small machine's memory
        peer = Peer(name, [*command, "--serve", name])
        facts = peer.facts()
        if facts is None:
            raise SystemExit(f"{name} does not fit into memory")
        results[name] = {**facts, "seconds": measure([peer], args.rounds)[name].median}
    base = results.get("transformers", next(iter(results.values())))["seconds"]
    print(f"{'':26}  {'an epoch':>10}  {'sentences/s':>12}  {'ratio':>6}")
    for name, found in results.items():
        rate = found["steps"] * 32 / found["seconds"]
        print(f"{name:26}  {found['seconds']:8.1f} s  {rate:12.1f}  {base / found['seconds']:6.2f}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({**described(), "dtype": args.dtype, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
