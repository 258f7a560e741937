"""A prepared corpus, opened for reading: its manifest, its tokenizer's file and its tokens as flat streams.

The shards are read with positional reads, not through a memory map. Both are far faster than a step needs, but a map
of a file that is read at random counts as much memory as the corpus is large, and kills the process with a signal
where a file on shared storage is truncated under it.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt1_jax.data.manifest import Manifest, Shard, Split, read_manifest
from gpt1_jax.errors import DamagedError, StorageError


class Corpus:
    """A folder that ``gpt1 prepare`` wrote.

    Args:
        folder: the corpus.

    Attributes:
        folder: the same, as a path.
        manifest: what is in it.

    Raises:
        UserError: if there is no prepared corpus in the folder.
        DamagedError: if its manifest cannot be parsed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the tokens: a SentencePiece model or, under the same name, a tokenizer.json."""
        return self.folder / "tokenizer.model"

    def tokens(self, split: Split) -> "TokenStream":
        """The whole split as one stream, source after source.

        Raises:
            DamagedError: if a shard is missing or has not the size that the manifest says.
        """
        return TokenStream(self.folder, self.manifest.shards_of(split), np.dtype(self.manifest.dtype))

    def source_tokens(self, split: Split) -> list[int]:
        """Tokens of each source in the split; in the stream of the split they follow each other in this order."""
        shards = self.manifest.shards_of(split)
        assert [s.source for s in shards] == sorted(s.source for s in shards), "the manifest orders shards by source"
        return [sum(s.tokens for s in shards if s.source == k) for k in range(len(self.manifest.sources))]


class TokenStream:
    """The tokens of several shards as one sequence, read by position in memory that does not depend on its length.

    Args:
        folder: the corpus.
        shards: in the order of the stream.
        dtype: of the tokens on disk.

    Raises:
        DamagedError: if a shard is missing or has not the size that the manifest says. Every size is checked at
            once, so that a damaged corpus is found before the first step and not hours later; files are opened
            when they are first read.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype):
        self._dtype = dtype.newbyteorder("<")
        self._files = [_ShardFile(folder / shard.file, shard.tokens * dtype.itemsize) for shard in shards]
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

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
            DamagedError: if a shard has become shorter or has gone.
            StorageError: if a shard cannot be read.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"tokens [{starts.min()}, {starts.max() + length}) of a stream of {len(self)}")
        raw = np.empty((len(starts), length), self._dtype)
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(raw, starts.tolist(), shards.tolist(), strict=True):
            self._fill(row, start, shard)
        return raw.astype(np.int32)

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
    """One file of tokens, of a known size, opened when it is first read and closed with the object."""

    def __init__(self, path: Path, size: int):
        self._path = path
        self._descriptor: int | None = None
        self._opening = threading.Lock()  # evaluation and the loader's thread may share a stream
        self.size = size
        try:
            found = os.stat(path).st_size
        except FileNotFoundError:
            raise self._damaged("is missing") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be reached: {error}") from None
        if found != size:
            raise self._damaged(f"has {found} bytes, its manifest says {size}")

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read_into(self, tokens: np.ndarray, offset: int) -> None:
        """Fills a contiguous array from the byte ``offset`` on."""
        if self._descriptor is None:
            self._open()
        assert self._descriptor is not None
        view = tokens.view(np.uint8).data
        while view:  # one call reads at most 2 GiB, and network storage may return less
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise StorageError(f"{self._path}: cannot be read: {error}") from None
            if not count:
                raise self._damaged(f"ends at byte {offset} of {self.size}")
            view, offset = view[count:], offset + count

    def _open(self) -> None:
        with self._opening:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self._path, os.O_RDONLY)
                except FileNotFoundError:
                    raise self._damaged("is missing") from None
                except OSError as error:
                    raise StorageError(f"{self._path}: cannot be opened: {error}") from None

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self._path}: this shard of the corpus {what}; run 'gpt1 prepare' again to rebuild it")
