"""Where documents begin in a packed window, so that they do not see each other.

A separator ends a document as a target. As an input it begins the next one: it is what that document's first token is
predicted from, at position 0. The window may begin in the middle of a document, which then counts from the window's
start.

Where its document begins says everything of a position: two positions are of one document if they agree on it, and
the position within the document is the distance to it. So it is one array, made of the tokens on the device, and a
batch is no larger than without it.

Shapes: B batch, T position, S key position.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def document_starts(tokens_BT: Int[Array, "B T"], separator_id: Int[Array, ""] | int) -> Int[Array, "B T"]:
    """The position in its row at which the document of each token begins, int32."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return jax.lax.cummax(jnp.where(tokens_BT == separator_id, positions_BT, 0), axis=1)


def same_document(starts_BT: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
    """Which keys are of the document of each query."""
    return starts_BT[:, :, None] == starts_BT[:, None, :]
