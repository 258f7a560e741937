"""Encoding speed on one core and on all, beside the ``tokenizers`` library: the same text, the same vocabulary.

    make bench
    .venv/bin/python benchmarks/tokenize.py --vocab-size 40478 --megabytes 8 --out result.json

``tokenizers`` is measured in three forms: with the very model of gpt1_jax, converted, which gives the same tokens; and
trained on the text to the same size, with its usual byte-level pre-tokenizer, which makes it fast, or with
SentencePiece's rules. On one core they take turns, in one process on one thread, and the median of the rounds counts;
seconds are of CPU time, so that other work on the machine does not blur the figures. On all cores gpt1_jax has a
process for each, as in a preparation, and ``tokenizers`` a thread for each; seconds are of wall time, each is warm
before, and they take turns too. Needs the extra ``bench``, which ``make bench`` installs.
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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.pool import available_cores
from gpt1_jax.text.document import Document
from gpt1_jax.text.python_docs import PythonDocsSource
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer, train_tokenizer

ROUNDS = 5
SAME = "tokenizers, the same model"


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text file (default: the embedded corpus)")
    parser.add_argument("--vocab-size", type=int, default=40478, help="tokens in both vocabularies (default 40478)")
    parser.add_argument("--megabytes", type=float, default=8, help="encoded in each round (default 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()

    import_tokenizers()
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else _embedded_corpus()
    documents = _documents(text, int(arguments.megabytes * 1e6))
    lines = [line for line in text.split("\n") if line]
    contestants: dict[str, Callable[[Sequence[str]], int]] = {}
    ours = train_tokenizer([text], arguments.vocab_size)
    contestants["gpt1_jax"] = lambda texts: sum(map(len, ours.encode_batch(texts)))
    same = import_tokenizers().Tokenizer.from_str(fast_tokenizer_json(ours).decode())
    assert all(same.encode(text).ids == ours.encode(text).tolist() for text in documents[:50])
    contestants[SAME] = lambda texts: sum(len(found.ids) for found in same.encode_batch_fast(texts))
    for name, byte_level in (("tokenizers, byte level", True), ("tokenizers, SentencePiece rules", False)):
        peer = _peer(lines, arguments.vocab_size, byte_level)
        contestants[name] = lambda texts, peer=peer: sum(len(found.ids) for found in peer.encode_batch_fast(texts))

    size = sum(len(document.encode()) for document in documents)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, encode in contestants.items():
            start = time.process_time()
            tokens[name] = encode(documents)
            speeds[name].append(size / 1e6 / (time.process_time() - start))
    all_cores = _on_all_cores(ours, same, documents, size)
    result = {
        "bytes": size,
        "documents": len(documents),
        "vocab_size": arguments.vocab_size,
        "megabytes_per_second": {name: round(statistics.median(found), 2) for name, found in speeds.items()},
        "spread": {name: [round(min(found), 2), round(max(found), 2)] for name, found in speeds.items()},
        "bytes_per_token": {name: round(size / count, 3) for name, count in tokens.items()},
        "all_cores_megabytes_per_second": all_cores,
        "versions": {name: metadata.version(name) for name in ("sentencepiece", "tokenizers")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    print(f"{size / 1e6:.1f} MB in {len(documents)} documents, vocabulary {arguments.vocab_size}, one core")
    print(f"{'':34}{'MB/s':>8}{'lowest':>8}{'highest':>8}{'bytes/token':>13}")
    for name in contestants:
        low, high = result["spread"][name]
        speed, ratio = result["megabytes_per_second"][name], result["bytes_per_token"][name]
        print(f"{name:34}{speed:8.2f}{low:8.2f}{high:8.2f}{ratio:13.3f}")
    print(f"on {available_cores()} cores, wall time")
    for name, speed in all_cores.items():
        print(f"{name:34}{speed:8.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _on_all_cores(ours: SentencePieceTokenizer, same: Any, documents: list[str], size: int) -> dict[str, float]:
    """Megabytes a second of wall time, the best of the rounds."""
    cores = available_cores()
    batches = [documents[at : at + 50] for at in range(0, len(documents), 50)]
    seconds: dict[str, list[float]] = {"gpt1_jax": [], SAME: []}
    with ProcessPoolExecutor(cores, get_context("spawn"), _load, (ours.to_bytes(),)) as pool:
        list(pool.map(_count, batches))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            count = sum(pool.map(_count, batches))
            seconds["gpt1_jax"].append(time.perf_counter() - start)
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            start = time.perf_counter()
            assert count == sum(len(found.ids) for found in same.encode_batch_fast(documents))
            seconds[SAME].append(time.perf_counter() - start)
    return {name: round(size / 1e6 / min(found), 2) for name, found in seconds.items()}


_in_worker: list[SentencePieceTokenizer] = []  # of a process of the pool


def _load(model: bytes) -> None:
    _in_worker.append(SentencePieceTokenizer(model))


def _count(texts: list[str]) -> int:
    return sum(map(len, _in_worker[0].encode_batch(texts)))


def import_tokenizers() -> Any:
    """The peer, which starts on one thread, or a message that says how to get it."""
    os.environ["RAYON_NUM_THREADS"] = str(available_cores())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        import tokenizers
    except ImportError:
        raise SystemExit("tokenizers, the peer, is missing: run 'make bench' so that it is installed") from None
    return tokenizers


def _embedded_corpus() -> str:
    return "\n\n".join(item.text for item in PythonDocsSource().read() if isinstance(item, Document))


def _documents(text: str, size: int) -> list[str]:
    """The first ``size`` characters in documents of some thousand characters, cut between lines."""
    documents, lines, length = [], [], 0
    for line in text[:size].splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length > 4000:
            documents.append("".join(lines))
            lines, length = [], 0
    return [*documents, "".join(lines)]


def _peer(lines: Sequence[str], vocab_size: int, byte_level: bool) -> Any:
    library = import_tokenizers()
    models, pre_tokenizers = library.models, library.pre_tokenizers
    if byte_level:
        peer = library.Tokenizer(models.BPE())
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        peer.decoder = library.decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        peer = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        peer.normalizer = library.normalizers.Replace(" ", "\u2581")
        peer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        alphabet = []
    special = ["<unk>", "<|endoftext|>"]
    if not byte_level:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator(lines, trainer)
    return peer


if __name__ == "__main__":
    main()
