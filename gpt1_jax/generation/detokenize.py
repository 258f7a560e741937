"""Text as it is generated: tokens in, and out only what later tokens cannot change."""

from collections.abc import Callable, Sequence

import numpy as np

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to


class Detokenizer:
    """Turns a stream of tokens into pieces of text that join to the decoding of all of them.

    A character outside the vocabulary is spelt in one token a byte, and a stream may stop between two of them, so
    text that ends in what may be half a character is held back. Everything is decoded anew at each call: decoding a
    piece alone would lose the space that begins it, and a context of tokens is short.

    Args:
        decode: token ids to text. The decoding of a beginning must be a beginning of the decoding of the whole, but
            for an incomplete character at its end.
        prompt: tokens that come before the stream; their text is not repeated.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] | np.ndarray = ()):
        self._decode = decode
        self._tokens = [int(token) for token in prompt]
        self._done = len(decode(self._tokens)) if self._tokens else 0

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Takes the next tokens, and returns the text that is complete with them."""
        self._tokens += map(int, tokens)
        return self._emit(self._decode(self._tokens).rstrip(_INCOMPLETE))

    def flush(self) -> str:
        """Returns what was held back, at the end of the stream."""
        return self._emit(self._decode(self._tokens))

    def _emit(self, text: str) -> str:
        new = text[self._done :]
        self._done += len(new)
        return new
