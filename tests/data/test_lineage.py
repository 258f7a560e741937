"""Every token of an example, traced to the document that it is from."""

import itertools

import numpy as np
import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.lineage import trace
from gpt1_jax.data.prepare import prepare
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError
from gpt1_jax.text.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources in shards of a few documents, some of which are shorter than a window and some longer."""
    folder = tmp_path_factory.mktemp("lineage")
    for source in ("a", "b"):
        for number in range(30):
            words = " ".join(f"{source} story {number} says {k * k}" for k in range(1 + 3 * (number % 9)))
            (folder / f"{source}{number:02}.txt").write_text(words)
    sources = ", ".join(f"{{kind: files, paths: ['{folder}/{source}*.txt']}}" for source in ("a", "b"))
    text = (
        f"data: {{root: {folder}/prepared, workers: 1, shard_tokens: 400, validation_fraction: 0.2,\n"
        f"  cleaning: {{min_chars: 1}}, sources: [{sources}]}}\nmodel: {{vocab_size: 300}}\n"
    )
    return Corpus(prepare(parse_config(text, "c")))


def test_every_part_is_what_its_document_encodes_to(corpus):
    windows = RandomWindows(corpus, 64, seed=3, weights=[1.0, {0: 1.0, 50: 3.0}])
    documents = list(read_documents(corpus.folder, "train"))
    tokenizer = read_tokenizer(corpus.tokenizer_file)
    examples = range(40, 100)
    rows = list(trace(corpus, windows, examples))
    places = windows.places(examples)
    assert [row.example for row in rows] == list(examples)
    assert [row.epoch for row in rows] == places.epochs.tolist() and max(places.epochs) > 0
    names = [corpus.manifest.sources[source].name for source in places.sources]
    assert [row.source for row in rows] == names and len(set(names)) == 2
    for row, expected in zip(rows, windows.examples(examples), strict=True):
        assert np.array_equal(np.concatenate([part.tokens for part in row.parts]), expected)
        for part in row.parts:
            text, identity = documents[part.position]
            whole = [*tokenizer.encode(text).tolist(), tokenizer.separator_id]
            assert (part.identity, part.split, part.length) == (identity, "train", len(whole))
            assert part.tokens.tolist() == whole[part.first : part.stop]
        for before, after in itertools.pairwise(row.parts):
            assert (after.position, after.first, before.stop) == (before.position + 1, 0, before.length)
    assert {len(row.parts) for row in rows} >= {1, 2}
    assert len({row.parts[0].position for row in rows}) > 20  # in shards of both sources


def test_only_the_shards_of_the_examples_are_read(corpus, monkeypatch):
    read = []
    offsets = Corpus.offsets
    monkeypatch.setattr(Corpus, "offsets", lambda self, shard: read.append(shard.file) or offsets(self, shard))
    windows = RandomWindows(corpus, 64, seed=3)
    (row,) = trace(corpus, windows, [7])
    holding = [s for s in corpus.manifest.shards_of("train") if s.first_document <= row.parts[0].position]
    assert 1 <= len(read) <= 2 and read[0] == holding[-1].file
    assert len(corpus.manifest.shards_of("train")) > 4


def test_offsets_that_are_gone_are_named(corpus):
    shard = corpus.manifest.shards_of("train")[0]
    path = corpus.folder / shard.offsets_file
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(DamagedError, match=r"train-00-00000\.offsets"):
            list(trace(Corpus(corpus.folder), RandomWindows(corpus, 64, seed=3), range(20)))
    finally:
        path.write_bytes(content)
