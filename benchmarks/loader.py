"""Speed, latency and memory of the loader beside Grain's, over the same file of tokens, in one run.

    make bench
    .venv/bin/python benchmarks/loader.py --tokens 100_000_000 --seconds 4 --out result.json

Both loaders shuffle all windows of the file, batch them and put them on the first device; the file is in the page
cache. Each runs in a process of its own, with a small corpus and with the full one, so that growth of memory with the
corpus shows. Grain gets a memory-mapped random-access source and a batch function of one NumPy call, and the fastest of
several numbers of worker processes and read threads stands for it.

The rows with ``sources`` cut the same file into as many. Ours mixes them under a curriculum, whose weights change every
thousand batches, and tells the documents of each packed window apart on the device; Grain's fastest mixes them by fixed
weights, which is what it offers.

The rows with ``start`` are for a corpus of 10 billion tokens in 100 shards: sparse files, which take no room. They say
what it takes to the first batch, and have no rate. With ``verify`` every shard that the first batch touches is compared
with its SHA-256, as ``data.verify`` has it unless told otherwise; without, sizes alone are checked. What is measured:

    tokens/s       of batches on the device, over the given seconds after the first batches
    first batch    seconds from opening the corpus (imports done) to the first batch on the device
    RSS growth     most resident memory of the process and its workers, less that before the corpus was opened; MB
    private        the same without mapped files, which the system can take back

Needs the extra ``bench``, which ``make bench`` installs.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)

import argparse
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import psutil

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches
from gpt1_jax.data.manifest import FileSum, Manifest, Shard, SourceCounts, SplitCounts, write_manifest
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.model.segments import document_starts

SHARD = "train-00-00000.tokens"
SMALL = 10  # the small corpus is this many times smaller
SOURCES = 8  # of the mixture
PHASE = 1000  # batches after which its weights change
START_SHARDS = 100
OURS, MIXED = "gpt1_jax", f"gpt1_jax sources={SOURCES}"
STARTS = ["gpt1_jax start", "gpt1_jax start verify"]
GRAIN = [f"grain workers={workers} threads={threads}" for workers in (0, 2) for threads in (0, 1, 16)]


def write_corpus(folder: Path, tokens: int, vocab_size: int = 40_478) -> None:
    """Writes two prepared corpora of random tokens in one file each, the same: of one source, and of several."""
    random = np.random.default_rng(0)
    folder.mkdir()
    with open(folder / SHARD, "wb") as file:
        for begin in range(0, tokens, 10_000_000):
            block = random.integers(0, vocab_size, min(10_000_000, tokens - begin), dtype=np.uint16)
            block.astype("<u2", copy=False).tofile(file)
    describe(folder, [tokens], {}, vocab_size)
    parts = folder / "sources"
    parts.mkdir()
    size = tokens // SOURCES
    content = np.memmap(folder / SHARD, "<u2", mode="r")
    for source in range(SOURCES):
        content[source * size : (source + 1) * size].tofile(parts / shard_file(source))
    describe(parts, [size] * SOURCES, {}, vocab_size)


def write_sparse_corpus(folder: Path, tokens: int) -> None:
    """Writes a corpus of zeros whose files have their sizes and take no room, with their checksums."""
    folder.mkdir()
    size, documents = tokens // START_SHARDS, tokens // START_SHARDS // 1000
    sums: dict[str, FileSum] = {}
    for name, length in (("tokens", 2 * size), ("offsets", 8 * (documents + 1))):
        for number in range(START_SHARDS):
            path = folder / f"train-00-{number:05}.{name}"
            path.touch()
            os.truncate(path, length)
        with open(folder / f"train-00-00000.{name}", "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        sums |= {f"train-00-{n:05}.{name}": FileSum(bytes=length, sha256=checksum) for n in range(START_SHARDS)}
    describe(folder, [size] * START_SHARDS, sums, 40_478, of_one_source=True)


def shard_file(source: int, number: int = 0) -> str:
    """The name of a shard."""
    return f"train-{source:02}-{number:05}.tokens"


def describe(
    folder: Path, sizes: Sequence[int], sums: dict[str, FileSum], vocab_size: int, of_one_source: bool = False
) -> None:
    """Writes the manifest of shards of the given sizes, in tokens, each of a source of its own, or all of one."""
    places = [(0, number) if of_one_source else (number, 0) for number in range(len(sizes))]
    manifest = Manifest(
        name="benchmark",
        fingerprint="0" * 16,
        settings={},
        vocab_size=vocab_size,
        separator_id=0,
        dtype="uint16",
        tokenizer_fingerprint="0" * 16,
        sources=tuple(SourceCounts(name=f"random{k}", read=1, kept=1, dropped={}) for k in range(places[-1][0] + 1)),
        splits={"train": SplitCounts(documents=len(sizes), bytes=0, words=0, tokens=sum(sizes))},
        shards=tuple(
            Shard(split="train", source=k, file=shard_file(k, n), tokens=size, documents=1, first_document=0)
            for (k, n), size in zip(places, sizes, strict=True)
        ),
        files=sums,
    )
    write_manifest(folder, manifest)


def our_batches(
    folder: Path, batch_size: int, context_length: int, verify: bool = False, mixed: bool = False
) -> Iterator[jax.Array]:
    """The project's loader; mixed: under a curriculum, with packed windows."""
    weights = None
    if mixed:
        changes = range(0, 100 * PHASE * batch_size, PHASE * batch_size)
        weights = [{at: 1.0 + (k + n) % SOURCES for n, at in enumerate(changes)} for k in range(SOURCES)]
    starts_of = jax.jit(lambda tokens: document_starts(tokens[:, :-1], 0))
    windows = RandomWindows(Corpus(folder, verify), context_length, seed=0, weights=weights)
    with Batches(windows, batch_size, jax.sharding.SingleDeviceSharding(jax.devices()[0])) as batches:
        for _, batch in batches:
            if mixed:
                jax.block_until_ready(starts_of(batch))
            yield batch


class MappedWindows:
    """Random-access source for Grain: windows of a memory-mapped file, opened in the process that reads."""

    def __init__(self, file: Path, context_length: int, part: int = 0, parts: int = 1):
        self._file = file
        self._context_length = context_length
        self._length = (file.stat().st_size // 2 - 1) // context_length // parts
        self._first = part * self._length
        self._tokens: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tokens": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if self._tokens is None:
            self._tokens = np.asarray(np.memmap(self._file, "<u2", mode="r"))
        start = (self._first + int(index)) * self._context_length
        return self._tokens[start : start + self._context_length + 1]


def import_grain():
    """Grain, or a message that says how to get it."""
    try:
        import grain
        from absl import flags
    except ImportError:
        raise SystemExit("Grain, the peer, is missing: run 'make bench' so that it is installed") from None
    flags.FLAGS.mark_as_parsed()  # its worker processes refuse to start otherwise
    return grain


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(rows, dtype=np.int32)


def grain_batches(
    folder: Path, batch_size: int, context_length: int, workers: int, threads: int, sources: int = 1
) -> Iterator[jax.Array]:
    """Grain's: sources, global shuffle, mixture, batch; worker processes and read threads as given."""
    grain = import_grain()
    parts = [MappedWindows(folder / SHARD, context_length, part, sources) for part in range(sources)]
    shuffled = [grain.MapDataset.source(part).shuffle(seed=0).repeat() for part in parts]
    data = grain.MapDataset.mix(shuffled, weights=[1 + k for k in range(sources)]) if sources > 1 else shuffled[0]
    data = data.batch(batch_size, batch_fn=_stack)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16))
    for batch in data:
        yield jax.device_put(batch)


def memory() -> tuple[int, int]:
    """Resident and private bytes of this process and its children."""
    process = psutil.Process()
    infos = [p.memory_info() for p in (process, *process.children(recursive=True))]
    return sum(i.rss for i in infos), sum(i.rss - getattr(i, "shared", 0) for i in infos)


def measure(batches: Callable[[], Iterator[jax.Array]], seconds: float) -> dict[str, float | None]:
    """Takes batches for ``seconds``, or the first alone if that is 0, and returns the figures."""
    jax.block_until_ready(jax.device_put(np.zeros((64, 513), np.int32)))  # the device is up before the clock starts
    before = most = memory()
    begin = time.perf_counter()
    iterator = batches()
    batch = jax.block_until_ready(next(iterator))
    first = time.perf_counter() - begin
    most = tuple(map(max, most, memory()))
    for _ in range(20 if seconds else 0):
        jax.block_until_ready(next(iterator))
    done, elapsed = 0, 0.0
    while elapsed < seconds:
        begin = time.perf_counter()
        for _ in range(200):
            jax.block_until_ready(next(iterator))
        elapsed += time.perf_counter() - begin
        done += 200
        most = tuple(map(max, most, memory()))  # the clock stands still meanwhile
    return {
        "tokens_per_second": done * batch.shape[0] * (batch.shape[1] - 1) / elapsed if seconds else None,
        "first_batch_seconds": first,
        "rss_growth_mb": (most[0] - before[0]) / 1e6,
        "private_growth_mb": (most[1] - before[1]) / 1e6,
    }


def run_one(name: str, folder: Path, batch_size: int, context_length: int, seconds: float) -> dict[str, float | None]:
    """Measures one loader in this process."""
    if name in STARTS:
        return measure(lambda: our_batches(folder, batch_size, context_length, name.endswith("verify")), 0)
    if name == MIXED:
        return measure(lambda: our_batches(folder / "sources", batch_size, context_length, mixed=True), seconds)
    if name == OURS:
        return measure(lambda: our_batches(folder, batch_size, context_length), seconds)
    import_grain()
    numbers = [int(part.partition("=")[2]) for part in name.split()[1:]]
    return measure(lambda: grain_batches(folder, batch_size, context_length, *numbers), seconds)


def run_apart(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measures one loader in a process of its own, with the files in the page cache, but for those of a start."""
    for path in [] if name in STARTS else folder.rglob("*.tokens"):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    options = {"batch-size": arguments.batch_size, "context-length": arguments.context_length}
    options |= {"seconds": arguments.seconds, "only": name, "folder": folder}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> dict:
    """Runs every loader on the full corpus, and ours and Grain's fastest on the small one."""
    import_grain()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        corpora = {count: Path(folder) / str(count) for count in (arguments.tokens, arguments.tokens // SMALL)}
        for count, corpus in corpora.items():
            write_corpus(corpus, count)
        corpora[arguments.start_tokens] = Path(folder) / "sparse"
        write_sparse_corpus(corpora[arguments.start_tokens], arguments.start_tokens)

        def add(name: str, count: int) -> dict:
            results.append({"loader": name, "corpus_tokens": count, **run_apart(name, corpora[count], arguments)})
            print(f"measured {name} on {count:,} tokens", file=sys.stderr)
            return results[-1]

        add(OURS, arguments.tokens)
        best = max((add(name, arguments.tokens) for name in GRAIN), key=lambda row: row["tokens_per_second"])
        add(OURS, arguments.tokens // SMALL)
        add(best["loader"], arguments.tokens // SMALL)
        add(MIXED, arguments.tokens)
        add(f"{best['loader']} sources={SOURCES}", arguments.tokens)
        for name in STARTS:
            add(name, arguments.start_tokens)
    return {
        "batch_size": arguments.batch_size,
        "context_length": arguments.context_length,
        "cores": psutil.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "grain": import_grain().__version__,
        "device": jax.devices()[0].device_kind,
        "grain_best": best["loader"],
        "speedup": results[0]["tokens_per_second"] / best["tokens_per_second"],
        "results": results,
    }


def print_table(report: dict) -> None:
    """Prints the results for people."""
    print(f"{'loader':<36}{'corpus tokens':>15}{'M tokens/s':>12}{'first batch s':>15}{'RSS MB':>9}{'private MB':>12}")
    for row in report["results"]:
        rate = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second'] / 1e6:.1f}"
        print(
            f"{row['loader']:<36}{row['corpus_tokens']:>15,}{rate:>12}"
            f"{row['first_batch_seconds']:>15.3f}{row['rss_growth_mb']:>9.0f}{row['private_growth_mb']:>12.0f}"
        )
    print(f"{report['speedup']:.1f} times Grain's best ({report['grain_best']}); {report['cores']} cores")


def main() -> None:
    """Reads the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500_000_000, help="tokens in the corpus (2 bytes each)")
    parser.add_argument("--start-tokens", type=int, default=10**10, help="tokens in the sparse corpus")
    parser.add_argument("--batch-size", type=int, default=64, help="windows in a batch")
    parser.add_argument("--context-length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure each loader for")
    parser.add_argument("--dir", help="where to write the temporary corpora")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one loader, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # its corpus
    arguments = parser.parse_args()
    if arguments.only:
        settings = arguments.batch_size, arguments.context_length, arguments.seconds
        print(json.dumps(run_one(arguments.only, arguments.folder, *settings)))
        return
    report = compare(arguments)
    print_table(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
