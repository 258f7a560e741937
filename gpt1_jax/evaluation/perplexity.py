"""Exact nats of a stream of tokens: every token predicted once, by one compiled function, on any mesh.

A stream holds documents, the separator token after each. The first document is predicted after a separator too, which
is context alone; every other separator is predicted, and counted, like any token.

A masked model has no probability of a text, and so no perplexity. Its pseudo-perplexity is that of each token from the
others of its window, on both sides (Salazar et al. 2020, "Masked Language Model Scoring").

Shapes: B windows, T position.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gpt1_jax.config import Config
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.windows import Window, windows
from gpt1_jax.model.cross_entropy import token_nats
from gpt1_jax.model.segments import document_starts
from gpt1_jax.model.sharding import axis_size, batch_sharding, replicated
from gpt1_jax.model.transformer import Params, bind

_PADDING = -1  # behind the last token of a window


class Tokens(Protocol):
    """A stream of tokens that is read by position, such as a split of a prepared corpus."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int32."""
        ...


class Score(NamedTuple):
    """What a stream cost.

    Attributes:
        nats: sum of the negative log-probabilities of its tokens, each from those before it; of a masked model,
            from those around it.
        tokens: how many they are.
        pseudo: whether it is a masked model's.
    """

    nats: float
    tokens: int
    pseudo: bool = False

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens), infinite beyond the largest float; of a masked model the pseudo-perplexity."""
        return exp(self.nats / self.tokens)


def exp(nats: float) -> float:
    """The exponential; infinite beyond the largest float, where :func:`math.exp` raises."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


class Evaluator:
    """Scores streams in windows of the training context, ``evaluation.stride`` tokens apart.

    Windows are read as they are needed, by each process only those that its devices hold, so memory does not depend
    on the length of the stream. The function is compiled at the first call, once.

    Args:
        config: the run, every ``auto`` resolved. ``evaluation.batch_size`` is rounded up to a multiple of the
            devices that a batch is split over.
        mesh: the devices.
        separator_id: the token that comes before the first document, and ends each. A model trained on packed windows
            is evaluated on such: no document sees another, and positions count from its beginning.
        between: called before every batch; what it raises ends the evaluation.
    """

    def __init__(self, config: Config, mesh: Mesh, separator_id: int, between: Callable[[], None] = lambda: None):
        self._between = between
        devices = axis_size(mesh, "batch")
        self._masked = config.model.objective == "masked"
        self._context_length = config.context_length
        self._stride = config.evaluation.stride or config.context_length
        self._batch_size = -(-config.evaluation.batch_size // devices) * devices
        self._mesh, self._sharding = mesh, batch_sharding(mesh)
        self._separator_id = separator_id
        self._nats = jax.jit(
            lambda params, tokens_BT: _window_nats(config, params, tokens_BT, separator_id),
            out_shardings=replicated(mesh),
        )

    def __call__(self, params: Params, stream: Tokens, max_tokens: int | None = None) -> Score:
        """Scores a stream, or its first ``max_tokens`` tokens.

        Each token's nats are float32, their sum is float64: the same on any mesh, up to the rounding of each.

        Raises:
            UserError: if the stream is empty.
        """
        length = len(stream) if max_tokens is None else min(len(stream), max_tokens)
        if not length:
            raise UserError("there are no tokens to evaluate; prepare a corpus with more text in this split")
        sums: list[float] = []
        pending: tuple[list[Window], Array] | None = None
        for batch in self._batches(length):
            self._between()
            # The next batch is given to the devices before the last one's result is waited for.
            with jax.set_mesh(self._mesh):
                dispatched = batch, self._nats(params, self._read(stream, batch))
            if pending:
                sums += _counted(*pending)
            pending = dispatched
        if pending:
            sums += _counted(*pending)
        return Score(math.fsum(sums), length, self._masked)

    def _batches(self, length: int) -> Iterator[list[Window]]:
        remaining = windows(length, self._context_length, self._stride)
        while batch := list(islice(remaining, self._batch_size)):
            yield batch

    def _read(self, stream: Tokens, batch: Sequence[Window]) -> Int[Array, "B T+1"]:
        """The windows on the devices, each after the token before it; the rest of the fixed shape is padding."""
        shape = (self._batch_size, self._context_length + 1)
        read: dict[tuple[int, int], np.ndarray] = {}  # devices along the axis `tensor` ask for the same rows

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(self._batch_size)
            if (first, last) not in read:
                block = np.full((last - first, shape[1]), _PADDING, np.int32)
                for row, window in zip(block, batch[first:last], strict=False):
                    before = min(window.start, 1)
                    row[0] = self._separator_id  # stands before the first token
                    tokens = stream.read(window.start - before, window.stop)
                    row[1 - before : 1 - before + len(tokens)] = tokens
                read[first, last] = block
            return read[first, last]

        return jax.make_array_from_callback(shape, self._sharding, rows)


def _window_nats(
    config: Config, params: Params, tokens_BT: Int[Array, "B T+1"], separator_id: int
) -> Float[Array, "B T"]:
    """Nats of every token but each window's first; those of the padding mean nothing."""
    model = bind(config.model, params)
    real_BT = tokens_BT[:, 1:] != _PADDING
    tokens_BT = jnp.maximum(tokens_BT, 0)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    masked, packed = config.model.objective == "masked", config.data.windows == "packed"
    starts_BT = document_starts(targets_BT if masked else inputs_BT, separator_id) if packed else None

    def nats(inputs_BT: Array, mask_BTS: Array | None) -> Array:
        x_BTD, _ = model(inputs_BT, mask_BTS=mask_BTS, starts_BT=starts_BT)
        return token_nats(x_BTD, model.output_table, targets_BT, config.model.loss_positions, config.model.logit_cap)

    if not masked:
        return nats(inputs_BT, None)  # padding on the right changes nothing before it

    period = config.evaluation.mask_period

    def hide(nats_BT: Array, first: Array) -> tuple[Array, None]:
        hidden_T = jnp.arange(targets_BT.shape[1]) % period == first
        inputs_BT = jnp.where(hidden_T, config.model.mask_id, targets_BT)
        return jnp.where(hidden_T, nats(inputs_BT, real_BT[:, None]), nats_BT), None

    return jax.lax.scan(hide, jnp.zeros(targets_BT.shape), jnp.arange(period))[0]


def _counted(batch: Sequence[Window], nats_BT: Array) -> list[float]:
    """The sum over the tokens that each window counts, in float64."""
    rows = zip(batch, np.asarray(nats_BT, np.float64), strict=False)  # rows behind the last window are padding
    return [float(row[window.counted - window.start : window.stop - window.start].sum()) for window, row in rows]
