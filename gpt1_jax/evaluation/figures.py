"""The figures of an evaluation: perplexity per token and per word, and bits per byte, beside xz and the limit."""

import dataclasses
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.perplexity import Evaluator, Score, Tokens, exp
from gpt1_jax.model.transformer import Params
from gpt1_jax.text.stories import grammar
from gpt1_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Figures:
    """What ``gpt1 evaluate`` reports; the fields are the keys of its JSON, in their order.

    The separators between documents are among the tokens, and their cost among the nats, so that the model is charged
    for saying where a document ends; they are not among the bytes and words, which are those of the text alone.

    Where every document is a tale of the source ``stories``, the true probability of each is known, its end included;
    the model's cost includes the end too, in the separator, so the two are comparable. Tales are independent, so on
    average over those that may be drawn no model costs less than the limit, whatever it has read before.

    A masked model gives a text no probability. Its nats are those of each token from the others on both sides, and but
    for its pseudo-perplexity every figure made of them is None.

    Attributes:
        split: ``train``, ``validation``, or ``text`` for files.
        documents: how many.
        tokens: predicted, each once, separators included.
        words: of the text, as white space separates them.
        bytes: of the text in UTF-8.
        nats: the sum over the tokens.
        perplexity: exp(nats / tokens); None of a masked model.
        word_perplexity: exp(nats / words); None of a masked model, and where there are no words, or a few so long
            (text without spaces) that it is beyond a float.
        bits_per_byte: nats / ln 2 / bytes; None of a masked model.
        xz_bits_per_byte: the same of xz at its strongest preset, 9, over all documents joined.
        pseudo_perplexity: exp(nats / tokens) of a masked model; None of any other.
        limit_nats: the sum of -ln of the true probability of each document; None unless all are tales.
        excess_nats_per_document: (nats - limit_nats) / documents; None without a limit.
        excess_percent: 100 (nats - limit_nats) / limit_nats; None without a limit.
    """

    split: str
    documents: int
    tokens: int
    words: int
    bytes: int
    nats: float
    perplexity: float | None
    word_perplexity: float | None
    bits_per_byte: float | None
    xz_bits_per_byte: float
    pseudo_perplexity: float | None = None
    limit_nats: float | None = None
    excess_nats_per_document: float | None = None
    excess_percent: float | None = None


class TextCounts:
    """Counts the documents that pass through, what xz makes of them and what they cost at least, in bounded memory."""

    def __init__(self):
        self.documents = self.words = self.bytes = 0
        self._compressor = lzma.LZMACompressor(preset=9)
        self._compressed = 0
        self._limit: float | None = 0.0  # nats of the tales so far; None once there was another document

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        """Yields the texts, counted."""
        for text in texts:
            data = text.encode()
            self.documents += 1
            self.words += len(text.split())
            self.bytes += len(data)
            self._compressed += len(self._compressor.compress(data))
            if self._limit is not None:
                tale = grammar().nats_of(text)
                self._limit = None if tale is None else self._limit + tale
            yield text

    def figures(self, split: str, score: Score) -> Figures:
        """Joins the counts with the score of the same documents; to be called once, at their end."""
        compressed = self._compressed + len(self._compressor.flush())
        common = Figures(
            split=split,
            documents=self.documents,
            tokens=score.tokens,
            words=self.words,
            bytes=self.bytes,
            nats=score.nats,
            perplexity=None,
            word_perplexity=None,
            bits_per_byte=None,
            xz_bits_per_byte=8 * compressed / self.bytes,
        )
        if score.pseudo:
            return dataclasses.replace(common, pseudo_perplexity=score.perplexity)
        word_perplexity = exp(score.nats / self.words) if self.words else math.inf
        limit = self._limit
        return dataclasses.replace(
            common,
            perplexity=score.perplexity,
            word_perplexity=word_perplexity if math.isfinite(word_perplexity) else None,
            bits_per_byte=score.nats / math.log(2) / self.bytes,
            limit_nats=limit,
            excess_nats_per_document=None if limit is None else (score.nats - limit) / self.documents,
            excess_percent=None if limit is None else 100 * (score.nats - limit) / limit,
        )


def evaluate_split(evaluator: Evaluator, params: Params, stream: Tokens, texts: Iterable[str], split: str) -> Figures:
    """Evaluates a whole split of a prepared corpus.

    Args:
        evaluator: of the run.
        params: its weights.
        stream: the split's tokens.
        texts: the same split's documents.
        split: its name.

    Raises:
        UserError: if the split has no text.
    """
    counts = TextCounts()
    for _ in counts.count(texts):
        pass
    if not counts.bytes:
        raise UserError(f"the {split} split has no text to evaluate; prepare a corpus with more documents")
    return counts.figures(split, evaluator(params, stream))


def evaluate_texts(evaluator: Evaluator, params: Params, texts: Iterable[str], tokenizer: Tokenizer) -> Figures:
    """Evaluates texts, each of them a document; their tokens are held in memory.

    Raises:
        UserError: if there is no text.
    """
    counts = TextCounts()
    encoded = [np.append(tokenizer.encode(text), np.int32(tokenizer.separator_id)) for text in counts.count(texts)]
    if not counts.bytes:
        raise UserError("there is no text to evaluate: it is empty")
    return counts.figures("text", evaluator(params, ArrayTokens(np.concatenate(encoded))))


def read_texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """The contents of text files, in UTF-8, one document each.

    Raises:
        UserError: naming the file that is missing, cannot be read or decoded, or is empty.
    """
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"{path}: this text file cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not a text file in UTF-8: byte {error.start} cannot be decoded ({error.reason}); "
                "convert it to UTF-8, or leave it out"
            ) from None
        if not text:
            raise UserError(f"{path}: this text file is empty: there is nothing to evaluate in it")
        yield text


class ArrayTokens:
    """An array as a stream."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop)."""
        return self._tokens[start:stop]
