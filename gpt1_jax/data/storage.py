"""Files that are whole or absent, here or in a bucket; one writer at a time; storage faults under their own name.

A path is a bucket's if it has a scheme, ``gs://`` or ``s3://``, and is a local one otherwise. Object storage has no
append, no rename and no lock; one put replaces an object as a whole, or does not.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from gpt1_jax.errors import GPT1Error, StorageError, UserError

AnyPath = str | os.PathLike[str]

# Of an OSError: the disk is full, read-only or failing, access is denied, or something else has the place of the path.
FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOLCK}
    | {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
)
# The packages that speak to buckets; what they raise themselves, and not in the name of Python, is the storage's fault.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google.a", "google.cloud", "requests", "s3fs")
# How TensorStore, which raises nothing more specific than ValueError, says that a bucket does not answer or let it in.
_OUT_OF_REACH = re.compile(r"\b(ABORTED|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE): ")
# And what the operating system has answered it.
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")

# Listings are not kept: TensorStore and other processes write behind fsspec's back.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)
fsspec.register_implementation("s3", "gpt1_jax.data.s3.S3FileSystem", clobber=True, errtxt="Install s3fs to access S3")


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def file_system(path: AnyPath) -> tuple[Any, str]:
    """The fsspec file system of a path, local or remote, and the path's name there."""
    return fsspec.core.url_to_fs(os.fspath(path))


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Writes a file: under a temporary name, flushed to the disk, and renamed; or by one put.

    Args:
        path: of the file; its folder exists, or its bucket.
        content: of the file.

    Raises:
        StorageError: if there is no such bucket.
    """
    if is_remote(path):
        remote, name = file_system(path)
        with _putting(path):
            remote.pipe_file(name, content)
        return
    # A name of its own: on a shared disk two workers may write the same file, to the same bytes.
    temporary = Path(f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        put_file(temporary, path)
    except OSError as error:
        error.filename = os.fspath(path)  # a full disk has none
        temporary.unlink(missing_ok=True)
        raise


def write_changed(path: epath.Path, content: bytes) -> None:
    """Writes a file, as :func:`write_atomically`, unless it has that content already."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def create_file(path: AnyPath, content: bytes) -> bool:
    """Writes a file that is not there yet; of several who do so at once, one succeeds.

    A bucket is asked to refuse a second one. Of those that know no such request, the last one's content stays.

    Args:
        path: of the file; its folder exists, or its bucket.
        content: of the file; a reader may see it empty for a moment.

    Returns:
        Whether it was written: false if there is such a file.

    Raises:
        StorageError: if there is no such bucket.
    """
    if is_remote(path):
        remote, name = file_system(path)
        if remote.exists(name):
            return False
        try:
            with _putting(path):
                remote.pipe_file(name, content, mode="create")
        except FileExistsError:
            return False
        return True
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        os.unlink(path)
        raise
    return True


def put_file(local: Path, path: AnyPath) -> None:
    """Moves a finished local file to its place: uploaded, or flushed to the disk and renamed on its file system.

    Raises:
        StorageError: if there is no such bucket.
    """
    if is_remote(path):
        remote, name = file_system(path)
        with _putting(path):
            remote.put_file(os.fspath(local), name)
        local.unlink()
        return
    with open(local, "rb") as file:
        os.fsync(file.fileno())
    local.replace(path)


def flush_folder(folder: AnyPath) -> None:
    """Has the disk hold all of a local folder: else a machine that fails could leave empty files under a final name."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # which say that a file system has no such thing
                raise
        finally:
            os.close(descriptor)


def make_folder(path: AnyPath) -> None:
    """Makes a folder and those above it where need be; a bucket has none, and a missing bucket is not made."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def check_room(folder: AnyPath, needed: int, what: str) -> None:
    """Checks that a folder's disk has room; a bucket has.

    Args:
        folder: it exists.
        needed: bytes.
        what: needs them, and what to do to need less, for the message.

    Raises:
        StorageError: with both figures, if there is less.
    """
    if is_remote(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{os.fspath(folder)}: {free:,} bytes are free there, and {needed:,} are needed: {what}; make room or "
            "write elsewhere, and run the same command again"
        )


def names_in(folder: AnyPath) -> set[str]:
    """Names of the files and folders in a folder, which need not exist."""
    try:
        return {path.name for path in epath.Path(folder).iterdir()}
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def _putting(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{os.fspath(path)}: there is no such bucket; make it, or write elsewhere") from None


def local_copy(path: AnyPath) -> Path:
    """A file to read on this machine: itself, or a copy that lasts as long as this process.

    An object is downloaded once, and again when it has changed.

    Raises:
        FileNotFoundError: if there is no such object.
    """
    if not is_remote(path):
        return Path(path)
    remote, name = file_system(path)
    version = hashlib.sha256(f"{name} {remote.ukey(name)}".encode()).hexdigest()
    copy = _copies() / version / os.path.basename(name)
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as file:
            remote.get_file(name, file.name)
        os.replace(file.name, copy)
    return copy


@functools.cache
def _copies() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gpt1-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def storage_fault(error: BaseException) -> GPT1Error | None:
    """What to tell the user of an error, if it is the storage's: full, read-only, forbidden, out of reach."""
    missing = getattr(error.__cause__, "name", None)
    if isinstance(error, ImportError) and missing in ("gcsfs", "s3fs"):
        return UserError(f"gs:// and s3:// need packages that are not here: {error}; pip install 'gpt1-jax[cloud]'")
    if isinstance(error, GPT1Error):  # which says itself what it is
        return None
    of_client = type(error).__module__.startswith(_CLIENTS) or _OUT_OF_REACH.search(str(error))
    said = _SYSTEM_ERROR.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if of_client or code in FAULTS:
        return StorageError(f"{error}; make room, get access or write elsewhere, and run the same command again")
    return None


@contextlib.contextmanager
def storage_errors(folder: AnyPath) -> Iterator[None]:
    """Turns a full, read-only, failing or unreachable storage into an error that says so.

    Args:
        folder: what is read or written inside. Where it is remote, every OSError is the storage's fault, but for that
            of a file that is not there.

    Raises:
        StorageError: naming the folder.
        UserError: if the package that reaches the folder is not installed.
    """
    try:
        yield
    except Exception as error:
        fault = storage_fault(error)
        if fault is None and is_remote(folder) and isinstance(error, OSError):
            fault = StorageError(f"{error}; run the same command again")
        if fault is None or isinstance(error, FileNotFoundError):
            raise
        raise type(fault)(f"{os.fspath(folder)}: {fault}") from None


@contextlib.contextmanager
def locked(path: AnyPath, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock, waiting for it if need be; it falls with the process. The file is removed at the end.

    Object storage has no lock that falls with its holder: there the caller must see to it that it is alone.
    """
    if is_remote(path):
        yield
        return
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
                os.unlink(path)
            return
        finally:
            os.close(descriptor)


def _is_file(descriptor: int, path: AnyPath) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
