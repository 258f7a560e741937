"""What a model thinks of continuations: nats of each token behind a context, and whether it is the greedy choice.

A batch is of one of a few widths, so that many lengths share a compiled function: a sequence goes to the least width
that holds it, and each width is twice the one before.

Shapes: B sequences, T position.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.model.attention_kernels import at_length
from gpt1_jax.model.cross_entropy import token_nats_and_greedy
from gpt1_jax.model.segments import document_starts
from gpt1_jax.model.sharding import axis_size, batch_sharding, constrain
from gpt1_jax.model.transformer import Params, bind
from gpt1_jax.text.tokenizer import Tokenizer

_SMALLEST = 16  # tokens that the narrowest batch reads of each sequence


class Continuation(NamedTuple):
    """Tokens to be predicted.

    Attributes:
        context: ids of the tokens before them, int32, at least one. In training every document comes behind a
            separator, so a context that begins a document begins with it.
        tokens: their own ids, int32.
    """

    context: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What the model thinks of a continuation.

    Attributes:
        nats: of each token, float64.
        greedy: whether each token is the likeliest one, bool.
    """

    nats: np.ndarray
    greedy: np.ndarray

    @property
    def log_probability(self) -> float:
        """Of the whole continuation, in nats."""
        return -math.fsum(self.nats)

    @property
    def mean_log_probability(self) -> float:
        """Of one token."""
        return self.log_probability / len(self.nats)


def encode_behind(tokenizer: Tokenizer, context: str, text: str) -> Continuation:
    """A text behind the context that begins a document, in the tokens of the two joined.

    The joined text is cut after as many tokens as the context has alone, and always before its last one. Spaces at the
    end of the context are the text's, since a word's token begins with its space. The public evaluation harness cuts
    at the same token.
    """
    before = context.rstrip()
    joined = tokenizer.encode(context + text)
    cut = min(len(tokenizer.encode(before)), len(joined) - 1)
    return Continuation(np.append(np.int32(tokenizer.separator_id), joined[:cut]), joined[cut:])


class Predictor:
    """Predicts continuations, on any mesh, in batches of ``evaluation.batch_size``.

    The function of each width is compiled when it is first needed, once.

    Args:
        config: the run, every ``auto`` resolved. ``evaluation.batch_size`` is rounded up to a multiple of the
            devices that a batch is split over. A prefix model is asked without a prefix.
        mesh: the devices.
        separator_id: the token between documents. A model trained on packed windows sees none behind it.

    Raises:
        UserError: if the model is a masked one, which gives a text no probability.
    """

    def __init__(self, config: Config, mesh: Mesh, separator_id: int):
        if config.model.objective == "masked":
            raise UserError(
                "model.objective=masked: this model gives a text no probability, so it cannot be asked which of "
                "several is likelier; evaluate a run trained with model.objective=causal or prefix"
            )
        devices = axis_size(mesh, "batch")
        self._context_length = config.context_length
        self._batch_size = -(-config.evaluation.batch_size // devices) * devices
        self._mesh, self._sharding = mesh, batch_sharding(mesh)
        self._model, self._packed = config.model, config.data.windows == "packed"
        self._separator_id = separator_id

    def __call__(self, params: Params, continuations: Sequence[Continuation]) -> list[Prediction]:
        """Predicts every continuation, each token from those before it, in the order given.

        A context is cut from the left to what fits. A continuation longer than the training context is predicted in
        stretches of that length, each behind as many tokens as fit. A sequence that occurs twice is computed once.
        """
        stretches = [list(_stretches(one, self._context_length)) for one in continuations]
        found = self._predict_all(params, {stretch.sequence for row in stretches for stretch in row})
        return [_joined(row, found) for row in stretches]

    def _predict_all(self, params: Params, sequences: Iterable[bytes]) -> dict[bytes, Prediction]:
        """Predicts every token of each sequence but its first."""
        of_width: dict[int, list[bytes]] = {}
        for sequence in sorted(sequences):  # on every host the same order
            of_width.setdefault(self._width(len(_tokens(sequence)) - 1), []).append(sequence)
        found: dict[bytes, Prediction] = {}
        pending: tuple[list[bytes], tuple[Array, Array]] | None = None
        for width, group in of_width.items():
            for first in range(0, len(group), self._batch_size):
                batch = group[first : first + self._batch_size]
                # The next batch is given to the devices before the last one's result is waited for.
                with jax.set_mesh(self._mesh):
                    dispatched = batch, self._predict(params, self._put(batch, width))
                if pending:
                    found.update(_read(*pending))
                pending = dispatched
        if pending:
            found.update(_read(*pending))
        return found

    def _predict(self, params: Params, tokens_BT: Int[Array, "B T+1"]) -> tuple[Array, Array]:
        model = at_length(self._model, tokens_BT.shape[1] - 1)
        return _predict(params, tokens_BT, self._separator_id, config=model, packed=self._packed)

    def _width(self, length: int) -> int:
        """The width of the batches in which a sequence of so many inputs is predicted."""
        return min(max(_SMALLEST, 1 << (length - 1).bit_length()), self._context_length)

    def _put(self, batch: Sequence[bytes], width: int) -> Int[Array, "B T+1"]:
        """The sequences on the devices, on each the rows that it holds, padded to the fixed shape with zeros."""
        shape = (self._batch_size, width + 1)

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(self._batch_size)
            block = np.zeros((last - first, shape[1]), np.int32)
            for row, sequence in zip(block, batch[first:last], strict=False):
                tokens = _tokens(sequence)
                row[: len(tokens)] = tokens
            return block

        return jax.make_array_from_callback(shape, self._sharding, rows)


class _Stretch(NamedTuple):
    """Tokens that the model reads at once.

    Attributes:
        sequence: the bytes of the tokens, int32, by which equal ones are found; one more than the model reads.
        counted: so many of the last ones are predicted; those before are context.
    """

    sequence: bytes
    counted: int


def _tokens(sequence: bytes) -> np.ndarray:
    return np.frombuffer(sequence, np.int32)


def _stretches(continuation: Continuation, context_length: int) -> Iterator[_Stretch]:
    """Stretches that together count every token of the continuation once."""
    begin = len(continuation.context)
    assert begin and len(continuation.tokens), "there is nothing to predict, or nothing to predict it from"
    joined = np.concatenate([continuation.context, continuation.tokens]).astype(np.int32)
    while begin < len(joined):
        end = min(begin + context_length, len(joined))
        yield _Stretch(joined[max(0, end - context_length - 1) : end].tobytes(), end - begin)
        begin = end


def _joined(stretches: Sequence[_Stretch], found: Mapping[bytes, Prediction]) -> Prediction:
    parts = [(found[stretch.sequence], stretch.counted) for stretch in stretches]
    return Prediction(
        np.concatenate([part.nats[-counted:] for part, counted in parts]),
        np.concatenate([part.greedy[-counted:] for part, counted in parts]),
    )


def _read(batch: Sequence[bytes], predicted: tuple[Array, Array]) -> Iterator[tuple[bytes, Prediction]]:
    """The predictions of a batch, on the host, without the padding."""
    nats_BT, greedy_BT = (np.asarray(array) for array in predicted)
    for sequence, nats_T, greedy_T in zip(batch, nats_BT, greedy_BT, strict=False):  # rows behind are padding
        length = len(_tokens(sequence)) - 1
        yield sequence, Prediction(nats_T[:length].astype(np.float64), greedy_T[:length])


@partial(jax.jit, static_argnames=("config", "packed"))
def _predict(
    params: Params, tokens_BT: Int[Array, "B T+1"], separator_id: int, *, config: ModelConfig, packed: bool
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Nats of every token but each sequence's first, and whether it is the likeliest; padding means nothing."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    model = bind(config, params)
    starts_BT = document_starts(inputs_BT, separator_id) if packed else None
    x_BTD, _ = model(inputs_BT, starts_BT=starts_BT)
    found = token_nats_and_greedy(x_BTD, model.output_table, targets_BT, config.loss_positions, config.logit_cap)
    nats_BT, greedy_BT = (constrain(array, (None, None)) for array in found)  # whole on every host
    return nats_BT, greedy_BT
