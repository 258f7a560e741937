"""SentencePiece BPE: lossless, with byte fallback, no silent normalisation and a separator no text can produce."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import sentencepiece as spm

from gpt1_jax.errors import RefusedError, UserError
from gpt1_jax.text.sentencepiece_proto import CONTROL, model_proto
from gpt1_jax.text.special_tokens import missing

SEPARATOR = "<|endoftext|>"
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space
_TRAINING_LINE = 4000  # bytes; the trainer leaves out, silently, lines over 4192
_TRAINING_THREADS = 8  # written into the model, so fixed: the same sample gives the same bytes on any machine
_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # str.splitlines also splits at eight other characters
# What a model must give back unchanged: runs of spaces, control characters, scripts, the marks that models use.
PROBE = (
    "A b  c   \n\n \tx\r\n\0\x01 été ﬁ ½ 漢字 😀 <unk> <s> </s> <|endoftext|> <0x41> a\u2581b \u2581\n \n\ufeff\u2028."
)


class SentencePieceTokenizer:
    r"""A SentencePiece model. Text is encoded line by line, a line being what ends in ``\n``.

    SentencePiece writes a space as U+2581 and so cannot tell the two apart. Here a U+2581 of the text is encoded as
    the three byte pieces of its UTF-8, which decode to itself.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer.model") -> None:
        """Loads a serialized model; ``origin`` names it in messages.

        Raises:
            UserError: if it is not a sound model, has no separator, or loses text.
        """
        self._model = model
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{origin}: not a SentencePiece model: {error}") from None
        if not self.vocab_size:
            raise UserError(f"{origin}: not a SentencePiece model: it is empty")
        self.separator_id: int = self._separator(origin)
        self.separator_reserved = True  # a control piece, which no text encodes to
        self._special_ids = {
            self._processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if self._processor.is_control(token) and token != self.separator_id
        }
        self.special_tokens: tuple[str, ...] = tuple(self._special_ids)
        others = (self._processor.id_to_piece(token) for token in (self.separator_id, self._processor.unk_id()))
        self.reserved: tuple[str, ...] = tuple(sorted({*others, *self.special_tokens}))
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        decoded = self.decode(self.encode(PROBE))
        if decoded != PROBE:
            raise UserError(
                f"{origin}: this model changes text: {PROBE!r} comes back as {decoded!r}. Train it with "
                "normalization_rule_name=identity, byte_fallback=true, remove_extra_whitespaces=false and "
                "add_dummy_prefix=false"
            )

    def to_bytes(self) -> bytes:
        """The serialized model."""
        return self._model

    def special_id(self, name: str) -> int:
        """The token of one of the special tokens; ``KeyError`` if there is none of that name."""
        return self._special_ids[name]

    def with_special_tokens(self, names: Sequence[str]) -> "SentencePieceTokenizer":
        """This model with more control pieces behind its last piece; itself if it has them all.

        Raises:
            UserError: if another piece already has such a name.
        """
        model = model_proto().FromString(self._model)
        new = missing(self, names, (piece.piece for piece in model.pieces))
        if not new:
            return self
        for name in new:
            model.pieces.add(piece=name, score=0.0, type=CONTROL)
        return SentencePieceTokenizer(model.SerializeToString(deterministic=True))

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32, shape (tokens,).

        Raises:
            UnicodeEncodeError: if the text holds half of a surrogate pair, which is not Unicode text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, as :meth:`encode`; one call for many short texts is faster."""
        lines: list[str] = []
        ends = []
        for text in texts:
            text.encode("utf-8")  # the library would replace surrogates without a word
            lines += _LINE.findall(text)
            ends.append(len(lines))
        encoded = self._processor.encode(lines, num_threads=1)
        if any(SPACE_MARK in text for text in texts):
            for number, line in enumerate(lines):
                if SPACE_MARK in line:
                    encoded[number] = self._encode_marked(line)
        return [
            np.fromiter(chain.from_iterable(encoded[start:end]), np.int32)
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; separators give nothing, and bytes that are no UTF-8 give U+FFFD."""
        return self._processor.decode(np.asarray(ids, np.int64).tolist())

    def _encode_marked(self, line: str) -> list[int]:
        first, *rest = (self._processor.encode(part) for part in line.split(SPACE_MARK))
        for part in rest:
            first += self._mark_ids + part
        return first

    def _separator(self, origin: str) -> int:
        for token in (self._processor.eos_id(), self._processor.bos_id()):
            if token >= 0:
                return token
        raise UserError(f"{origin}: this model has no control piece (eos or bos) to put between documents")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a BPE model with byte fallback: id 0 unknown, id 1 the separator, id 2 the newline.

    Args:
        texts: the sample; all of it is used.
        vocab_size: number of tokens.

    Raises:
        RefusedError: if the sample is too small, or too varied, for so many tokens.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            required_chars=SPACE_MARK,  # or a space, in a corpus that has few, would fall to the bytes of its mark
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=SEPARATOR,
            num_threads=_TRAINING_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines without their ends, the long ones cut at spaces, or anywhere if there are none."""
    for text in texts:
        for line in text.replace(SPACE_MARK, "\n").split("\n"):
            while len(line.encode()) > _TRAINING_LINE:
                piece = line[: _TRAINING_LINE // 4]  # characters of at most four bytes
                cut = piece.rfind(" ", 1)
                cut = cut if cut > 0 else len(piece)
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _training_error(message: str, vocab_size: int) -> RefusedError:
    if largest := re.search(r"value <= (\d+)", message):
        return RefusedError(
            f"model.vocab_size={vocab_size}: the corpus is too small for so many tokens; "
            f"the largest possible vocabulary is {largest[1]}. Lower model.vocab_size or add text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return RefusedError(
            f"model.vocab_size={vocab_size}: too few for the bytes and the characters of this corpus; "
            f"the smallest possible vocabulary is {smallest[1]}"
        )
    return RefusedError(f"model.vocab_size={vocab_size}: the tokenizer cannot be trained: {message}")
