"""Training examples: random contiguous windows of tokens, as a pure function of their global index.

Packed windows (``data.windows``) are the same windows: what sets their documents apart is made of the tokens on the
devices (gpt1_jax/model/segments.py).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gpt1_jax.data import order
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.manifest import Split
from gpt1_jax.errors import UserError


class Places(NamedTuple):
    """Where examples come from, int64 [n] each.

    Attributes:
        sources: index into the sources of the corpus.
        epochs: how many times the source was gone through before.
        starts: position, in the stream of the split, of the first token.
    """

    sources: np.ndarray
    epochs: np.ndarray
    starts: np.ndarray


class RandomWindows:
    """An endless sequence of windows of ``context_length + 1`` tokens: inputs, and the same shifted by one as targets.

    The paper trains on "randomly sampled, contiguous sequences of 512 tokens" (section 4.1). Here every epoch of a
    source cuts its stream of tokens, shards and documents joined, from a random offset in [0, context_length) into
    windows ``context_length`` apart, and shuffles them. So a token is a target at most once an epoch, and different
    epochs cut at different places. An epoch has ``(tokens - context_length) // context_length`` windows whatever its
    offset: the partial window that remains at the end, and the tokens before the offset, together fewer than
    ``2 * context_length``, are left out of that epoch and taken up by others. A source too short for that but long
    enough for one window gives one, at a random place.

    The sources are mixed in exact proportion to weight x tokens (:class:`gpt1_jax.data.order.Mixture`), and where the
    weights change, in each phase of them (:class:`gpt1_jax.data.order.Curriculum`); each source runs through its epochs
    at its own pace.

    Args:
        corpus: a prepared corpus.
        context_length: tokens that the model sees; a window has one more.
        seed: of the run.
        weights: one for each source, a number or a mapping from the example from which it holds to a number; None: 1
            for all. A source that has only the weight 0 is left out.
        split: of the corpus.

    Attributes:
        context_length: as given.
        windows_per_epoch: of each source, int64.
        quotas: examples of each source in a period of the mixture of each phase, int64 [phases, sources].

    Raises:
        UserError: if a source is shorter than a window, a weight is too small, or the weights do not match.
        DamagedError: if a shard is missing or has not the size that the manifest says.
    """

    def __init__(
        self,
        corpus: Corpus,
        context_length: int,
        seed: int,
        weights: Sequence[float | Mapping[int, float]] | None = None,
        split: Split = "train",
    ):
        tokens = corpus.source_tokens(split)
        names = [source.name for source in corpus.manifest.sources]
        weights = [1.0] * len(tokens) if weights is None else weights
        if len(weights) != len(tokens):
            raise UserError(
                f"{corpus.folder}: data.sources lists {len(weights)} sources, the corpus was prepared from "
                f"{len(tokens)} ({', '.join(names)}); run 'gpt1 prepare' with this configuration"
            )
        for name, weight, count in zip(names, weights, tokens, strict=True):
            drawn = any(weight.values()) if isinstance(weight, Mapping) else weight > 0
            if drawn and count < context_length + 1:
                raise UserError(
                    f"{corpus.folder}: source '{name}' has {count} tokens in the {split} split, fewer than the "
                    f"{context_length + 1} of one window (context_length={context_length}, and the token to predict); "
                    "add text to the source, remove it from data.sources, or lower train.context_length"
                )
        self.context_length = context_length
        self._seed = seed
        self._stream = corpus.tokens(split)
        self._curriculum = order.Curriculum(weights, tokens, names)
        self.quotas = self._curriculum.quotas
        sizes = np.array(tokens, np.int64)
        self._begin = np.cumsum(sizes) - sizes  # where each source begins in the stream of the split
        self.windows_per_epoch = np.maximum((sizes - context_length) // context_length, 1)
        self._offsets = np.minimum(sizes - self.windows_per_epoch * context_length, context_length)

    def places(self, examples: ArrayLike) -> Places:
        """Where the examples of the given global indices come from."""
        source, drawn = self._curriculum.locate(np.atleast_1d(examples))
        count = self.windows_per_epoch[source]
        epoch, index = np.divmod(drawn, count)
        key = order.make_key(self._seed, source, epoch)
        window = order.permute(index, count, key)
        start = self._begin[source] + order.draw(key, self._offsets[source]) + window * self.context_length
        return Places(source, epoch, start)

    def starts(self, examples: ArrayLike) -> np.ndarray:
        """Position, in the stream of the split, of the first token of each example; int64 [n]."""
        return self.places(examples).starts

    def examples(self, indices: ArrayLike) -> np.ndarray:
        """Examples by their global indices.

        Args:
            indices: [n], each at least 0; the sequence has no end.

        Returns:
            int32 [n, context_length + 1].
        """
        return self._stream.gather(self.starts(indices), self.context_length + 1)

    def example(self, index: int) -> np.ndarray:
        """One example, int32 [context_length + 1]."""
        return self.examples([index])[0]
