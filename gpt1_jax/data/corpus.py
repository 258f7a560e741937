"""A prepared corpus, opened for reading: its manifest, its tokenizer's file and its tokens as flat streams.

The shards are read with positional reads, not through a memory map. Both are far faster than a step needs, but a map
of a file that is read at random counts as much memory as the corpus is large, and kills the process with a signal
where a file on shared storage is truncated under it. Shards in a bucket are read by ranges, without a local copy.
"""

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.data.integrity import damage_of
from gpt1_jax.data.manifest import FileSum, Manifest, Shard, Split, read_manifest
from gpt1_jax.data.storage import AnyPath, file_system, is_remote, storage_errors, storage_fault
from gpt1_jax.errors import DamagedError, StorageError, UserError
from gpt1_jax.pool import available_cores
from gpt1_jax.text.tokenizer import Tokenizer, load_tokenizer

OFFSET = np.dtype("<i8")


class Corpus:
    """A folder that ``gpt1 prepare`` wrote.

    Args:
        folder: the corpus, local or in a bucket.
        verify: compare every file with its checksum before anything in it is used.
        readers: threads that read windows at once beside the caller's; 0: the caller reads one after another.

    Attributes:
        folder: the same, as a path.
        manifest: what is in it.

    Raises:
        UserError: if there is no prepared corpus in the folder.
        DamagedError: if its manifest is not as it was written.
        StorageError: if the storage cannot be reached.
    """

    def __init__(self, folder: AnyPath, verify: bool = True, readers: int = 0):
        self.folder = epath.Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self._verify = verify
        self._readers = ThreadPoolExecutor(readers, "reader") if readers else None
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards = {
            shard.file: _ShardFile(self.folder / shard.file, shard.tokens * self._dtype.itemsize, self._sum(shard.file))
            for shard in self.manifest.shards
        }

    @property
    def tokenizer_file(self) -> epath.Path:
        """The tokenizer that made the tokens: a SentencePiece model or, under the same name, a tokenizer.json."""
        return self.folder / "tokenizer.model"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DamagedError: if it is missing or altered.
            StorageError: if it cannot be read.
        """
        path, expected = self.tokenizer_file, self.manifest.tokenizer_fingerprint
        try:
            with storage_errors(path):
                content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            what = f"has SHA-256 {found}, its manifest says {expected}" if content else "is missing"
            raise DamagedError(f"{path}: the corpus's tokenizer {what}; run 'gpt1 prepare' again to rebuild it")
        return load_tokenizer(content, str(path))

    def tokens(self, split: Split) -> "TokenStream":
        """The whole split as one stream, source after source.

        Raises:
            DamagedError: if a shard is missing or has not the size that the manifest says. Every size is checked at
                once, so that a damaged corpus is found before the first step and not hours later; checksums are
                compared, and files opened, when they are first read.
            StorageError: if the storage cannot be reached.
        """
        shards = self.manifest.shards_of(split)
        with storage_errors(self.folder):
            files, folder = file_system(self.folder)
            sizes = {os.path.basename(found["name"]): found["size"] for found in files.ls(folder, detail=True)}
        for shard in shards:
            self._shards[shard.file].check_size(sizes.get(shard.file))
        return TokenStream([self._shards[shard.file] for shard in shards], self._dtype, self._readers)

    def source_tokens(self, split: Split) -> list[int]:
        """Tokens of each source in the split; in the stream of the split they follow each other in this order."""
        shards = self.manifest.shards_of(split)
        assert [s.source for s in shards] == sorted(s.source for s in shards), "the manifest orders shards by source"
        return [sum(s.tokens for s in shards if s.source == k) for k in range(len(self.manifest.sources))]

    def offsets(self, shard: Shard) -> np.ndarray:
        """Where each document of a shard begins in it, and the end of the last: int64 [documents + 1], in tokens.

        Raises:
            DamagedError: if the file is missing or altered.
            StorageError: if it cannot be read.
        """
        path = self.folder / shard.offsets_file
        size = (shard.documents + 1) * OFFSET.itemsize
        file = _ShardFile(path, size, self._sum(shard.offsets_file))
        offsets = np.empty(shard.documents + 1, OFFSET)
        file.read_into(offsets, 0)
        return offsets

    @property
    def sums(self) -> Mapping[str, FileSum] | None:
        """What its files are compared with before they are used; None: they are trusted."""
        return self.manifest.files if self._verify else None

    def _sum(self, file: str) -> FileSum | None:
        return self.sums[file] if self.sums else None


def find_corpus(fingerprint: str, config: Config, run: epath.Path) -> Corpus:
    """A corpus that a run was trained on, found by its fingerprint: its sources may be gone or changed.

    Raises:
        UserError: if it is not there.
    """
    root = epath.Path(config.data.root)
    folders = list(root.glob(f"*-{fingerprint}"))
    if not folders:
        raise UserError(
            f"{root}: the corpus of {run} (fingerprint {fingerprint}) is not here; run from the folder that it was "
            "trained from"
        )
    return Corpus(folders[0], config.data.verify, config.data.readers)


class TokenStream:
    """The tokens of several shards as one sequence, read by position in memory that does not depend on its length.

    Args:
        files: of the shards, in the order of the stream.
        dtype: of the tokens in them.
        readers: read the rows of a batch at once; None: the caller reads them one after another.
    """

    def __init__(self, files: "Sequence[_ShardFile]", dtype: np.dtype, readers: ThreadPoolExecutor | None):
        self._files, self._dtype, self._readers = files, dtype, readers
        self._ends = np.cumsum([file.size // dtype.itemsize for file in files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int32."""
        return self.gather(np.array([start]), stop - start)[0]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of the stream, which may span shards.

        Args:
            starts: [n], positions of their first tokens.
            length: tokens in each.

        Returns:
            int32 [n, length].

        Raises:
            IndexError: if a window leaves the stream.
            DamagedError: if a shard is not the one that was written, or has become shorter, or has gone.
            StorageError: if a shard cannot be read.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"tokens [{starts.min()}, {starts.max() + length}) of a stream of {len(self)}")
        raw = np.empty((len(starts), length), self._dtype)
        first = np.searchsorted(self._ends, starts, side="right").tolist()
        last = np.searchsorted(self._ends, starts + length - 1, side="right").tolist()
        if length:
            self._open({shard for begin, end in zip(first, last, strict=True) for shard in range(begin, end + 1)})
        rows = self._readers.map if self._readers else map
        for _ in rows(self._fill, raw, starts.tolist(), first):
            pass
        return raw.astype(np.int32)

    def _open(self, shards: set[int]) -> None:
        """Opens files that are not open yet, all at once: each is read from end to end for its checksum."""
        closed = [file for file in map(self._files.__getitem__, shards) if not file.is_open]
        if closed:
            with ThreadPoolExecutor(available_cores()) as pool:
                list(pool.map(_ShardFile.open, closed))

    def _fill(self, row: np.ndarray, start: int, shard: int) -> None:
        """Reads tokens from ``start``, which lies in ``shard``, until ``row`` is full."""
        done = 0
        while done < len(row):
            end = int(self._ends[shard])
            count = min(len(row) - done, end - start)
            file = self._files[shard]
            # The end of the file is the end of the shard: its size was checked.
            file.read_into(row[done : done + count], file.size - (end - start) * row.itemsize)
            done, start, shard = done + count, start + count, shard + 1


class _ShardFile:
    """One file of a shard, of a known size, checked and opened when it is first read, closed with the object.

    Args:
        path: of the file.
        size: in bytes.
        expected: what it must be; None: it is trusted.
    """

    def __init__(self, path: epath.Path, size: int, expected: FileSum | None):
        self._path, self._expected = path, expected
        self._opening = threading.Lock()  # evaluation and the loader's threads may share a file
        # Reads bytes at an offset into a buffer, and says how many, 0 at the end of the file; None until opened.
        self._read: Callable[[memoryview, int], int] | None = None
        self._descriptor: int | None = None
        self.size = size

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)

    @property
    def is_open(self) -> bool:
        """Whether it has been checked and may be read."""
        return self._read is not None

    def check_size(self, found: int | None) -> None:
        """Compares the size with the one found; None: there is no such file."""
        if found is None:
            raise self._damaged("is missing")
        if found != self.size:
            raise self._damaged(f"has {found} bytes, its manifest says {self.size}")

    def open(self) -> None:
        """Compares it with its checksum, and opens it; a second call does nothing."""
        with self._opening:
            if self._read is not None:
                return
            if self._expected and (what := damage_of(self._path, self._expected)):
                raise self._damaged(what)
            if is_remote(self._path):
                self._read = functools.partial(_read_range, *file_system(self._path))
                return
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY)
            except FileNotFoundError:
                raise self._damaged("is missing") from None
            except OSError as error:
                raise StorageError(f"{self._path}: cannot be opened: {error}") from None
            self._read = functools.partial(_read_local, self._descriptor)

    def read_into(self, numbers: np.ndarray, offset: int) -> None:
        """Fills a contiguous array from the byte ``offset`` on."""
        if self._read is None:
            self.open()
        assert self._read is not None
        view = numbers.view(np.uint8).data
        while view:  # one call reads at most 2 GiB, and network storage may return less
            try:
                count = self._read(view, offset)
            except FileNotFoundError:
                raise self._damaged("is missing") from None
            except Exception as error:
                if isinstance(error, OSError) or storage_fault(error):
                    raise StorageError(f"{self._path}: cannot be read: {error}") from None
                raise
            if not count:
                raise self._damaged(f"ends at byte {offset} of {self.size}")
            view, offset = view[count:], offset + count

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self._path}: this file of the corpus {what}; run 'gpt1 prepare' again: it rebuilds just that file"
        )


def _read_local(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)


def _read_range(files: Any, name: str, view: memoryview, offset: int) -> int:
    found = files.cat_file(name, start=offset, end=offset + len(view))
    view[: len(found)] = found
    return len(found)
