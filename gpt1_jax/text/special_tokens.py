"""Tokens that no text encodes to: the names of those of the paper, and which of them a vocabulary lacks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gpt1_jax.errors import UserError

if TYPE_CHECKING:
    from gpt1_jax.text.tokenizer import Tokenizer

# Of the authors' fine-tuning: before an example, between its two texts, and where the classifier reads.
START, DELIMITER, CLASSIFY = "_start_", "_delimiter_", "_classify_"


def missing(tokenizer: "Tokenizer", names: Sequence[str], vocabulary: Iterable[str]) -> list[str]:
    """Those of the names that are not special tokens yet, in their order, each once.

    Args:
        tokenizer: the one that is to get them.
        names: of special tokens.
        vocabulary: the names of its tokens.

    Raises:
        UserError: if another token, one that texts are made of or the separator, already has such a name.
    """
    wanted = [name for name in dict.fromkeys(names) if name not in tokenizer.special_tokens]
    taken = sorted({*wanted}.intersection(vocabulary) | {name for name in wanted if not name})
    if taken:
        raise UserError(
            f"{taken[0]!r} cannot be a special token of this tokenizer: its vocabulary has a token of that name, which "
            "stands for something else. Take another tokenizer"
        )
    return wanted
