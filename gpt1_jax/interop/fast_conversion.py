"""A run's tokenizer in the form that other software reads: tokenizer.json of the ``tokenizers`` library.

A SentencePiece model is rewritten, token for token. What differs is the spelling: SentencePiece writes a space as
U+2581, and here it is a space, so that a U+2581 of the text is a character like any other, one that the vocabulary does
not have, and falls to the same three byte pieces (:mod:`gpt1_jax.text.sentencepiece`).

The separator and the unknown piece are in the vocabulary but not registered as special tokens, and no merge makes
them, so their names in a text are text. transformers registers the separator by ``tokenizer_config.json``, whose
``split_special_tokens`` keeps its name in a text what it is. The other control pieces are registered, or they would be
forgotten as special.
"""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models

from gpt1_jax.errors import UserError
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.sentencepiece import PROBE, SPACE_MARK
from gpt1_jax.text.sentencepiece_proto import BPE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, model_proto
from gpt1_jax.text.tokenizer import Tokenizer


def fast_tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json, from either kind of tokenizer: one that is in this form is given as it is.

    Raises:
        UserError: if the model is of a kind that has no exact counterpart.
    """
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.to_bytes()
    converted = _converted(tokenizer.to_bytes(), tokenizer.special_tokens)
    _check_same(tokenizer, FastTokenizer(converted, "the converted tokenizer"))
    return converted


def tokenizer_config(
    tokenizer: FastTokenizer, model_max_length: int, chat_template: str | None = None
) -> dict[str, Any]:
    """What tokenizer_config.json must say for transformers to read that tokenizer.json to the same tokens.

    The class must be named, or the one of ``openai-gpt`` is taken, which lower-cases; so must the inputs, or some
    versions add ``token_type_ids``, which that model embeds.

    The tokenizer of a model that answers conversations gets their template. A rendered conversation must have its
    special tokens found, so that there the names of special tokens are not text; the template refuses messages that
    spell them.

    Args:
        tokenizer: of that tokenizer.json.
        model_max_length: the context, in tokens.
        chat_template: of the model, if it answers conversations.
    """
    separator = tokenizer.token(tokenizer.separator_id)
    unknown = tokenizer.unknown or separator
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "bos_token": separator,  # a document begins where another ends
        "eos_token": separator,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": chat_template is None,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    return settings


def _converted(model: bytes, special_tokens: Sequence[str]) -> bytes:
    proto = model_proto().FromString(model)
    if proto.trainer_spec.model_type != BPE:
        raise _no_counterpart("it is not BPE")
    pieces = [(piece.piece.replace(SPACE_MARK, " "), piece.score, piece.type) for piece in proto.pieces]
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise _no_counterpart("two of its pieces differ in a space and a U+2581 alone")
    if any(kind == UNUSED for _, _, kind in pieces):
        raise _no_counterpart("it has unused pieces")
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    if any(character not in scores for text in scores for character in text):
        raise _no_counterpart("it has a piece with a character that is no piece")
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    fast = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_tokens(
        [
            tokenizers.AddedToken(text, normalized=False, special=False)
            for text, _, kind in pieces
            if kind == USER_DEFINED
        ]
    )
    fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special_tokens])
    return fast.to_str().encode()


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, best first.

    SentencePiece joins the neighbours whose union has the highest score, wherever the union is cut in two.
    """
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def _check_same(tokenizer: Tokenizer, converted: FastTokenizer) -> None:
    pieces = "\n".join(converted.token(number) for number in range(converted.vocab_size))
    for text in (PROBE, pieces):
        if tokenizer.encode(text).tolist() != converted.encode(text).tolist():
            raise _no_counterpart("the two encode its own pieces differently")
    if (tokenizer.vocab_size, tokenizer.separator_id) != (converted.vocab_size, converted.separator_id):
        raise _no_counterpart("its separator is none of the names known here")
    for name in tokenizer.special_tokens:
        if tokenizer.special_id(name) != converted.special_id(name):
            raise _no_counterpart(f"its special token {name!r} is another there")


def _no_counterpart(why: str) -> UserError:
    return UserError(
        f"this SentencePiece model has no exact counterpart in the tokenizers library: {why}; "
        "models that 'gpt1 prepare' trains have one"
    )
