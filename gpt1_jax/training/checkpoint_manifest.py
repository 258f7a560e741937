"""The manifest of a checkpoint: what is in it, and the size and the checksum of every file.

It is written last, so a checkpoint that has one is complete. Its own checksum is its last key.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pydantic
from etils import epath

from gpt1_jax.data.integrity import Problem, damage_of
from gpt1_jax.data.manifest import FileSum, sealed, sha256_of, unsealed
from gpt1_jax.data.storage import file_system, storage_errors, write_atomically
from gpt1_jax.pool import available_cores

MANIFEST = "manifest.json"


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ArrayKind(_Record):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class CheckpointManifest(_Record):
    """Everything that must hold of a checkpoint before it is used."""

    version: Literal[1] = 1
    step: int
    written: str  # when, UTC, ISO 8601
    config: str  # SHA-256 of the configuration
    tokenizer: str  # SHA-256 of the tokenizer
    arrays: dict[str, ArrayKind]  # by item and path in its tree, such as params/embedding/token_kernel
    files: dict[str, FileSum]  # every file but the manifest, by relative path

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


def write_manifest(checkpoint: epath.Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest: from then on the checkpoint is complete."""
    write_atomically(checkpoint / MANIFEST, sealed(manifest.model_dump(mode="json")))


def read_manifest(checkpoint: epath.Path) -> CheckpointManifest:
    """Reads the manifest of a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not as it was written.
        StorageError: if it cannot be read.
    """
    path = checkpoint / MANIFEST
    with storage_errors(path):
        data = path.read_bytes()
    return CheckpointManifest.model_validate(unsealed(data))


def files_in(folder: epath.Path) -> list[str]:
    """The files of a folder and of those in it, by relative path, sorted."""
    files, name = file_system(folder)
    return sorted(file.removeprefix(name).lstrip("/") for file in files.find(name))


def sums_of(folder: epath.Path) -> dict[str, FileSum]:
    """Size and checksum of every file of a folder; hashing leaves the interpreter's lock alone."""

    def sum_of(name: str) -> FileSum:
        files, path = file_system(folder / name)
        return FileSum(bytes=files.size(path), sha256=sha256_of(folder / name))

    names = files_in(folder)
    with ThreadPoolExecutor(available_cores()) as pool:
        return dict(zip(names, pool.map(sum_of, names), strict=True))


def problems_in(checkpoint: epath.Path, step: int, under: str = "", share: slice = slice(None)) -> list[Problem]:
    """What of a checkpoint is not as its manifest says.

    Args:
        checkpoint: its folder.
        step: that it is expected to be of.
        under: only files whose path begins so are read.
        share: which of them, as where several hosts share the work.

    Raises:
        StorageError: if a file cannot be read.
    """
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return [Problem(MANIFEST, "is missing")]
    except ValueError as error:
        return [Problem(MANIFEST, f"is not as it was written: {_first_line(error)}")]
    if manifest.step != step:
        return [Problem(MANIFEST, f"is of step {manifest.step}")]
    names = sorted(name for name in manifest.files if name.startswith(under))[share]
    with ThreadPoolExecutor(available_cores()) as pool:
        damages = list(pool.map(lambda name: damage_of(checkpoint / name, manifest.files[name]), names))
    return [Problem(name, what) for name, what in zip(names, damages, strict=True) if what]


def differences(stored: Mapping[str, ArrayKind], asked: Mapping[str, ArrayKind]) -> Iterable[str]:
    """Says of every array that is asked for and not stored so what differs."""
    for path, kind in asked.items():
        if (found := stored.get(path)) != kind:
            yield f"{path}: {found or 'not'} there, {kind} asked for"
    for path in sorted(stored.keys() - asked.keys()):
        yield f"{path}: {stored[path]} there, not asked for"


def _first_line(error: ValueError) -> str:
    return str(error).partition("\n")[0]
