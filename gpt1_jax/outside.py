"""What comes from outside, in bounded memory: a file that is longer than it can be, JSON that is deeper."""

import json
import os
from typing import Any

from etils import epath


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """Reads a file, local or in a bucket.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: if it has more; no more than these are read.
        OSError: if it cannot be read.
    """
    with epath.Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def parse_json(content: str | bytes) -> Any:
    """As ``json.loads``, with ``ValueError`` for whatever is wrong, also for what is nested too deeply to be read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
