"""Whether the files of a corpus are those that were written: their sizes and SHA-256 against the manifest."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from gpt1_jax.data.manifest import MANIFEST, FileSum, sha256_of
from gpt1_jax.data.storage import AnyPath, file_system, storage_errors
from gpt1_jax.pool import available_cores

if TYPE_CHECKING:
    from gpt1_jax.data.corpus import Corpus


class Problem(NamedTuple):
    """A file of a corpus or a checkpoint, by its name in the manifest, and what is wrong with it."""

    file: str
    what: str


def damage_of(path: AnyPath, expected: FileSum) -> str | None:
    """What is wrong with a file, or None: it is missing, or has not the size or the SHA-256 that it was written with.

    Raises:
        StorageError: if it cannot be read.
    """
    try:
        with storage_errors(path):
            files, name = file_system(path)
            size = files.size(name)
            if size != expected.bytes:
                return f"has {size} bytes, its manifest says {expected.bytes}"
            found = sha256_of(path)
    except FileNotFoundError:
        return "is missing"
    return None if found == expected.sha256 else f"has SHA-256 {found}, its manifest says {expected.sha256}"


def verify_corpus(
    corpus: "Corpus", progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None
) -> list[Problem]:
    """Reads every file of a corpus and compares it with the manifest.

    Args:
        corpus: opened.
        progress: told the stage, the files done and their number.

    Returns:
        What is wrong: files that are missing or altered, in the order of the manifest, then files that are not in it.

    Raises:
        StorageError: if a file cannot be read.
    """
    expected = corpus.manifest.files
    problems = []
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing leaves the interpreter's lock alone
        damages = pool.map(lambda file: damage_of(corpus.folder / file, expected[file]), expected)
        for done, (file, what) in enumerate(zip(expected, damages, strict=True), 1):
            if what:
                problems.append(Problem(file, what))
            progress("verifying checksums", done, len(expected))
    with storage_errors(corpus.folder):
        files, folder = file_system(corpus.folder)
        found = sorted(name.removeprefix(folder).lstrip("/") for name in files.find(folder))
    return problems + [Problem(file, "is not in the manifest") for file in found if file not in {MANIFEST, *expected}]
