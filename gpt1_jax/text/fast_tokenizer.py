"""Any tokenizer of the ``tokenizers`` library behind this project's protocol; its whole state is its JSON."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import tokenizers

from gpt1_jax.errors import UserError
from gpt1_jax.text.sentencepiece import PROBE
from gpt1_jax.text.special_tokens import missing

# Names of the token that ends a document, in the order in which they are looked for.
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<s>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class FastTokenizer:
    """A tokenizer.json. Text is text: the names of special tokens in it are spelt like any other word.

    The separator is the first of ``SEPARATORS`` that is in the vocabulary and that no text encodes to.

    Deviation: where there is none, as in the authors' vocabulary, the unknown token stands between documents.

    Args:
        content: the JSON.
        origin: names it in messages.

    Attributes:
        vocab_size: number of tokens, one more than the largest.
        separator_id: the token that ends every document.
        separator_reserved: whether no text encodes to it; false where it is the unknown token.
        unknown: the name of the token for what the vocabulary does not have, or None.
        special_tokens: the names of the special tokens, in the order of their ids, without the separator.
        reserved: the names, sorted, that other software may read as tokens: separator, unknown and special ones.
        fingerprint: SHA-256 of the JSON, hexadecimal.

    Raises:
        UserError: if it is no tokenizer, or has neither a separator nor an unknown token.
    """

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        self._content = content
        self._tokenizer = _parsed(content, origin)
        self._tokenizer.no_truncation()  # both are of batches for a model, and would cut or lengthen documents
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        vocabulary = self._tokenizer.get_vocab()
        if not vocabulary:
            raise UserError(f"{origin}: this tokenizer has no tokens")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.unknown: str | None = getattr(self._tokenizer.model, "unk_token", None)
        self.separator_id, self.separator_reserved = self._separator(vocabulary, origin)
        self._special_ids = {
            added.content: token
            for token, added in sorted(self._tokenizer.get_added_tokens_decoder().items())
            if added.special and token != self.separator_id
        }
        self.special_tokens: tuple[str, ...] = tuple(self._special_ids)
        separator = self.token(self.separator_id)
        self.reserved = tuple(sorted({separator, self.unknown or separator, *self.special_tokens}))
        self.fingerprint: str = hashlib.sha256(content).hexdigest()
        self._bytes = {token: int(byte[1], 16) for name, token in vocabulary.items() if (byte := _BYTE.fullmatch(name))}
        self._byte_ids = {byte: token for token, byte in self._bytes.items()}

    def to_bytes(self) -> bytes:
        """The JSON."""
        return self._content

    def special_id(self, name: str) -> int:
        """The token of one of the special tokens; ``KeyError`` if there is none of that name."""
        return self._special_ids[name]

    def with_special_tokens(self, names: Sequence[str]) -> "FastTokenizer":
        """This tokenizer with more special tokens behind its last token; itself if it has them all.

        Raises:
            UserError: if another token already has such a name, or if the library cannot add them behind the last.
        """
        new = missing(self, names, self._tokenizer.get_vocab())
        if not new:
            return self
        raw = _parsed(self._content, "the tokenizer")  # with what this class has switched off
        raw.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in new])
        if [raw.token_to_id(name) for name in new] != [*range(self.vocab_size, self.vocab_size + len(new))]:
            raise UserError(
                f"special tokens ({', '.join(new)}) cannot be added behind this tokenizer's last token: numbers below "
                f"{self.vocab_size} are not in its vocabulary. Take another tokenizer"
            )
        extended = FastTokenizer(raw.to_str().encode(), "the tokenizer with special tokens")
        # The library finds special tokens before words that were added, and then does not look for these inside.
        if any(self.encode(name).tolist() != extended.encode(name).tolist() for name in new):
            raise UserError(
                f"special tokens ({', '.join(new)}) cannot be added to this tokenizer: a text that spells one of them "
                "would become other tokens than it is now. Take another tokenizer"
            )
        return extended

    def token(self, number: int) -> str:
        """The name of a token in the vocabulary."""
        return self._tokenizer.id_to_token(number) or ""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32, shape (tokens,), and nothing around them.

        Raises:
            UnicodeEncodeError: if the text holds half of a surrogate pair, which is not Unicode text.
        """
        text.encode("utf-8")  # the library's own error is of another type
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, as :meth:`encode`.

        One by one: the library's own batches start threads on all cores, in each of the worker processes that share
        these cores already, and warn when a process forks after that.
        """
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; separators and special tokens give nothing; bytes that are no UTF-8 give U+FFFD."""
        kept = [token for token in np.asarray(ids, np.int64).tolist() if token != self.separator_id]
        return self._tokenizer.decode(self._with_sound_bytes(kept), skip_special_tokens=True)

    def _with_sound_bytes(self, ids: list[int]) -> list[int]:
        """The tokens with every run of byte pieces that is no UTF-8 repaired.

        The library would give U+FFFD for all the bytes of such a run, those of whole characters too, so that the text
        of a beginning would not be a beginning of the text.
        """
        if len(self._byte_ids) < 256 or not any(token in self._bytes for token in ids):
            return ids
        sound, run = [], bytearray()
        for token in [*ids, None]:
            if token in self._bytes:
                run.append(self._bytes[token])
                continue
            sound += [self._byte_ids[byte] for byte in run.decode("utf-8", "replace").encode()]
            run.clear()
            if token is not None:
                sound.append(token)
        return sound

    def _separator(self, vocabulary: dict[str, int], origin: str) -> tuple[int, bool]:
        """The separator, and whether it is reserved."""
        for name in SEPARATORS:
            if name in vocabulary and vocabulary[name] not in self.encode(name):
                return vocabulary[name], True
        if self.unknown in vocabulary:
            return vocabulary[self.unknown], False
        raise UserError(
            f"{origin}: this tokenizer has no token to put between documents: none of {', '.join(SEPARATORS)} is a "
            "special token of it, and it has no unknown token. Add one of them as a special token"
        )


def _parsed(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        tokenizer.encode(PROBE)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{origin}: no tokenizer that the tokenizers library can use: {error}") from None
    return tokenizer
