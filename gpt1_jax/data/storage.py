"""Files that are whole or absent, one writer at a time, and storage faults under their own name."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt1_jax.errors import StorageError

# Of an OSError: the disk is full, read-only or failing, access is denied, or something else has the place of the path.
FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOLCK}
    | {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, flushes it to the disk, and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns a full, read-only or failing disk into an error that says so.

    Raises:
        StorageError: naming the folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        raise StorageError(
            f"{folder}: cannot write: {error}; make room, get access or set data.root elsewhere, and run the same "
            "command again"
        ) from None


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock, waiting for it if need be; it falls with the process. The file is removed at the end."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_file(descriptor, path):  # the one who held it has removed it: another may hold its successor
                continue
            try:
                yield
            finally:
                path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
