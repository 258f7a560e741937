"""Documents from files: .txt and .md (one each), .jsonl and .parquet (one a record), plain, .gz, .zst or .xz.

Memory is bounded by ``data.cleaning.max_chars``, not by the size of a file.
"""

import errno
import glob
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gpt1_jax.errors import StorageError, UserError
from gpt1_jax.source_config import Files
from gpt1_jax.text.compression import DAMAGE, SUFFIXES, decompressed
from gpt1_jax.text.document import Document, Skipped, named, printable, to_document

_HASHED_BYTES = 256_000_000  # local files up to this size in all are told apart by content, larger ones by time
_GROUP_BYTES, _GROUP_FILES = 64_000_000, 1000  # of files read in one go
_ROWS = 64  # of a Parquet file held at once
_UTF8_BYTES, _JSON_BYTES = 4, 12  # most bytes that one character takes: in UTF-8, and as \uXXXX\uXXXX
_OTHER_FIELDS = 1_000_000  # bytes of a JSON line beside its text


class FilesSource:
    """The documents of the files that some globs match: globs in the order given, files by name, each file once."""

    def __init__(self, config: Files, max_chars: int, files: list[str] | None = None) -> None:
        self._config = config
        self._max_chars = max_chars
        self._files = matched(config.paths) if files is None else files
        self.name = f"files:{' '.join(config.paths)}"
        self.label = _label(config.paths[0])
        remote = [path for path in self._files if "://" in path]
        self.network = f"{len(remote):,} files, the first of them {remote[0]}" if remote else None

    def settings(self) -> dict[str, Any]:
        """The files with their sizes and contents (or, above 256 MB in all, times)."""
        return {
            "kind": "files",
            "paths": list(self._config.paths),
            "text_field": self._config.text_field,
            "identity_field": self._config.identity_field,
            "files": file_states(self._files),
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The documents, in the order of the files and of their lines or rows.

        Raises:
            StorageError: if a remote file can no longer be read.
        """
        for path in self._files:
            try:
                yield from self._read_file(path)
            except FileNotFoundError as error:  # it was there when the fingerprint was made
                raise StorageError(f"{path}: has gone, or cannot be reached from here: {error}") from None
            except DAMAGE as error:
                if "://" in path and isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                    # An outage of the network must not become a smaller corpus.
                    raise StorageError(f"{path}: cannot be read: {error}; run the same command again") from None
                yield Skipped(path, "unreadable", f"it is damaged or cannot be read: {error}")

    def split(self) -> Sequence["FilesSource"]:
        """Files in groups: a large one alone, small ones together."""
        groups: list[list[str]] = []
        room = 0
        for path in self._files:
            size = _size(path)
            if not groups or size > room or len(groups[-1]) == _GROUP_FILES:
                groups.append([])
                room = _GROUP_BYTES
            groups[-1].append(path)
            room -= size
        return [FilesSource(self._config, self._max_chars, group) for group in groups]

    def _read_file(self, path: str) -> Iterator[Document | Skipped]:
        kind = file_type(path)
        readers: dict[str, Callable[[BinaryIO, str], Iterator[Document | Skipped]]] = {
            "txt": self._whole,
            "md": self._whole,
            "jsonl": self._lines,
            "parquet": self._rows,
        }
        if kind not in readers:
            yield Skipped(path, "unknown_type", "its name ends in none of .txt .md .jsonl .parquet (.gz .zst .xz)")
            return
        with contents(path) as file:
            yield from readers[kind](file, path)

    def _whole(self, file: BinaryIO, path: str) -> Iterator[Document | Skipped]:
        limit = _UTF8_BYTES * self._max_chars
        data = _read(file, limit + 1)
        if len(data) > limit:
            yield _oversized(path, limit)
        elif b"\0" in data:
            yield Skipped(path, "binary", "it holds a NUL byte: it is not a text file")
        elif not data:
            yield Skipped(path, "empty", "the file is empty")
        else:
            document = to_document(data, path, "")
            if isinstance(document, Document):  # a byte order mark is no part of the text
                document = Document(document.text.removeprefix("\ufeff"), path)
            yield document

    def _lines(self, file: BinaryIO, path: str) -> Iterator[Document | Skipped]:
        limit = _JSON_BYTES * self._max_chars + _OTHER_FIELDS
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            identity = f"{path}:{number}"
            if len(line) > limit:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield _oversized(identity, limit)
            elif line.strip():
                yield self._record(line, identity)
        if not number:
            yield Skipped(path, "empty", "the file is empty")

    def _record(self, line: bytes, identity: str) -> Document | Skipped:
        try:
            record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        except UnicodeDecodeError as error:
            return Skipped(identity, "invalid_utf8", str(error))
        except (ValueError, RecursionError) as error:
            return Skipped(identity, "invalid_json", f"it is not valid JSON: {error}")
        if not isinstance(record, dict):
            return Skipped(identity, "invalid_json", "it is not a JSON object")
        field = self._config.text_field
        if field not in record:
            keys = ", ".join(list(record)[:20]) or "none"
            return Skipped(identity, "missing_field", f"it has no field '{field}' (text_field); it has: {keys}")
        return named(to_document(record[field], identity, field), record, self._config.identity_field)

    def _rows(self, file: BinaryIO, path: str) -> Iterator[Document | Skipped]:
        field = self._config.text_field
        with closing(seekable(file, path)) as whole:
            try:
                table = pq.ParquetFile(whole)
                fields = {"text_field": field, "identity_field": self._config.identity_field or field}
                for key, name in fields.items():
                    if name not in table.schema_arrow.names:
                        names = ", ".join(table.schema_arrow.names[:20])
                        yield Skipped(path, "missing_field", f"it has no column '{name}' ({key}); it has: {names}")
                        return
                if not table.metadata.num_rows:
                    yield Skipped(path, "empty", "it has no rows")
                row = 0
                for batch in table.iter_batches(batch_size=_ROWS, columns=list(dict.fromkeys(fields.values()))):
                    names = batch.column(fields["identity_field"])
                    for value, name in zip(batch.column(field), names, strict=True):
                        yield self._cell(value, name, f"{path}:{row}")
                        row += 1
            except pa.ArrowException as error:
                yield Skipped(path, "unreadable", f"it is not a sound Parquet file: {error}")

    def _cell(self, value: pa.Scalar, name: pa.Scalar, identity: str) -> Document | Skipped:
        try:
            document = to_document(value.as_py(), identity, self._config.text_field)
            field = self._config.identity_field
            return named(document, {field: name.as_py()}, field) if field else document
        except UnicodeDecodeError as error:
            return Skipped(identity, "invalid_utf8", str(error))


def matched(patterns: tuple[str, ...], key: str = "data.sources: paths") -> list[str]:
    """The files that globs match, local or remote; ``key`` is where the globs were given.

    Raises:
        UserError: if a glob matches none.
        StorageError: if remote storage cannot be reached.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            names = _remote(pattern, key)
        else:
            pattern = os.path.expanduser(pattern)
            names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not names:
            raise UserError(f"{key}: '{pattern}' matches no file{_missing_folder(pattern)}")
        found.update(dict.fromkeys(names))
    return list(found)


@contextmanager
def contents(path: str) -> Iterator[BinaryIO]:
    """A file, local or remote, opened and decompressed as its suffix says."""
    opened: Any = fsspec.open(path, "rb")  # without annotations: seen as a list of files too
    with cast(BinaryIO, opened.open()) as file:
        yield decompressed(file, path.lower())


def file_type(path: str) -> str:
    """What a file's name ends in, that of a compression left out: ``a.tsv.gz`` gives ``tsv``."""
    return _plain(path).rpartition(".")[2].lower()


def seekable(file: BinaryIO, path: str) -> BinaryIO:
    """The file itself, or a temporary copy on disk if it is compressed as a whole: Parquet is read from its end."""
    if _plain(path) == path:
        return file
    copy = tempfile.TemporaryFile()
    try:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
    except BaseException as error:
        copy.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path}: no room for it, decompressed, in {tempfile.gettempdir()}: {error}") from None
        raise
    return cast(BinaryIO, copy)


def file_states(paths: list[str]) -> list[list[Any]]:
    """What tells a changed file from an unchanged one: its name, its size, and its content, time or remote tag.

    Raises:
        StorageError: if remote storage cannot be reached.
    """
    local = [path for path in paths if "://" not in path]
    hashed = sum(os.path.getsize(path) for path in local) <= _HASHED_BYTES
    return [_local_state(path, hashed) if "://" not in path else _remote_state(path) for path in paths]


def _size(path: str) -> int:
    """Bytes of a file; none if it has gone, which reading it will explain."""
    if "://" not in path:
        return os.path.getsize(path) if os.path.exists(path) else 0
    try:
        file_system, name = fsspec.core.url_to_fs(path)
        return file_system.size(name) or 0
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}; run the same command again") from None


def _local_state(path: str, hashed: bool) -> list[Any]:
    state, name = os.stat(path), printable(path)
    if not hashed:
        return [name, state.st_size, state.st_mtime_ns]
    try:
        with open(path, "rb") as file:
            return [name, state.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        return [name, state.st_size, type(error).__name__]  # reading it will say so


def _remote_state(path: str) -> list[Any]:
    try:
        file_system, name = fsspec.core.url_to_fs(path)
        info = file_system.info(name)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}; run the same command again") from None
    tags = ("ETag", "etag", "md5Hash", "md5", "crc32c", "LastModified", "mtime", "updated", "created")
    tag = next((str(info[key]) for key in tags if info.get(key)), None)
    return [path, info.get("size"), tag]


def _remote(pattern: str, key: str) -> list[str]:
    try:
        file_system, path = fsspec.core.url_to_fs(pattern)
        names = sorted(str(name) for name in file_system.glob(path) if file_system.isfile(name))
        return [file_system.unstrip_protocol(name) for name in names]
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}: '{pattern}': {error}") from None
    except OSError as error:
        raise StorageError(f"{key}: '{pattern}' cannot be listed: {error}") from None


def _missing_folder(pattern: str) -> str:
    if "://" in pattern:
        return ""
    folder = Path(pattern)
    while glob.has_magic(str(folder)):
        folder = folder.parent
    folder = folder if folder != Path(pattern) else folder.parent
    return "" if folder.is_dir() else f"; there is no folder '{folder}'"


def _label(pattern: str) -> str:
    """The last part of a path that is no wildcard: ``corpora/books/*.txt`` gives ``books``, ``notes.txt`` ``notes``."""
    parts = [part for part in pattern.split("://")[-1].split("/") if part and not glob.has_magic(part)]
    return _plain(parts[-1]).partition(".")[0] if parts else "files"


def _plain(name: str) -> str:
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _read(file: BinaryIO, size: int) -> bytes:
    """Up to ``size`` bytes: a compressed stream may give fewer at a time."""
    blocks = []
    while size and (block := file.read(min(size, 1 << 20))):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)


def _oversized(identity: str, limit: int) -> Skipped:
    return Skipped(identity, "oversized", f"it is over {limit:,} bytes, more than data.cleaning.max_chars can be")
