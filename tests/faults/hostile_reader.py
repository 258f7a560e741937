"""Reads hostile files in a process of its own, in bounded memory: ``python hostile_reader.py FORMAT...``.

Each format has a folder, with a folder for each case. It prints a line of JSON for each: what came of it, 0 or the exit
code of the project's error, or the type of any other one, and the message.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from gpt1_jax.errors import GPT1Error, UserError

ROOM = 2**30  # bytes above what the process has when it begins


def weights(folder: Path) -> None:
    """The tensors of safetensors files."""
    from gpt1_jax.interop.safetensors_files import Weights

    found = Weights(folder)
    if problems := found.problems():
        raise UserError("\n".join(problems[:3]))
    for name in [*found.shapes][:10]:
        found.read(name)


def configuration(folder: Path) -> None:
    """A configuration."""
    from gpt1_jax.config_file import load_config

    load_config(folder / "config.yaml")


def tokenizer(folder: Path) -> None:
    """A tokenizer of either kind."""
    from gpt1_jax.text.tokenizer import read_tokenizer

    read_tokenizer(folder / "tokenizer.model")


def release(folder: Path) -> None:
    """The authors' release."""
    from gpt1_jax.interop.original import read_original

    read_original(folder)


def texts(folder: Path) -> None:
    """Documents; where there are none, it is as with a corpus."""
    from gpt1_jax.source_config import Files
    from gpt1_jax.text.document import Skipped
    from gpt1_jax.text.files import FilesSource

    files = tuple(str(path) for path in folder.iterdir())
    items = list(FilesSource(Files(kind="files", paths=files), 10_000_000).read())
    skipped = [f"{item.reason}: {item.detail}" for item in items if isinstance(item, Skipped)]
    if len(skipped) == len(items):
        raise UserError("; ".join(skipped))


READERS: dict[str, Callable[[Path], None]] = {
    "safetensors": weights,
    "pickle": weights,
    "yaml": configuration,
    "model": tokenizer,
    "npy": release,
    "tar": texts,
}


def outcome(kind: str, folder: Path) -> dict[str, object]:
    """What came of a case."""
    try:
        READERS[kind](folder)
    except GPT1Error as error:
        return {"outcome": error.exit_code, "message": str(error)[:300]}
    except BaseException as error:  # one that comes from Rust is not an Exception
        return {"outcome": type(error).__name__, "message": str(error)[:300]}
    return {"outcome": 0}


if __name__ == "__main__":
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind in sys.argv[1:]:
        for folder in sorted(Path(kind).iterdir()):
            print(folder, file=sys.stderr, flush=True)
            print(json.dumps({"kind": kind, "case": folder.name, **outcome(kind, folder)}), flush=True)
