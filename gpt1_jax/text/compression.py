"""Streams of plain, .gz, .zst and .xz files; a truncated or damaged one raises ``OSError``, never ends early."""

import gzip
import io
import lzma
import zlib
from typing import BinaryIO, cast

import zstandard

SUFFIXES = (".gz", ".zst", ".xz")
# What reading a damaged stream may raise.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_BLOCK = 1 << 16  # bytes
_INPUT = 1 << 11  # bytes decompressed at once: made to, they give 64 MB


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """A stream of the contents of ``file``, compressed as the suffix of ``name`` says."""
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    if name.endswith(".xz"):
        return cast(BinaryIO, lzma.LZMAFile(file, mode="rb"))
    if name.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_Zstandard(file), _BLOCK))
    return file


class _Zstandard(io.RawIOBase):
    """Zstandard frames one after another. The library's own stream reader ends silently where a file is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = memoryview(b"")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unused = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills ``buffer`` as far as one block of input goes; 0 at the end."""
        while not self._pending:
            block = self._unused or self._file.read(_INPUT)
            self._unused = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the Zstandard frame is cut off")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size
