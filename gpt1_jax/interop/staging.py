"""A folder that is there whole or not at all."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from gpt1_jax.data.storage import flush_folder, locked
from gpt1_jax.errors import UserError
from gpt1_jax.training.hosts import Hosts
from gpt1_jax.training.lock import sole_writer


def check_new(folder: Path | epath.Path) -> None:
    """Checks that nothing is in a folder that is about to be made.

    Raises:
        UserError: if something is.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is left as it is; give the name of a new folder, or remove it")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder beside ``folder``, which takes its name when all has gone well.

    What a killed process left under the hidden name is removed by the next one that makes the same folder; two that
    make it at once take turns, and the second is refused.

    Raises:
        UserError: if there is such a folder already.
    """
    check_new(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.partial")
    with locked(folder.with_name(f".{folder.name}.lock"), lambda: None):
        check_new(folder)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        try:
            yield hidden
            flush_folder(hidden)
            check_new(folder)
            hidden.rename(folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def in_bucket(folder: epath.Path, say: Callable[[str], None]) -> Iterator[epath.Path]:
    """Gives a folder itself, since a bucket's cannot be renamed; if something goes wrong, it is emptied.

    What makes it complete for a reader is to be written into it last.

    Raises:
        UserError: if something is in it already, or another process is making it.
    """
    check_new(folder)
    with sole_writer(folder, Hosts(), say):
        try:
            yield folder
        except BaseException:
            folder.rmtree(missing_ok=True)
            raise
