from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, ModelConfig, TrainConfig
from gpt1_jax.errors import UserError
from gpt1_jax.generation import decode
from gpt1_jax.generation.decode import generate, prompt_room, stream
from gpt1_jax.generation.sampling import GREEDY, Sampling, sample
from gpt1_jax.model.objective import prefix_mask
from gpt1_jax.model.segments import document_starts
from gpt1_jax.model.transformer import bind, init_params

MODEL = ModelConfig(
    vocab_size=97, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32"
)
CONFIG = Config(model=MODEL, evaluation=EvaluationConfig(sample_tokens=8))
NEVER = 96  # a separator that the test model does not draw
SAMPLING = Sampling(temperature=0.8, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def params():
    # Ten times the initial scale: decided logits, in which every position and token matters.
    params = jax.tree.map(lambda leaf: leaf * 10, init_params(MODEL, jax.random.key(0)))
    params["embedding"]["token_kernel"] = params["embedding"]["token_kernel"].at[NEVER].set(0.0)
    return params


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, 90, length, dtype=np.int32)


@partial(jax.jit, static_argnums=(0, 4))
def _next_token(config, params, tokens_BT, lengths, sampling, key):
    prompt, length = lengths
    model = bind(config, params)
    mask = prefix_mask(prompt[None], tokens_BT.shape[1]) if config.objective == "prefix" else None
    logits = model.logits(model(tokens_BT, mask_BTS=mask)[0])[:, length - 1]
    return sample(logits, key[None], sampling)[0]


def uncached(params, prompt, *, model=MODEL, row=0, sampling=GREEDY, max_tokens, seed=0, separator_id=NEVER):
    """The whole text through the model again for every token, one row at a time."""
    tokens, new = list(prompt), []
    row_key = jax.random.fold_in(jax.random.key(seed), row)
    while len(new) < max_tokens:
        padded = jnp.array([tokens + [0] * (model.context_length - len(tokens))])
        key = jax.random.fold_in(row_key, len(tokens))
        lengths = jnp.array([len(prompt), len(tokens)])
        token = int(_next_token(model, params, padded, lengths, sampling, key))
        if token == separator_id:
            break
        tokens.append(token)
        new.append(token)
    return new


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_cached_equals_uncached_token_for_token(params, scan_layers, sampling):
    model = MODEL.model_copy(update={"scan_layers": scan_layers})
    config = CONFIG.model_copy(update={"model": model})
    for length in (1, 2, 11):
        got = generate(config, params, [prompt(length)], sampling=sampling, max_tokens=5, seed=7, separator_id=NEVER)
        expected = uncached(params, prompt(length), sampling=sampling, max_tokens=5, seed=7)
        assert tokens_of(got) == [expected] and len(expected) == 5


@pytest.mark.parametrize("objective", ["causal", "prefix"])
def test_an_empty_prompt_begins_a_document_as_packed_windows_do(objective, params):
    # There the separator before a document has position 0, wherever in the window it stands.
    separator, model = 5, MODEL.model_copy(update={"objective": objective})
    config = CONFIG.model_copy(update={"model": model})
    arguments = {"sampling": GREEDY, "max_tokens": 4, "seed": 0, "separator_id": separator}
    (completion,) = generate(config, params, [np.zeros(0, np.int32)], **arguments)
    window, bound = jnp.array([[7, 9, 11, separator, *completion.tokens.tolist()]]), bind(model, params)
    mask = prefix_mask(jnp.array([2]), window.shape[1]) if objective == "prefix" else None
    x_BTD, _ = bound(window, mask_BTS=mask, starts_BT=document_starts(window, separator))
    predicted = np.asarray(bound.logits(x_BTD)[0, 3:].argmax(-1))
    assert len(completion.tokens) == 4 and predicted[:4].tolist() == completion.tokens.tolist()


def test_every_variation_is_cached_as_it_is_computed(variation):
    config = CONFIG.model_copy(update={"model": variation})
    params = jax.tree.map(lambda leaf: leaf * 10, init_params(variation, jax.random.key(0)))
    prompts = [prompt(length) for length in (1, 9, 4)]
    arguments = {"sampling": GREEDY, "max_tokens": 6, "seed": 0, "separator_id": NEVER}
    if variation.objective == "masked":
        with pytest.raises(UserError, match=r"model\.objective=masked.*cannot continue"):
            generate(config, params, prompts, **arguments)
        return
    expected = [uncached(params, tokens, model=variation, max_tokens=6) for tokens in prompts]
    assert tokens_of(generate(config, params, prompts, **arguments)) == expected
    assert len({token for row in expected for token in row}) > 3


def test_the_whole_context_is_used(params):
    got = generate(CONFIG, params, [prompt(1)], sampling=GREEDY, max_tokens=15, seed=0, separator_id=NEVER)
    assert tokens_of(got) == [uncached(params, prompt(1), max_tokens=15)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_a_row_does_not_depend_on_its_batch(params, sampling):
    prompts = [prompt(length) for length in (3, 10, 1, 10)]
    arguments = {"sampling": sampling, "max_tokens": 6, "seed": 3, "separator_id": NEVER}
    together = tokens_of(generate(CONFIG, params, prompts, **arguments))
    assert tokens_of(generate(CONFIG, params, prompts[:1], **arguments)) == together[:1]
    for row, tokens in enumerate(prompts):
        expected = uncached(params, tokens, row=row, sampling=sampling, max_tokens=6, seed=3)
        assert together[row] == expected


def test_rows_and_seeds_draw_differently(params):
    arguments = {"sampling": Sampling(temperature=2.0), "max_tokens": 8, "separator_id": NEVER}
    first, second = tokens_of(generate(CONFIG, params, [prompt(4)] * 2, seed=0, **arguments))
    (other,) = tokens_of(generate(CONFIG, params, [prompt(4)], seed=1, **arguments))
    assert first != second and first != other


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_streaming_gives_what_generate_gives(params, chunk):
    prompts = [prompt(length) for length in (2, 9)]
    arguments = {"sampling": SAMPLING, "max_tokens": 7, "seed": 5, "separator_id": NEVER}
    pieces = list(stream(CONFIG, params, prompts, chunk=chunk, **arguments))
    assert [[len(row) for row in piece] for piece in pieces[:-1]] == [[chunk] * 2] * (len(pieces) - 1)
    joined = [np.concatenate(row).tolist() for row in zip(*pieces, strict=True)]
    assert joined == tokens_of(generate(CONFIG, params, prompts, **arguments))


def test_each_row_stops_at_the_end_of_its_document(params):
    prompts = [prompt(length) for length in (2, 5, 8)]
    arguments = {"sampling": GREEDY, "max_tokens": 8, "seed": 0}
    free = tokens_of(generate(CONFIG, params, prompts, separator_id=NEVER, **arguments))
    separator = next(token for token in free[1] if token != free[1][0])
    expected = [row[: row.index(separator)] if separator in row else row for row in free]
    assert 0 < len(expected[1]) < 8
    assert tokens_of(generate(CONFIG, params, prompts, separator_id=separator, **arguments)) == expected


def test_the_loop_ends_with_the_last_row(params):
    (free,) = generate(CONFIG, params, [prompt(4)], sampling=GREEDY, max_tokens=8, seed=0, separator_id=NEVER)
    separator = int(free.tokens[0])
    pieces = list(
        stream(CONFIG, params, [prompt(4)], sampling=GREEDY, max_tokens=8, seed=0, separator_id=separator, chunk=2)
    )
    assert [piece[0].tolist() for piece in pieces] == [[]]


def test_an_empty_prompt_starts_a_document(params):
    arguments = {"sampling": GREEDY, "max_tokens": 4, "seed": 0, "separator_id": 5}
    empty, separator = generate(CONFIG, params, [prompt(0), np.array([5], np.int32)], **arguments)
    assert empty.tokens.tolist() == separator.tokens.tolist() == uncached(params, [5], max_tokens=4, separator_id=5)
    assert empty.dropped == 0


def test_a_long_prompt_is_cut_from_the_left_and_says_so(params):
    long, short = prompt(30), prompt(3)
    got = generate(CONFIG, params, [long, short], sampling=GREEDY, max_tokens=6, seed=0, separator_id=NEVER)
    assert [completion.dropped for completion in got] == [20, 0]
    assert got[0].tokens.tolist() == uncached(params, long[20:], max_tokens=6)


def test_no_prompts_give_nothing(params):
    assert generate(CONFIG, params, [], sampling=GREEDY, max_tokens=4, seed=0, separator_id=NEVER) == []


def test_room_is_what_the_training_context_leaves():
    assert prompt_room(CONFIG, 6) == 10
    with pytest.raises(UserError, match=r"16 tokens.*model\.context_length=16.*at most 15"):
        prompt_room(CONFIG, 16)
    with pytest.raises(UserError, match="at least 1"):
        prompt_room(CONFIG, 0)
    shorter = CONFIG.model_copy(update={"train": TrainConfig(context_length=9)})
    assert prompt_room(shorter, 6) == 3
    with pytest.raises(UserError, match=r"train\.context_length=9"):
        prompt_room(shorter, 9)


def test_too_many_tokens_are_refused_at_the_call(params):
    with pytest.raises(UserError, match="no room"):
        stream(CONFIG, params, [prompt(2)], sampling=GREEDY, max_tokens=16, seed=0, separator_id=NEVER)


def test_few_shapes_are_compiled(params, monkeypatch):
    traced = []
    monkeypatch.setattr(decode, "sample", lambda *args: traced.append(args) or sample(*args))
    sampling = Sampling(temperature=0.123)  # in no other test, so compiled here
    counts = []
    for length in (1, 4, 11):
        generate(CONFIG, params, [prompt(length)], sampling=sampling, max_tokens=5, seed=0, separator_id=NEVER)
        counts.append(len(traced))
    assert counts[0] > 0 and set(counts) == {counts[0]}
