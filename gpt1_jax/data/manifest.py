"""The manifest of a prepared corpus: what it was made from, what is in it, and the checksum of every file.

It is written last, so a folder that has one is complete. The files that it describes::

    documents/NAME/1.0.0/     the cleaned documents, a TFDS dataset in ArrayRecord files, splits train and validation
    tokenizer.model           the tokenizer, of whichever kind
    train-SS-NNNNN.tokens     tokens of source SS, shard NNNNN: flat, little-endian, uint16 or uint32
    train-SS-NNNNN.offsets    where each of its documents begins in the shard, and the end of the last: int64
    validation-SS-NNNNN.*     the same for the validation split
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, cast

import pydantic
from etils import epath

from gpt1_jax.data.storage import AnyPath, storage_errors, write_atomically
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.outside import parse_json

MANIFEST = "manifest.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class FileSum(_Record):
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


class SourceCounts(_Record):
    """What one source gave: documents read, kept, dropped by reason, and those of which something was cut off."""

    name: str
    read: int
    kept: int
    dropped: dict[str, int]
    cut: dict[str, int] = {}


class SplitCounts(_Record):
    """Totals of one split: ``bytes`` of UTF-8, ``words`` as white space separates them, ``tokens`` with separators."""

    documents: int
    bytes: int
    words: int
    tokens: int


class Shard(_Record):
    """One file of tokens. Every document in it is followed by the separator token."""

    split: Split
    source: int  # index into Manifest.sources
    file: str  # relative to the corpus; its offsets have the suffix .offsets
    tokens: int
    documents: int
    first_document: int  # index of its first document within the split of the TFDS dataset

    @property
    def offsets_file(self) -> str:
        """The file with the documents' offsets."""
        return str(Path(self.file).with_suffix(".offsets"))


class Manifest(_Record):
    """Everything about a prepared corpus that a reader must know."""

    version: Literal[2] = 2
    name: str
    fingerprint: str
    settings: dict[str, Any]  # what the fingerprint covers
    vocab_size: int
    separator_id: int
    dtype: Literal["uint16", "uint32"]
    tokenizer_fingerprint: str
    sources: tuple[SourceCounts, ...]
    splits: dict[Split, SplitCounts]
    shards: tuple[Shard, ...]  # ordered by split, source and number
    files: dict[str, FileSum]  # every file of the corpus but the manifest, by relative path

    def shards_of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)


def write_manifest(corpus: AnyPath, manifest: Manifest) -> None:
    """Writes the manifest, with its own checksum as the last key: from then on the corpus is complete."""
    write_atomically(epath.Path(corpus) / MANIFEST, sealed(manifest.model_dump(mode="json")))


def read_manifest(corpus: AnyPath) -> Manifest:
    """Reads the manifest of a prepared corpus.

    Raises:
        UserError: if there is none.
        DamagedError: if it cannot be parsed, or is not as it was written.
        StorageError: if it cannot be read.
    """
    path = epath.Path(corpus) / MANIFEST
    try:
        with storage_errors(path):
            data = path.read_bytes()
        return Manifest.model_validate(unsealed(data))
    except FileNotFoundError:
        raise UserError(
            f"{corpus}: no prepared corpus here ({MANIFEST} is missing); run 'gpt1 prepare' first"
        ) from None
    except ValueError as error:  # no JSON, no UTF-8, or other keys
        raise DamagedError(f"{path}: not as it was written: {error}; run 'gpt1 prepare' again") from None


def sealed(content: dict[str, Any]) -> bytes:
    """An object as JSON, with its own checksum as the last key."""
    return json.dumps({**content, "sha256": _canonical_sha256(content)}, indent=2).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any]:
    """The object that was sealed.

    Raises:
        ValueError: if a byte is not as it was written.
    """
    content = parse_json(data)
    if isinstance(content, dict):
        content.pop("sha256", None)
        if sealed(content) == data:
            return content
    raise ValueError("its checksum is another")


def sha256_of(path: AnyPath) -> str:
    """SHA-256 of a file, hexadecimal, read in blocks."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def fingerprint_of(settings: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the settings in canonical JSON."""
    return _canonical_sha256(settings)[:16]


def _canonical_sha256(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
