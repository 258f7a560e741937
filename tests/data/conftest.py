import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt1_jax.data.manifest import FileSum, Manifest, Shard, SourceCounts, SplitCounts, write_manifest


@pytest.fixture(scope="session")
def write_corpus():
    """A function that writes a corpus whose tokens are 0, 1, 2, ..., so that they tell their place in the stream."""
    return _write_corpus


def _write_corpus(folder: Path, sources: Sequence[Sequence[int]], dtype: str = "uint16") -> Path:
    """Each source is given by the sizes of its shards, in tokens; all of them are in the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, begin = [], 0
    for source, sizes in enumerate(sources):
        for number, size in enumerate(sizes):
            file = f"train-{source:02}-{number:05}.tokens"
            np.arange(begin, begin + size).astype(np.dtype(dtype).newbyteorder("<")).tofile(folder / file)
            np.array([0, size], "<i8").tofile((folder / file).with_suffix(".offsets"))
            shard = {"split": "train", "source": source, "file": file, "tokens": size, "documents": 1}
            shards.append(Shard(**shard, first_document=len(shards)))
            begin += size
    (folder / "tokenizer.model").write_bytes(b"not read")
    manifest = Manifest(
        name="tiny",
        fingerprint="0" * 16,
        settings={},
        vocab_size=2**16,
        separator_id=0,
        dtype=dtype,
        tokenizer_fingerprint="0" * 16,
        sources=tuple(SourceCounts(name=f"source{k}", read=1, kept=1, dropped={}) for k in range(len(sources))),
        splits={"train": SplitCounts(documents=len(shards), bytes=0, words=0, tokens=begin)},
        shards=tuple(shards),
        files={
            path.name: FileSum(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(folder.iterdir())
        },
    )
    write_manifest(folder, manifest)
    return folder
