import dataclasses
import itertools
import lzma
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt1_jax.config import Config, EvaluationConfig, MeshConfig, ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation.figures import TextCounts, evaluate_split, evaluate_texts, read_texts
from gpt1_jax.evaluation.perplexity import Evaluator, Score
from gpt1_jax.model.transformer import init_params
from gpt1_jax.text.stories import grammar
from gpt1_jax.training.mesh import make_mesh


class Bytes:
    """One token a byte; 256 stands between documents."""

    vocab_size = 257
    separator_id = 256
    fingerprint = ""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(ids).decode()

    def to_bytes(self) -> bytes:
        return b""


MODEL = ModelConfig(
    vocab_size=257, context_length=16, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, dtype="float32"
)
TEXTS = ["Hällo  wörld,\n how are you?", "x", "the end 🙂"]


@pytest.fixture(scope="module")
def evaluator():
    config = Config(model=MODEL, evaluation=EvaluationConfig(batch_size=4, sample_tokens=8))
    return Evaluator(config, make_mesh(MeshConfig(), jax.devices()[:1]), Bytes.separator_id)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def test_figures_by_hand(evaluator, params):
    uniform = jax.tree.map(jnp.zeros_like, params)  # every token costs ln 257
    figures = evaluate_texts(evaluator, uniform, TEXTS, Bytes())
    text_bytes = 29 + 1 + 12
    nats = (text_bytes + 3) * math.log(257)  # a separator after each document is predicted too
    compressed = len(lzma.compress("".join(TEXTS).encode(), preset=9))
    expected = {
        "split": "text",
        "documents": 3,
        "tokens": text_bytes + 3,
        "words": 5 + 1 + 3,
        "bytes": text_bytes,
        "nats": pytest.approx(nats, rel=1e-6),
        "perplexity": pytest.approx(257, rel=1e-5),
        "word_perplexity": pytest.approx(math.exp(nats / 9), rel=1e-4),
        "bits_per_byte": pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6),
        "xz_bits_per_byte": 8 * compressed / text_bytes,
        "pseudo_perplexity": None,
        "limit_nats": None,
        "excess_nats_per_document": None,
        "excess_percent": None,
    }
    assert dataclasses.asdict(figures) == expected
    assert list(dataclasses.asdict(figures)) == list(expected)


TALES = [grammar().sample(5, number) for number in range(20)]


class Knowing:
    """A model that knows the true distribution of the tales, told tokens of one byte each."""

    def __call__(self, params, stream, max_tokens=None) -> Score:
        tokens = stream.read(0, len(stream)).tolist()
        ends = [position for position, token in enumerate(tokens) if token == Bytes.separator_id]
        texts = [Bytes().decode(tokens[a + 1 : b]) for a, b in itertools.pairwise([-1, *ends])]
        return Score(math.fsum(grammar().nats_of(text) for text in texts), len(tokens))


def test_who_knows_the_distribution_has_no_excess():
    figures = evaluate_texts(Knowing(), {}, [tale.text for tale in TALES], Bytes())
    assert figures.limit_nats == pytest.approx(math.fsum(tale.nats for tale in TALES), rel=1e-12)
    assert figures.excess_nats_per_document == pytest.approx(0, abs=1e-9)
    assert figures.excess_percent == pytest.approx(0, abs=1e-9)


def test_the_excess_by_hand(evaluator, params):
    uniform = jax.tree.map(jnp.zeros_like, params)
    figures = evaluate_texts(evaluator, uniform, [tale.text for tale in TALES[:2]], Bytes())
    limit = TALES[0].nats + TALES[1].nats
    nats = (len(TALES[0].text) + len(TALES[1].text) + 2) * math.log(257)  # separators: the ends of the tales
    assert figures.limit_nats == pytest.approx(limit, rel=1e-12)
    assert figures.excess_nats_per_document == pytest.approx((nats - limit) / 2, rel=1e-5)
    assert figures.excess_percent == pytest.approx(100 * (nats / limit - 1), rel=1e-5)


@pytest.mark.parametrize("other", ["Once.", TALES[0].text + "\n", TALES[0].text.lower()])
def test_one_document_that_is_no_tale_leaves_no_limit(evaluator, params, other):
    for texts in ([TALES[1].text, other], [other, TALES[1].text]):
        figures = evaluate_texts(evaluator, params, texts, Bytes())
        assert (figures.limit_nats, figures.excess_nats_per_document, figures.excess_percent) == (None, None, None)


def test_a_split_costs_what_its_texts_cost(evaluator, params):
    class Stream:
        tokens = np.concatenate([np.append(Bytes().encode(text), np.int32(256)) for text in TEXTS])

        def __len__(self) -> int:
            return len(self.tokens)

        def read(self, start: int, stop: int) -> np.ndarray:
            return self.tokens[start:stop]

    from_split = evaluate_split(evaluator, params, Stream(), iter(TEXTS), "validation")
    assert from_split == dataclasses.replace(evaluate_texts(evaluator, params, TEXTS, Bytes()), split="validation")
    with pytest.raises(UserError, match="train split has no text"):
        evaluate_split(evaluator, params, Stream(), [], "train")


def test_xz_is_of_all_documents_joined():
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcd ", k=3000)) for _ in range(10)]
    counts = TextCounts()
    assert list(counts.count(texts)) == texts
    figures = counts.figures("text", Score(1.0, 1))
    assert figures.xz_bits_per_byte * figures.bytes / 8 == len(lzma.compress("".join(texts).encode(), preset=9))


def test_what_a_float_cannot_hold_is_none(evaluator, params):
    one_long_word = evaluate_texts(evaluator, params, ["語" * 100], Bytes())
    assert one_long_word.words == 1 and one_long_word.word_perplexity is None
    assert evaluate_texts(evaluator, params, [" \n"], Bytes()).word_perplexity is None


def test_a_perplexity_beyond_a_float_is_infinite():
    assert Score(nats=math.log(2) * 300, tokens=100).perplexity == pytest.approx(8)
    assert Score(nats=1e6, tokens=10).perplexity == math.inf


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_refused(evaluator, params, texts):
    with pytest.raises(UserError, match="no text"):
        evaluate_texts(evaluator, params, texts, Bytes())


def test_files_are_documents(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes("é\r\n".encode())
    second.write_bytes(b"two")
    assert list(read_texts([first, str(second)])) == ["é\r\n", "two"]


def test_a_bad_file_is_named(tmp_path):
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes(b"caf\xe9")
    empty.touch()
    for path, message in [
        (latin, "latin.txt.*UTF-8.*byte 3"),
        (empty, "empty.txt.*empty"),
        (tmp_path / "missing.txt", "missing.txt.*No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_texts([path]))
