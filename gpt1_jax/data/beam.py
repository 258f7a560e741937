"""The stages of a preparation as Apache Beam pipelines, on whatever runner ``data.beam_options`` name.

Beam is an extra, imported when this engine is chosen. Documents travel through files, not through the pipelines: what
is grouped there is their digests and signatures alone.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from gpt1_jax import errors
from gpt1_jax.config import CleaningConfig, DataConfig
from gpt1_jax.data.collect import Part, collect_parts, write_array
from gpt1_jax.data.duplicates import REASONS, Chunk, digests_of, dropped_file, signatures_of
from gpt1_jax.data.engine import Engine, OnDone, download_config
from gpt1_jax.data.storage import make_folder, names_in, storage_fault, write_atomically
from gpt1_jax.errors import GPT1Error, UserError
from gpt1_jax.text.document import DUPLICATE, NEAR_DUPLICATE
from gpt1_jax.text.near_duplicates import band_keys, is_near_duplicate

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, StandardOptions
    from apache_beam.runners.runner import create_runner
except ImportError as error:
    raise UserError(
        f"data.engine=beam needs Apache Beam, which cannot be imported ({error}); install it with: "
        "pip install 'gpt1-jax[beam]', or set data.engine=local"
    ) from None

Item = TypeVar("Item")
_Place = tuple[int, int]  # of a document: the index of its chunk, its number there


class BeamEngine(Engine):
    """A Beam runner.

    Args:
        options: of the pipelines, such as ``--runner=DataflowRunner``.
        errors: a folder, of its own, in which workers note what they raise.

    Raises:
        UserError: if there is no such runner.
    """

    def __init__(self, options: Sequence[str], errors: epath.Path) -> None:
        self._options = PipelineOptions(list(options))
        # Otherwise classes would be pickled by their contents, those of other packages too.
        self._options.view_as(SetupOptions).save_main_session = False
        self._errors = errors
        name = self._options.view_as(StandardOptions).runner or "DirectRunner"
        try:
            self._runner = create_runner(name)
        except (ValueError, ImportError) as error:
            raise UserError(f"data.beam_options: --runner={name}: {error}") from None
        logging.getLogger("apache_beam").setLevel(logging.ERROR)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A pipeline has ended when it is left: there is nothing to close."""

    def run(self, function: Callable[[Item], None], items: Sequence[Item], on_done: OnDone) -> None:
        """One element an item; a runner spreads them over its workers."""
        if items:
            self._run(lambda pipeline: _side_by_side(pipeline, items) | beam.Map(_guarded(function, self._errors)))
            on_done(len(items))

    def collect(self, parts: Sequence[Part], config: DataConfig, folder: epath.Path, on_read: OnDone) -> None:
        """Reads and cleans a part in one worker."""
        self.run(functools.partial(_collect_part, config=config, folder=folder), parts, lambda _: None)

    def drop_duplicates(self, chunks: Sequence[Chunk], config: CleaningConfig, folder: epath.Path) -> None:
        """Groups digests, and then bands of signatures."""
        if chunks:
            self._run(lambda pipeline: _drop_duplicates(pipeline, list(enumerate(chunks)), config, folder))

    def build(self, builder: tfds.core.DatasetBuilder) -> None:
        """TFDS's own Beam path: a file of documents in one worker."""
        with self._explained():
            builder.download_and_prepare(download_config=download_config(self._runner, self._options))

    def _run(self, make: Callable[[beam.Pipeline], Any]) -> None:
        with self._explained(), beam.Pipeline(self._runner, self._options) as pipeline:
            make(pipeline)

    def _explained(self) -> "_Explained":
        return _Explained(self._errors)


class _Explained:
    """Raises what a worker has noted, and the failure of a pipeline as an error of ours."""

    def __init__(self, notes: epath.Path) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        self._notes.rmtree(missing_ok=True)
        make_folder(self._notes)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for note in sorted(names_in(self._notes)):
            found = json.loads((self._notes / note).read_text(encoding="utf-8"))
            raise getattr(errors, found["kind"])(found["message"]) from None
        if isinstance(error, Exception) and not isinstance(error, GPT1Error):
            if fault := storage_fault(error):
                raise fault from None
            raise GPT1Error(f"the Beam pipeline failed: {type(error).__name__}: {error}") from error


def _guarded(function: Callable[[Item], None], notes: epath.Path) -> Callable[[Item], None]:
    """Notes an error that the user is to see as it is: a runner would make text of it, or try again.

    After one, nothing more is begun.
    """

    def call(item: Item) -> None:
        if names_in(notes):
            return
        try:
            function(item)
        except Exception as error:
            found = error if isinstance(error, GPT1Error) else storage_fault(error)
            if found is None:
                raise
            content = json.dumps({"kind": type(found).__name__, "message": str(found)}).encode()
            write_atomically(notes / f"{hashlib.sha256(content).hexdigest()[:16]}.json", content)

    return call


def _side_by_side(pipeline: beam.Pipeline, items: Sequence[Item]) -> Any:
    return pipeline | beam.Create(items) | beam.Reshuffle()


def _collect_part(part: Part, config: DataConfig, folder: epath.Path) -> None:
    collect_parts([part], config, folder, map, lambda _: None)


def _drop_duplicates(
    pipeline: beam.Pipeline, chunks: Sequence[tuple[int, Chunk]], config: CleaningConfig, folder: epath.Path
) -> Any:
    """Writes, beside each chunk, which of its documents are dropped; each transform is named after its result."""
    items = _side_by_side(pipeline, chunks)
    repeated = (
        items
        | "digests" >> beam.FlatMap(_digests, folder, config.deduplicate)
        | "equal texts" >> beam.GroupByKey()
        | "all but the first" >> beam.FlatMap(_all_but_first)
    )
    found = {"chunk": items, "repeated": repeated}
    if config.near_duplicates:
        near = (
            {"chunk": items, "repeated": repeated}
            | "distinct documents of a chunk" >> beam.CoGroupByKey()
            | "bands" >> beam.FlatMap(_bands, folder, config)
            | "buckets" >> beam.GroupByKey()
            | "like the first" >> beam.FlatMap(_like_first, config)
            | "once each" >> beam.Distinct()
        )
        found["near"] = near
    return found | "all of a chunk" >> beam.CoGroupByKey() | "write" >> beam.Map(_write_dropped, folder)


def _digests(item: tuple[int, Chunk], folder: epath.Path, wanted: bool) -> Iterator[tuple[bytes, _Place]]:
    index, chunk = item
    for row, digest in enumerate(digests_of(chunk, folder) if wanted else ()):
        yield digest.tobytes(), (index, row)


def _all_but_first(group: tuple[bytes, Iterable[_Place]]) -> Iterator[_Place]:
    places = group[1]
    first = min(places)
    return (place for place in places if place != first)


def _bands(
    group: tuple[int, dict[str, Iterable[Any]]], folder: epath.Path, config: CleaningConfig
) -> Iterator[tuple[tuple[int, int], tuple[_Place, bytes]]]:
    """Every band of every distinct document: (band, its hash), and the document with its signature."""
    assert config.near_duplicates
    index, found = group
    (chunk,) = found["chunk"]
    repeated = set(found["repeated"])
    signatures = signatures_of(chunk, folder)
    keys_of = band_keys(signatures, config.near_duplicates).view(np.int64)  # Beam's integers are signed
    for row, keys in enumerate(keys_of.tolist()):
        if row not in repeated:
            for band, key in enumerate(keys):
                yield (band, key), ((index, row), signatures[row].tobytes())


def _like_first(
    bucket: tuple[tuple[int, int], Iterable[tuple[_Place, bytes]]], config: CleaningConfig
) -> Iterator[_Place]:
    assert config.near_duplicates
    members = bucket[1]
    first, signature = min(members)
    reference = np.frombuffer(signature, np.uint32)
    for place, other in members:
        if place != first and is_near_duplicate(reference, np.frombuffer(other, np.uint32), config.near_duplicates):
            yield place


def _write_dropped(group: tuple[int, dict[str, Iterable[Any]]], folder: epath.Path) -> None:
    (chunk,) = group[1]["chunk"]
    dropped = np.zeros(chunk.documents, np.uint8)
    for name, reason in (("repeated", DUPLICATE), ("near", NEAR_DUPLICATE)):
        dropped[list(group[1].get(name, ()))] = REASONS.index(reason)
    write_array(dropped_file(chunk, folder), dropped)
