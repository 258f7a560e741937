"""Preparation: sources to a corpus on disk, in stages that a killed run need not repeat.

The corpus grows in its own folder, ``ROOT/NAME-FINGERPRINT``, and is complete when it has its manifest, which is
written last. Until then ``.work`` inside it holds what the stages leave to each other:

1. collect: read the sources, clean, part by part (:mod:`gpt1_jax.data.collect`)
2. duplicates: decide which documents are dropped, and count (:mod:`gpt1_jax.data.duplicates`)
3. documents: write them as a TFDS dataset (:mod:`gpt1_jax.data.documents`)
4. tokenizer: train it from a sample of the training split, or copy the given one
5. shards: encode the documents (:mod:`gpt1_jax.data.encode`)
6. checksums, and the manifest

An engine runs 1, 2, 3, 5 and the checksums (:mod:`gpt1_jax.data.engine`).
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.data.collect import forget_contamination, is_complete, make_parts
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.counts import Collected, check_collected, count_collected
from gpt1_jax.data.documents import DocumentReader, dataset_files, remove_leftovers, write_documents
from gpt1_jax.data.duplicates import chunks_of, dropped_file
from gpt1_jax.data.encode import (
    TOKENIZER,
    encode_range,
    forget_opened,
    plan_ranges,
    plan_shards,
    rebuild_shard,
    token_dtype,
    write_shard,
)
from gpt1_jax.data.engine import Engine, LocalEngine
from gpt1_jax.data.integrity import damage_of, verify_corpus
from gpt1_jax.data.manifest import (
    MANIFEST,
    SPLITS,
    FileSum,
    Manifest,
    Shard,
    SplitCounts,
    fingerprint_of,
    read_manifest,
    sha256_of,
    write_manifest,
)
from gpt1_jax.data.storage import (
    check_room,
    file_system,
    locked,
    make_folder,
    names_in,
    storage_errors,
    write_atomically,
)
from gpt1_jax.errors import DamagedError, RefusedError, UserError
from gpt1_jax.text.contamination import load_contamination
from gpt1_jax.text.document import TextSource
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.near_duplicates import check_near_duplicates
from gpt1_jax.text.quality import check_quality
from gpt1_jax.text.sentencepiece import train_tokenizer
from gpt1_jax.text.sources import open_source
from gpt1_jax.text.tokenizer import Tokenizer, read_tokenizer

# Called with what is being done, how many units of it are done, and of how many if that is known.
Progress = Callable[[str, int, int | None], None]
_FORMAT = 2  # of the prepared files; another number makes every corpus anew
_WORK = ".work"


@dataclass(frozen=True)
class _Plan:
    """What a configuration asks for, checked: mistakes show before any work is done."""

    config: Config
    sources: list[TextSource]
    tokenizer: Tokenizer | None  # None: to be trained
    settings: dict[str, Any]  # everything that changes the contents of the corpus

    @property
    def folder(self) -> epath.Path:
        labels = [re.sub(r"[^A-Za-z0-9_.-]+", "_", source.label).strip("._-") or "text" for source in self.sources]
        name = "+".join(dict.fromkeys(labels))[:80]
        return epath.Path(self.config.data.root) / f"{name}-{fingerprint_of(self.settings)}"


def corpus_dir(config: Config) -> epath.Path:
    """The folder of a configuration's corpus, prepared or not: ``data.root/NAME-FINGERPRINT``.

    NAME says what the sources are, for the reader: ``python_docs``, ``books`` for ``corpora/books/*.txt``, the name
    of a dataset, joined by ``+``. FINGERPRINT covers what changes the contents: the sources (sizes and contents of
    files, versions of packages and datasets), cleaning, tokenizer, vocabulary size, split and shard size, and not
    weights, engine, workers or the model, so runs that agree on these share a corpus.

    Raises:
        UserError: if a source, or a given tokenizer, is not there or not sound.
    """
    return _plan(config).folder


def prepare(config: Config, progress: Progress = lambda stage, done, total: None, check: bool = False) -> epath.Path:
    """Prepares a configuration's corpus, or finds it prepared.

    Killed at any moment and called again, it goes on and gives the bytes of an uninterrupted run. A second process
    that prepares the same corpus on a local disk waits for the first; in a bucket there must be none.

    Args:
        config: the configuration.
        progress: told the stage, the units done and, where known, their total.
        check: compare every file of a corpus that is found with its manifest, and rebuild what is damaged.

    Returns:
        The corpus's folder, whose manifest says what was read, dropped and why.

    Raises:
        UserError: if a source is not there, nothing is left of it, a split is empty, input is invalid and
            ``data.cleaning.on_invalid`` is error, or the tokenizer does not fit.
        DamagedError: if the corpus that is found is another one, or a damaged file cannot be rebuilt as it was.
        StalledError: if a worker process does not answer for ``deadlines.start`` seconds.
        StorageError: if the storage is full, read-only or cannot be reached.
    """
    plan = _plan(config)
    folder = plan.folder
    with storage_errors(folder.parent):
        if not check and (folder / MANIFEST).exists() and not (folder / _WORK).exists():
            _read_own_manifest(plan, folder)
            return folder
        make_folder(folder.parent)
        lock = folder.parent / f".{folder.name}.lock"
        with locked(lock, lambda: progress("waiting for another process that prepares this corpus", 0, None)):
            with _engine(config, folder) as engine:
                if not (folder / MANIFEST).exists():
                    _prepare(plan, folder, engine, progress)
                (folder / _WORK).rmtree(missing_ok=True)  # complete, but killed before this
                if check:
                    _repair(plan, folder, engine, progress)
    return folder


def _plan(config: Config) -> _Plan:
    data = config.data
    for source in data.sources:
        check_quality(source.quality)
    if data.cleaning.near_duplicates:
        check_near_duplicates(data.cleaning.near_duplicates)
    sources = [open_source(source, data.cleaning.max_chars) for source in data.sources]
    path = data.tokenizer.file
    tokenizer = read_tokenizer(path) if path else None
    if tokenizer and tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"data.tokenizer.file={path} has {tokenizer.vocab_size} tokens, but model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size} or give another tokenizer"
        )
    if tokenizer and data.windows == "packed" and not tokenizer.separator_reserved:
        raise UserError(
            f"data.windows=packed: data.tokenizer.file={path} has its unknown token between documents, which a text "
            "may hold too, so documents cannot be told apart; add the special token <|endoftext|> to the tokenizer, or "
            "set data.windows=contiguous"
        )
    return _Plan(config, sources, tokenizer, _settings(config, sources, tokenizer))


def _settings(config: Config, sources: list[TextSource], given: Tokenizer | None) -> dict[str, Any]:
    data, file = config.data, config.data.tokenizer.file
    cleaning = data.cleaning.model_dump(mode="json")
    libraries = ["ftfy", "tokenizers" if isinstance(given, FastTokenizer) else "sentencepiece"]
    if data.cleaning.near_duplicates:
        libraries.append("datasketch")
    if any(source.quality.languages for source in data.sources):
        libraries.append("py3langid")
    if data.cleaning.decontaminate:
        cleaning["decontaminate"] = load_contamination(data.cleaning.decontaminate, data.cleaning.max_chars).settings()
    return {
        "format": _FORMAT,
        "sources": [source.settings() for source in sources],
        "quality": [source.quality.model_dump(mode="json") for source in data.sources],
        "cleaning": cleaning,
        "tokenizer": {"sha256": sha256_of(file)} if file else {"sample_bytes": data.tokenizer.sample_bytes},
        "vocab_size": config.model.vocab_size,
        "validation_fraction": data.validation_fraction,
        "shard_tokens": data.shard_tokens,
        "libraries": {name: metadata.version(name) for name in libraries},  # these may change the bytes
    }


def _engine(config: Config, folder: epath.Path) -> Engine:
    if config.data.engine == "local":
        return LocalEngine(config.data.workers, config.deadlines.start)
    from gpt1_jax.data.beam import BeamEngine  # an extra

    return BeamEngine(config.data.beam_options, folder / _WORK / "errors")


def _prepare(plan: _Plan, folder: epath.Path, engine: Engine, progress: Progress) -> None:
    work = folder / _WORK
    make_folder(work / "text")
    for source in plan.sources:
        if source.network:
            progress(f"{source.name} needs the network: {source.network}", 0, None)
    try:
        manifest = _run_stages(plan, folder, work, engine, progress)
    except RefusedError:  # what mends it gives another fingerprint: nothing here would be used again
        folder.rmtree(missing_ok=True)
        raise
    finally:
        forget_opened()
        forget_contamination()
    write_manifest(folder, manifest)
    work.rmtree(missing_ok=True)


def _run_stages(plan: _Plan, folder: epath.Path, work: epath.Path, engine: Engine, progress: Progress) -> Manifest:
    data = plan.config.data
    collected = _collect(plan, work / "text", engine, progress)
    done = work / "documents.done"  # TFDS renames their folder at the end, which in a bucket takes long
    if not done.exists():
        progress("writing documents", 0, None)
        text = sum(map(sum, collected.bytes.values()))
        check_room(folder, text, f"at least as much as the {text:,} bytes of text, as documents and as tokens")
        name = folder.name.rpartition("-")[0]
        kept = {split: collected.chunks_of(split) for split in SPLITS}
        write_documents(folder, name, kept, work / "text", engine.build)
        remove_leftovers(folder)
        write_atomically(done, b"")
    if not (folder / TOKENIZER).exists():
        progress("training the tokenizer", 0, None)
        sample = functools.partial(_sample, folder, sum(collected.bytes["train"]), data.tokenizer.sample_bytes)
        tokenizer = plan.tokenizer or train_tokenizer(sample(), plan.config.model.vocab_size)
        write_atomically(folder / TOKENIZER, tokenizer.to_bytes())
    shards = _encode(collected, folder, work, plan.config, engine, progress)
    for leftover in folder.glob("*.tmp"):  # of a killed process
        leftover.unlink()
    sums = _checksums(folder, shards, work, engine, progress)
    return _manifest(plan, folder, collected, shards, sums)


def _collect(plan: _Plan, work: epath.Path, engine: Engine, progress: Progress) -> Collected:
    """Stages 1 and 2; what they left is found by a second call."""
    done = work / "collected.json"
    if done.exists():
        return Collected.model_validate_json(done.read_text(encoding="utf-8"))
    data, names = plan.config.data, [source.name for source in plan.sources]
    progress(f"reading {', '.join(names)}", 0, None)
    parts = make_parts(plan.sources)
    there = names_in(work)
    read = _Counter(f"reading {', '.join(names)}", None, progress)
    engine.collect([part for part in parts if not is_complete(part.number, there)], data, work, read)
    chunks = chunks_of(len(parts), work)
    progress("looking for duplicates", 0, None)
    there = names_in(work)
    if not all(dropped_file(chunk, work).name in there for chunk in chunks):
        engine.drop_duplicates(chunks, data.cleaning, work)
    collected = count_collected(len(parts), chunks, names, work)
    check_collected(collected, data.validation_fraction)
    write_atomically(done, collected.model_dump_json().encode())
    return collected


def _encode(
    collected: Collected, folder: epath.Path, work: epath.Path, config: Config, engine: Engine, progress: Progress
) -> tuple[Shard, ...]:
    ranges = plan_ranges(collected.documents, collected.bytes)
    there = names_in(work)
    left = [documents for documents in ranges if f"{documents.name}.ends.npy" not in there]
    _run(engine, "encoding, in parts", functools.partial(encode_range, corpus=folder, work=work), left, progress)
    plans = plan_shards(ranges, work, config.data.shard_tokens)
    there = names_in(folder)
    unwritten = [plan for plan in plans if plan.shard.offsets_file not in there]
    tokens = sum(plan.shard.tokens for plan in unwritten)
    check_room(folder, tokens * token_dtype(config.model.vocab_size).itemsize, f"{tokens:,} tokens")
    _run(engine, "writing shards", functools.partial(write_shard, corpus=folder, work=work), unwritten, progress)
    return tuple(plan.shard for plan in plans)


def _checksums(
    folder: epath.Path, shards: Sequence[Shard], work: epath.Path, engine: Engine, progress: Progress
) -> dict[str, FileSum]:
    """The checksum of every file of the corpus, by relative path."""
    names = sorted(
        [TOKENIZER]
        + [name for shard in shards for name in (shard.file, shard.offsets_file)]
        + [path.relative_to(folder).as_posix() for path in dataset_files(folder)]
    )
    notes = work / "sums"
    make_folder(notes)
    _run(engine, "computing checksums", functools.partial(_note_checksum, folder=folder, notes=notes), names, progress)
    return {name: FileSum.model_validate_json(_note(name, notes).read_text()) for name in names}


def _note(name: str, notes: epath.Path) -> epath.Path:
    return notes / f"{name.replace('/', '~')}.json"


def _note_checksum(name: str, folder: epath.Path, notes: epath.Path) -> None:
    files, path = file_system(folder / name)
    file = FileSum(bytes=files.size(path), sha256=sha256_of(folder / name))
    write_atomically(_note(name, notes), file.model_dump_json().encode())


def _read_own_manifest(plan: _Plan, folder: epath.Path) -> Manifest:
    manifest, expected = read_manifest(folder), fingerprint_of(plan.settings)
    if manifest.fingerprint != expected:
        raise DamagedError(
            f"{folder / MANIFEST}: of another corpus: its fingerprint is {manifest.fingerprint}, and not {expected}; "
            "run 'gpt1 prepare' again to make the right one"
        )
    return manifest


def _repair(plan: _Plan, folder: epath.Path, engine: Engine, progress: Progress) -> None:
    """Rebuilds what is damaged: shards from the documents; anything else, and all that follows from it, anew."""
    try:
        manifest = _read_own_manifest(plan, folder)
    except DamagedError:
        _replace(plan, folder, None, engine, progress)
        return
    damaged = {problem.file for problem in verify_corpus(Corpus(folder), progress)} & set(manifest.files)
    shards = [shard for shard in manifest.shards if {shard.file, shard.offsets_file} & damaged]
    if damaged - {name for shard in shards for name in (shard.file, shard.offsets_file)}:
        _replace(plan, folder, manifest, engine, progress)
    elif shards:
        names, work = ", ".join(shard.file for shard in shards), folder / _WORK
        make_folder(work)
        rebuild = functools.partial(rebuild_shard, corpus=folder, work=work)
        _run(engine, f"rebuilding {names}", rebuild, shards, progress)
        work.rmtree(missing_ok=True)
        forget_opened()
    for name in sorted(damaged):
        if what := damage_of(folder / name, manifest.files[name]):
            raise DamagedError(f"{folder / name}: made again, it {what}; remove the folder and prepare the corpus anew")


def _replace(plan: _Plan, folder: epath.Path, manifest: Manifest | None, engine: Engine, progress: Progress) -> None:
    """Prepares the corpus again beside the damaged one, which goes when the new one is whole."""
    progress("the documents, the tokenizer or the manifest are damaged: preparing the corpus again", 0, None)
    beside = folder.parent / f".{folder.name}.rebuilt" / folder.name
    if not (beside / MANIFEST).exists():
        _prepare(plan, beside, engine, progress)
    files = read_manifest(beside).files
    if manifest and files != manifest.files:
        names = sorted(name for name in {**files, **manifest.files} if files.get(name) != manifest.files.get(name))
        raise DamagedError(
            f"{folder}: it is damaged, and made again from its sources it is another corpus ({', '.join(names)}); it "
            f"was left as it is, and the new one is {beside}: put it in its place, or prepare with another data.root"
        )
    folder.rmtree()
    beside.rename(folder)
    beside.parent.rmtree(missing_ok=True)


def _run(engine: Engine, stage: str, function: Callable[[Any], None], items: Sequence[Any], progress: Progress) -> None:
    if items:
        progress(stage, 0, len(items))
        engine.run(function, items, _Counter(stage, len(items), progress))


class _Counter:
    """Adds up what is done of a stage."""

    def __init__(self, stage: str, total: int | None, progress: Progress) -> None:
        self._stage, self._total, self._progress, self._done = stage, total, progress, 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._progress(self._stage, self._done, self._total)


def _sample(corpus: epath.Path, size: int, wanted_bytes: int) -> Iterator[str]:
    """Documents of the training split, evenly spaced through it, up to ``data.tokenizer.sample_bytes`` bytes."""
    reader = DocumentReader(corpus, "train")
    left = wanted_bytes
    wanted = min(len(reader), max(1, left * len(reader) // size))
    for number in range(wanted):
        text = reader[number * len(reader) // wanted][0]
        encoded = text.encode()
        yield text if len(encoded) <= left else encoded[:left].decode("utf-8", "ignore")
        left -= len(encoded)
        if left <= 0:
            return


def _manifest(
    plan: _Plan,
    folder: epath.Path,
    collected: Collected,
    shards: tuple[Shard, ...],
    files: Mapping[str, FileSum],
) -> Manifest:
    tokenizer = read_tokenizer(folder / TOKENIZER)
    return Manifest(
        name=folder.name.rpartition("-")[0],
        fingerprint=fingerprint_of(plan.settings),
        settings=plan.settings,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.separator_id,
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "uint32",
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=collected.sources,
        splits={
            split: SplitCounts(
                documents=sum(collected.documents[split]),
                bytes=sum(collected.bytes[split]),
                words=collected.words[split],
                tokens=sum(shard.tokens for shard in shards if shard.split == split),
            )
            for split in SPLITS
        },
        shards=shards,
        files=dict(files),
    )
