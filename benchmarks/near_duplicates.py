"""Near-duplicates: how many are found, how many sound documents are lost, and how long it takes, beside datasketch.

    .venv/bin/python benchmarks/near_duplicates.py FOLDER
    .venv/bin/python benchmarks/near_duplicates.py FOLDER --passages 10000 --threshold 0.7 --out result.json

FOLDER holds books, ``*.jsonl.gz`` with a field ``text``. They are cut into passages of 300 to 1,000 words, and 5 % of
these are planted again behind all of them, each with one kind of edit. Books repeat themselves, so a passage that is
lost is compared exactly, n-gram by n-gram, with every earlier one: it is sound only if none reaches the threshold.
The peer is ``datasketch.MinHashLSH`` as its documentation shows it: query and insert, one document after the other. It
gets our signatures for the index, so that both judge the same, and for the time of signing its own, over strings.
Seconds are of CPU time on one core. Needs the extra ``quality``.
"""

import sys

# Python puts this folder first, where tokenize.py would stand in for the standard library's module of that name.
if (folder := __file__.rpartition("/")[0]) in sys.path:
    sys.path.remove(folder)

import argparse
import gzip
import itertools
import json
import os
import platform
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasketch
import numpy as np

from gpt1_jax.config import NearDuplicates
from gpt1_jax.text.near_duplicates import near_duplicates, signature
from gpt1_jax.text.words import ngrams, normal_words

PLANTED = 0.05
SIGNED_BY_PEER = 1000  # passages: it takes too long for all
BOILERPLATE = "This page was found on the web and is shown as it was. All rights belong to whom they belong. " * 2


def main() -> None:
    """Prints a table and writes JSON."""
    defaults = NearDuplicates()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="books, *.jsonl.gz")
    parser.add_argument("--passages", type=int, default=20_000, help="at most, evenly through the books (20,000)")
    parser.add_argument("--threshold", type=float, default=defaults.threshold, help=f"({defaults.threshold})")
    parser.add_argument("--ngram", type=int, default=defaults.ngram, help=f"({defaults.ngram})")
    parser.add_argument("--permutations", type=int, default=defaults.permutations, help=f"({defaults.permutations})")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts and edits (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    config = NearDuplicates(threshold=arguments.threshold, ngram=arguments.ngram, permutations=arguments.permutations)
    rng = random.Random(arguments.seed)
    every = list(_passages(arguments.folder, rng))
    wanted = min(arguments.passages, len(every))
    passages = [every[number * len(every) // wanted] for number in range(wanted)]
    originals = rng.sample(range(wanted), round(wanted * PLANTED))
    kinds = list(itertools.islice(itertools.cycle(EDITS), len(originals)))
    vocabulary = rng.choice(passages).split()
    copies = [EDITS[kind](passages[number], rng, vocabulary) for kind, number in zip(kinds, originals, strict=True)]

    documents = passages + copies
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    start = time.process_time()
    signatures = np.stack([signature(document, config) for document in documents])
    signing = time.process_time() - start
    start = time.process_time()
    dropped = near_duplicates(signatures, config)
    deciding = time.process_time() - start
    result = {
        "config": config.model_dump(),
        "passages": {"cut": len(every), "used": wanted, "planted": len(copies), "megabytes": round(megabytes, 1)},
        "found": _found(kinds, originals, passages, copies, dropped[wanted:], config),
        "lost": _lost(passages, np.flatnonzero(dropped[:wanted]), config),
        "seconds_per_megabyte": {"sign": signing / megabytes, "decide": deciding / megabytes},
        "peer": _peer(documents, signatures, dropped, megabytes, config),
        "versions": {"datasketch": metadata.version("datasketch"), "numpy": np.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    _print(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _passages(folder: Path, rng: random.Random) -> Iterator[str]:
    """The books of a folder, cut between words."""
    paths = sorted(folder.glob("*.jsonl.gz"))
    if not paths:
        raise SystemExit(f"{folder}: there is no *.jsonl.gz")
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                ends = [found.end() for found in re.finditer(r"\S+", text)]
                first = 0
                while (length := rng.randint(300, 1000)) <= len(ends) - first:
                    yield text[ends[first - 1] if first else 0 : ends[first + length - 1]].strip()
                    first += length


def _edited(edit: Callable[[str, random.Random, Sequence[str]], str]) -> Callable[..., str]:
    """Applies an edit to 1 to 5 % of the words."""

    def apply(text: str, rng: random.Random, vocabulary: Sequence[str]) -> str:
        share = rng.uniform(0.01, 0.05)
        return " ".join(edit(word, rng, vocabulary) if rng.random() < share else word for word in text.split())

    return apply


EDITS: dict[str, Callable[[str, random.Random, Sequence[str]], str]] = {
    "1-5 % of words replaced": _edited(lambda word, rng, vocabulary: rng.choice(vocabulary)),
    "1-5 % of words dropped": _edited(lambda word, rng, vocabulary: ""),
    "1-5 % of words inserted": _edited(lambda word, rng, vocabulary: f"{word} {rng.choice(vocabulary)}"),
    "case, punctuation, spaces": lambda text, rng, vocabulary: "\n\n".join(re.split(r"[\s,;:]+", text.upper())),
    "header and footer": lambda text, rng, vocabulary: f"{BOILERPLATE}\n\n{text}\n\n{BOILERPLATE.upper()}",
    "last 5-25 % cut off": lambda text, rng, vocabulary: text[: round(len(text) * rng.uniform(0.75, 0.95))],
}


def _shingles(text: str, config: NearDuplicates) -> set[str]:
    return set(ngrams(normal_words(text), config.ngram))


def _jaccard(one: str, other: str, config: NearDuplicates) -> float:
    first, second = _shingles(one, config), _shingles(other, config)
    return len(first & second) / len(first | second)


def _found(
    kinds: Sequence[str],
    originals: Sequence[int],
    passages: Sequence[str],
    copies: Sequence[str],
    dropped: np.ndarray,
    config: NearDuplicates,
) -> dict[str, dict[str, float]]:
    """Of each kind of edit: copies, the share found, and the exact similarity to the original, mean and lowest."""
    exact = np.array(
        [_jaccard(passages[original], copy, config) for original, copy in zip(originals, copies, strict=True)]
    )
    names = np.array(kinds)
    rows = {kind: names == kind for kind in EDITS} | {"all": np.ones(len(copies), bool)}
    return {
        kind: {
            "copies": int(row.sum()),
            "found": float(dropped[row].mean()),
            "jaccard_mean": float(exact[row].mean()),
            "jaccard_lowest": float(exact[row].min()),
        }
        for kind, row in rows.items()
    }


def _lost(passages: Sequence[str], lost: np.ndarray, config: NearDuplicates) -> dict[str, Any]:
    """Passages dropped that were not planted: those with an exact twin before them, and those without."""
    sizes = {int(number): _shingles(passages[number], config) for number in lost}
    holders = defaultdict(list)
    for number, shingles in sizes.items():
        for shingle in shingles:
            holders[shingle].append(number)
    nearest = dict.fromkeys(sizes, 0.0)
    for earlier, text in enumerate(passages):
        shingles = _shingles(text, config)
        shared = Counter(number for shingle in shingles & holders.keys() for number in holders[shingle])
        for number, count in shared.items():
            if earlier < number:
                nearest[number] = max(nearest[number], count / (len(sizes[number]) + len(shingles) - count))
    sound = sorted(value for value in nearest.values() if value < config.threshold)
    return {
        "dropped": len(nearest),
        "with_a_twin": len(nearest) - len(sound),
        "sound": len(sound),
        "sound_share": len(sound) / len(passages),
        "sound_jaccard_to_the_nearest": sound,
    }


def _peer(
    documents: Sequence[str], signatures: np.ndarray, dropped: np.ndarray, megabytes: float, config: NearDuplicates
) -> dict[str, Any]:
    """The same with the library alone: a document is dropped if any earlier one in its buckets is near enough."""
    start = time.process_time()
    signed = documents[:SIGNED_BY_PEER]
    for document in signed:
        datasketch.MinHash(config.permutations).update_batch(map(str.encode, _shingles(document, config)))
    signing = (time.process_time() - start) / (sum(len(document.encode()) for document in signed) / 1e6)
    sketches = [datasketch.MinHash(hashvalues=values, scheme="affine32") for values in signatures]
    index = datasketch.MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
    theirs = np.zeros(len(documents), bool)
    query: Callable[[datasketch.MinHash], list[Any]] = index.query
    start = time.process_time()
    for number, sketch in enumerate(sketches):
        theirs[number] = any(sketches[found].jaccard(sketch) >= config.threshold for found in query(sketch))
        index.insert(number, sketch)
    deciding = (time.process_time() - start) / megabytes
    return {
        "sign": signing,
        "decide": deciding,
        "dropped_by_both": int((dropped & theirs).sum()),
        "dropped_by_us_alone": int((dropped & ~theirs).sum()),
        "dropped_by_peer_alone": int((theirs & ~dropped).sum()),
    }


def _print(result: dict[str, Any]) -> None:
    passages, lost, peer, seconds = (result[key] for key in ("passages", "lost", "peer", "seconds_per_megabyte"))
    print(f"{result['config']}")
    print(
        "{used:,} of {cut:,} passages, {planted:,} of them planted again with edits, {megabytes} MB".format(**passages)
    )
    print(f"{'planted':28}{'copies':>8}{'found':>9}{'Jaccard':>9}{'lowest':>8}")
    for kind, row in result["found"].items():
        print(f"{kind:28}{row['copies']:8,}{row['found']:9.2%}{row['jaccard_mean']:9.2f}{row['jaccard_lowest']:8.2f}")
    print(
        f"not planted, but dropped: {lost['dropped']}, {lost['with_a_twin']} of them with a twin before them; "
        f"sound and lost: {lost['sound']} ({lost['sound_share']:.4%})"
    )
    print(f"{'seconds for a megabyte':28}{'sign':>8}{'decide':>9}")
    print(f"{'gpt1_jax':28}{seconds['sign']:8.3f}{seconds['decide']:9.4f}")
    print(f"{'datasketch':28}{peer['sign']:8.3f}{peer['decide']:9.4f}")
    print("dropped by both {dropped_by_both}, by us alone {dropped_by_us_alone}, ".format(**peer), end="")
    print("by the peer alone {dropped_by_peer_alone}".format(**peer))


if __name__ == "__main__":
    main()
