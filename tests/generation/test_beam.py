import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.generation.beam import Found, beam_search
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.model.transformer import bind, init_params

MODEL = ModelConfig(
    vocab_size=7, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, dtype="float32"
)
CONFIG = Config(model=MODEL, evaluation=EvaluationConfig(sample_tokens=8))
SEPARATOR, END = 0, 3
# Tokens but the end, of every length that leaves room for seven more, and none.
PROMPTS = [np.random.default_rng(n).choice([0, 1, 2, 4, 5, 6], n % 10).astype(np.int32) for n in range(32)]


def decided(model: ModelConfig):
    """Weights with which every token matters, and the likeliest at each place seldom make the likeliest text."""
    params = jax.tree.map(lambda leaf: leaf * 25, init_params(model, jax.random.key(1)))
    tokens, positions = params["embedding"]["token_kernel"] / 3, params["embedding"]["position_kernel"]
    params["embedding"] = {"token_kernel": tokens.at[END].mul(0.3), "position_kernel": positions}
    return params


@pytest.fixture(scope="module")
def params():
    return decided(MODEL)


@pytest.fixture(scope="module")
def next_logp(params):
    """The log-probabilities of the token after some, through the whole model, float64."""

    @jax.jit
    def logits(tokens_BT):
        model = bind(MODEL, params)
        return model.logits(model(tokens_BT)[0])

    known: dict[tuple[int, ...], np.ndarray] = {}

    def find(tokens: tuple[int, ...]) -> np.ndarray:
        if tokens not in known:
            padded = np.zeros((1, MODEL.context_length), np.int32)
            padded[0, : len(tokens)] = tokens
            scores = np.asarray(logits(jnp.asarray(padded))[0, len(tokens) - 1], np.float64)
            known[tokens] = scores - np.logaddexp.reduce(scores)
        return known[tokens]

    return find


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def plain_search(next_logp, prompt, *, beams, alpha, max_tokens, end=END):
    """The same search over lists, without the rule that only saves time."""
    prompt = tuple(prompt) or (SEPARATOR,)
    live, ended = [(0.0, ())], []
    for length in range(1, max_tokens + 1):
        extended = [
            (logp + float(next_logp(prompt + tokens)[token]), (*tokens, token))
            for logp, tokens in live
            for token in range(MODEL.vocab_size)
        ]
        ranked = sorted(extended, key=lambda pair: -pair[0])
        ended += [(logp / penalty(length, alpha), tokens[:-1]) for logp, tokens in ranked[:beams] if tokens[-1] == end]
        live = [pair for pair in ranked if pair[1][-1] != end][:beams]
        if len(ended) >= beams:
            live = []
            break
    ended += [(logp / penalty(max_tokens, alpha), tokens) for logp, tokens in live]
    score, tokens = max(ended, key=lambda pair: pair[0])
    return list(tokens), score


def search(params, prompts, *, beams, alpha, max_tokens, end=END) -> list[Found]:
    settings = {"beams": beams, "length_penalty": alpha, "max_tokens": max_tokens}
    return beam_search(CONFIG, params, prompts, **settings, separator_id=SEPARATOR, end_id=end)


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def found(params, prompts, **settings) -> list[list[int]]:
    return tokens_of(search(params, prompts, **settings))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_enough_beams_find_the_best_of_all_texts(params, next_logp, alpha):
    max_tokens, best = 3, []
    for prompt in PROMPTS[4:8]:
        scores = {}
        for length in range(max_tokens + 1):
            for tokens in itertools.product([t for t in range(MODEL.vocab_size) if t != END], repeat=length):
                whole = tokens if length == max_tokens else (*tokens, END)
                logp = sum(next_logp((*prompt, *whole[:n]))[token] for n, token in enumerate(whole))
                scores[tokens] = logp / penalty(len(whole), alpha)
        best.append(list(max(scores, key=scores.__getitem__)))
    # More than there are: none is left out, and those that end do not fill them up.
    assert found(params, PROMPTS[4:8], beams=300, alpha=alpha, max_tokens=max_tokens) == best


@pytest.mark.parametrize("beams", [1, 4])
def test_it_is_the_plain_search_over_whole_texts(params, next_logp, beams):
    lengths = set()
    for alpha, max_tokens in itertools.product((0.0, 0.6, 2.0), (1, 7)):
        settings = {"beams": beams, "alpha": alpha, "max_tokens": max_tokens}
        expected = [plain_search(next_logp, prompt, **settings) for prompt in PROMPTS]
        got = search(params, PROMPTS, **settings)
        assert tokens_of(got) == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([each.score for each in got], [score for _, score in expected], atol=1e-4)
        lengths |= {len(tokens) for tokens, _ in expected}
    assert len(lengths) > 2  # some end before the limit, and at different places


def test_one_beam_is_greedy(params):
    for end in (SEPARATOR, END):
        greedy = generate(
            CONFIG, params, PROMPTS, sampling=GREEDY, max_tokens=7, seed=0, separator_id=SEPARATOR, end_id=end
        )
        expected = tokens_of(greedy)
        assert found(params, PROMPTS, beams=1, alpha=0.6, max_tokens=7, end=end) == expected


def test_a_prompt_does_not_depend_on_its_batch(params):
    settings = {"beams": 4, "alpha": 0.6, "max_tokens": 7}
    together = found(params, PROMPTS, **settings)
    assert [tokens for prompt in PROMPTS[:6] for tokens in found(params, [prompt], **settings)] == together[:6]
    assert found(params, [], **settings) == []


def test_the_penalty_lengthens(params):
    short, long = (found(params, PROMPTS, beams=4, alpha=alpha, max_tokens=7) for alpha in (0.0, 5.0))
    assert sum(map(len, short)) < sum(map(len, long))


def test_what_cannot_be_searched_is_refused(params):
    with pytest.raises(UserError, match=r"beams=0.*\nlength_penalty=nan"):
        found(params, PROMPTS, beams=0, alpha=math.nan, max_tokens=4)
    with pytest.raises(UserError, match=r"length_penalty=-0\.5: must be at least 0"):
        found(params, PROMPTS, beams=2, alpha=-0.5, max_tokens=4)
    with pytest.raises(UserError, match="no room"):
        found(params, PROMPTS, beams=2, alpha=0.6, max_tokens=16)


def test_a_long_prompt_is_cut_from_the_left_and_says_so(params):
    long = np.arange(20, dtype=np.int32) % 3
    settings = {"beams": 4, "length_penalty": 0.6, "max_tokens": 6, "separator_id": SEPARATOR, "end_id": END}
    (cut,) = beam_search(CONFIG, params, [long], **settings)
    (alone,) = beam_search(CONFIG, params, [long[-10:]], **settings)
    assert (cut.dropped, alone.dropped) == (10, 0)
    assert cut.tokens.tolist() == alone.tokens.tolist()
