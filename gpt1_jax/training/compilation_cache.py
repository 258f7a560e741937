"""Compiled functions, kept where the next start, and every other host, finds them."""

import hashlib
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

# JAX's public setting names a folder only. Its files carry no checksum and are written in place, and a flipped bit in
# compiled code is run: of ten, one ended the process with a segmentation fault.
from jax._src import compilation_cache as jax_cache
from jax._src.compilation_cache_interface import CacheInterface

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.data.storage import make_folder, write_atomically

_FOLDER = ".compilation_cache"  # in runs_dir
_MIN_SECONDS = 0.2  # what compiles faster is not worth a file


@contextmanager
def compilation_cache(config: Config | FinetuneConfig) -> Iterator[None]:
    """Has JAX keep what it compiles inside in ``train.compilation_cache``.

    JAX keys a function by all that it depends on: program, options, versions and kind of device. Of the processes of
    a run the first writes. What cannot be read or written is a warning, and compiled.
    """
    folder = config.train.compilation_cache
    if folder is None:
        yield
        return
    folder = epath.Path(config.runs_dir) / _FOLDER if folder == "auto" else epath.Path(folder)
    least: float = jax.config.jax_persistent_cache_min_compile_time_secs  # pyrefly: ignore[missing-attribute]
    _use(_Folder(folder / _instructions()), _MIN_SECONDS)
    try:
        yield
    finally:
        _use(None, least)


class _Folder(CacheInterface):
    """Files, whole or absent, each of which ends with the SHA-256 of the rest."""

    def __init__(self, folder: epath.Path):
        self._path: Any = folder

    def get(self, key: str) -> Any:
        """The bytes that were put under the key; None if there are none, or if they are damaged."""
        try:
            content = (self._path / key).read_bytes()
        except FileNotFoundError:
            return None
        value, digest = content[:-64], content[-64:]
        if _digest(value) != digest:
            warnings.warn(f"{self._path / key}: this compiled function is damaged; it is compiled again", stacklevel=2)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Writes a value, in the place of a damaged one."""
        make_folder(self._path)
        write_atomically(self._path / key, value + _digest(value))


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).hexdigest().encode()


def _use(cache: _Folder | None, least_seconds: float) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    jax_cache.reset_cache()
    if cache:
        jax_cache._cache, jax_cache._cache_initialized = cache, True


def _instructions() -> str:
    """A name for the instructions of the processor, if the devices are CPUs: code for another may end the process."""
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        said = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:  # not Linux
        said = [platform.processor()]
    return "cpu-" + hashlib.sha256("\n".join([platform.machine(), *said]).encode()).hexdigest()[:8]
