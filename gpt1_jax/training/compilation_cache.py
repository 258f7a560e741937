"""Compiled functions, kept where the next start, and every other host, finds them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from gpt1_jax.config import Config

_FOLDER = ".compilation_cache"  # in runs_dir
_MIN_SECONDS = 0.2  # what compiles faster is not worth a file


@contextmanager
def compilation_cache(config: Config) -> Iterator[None]:
    """Has JAX keep what it compiles inside in ``train.compilation_cache``.

    JAX keys a function by all that it depends on: the program, the options, the versions, the kind of device and, of
    CPUs, their instructions. It writes in process 0 alone. An entry that cannot be read is a warning, and compiled.
    """
    folder = config.train.compilation_cache
    if folder == "auto":
        folder = os.path.join(config.runs_dir, _FOLDER)
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": _MIN_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX looks at its folder once, at the first function that it compiles
