"""Preparation: sources to a corpus on disk, in stages that a killed run need not repeat.

The stages work in a hidden folder beside the corpus, ``ROOT/.NAME-FINGERPRINT.partial``, which takes the corpus's
name once the manifest is written:

1. collect: read the sources, clean, drop duplicates, choose the split (:mod:`gpt1_jax.data.collect`)
2. documents: write them as a TFDS dataset (:mod:`gpt1_jax.data.documents`)
3. tokenizer: train it from a sample of the training split, or copy the given one
4. shards: encode the documents (:mod:`gpt1_jax.data.encode`)
5. manifest: count, checksum, rename
"""

import functools
import os
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt1_jax.config import Config
from gpt1_jax.data.collect import SPLITS, Collected, Progress, collect, collected_documents
from gpt1_jax.data.documents import FOLDER, DocumentReader, read_documents, write_documents
from gpt1_jax.data.encode import TOKENIZER, encode_documents, token_dtype
from gpt1_jax.data.manifest import MANIFEST, FileSum, Manifest, Shard, SplitCounts, fingerprint_of, sha256_of
from gpt1_jax.data.storage import locked, storage_errors, write_atomically
from gpt1_jax.errors import UserError
from gpt1_jax.pool import available_cores
from gpt1_jax.text.document import TextSource
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import train_tokenizer
from gpt1_jax.text.sources import open_source
from gpt1_jax.text.tokenizer import Tokenizer, read_tokenizer

__all__ = ["corpus_dir", "prepare", "read_documents"]

_FORMAT = 1  # of the prepared files; another number makes every corpus anew
_WORK = ".work"


def corpus_dir(config: Config) -> Path:
    """The folder of a configuration's corpus, prepared or not: ``data.root/NAME-FINGERPRINT``.

    NAME says what the sources are, for the reader: ``python_docs``, ``books`` for ``corpora/books/*.txt``, the name
    of a dataset, joined by ``+``. FINGERPRINT covers what changes the contents: the sources (sizes and contents of
    files, versions of packages and datasets), cleaning, tokenizer, vocabulary size, split and shard size, and not
    weights, workers or the model, so runs that agree on these share a corpus.

    Raises:
        UserError: if a source, or a given tokenizer, is not there or not sound.
    """
    sources, given = _open(config)
    return _folder(config, sources, _settings(config, sources, given))


def prepare(config: Config, progress: Progress = lambda stage, done, total: None) -> Path:
    """Prepares a configuration's corpus, or finds it prepared.

    Killed at any moment and called again, it goes on and gives the bytes of an uninterrupted run. A second process
    that prepares the same corpus waits for the first.

    Args:
        config: the configuration.
        progress: told the stage, the units done and, where known, their total.

    Returns:
        The corpus's folder, whose manifest says what was read, dropped and why.

    Raises:
        UserError: if a source is not there, nothing is left of it, a split is empty, input is invalid and
            ``data.cleaning.on_invalid`` is error, or the tokenizer does not fit.
        StorageError: if the disk is full or read-only.
    """
    sources, given = _open(config)
    settings = _settings(config, sources, given)
    folder = _folder(config, sources, settings)
    if (folder / MANIFEST).exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    with storage_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock, lambda: progress("waiting for another process that prepares this corpus", 0, None)):
            if not (folder / MANIFEST).exists():
                try:
                    _run_stages(config, sources, given, settings, partial, progress)
                except UserError:  # what mends it gives another fingerprint: nothing here would be used again
                    shutil.rmtree(partial)
                    raise
                partial.rename(folder)
    return folder


def _open(config: Config) -> tuple[list[TextSource], Tokenizer | None]:
    """The sources and the given tokenizer, if any: mistakes show before any work is done."""
    max_chars, workers = config.data.cleaning.max_chars, _workers(config)
    sources = [open_source(source, max_chars, workers) for source in config.data.sources]
    path = config.data.tokenizer.file
    if path is None:
        return sources, None
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"data.tokenizer.file={path} has {tokenizer.vocab_size} tokens, but model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size} or give another tokenizer"
        )
    return sources, tokenizer


def _workers(config: Config) -> int:
    return config.data.workers or available_cores()


def _settings(config: Config, sources: list[TextSource], given: Tokenizer | None) -> dict[str, Any]:
    """Everything that changes the contents of the corpus."""
    data, file = config.data, config.data.tokenizer.file
    libraries = ("ftfy", "tokenizers" if isinstance(given, FastTokenizer) else "sentencepiece")
    return {
        "format": _FORMAT,
        "sources": [source.settings() for source in sources],
        "cleaning": data.cleaning.model_dump(mode="json"),
        "tokenizer": {"sha256": sha256_of(file)} if file else {"sample_bytes": data.tokenizer.sample_bytes},
        "vocab_size": config.model.vocab_size,
        "validation_fraction": data.validation_fraction,
        "shard_tokens": data.shard_tokens,
        "libraries": {name: metadata.version(name) for name in libraries},  # these may change the bytes
    }


def _folder(config: Config, sources: list[TextSource], settings: dict[str, Any]) -> Path:
    labels = [re.sub(r"[^A-Za-z0-9_.-]+", "_", source.label).strip("._-") or "text" for source in sources]
    name = "+".join(dict.fromkeys(labels))[:80]
    return Path(config.data.root) / f"{name}-{fingerprint_of(settings)}"


def _run_stages(
    config: Config,
    sources: list[TextSource],
    given: Tokenizer | None,
    settings: dict[str, Any],
    partial: Path,
    progress: Progress,
) -> None:
    work = partial / _WORK
    if (partial / MANIFEST).exists():  # killed between the last two steps
        shutil.rmtree(work, ignore_errors=True)
        return
    work.mkdir(parents=True, exist_ok=True)
    workers = _workers(config)
    collected = collect(sources, config.data, work, workers, progress)
    if not (partial / FOLDER).exists():
        progress("writing documents", 0, None)
        records = {split: functools.partial(collected_documents, work, split) for split in SPLITS}
        write_documents(records, partial / FOLDER, work / "tfds")
    for split in SPLITS:
        (work / f"{split}.jsonl").unlink(missing_ok=True)
    if not (partial / TOKENIZER).exists():
        progress("training the tokenizer", 0, None)
        tokenizer = given or train_tokenizer(_sample(partial, collected, config), config.model.vocab_size)
        write_atomically(partial / TOKENIZER, tokenizer.to_bytes())
    shards = encode_documents(partial, work, collected, config.data.shard_tokens, workers, progress)
    progress("computing checksums", 0, None)
    tokenizer = read_tokenizer(partial / TOKENIZER)
    manifest = _manifest(partial, settings, collected, tokenizer, shards)
    write_atomically(partial / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
    shutil.rmtree(work)


def _sample(partial: Path, collected: Collected, config: Config) -> Iterator[str]:
    """Documents of the training split, evenly spaced through it, up to ``data.tokenizer.sample_bytes`` bytes."""
    reader = DocumentReader(partial, "train")
    left = config.data.tokenizer.sample_bytes
    wanted = min(len(reader), max(1, left * len(reader) // collected.bytes["train"]))
    for number in range(wanted):
        text = reader[number * len(reader) // wanted][0]
        encoded = text.encode()
        yield text if len(encoded) <= left else encoded[:left].decode("utf-8", "ignore")
        left -= len(encoded)
        if left <= 0:
            return


def _manifest(
    partial: Path,
    settings: dict[str, Any],
    collected: Collected,
    tokenizer: Tokenizer,
    shards: tuple[Shard, ...],
) -> Manifest:
    files = sorted(path for path in partial.rglob("*") if path.is_file() and partial / _WORK not in path.parents)
    fingerprint = fingerprint_of(settings)
    return Manifest(
        name=partial.name.removeprefix(".").removesuffix(f"-{fingerprint}.partial"),
        fingerprint=fingerprint,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.separator_id,
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "uint32",
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=collected.sources,
        splits={
            split: SplitCounts(
                documents=sum(collected.documents[split]),
                bytes=collected.bytes[split],
                words=collected.words[split],
                tokens=sum(shard.tokens for shard in shards if shard.split == split),
            )
            for split in SPLITS
        },
        shards=shards,
        files={
            path.relative_to(partial).as_posix(): FileSum(bytes=os.path.getsize(path), sha256=sha256_of(path))
            for path in files
        },
    )
