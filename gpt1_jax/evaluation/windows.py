"""Where the windows of a strided evaluation begin, and which tokens each of them counts."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """A stretch of the stream that the model reads at once.

    It predicts the tokens at ``start`` to ``stop - 1``, each from those before it in the window and the one at
    ``start - 1``, and counts the predictions from ``counted`` on: those before are another window's.
    """

    start: int
    stop: int
    counted: int


def windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Windows that together count every token of a stream once.

    Window k starts at k * stride. With a stride below the context length, all but the first window count only
    their last ``stride`` tokens, each then predicted from at least ``context_length - stride`` others.

    Args:
        length: tokens in the stream.
        context_length: tokens in a window; the last may be shorter.
        stride: tokens between the starts of windows, 1 to ``context_length``.
    """
    assert 0 < stride <= context_length
    start = counted = 0
    while counted < length:
        stop = min(start + context_length, length)
        yield Window(start, stop, counted)
        start, counted = start + stride, stop
