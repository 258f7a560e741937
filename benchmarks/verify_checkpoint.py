"""How fast a checkpoint is verified, beside reading its files alone, which no check can be faster than.

    .venv/bin/python benchmarks/verify_checkpoint.py
    .venv/bin/python benchmarks/verify_checkpoint.py --megabytes 4000 --out result.json

A checkpoint of random arrays is written to a temporary folder (``TMPDIR``). Then verifying it, as every command does
that opens a run, and reading all of its files into memory take turns, with as many threads, and the median of the
rounds counts. The files are in the system's cache, so the figure is of the hashing and not of the disk: from a disk
both wait for it. A megabyte is 1,000,000 bytes. Seconds are of wall time on all cores, and of CPU time, added up over
them, which other work on the machine does not blur.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.pool import available_cores
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.checkpoint_manifest import problems_in

ROUNDS = 5
ARRAYS = 16
STEP = 0


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1400, help="of the checkpoint (default 1400, as GPT-1's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax explains itself at length
    with tempfile.TemporaryDirectory(prefix="gpt1-") as folder:
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            files = RunFiles(config="", tokenizer=b"", examples=0, data=None, corpus=None)
            checkpoints.save_imported(_arrays(arguments.megabytes * 10**6), files)
            checkpoints.wait()
            checkpoint = checkpoints.path(STEP)
        paths = [path for path in Path(checkpoint).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in paths)

        def verify() -> None:
            assert not problems_in(checkpoint, STEP)

        seconds = _in_turn({"verifying": verify, "reading": lambda: _read(paths)})
    print(f"{size / 1e6:,.0f} MB in {len(paths)} files, {available_cores()} cores")
    print(f"{'':12}{'MB/s':>10}{'MB/s of a core':>16}")
    speeds = {name: [round(size / 1e6 / each) for each in found] for name, found in seconds.items()}
    for name, (wall, core) in speeds.items():
        print(f"{name:12}{wall:10,}{core:16,}")
    ratio = seconds["reading"][0] / seconds["verifying"][0]
    print(f"verifying goes at {ratio:.2f} of the speed of reading")
    if arguments.out:
        result = {
            "bytes": size,
            "files": len(paths),
            "cores": available_cores(),
            "ratio": round(ratio, 3),
            "megabytes_per_second": {name: wall for name, (wall, _) in speeds.items()},
            "megabytes_per_second_of_a_core": {name: core for name, (_, core) in speeds.items()},
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _in_turn(works: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """The medians of the seconds of each: of wall time, and of CPU time."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found))
        for name, found in seconds.items()
    }


def _read(paths: list[Path]) -> None:
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(_read_file, paths))


def _read_file(path: Path) -> None:
    block = bytearray(1 << 18)  # as hashlib reads a file
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _arrays(size: int) -> dict[str, jax.Array]:
    """Random bits, which cannot be compressed."""
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    return {f"array_{n}": jax.random.normal(key, (size // ARRAYS // 4,), jnp.float32) for n, key in enumerate(keys)}


if __name__ == "__main__":
    main()
