"""The errors that a user may meet, each with the exit code that scripts rely on.

Every message says what was wrong, where, with which value, and what to do next.
"""

import difflib
from collections.abc import Iterable


class GPT1Error(Exception):
    """Base of the project's errors; the command line prints the message alone, without a traceback."""

    exit_code = 1


class UserError(GPT1Error):
    """The user's mistake: a wrong key, value, path or combination."""

    exit_code = 2


class RefusedError(UserError):
    """The input is refused for what it is: whatever mends it is another input, or other settings."""


class DamagedError(GPT1Error):
    """Data or a checkpoint on disk is not what was written: a missing, truncated or altered file."""

    exit_code = 3


class DivergedError(GPT1Error):
    """The computation has gone wrong: no finite loss, spikes without end, or two results of one step."""

    exit_code = 4


class StalledError(GPT1Error):
    """The run cannot go on: a host of it has not come, has gone, or makes no progress."""

    exit_code = 5


class StorageError(GPT1Error):
    """Storage is full, read-only or cannot be reached."""

    exit_code = 6


class Interrupted(GPT1Error):
    """A signal ended the run, and a checkpoint holds what was trained: the same command goes on from there."""

    exit_code = 75


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the valid name nearest to ``name``, or ``""`` if none is near."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
