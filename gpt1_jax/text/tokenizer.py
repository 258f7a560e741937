"""What every tokenizer offers, and the one way to open a stored one, whatever its kind."""

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gpt1_jax.errors import UserError
from gpt1_jax.outside import read_bounded
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer

MOST_BYTES = 200_000_000  # of a tokenizer's file


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back.

    ``decode(encode(text)) == text`` holds for the SentencePiece models of this project, and for their form in the
    ``tokenizers`` library; a vocabulary that comes from elsewhere may lose case or spacing.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def separator_id(self) -> int:
        """The token that ends every document; no text encodes to it, or only what the vocabulary does not know."""
        ...

    @property
    def separator_reserved(self) -> bool:
        """Whether no text encodes to the separator, so that each one in a stream is the end of a document."""
        ...

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The names, in the order of their ids, of the tokens that no text encodes to and that decode to nothing.

        The separator is not among them.
        """
        ...

    @property
    def reserved(self) -> tuple[str, ...]:
        """The names, sorted, that other software may read as tokens: separator, unknown and special ones."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's serialized form, hexadecimal."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32, shape (tokens,).

        Raises:
            UnicodeEncodeError: if the text holds half of a surrogate pair, which is not Unicode text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, as :meth:`encode`; one call for many short texts is faster."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; separators give nothing, and bytes that are no UTF-8 give U+FFFD.

        The text of a beginning of the tokens is a beginning of their text, but for an incomplete character at its
        end, which gives U+FFFD.
        """
        ...

    def special_id(self, name: str) -> int:
        """The token of one of :attr:`special_tokens`.

        Raises:
            KeyError: if there is none of that name.
        """
        ...

    def with_special_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """This tokenizer with more special tokens, behind its last token, in their order.

        Those that are there already stay where they are; if all are, this is the tokenizer itself. Every text encodes
        as before, also one that spells a name.

        Raises:
            UserError: if a token that texts are made of already has such a name.
        """
        ...

    def to_bytes(self) -> bytes:
        """The serialized form."""
        ...


def load_tokenizer(content: bytes, origin: str = "tokenizer.model") -> Tokenizer:
    """The tokenizer in its serialized form: a SentencePiece model, or a JSON of the ``tokenizers`` library.

    Args:
        content: what :meth:`Tokenizer.to_bytes` gave; the two kinds are told apart by it.
        origin: names it in messages.

    Raises:
        UserError: if it is neither, or does not serve as a tokenizer here.
    """
    # A SentencePiece model is a protocol buffer whose first byte, the tag of field 1, is a newline.
    kind = FastTokenizer if content.startswith(b"{") else SentencePieceTokenizer
    return kind(content, origin)


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file, local or in a bucket, of either kind.

    Raises:
        UserError: if the file cannot be read, or holds no sound tokenizer.
    """
    try:
        content = read_bounded(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: this tokenizer cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: this is no tokenizer: {error}") from None
    return load_tokenizer(content, str(path))
