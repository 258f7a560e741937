"""Documents of a packed window: what they see, where they count from, and that they do not touch each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import ModelConfig
from gpt1_jax.model.cross_entropy import token_nats
from gpt1_jax.model.embedding import Embedding
from gpt1_jax.model.objective import make_task, prefix_mask
from gpt1_jax.model.segments import document_starts, same_document
from gpt1_jax.model.transformer import bind, init_params

SEPARATOR = 3
BOUNDS = [(0, 5), (5, 6), (6, 12), (12, 16)]  # of the documents of a row, the first of them cut off by the window


def row(length: int = 16) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(4, 97, (1, length), dtype=np.int32)
    tokens[0, [begin for begin, _ in BOUNDS[1:]]] = SEPARATOR
    return tokens


def test_documents_by_hand():
    tokens = jnp.array([[7, 7, 3, 7, 3, 3, 7], [3, 7, 7, 7, 7, 7, 3]])
    starts = document_starts(tokens, 3)
    assert starts.tolist() == [[0, 0, 2, 2, 4, 5, 5], [0, 0, 0, 0, 0, 0, 6]]
    assert same_document(starts)[0].astype(int).tolist()[1:4] == [[1, 1, 0, 0, 0, 0, 0]] + [[0, 0, 1, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize("name", ["plain", "rotary", "grouped", "masked", "modern", "looped", "by a mask", "prefix"])
def test_a_document_in_a_window_gives_what_it_gives_alone(name, tiny_model, variations):
    looped = {"scan_layers": True, "remat": "full"}
    config = variations.get(name, tiny_model.model_copy(update=looped if name == "looped" else {}))
    params = jax.tree.map(lambda leaf: leaf * 4, init_params(config, jax.random.key(0)))
    model, tokens = bind(config, params), jnp.asarray(row())

    def mask_of(begin: int, end: int) -> jax.Array | None:
        """What a document sees where the first nine tokens of the window are the prefix."""
        if name not in ("prefix", "by a mask"):
            return None
        prefix = 9 if name == "prefix" else 0
        return prefix_mask(jnp.array([np.clip(prefix - begin, 0, end - begin)]), end - begin)

    together, _ = model(tokens, mask_BTS=mask_of(0, 16), starts_BT=document_starts(tokens, SEPARATOR))
    for begin, end in BOUNDS:
        alone, _ = model(tokens[:, begin:end], mask_BTS=mask_of(begin, end))
        np.testing.assert_allclose(together[:, begin:end], alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("objective", ["causal", "causal by a mask", "prefix", "masked"])
def test_no_loss_of_a_document_depends_on_the_inputs_of_another(objective, tiny_model, monkeypatch):
    config = tiny_model.model_copy(update={"objective": objective.split()[0]})
    params = jax.tree.map(lambda leaf: leaf * 4, init_params(config, jax.random.key(0)))
    one_more = jnp.full((1, 1), 50)  # a masked model reads the targets, any other all but the last
    parts = [one_more, jnp.asarray(row())] if objective == "masked" else [jnp.asarray(row()), one_more]
    tokens = jnp.concatenate(parts, axis=1)
    task = make_task(config, tokens, jax.random.key(1), SEPARATOR)
    mask = jnp.tril(jnp.ones((1, 16, 16), bool)) if objective == "causal by a mask" else task.mask_BTS
    embed = Embedding.__call__

    @jax.jit
    @jax.grad
    def sensitivity(change_BTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
        with monkeypatch.context() as patch:
            patch.setattr(Embedding, "__call__", lambda *arguments: embed(*arguments) + change_BTD)
            model = bind(config, params)
            x_BTD, _ = model(task.inputs_BT, mask_BTS=mask, starts_BT=task.starts_BT)
            nats_BT = token_nats(x_BTD, model.output_table, task.targets_BT, config.loss_positions)
            return (nats_BT * weights_BT).sum()

    for begin, end in BOUNDS:
        weights = (jnp.arange(16)[None] >= begin) & (jnp.arange(16) < end)
        found = np.abs(sensitivity(jnp.zeros((1, 16, config.embed_dim)), weights.astype(jnp.float32))).sum(-1)[0]
        assert (found[begin:end] > 0).all()
        found[begin:end] = 0
        assert not found.any()


def test_what_hides_a_separator_does_not_join_documents(tiny_model):
    config = tiny_model.model_copy(update={"objective": "masked"})
    tokens = jnp.concatenate([jnp.full((300, 1), 50), jnp.repeat(jnp.asarray(row()), 300, axis=0)], axis=1)
    task = make_task(config, tokens, jax.random.key(0), SEPARATOR)
    assert (np.asarray(task.inputs_BT)[:, 5] == config.mask_id).any()  # a hidden separator
    assert (np.asarray(task.starts_BT) == np.repeat([0, 5, 6, 12], [5, 1, 6, 4])).all()


def test_contiguous_windows_have_no_documents(tiny_model):
    for objective in ("causal", "prefix", "masked"):
        config: ModelConfig = tiny_model.model_copy(update={"objective": objective})
        assert make_task(config, jnp.asarray(row(17)), jax.random.key(0)).starts_BT is None
