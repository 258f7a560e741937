"""A file of a corpus that is not what was written is named, whatever has become of it."""

import hashlib
import os
from pathlib import Path

import pytest

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.integrity import Problem, verify_corpus
from gpt1_jax.errors import StorageError


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kinds(corpus: Corpus) -> dict[str, str]:
    """A file of each kind, by its suffix."""
    return {Path(file).suffix or Path(file).name: file for file in corpus.manifest.files}


@pytest.fixture
def copied(corpus, tmp_path) -> Corpus:
    """A prepared corpus of one's own, with documents and tokenizer."""
    folder = tmp_path / "copied"
    for name in (*corpus.manifest.files, "manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((corpus.folder / name).read_bytes())
    return Corpus(folder)


def test_nothing_is_wrong_with_what_was_just_written(copied):
    seen = []
    assert verify_corpus(copied, lambda *told: seen.append(told)) == []
    count = len(copied.manifest.files)
    assert seen == [("verifying checksums", done, count) for done in range(1, count + 1)]


def test_a_flipped_bit_is_found_in_every_file(copied):
    assert {".tokens", ".offsets", ".model", ".json"} < set(kinds(copied))
    assert any("array_record" in kind for kind in kinds(copied))
    for file, expected in copied.manifest.files.items():
        path = Path(copied.folder / file)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        what = f"has SHA-256 {sha256(path)}, its manifest says {expected.sha256}"
        assert verify_corpus(copied) == [Problem(file, what)]
        path.write_bytes(content)
    assert verify_corpus(copied) == []


def test_truncated_missing_and_foreign_files_are_told_together(copied):
    folder, files = Path(copied.folder), list(copied.manifest.files)
    size = copied.manifest.files[files[0]].bytes
    os.truncate(folder / files[0], size - 1)
    (folder / files[2]).unlink()
    (folder / "documents" / "notes.txt").write_text("mine")
    assert verify_corpus(copied) == [
        Problem(files[0], f"has {size - 1} bytes, its manifest says {size}"),
        Problem(files[2], "is missing"),
        Problem("documents/notes.txt", "is not in the manifest"),
    ]


def test_a_file_that_cannot_be_read_is_the_storages_fault(copied, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", os.fspath(path))

    monkeypatch.setattr("gpt1_jax.data.integrity.sha256_of", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        verify_corpus(copied)
