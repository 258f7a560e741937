import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.errors import DamagedError, StorageError, UserError


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_stream_joins_shards_and_sources(write_corpus, tmp_path, dtype):
    stream = Corpus(write_corpus(tmp_path, [[5, 2], [4]], dtype)).tokens("train")
    assert len(stream) == 11
    tokens = stream.read(0, 11)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(range(11))
    assert stream.gather(np.array([4, 0, 5]), 4).tolist() == [[4, 5, 6, 7], [0, 1, 2, 3], [5, 6, 7, 8]]
    assert stream.read(3, 3).size == 0


def test_bytes_on_disk_are_little_endian(write_corpus, tmp_path):
    folder = write_corpus(tmp_path, [[300]])
    assert (folder / "train-00-00000.tokens").read_bytes()[-2:] == bytes([299 - 256, 1])
    assert Corpus(folder).tokens("train").read(299, 300).tolist() == [299]


@pytest.fixture(scope="module")
def ragged(write_corpus, tmp_path_factory):
    return Corpus(write_corpus(tmp_path_factory.mktemp("ragged"), [[1, 7, 0, 3], [0, 30], [9]])).tokens("train")


@settings(deadline=None)
@given(bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted))
def test_any_range_reads_the_same_as_the_whole(ragged, bounds):
    assert ragged.read(*bounds).tolist() == list(range(*bounds))


def test_reading_outside_the_stream_is_refused(ragged):
    for start, stop in [(-1, 3), (48, 51)]:
        with pytest.raises(IndexError, match="stream of 50"):
            ragged.read(start, stop)


def test_counts_tokenizer_and_an_absent_split(write_corpus, tmp_path):
    corpus = Corpus(write_corpus(tmp_path, [[5, 2], [4]]))
    assert corpus.source_tokens("train") == [7, 4]
    assert corpus.source_tokens("validation") == [0, 0]
    assert len(corpus.tokens("validation")) == 0
    assert corpus.tokenizer_file == tmp_path / "tokenizer.model"


def test_files_are_opened_when_read_and_closed_with_the_stream(write_corpus, tmp_path):
    stream = Corpus(write_corpus(tmp_path, [[5, 5, 5]])).tokens("train")

    def held():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.lexists(link))

    assert held() == 0
    stream.read(7, 12)
    assert held() == 2
    del stream
    gc.collect()
    assert held() == 0


def test_no_corpus_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="gpt1 prepare"):
        Corpus(tmp_path)


@pytest.mark.parametrize("size", [None, 7, 9, 12])
def test_missing_or_truncated_shard_is_named_before_anything_is_read(write_corpus, tmp_path, size):
    shard = write_corpus(tmp_path, [[5], [5]]) / "train-01-00000.tokens"
    shard.unlink() if size is None else shard.write_bytes(bytes(size))
    what = "is missing" if size is None else f"has {size} bytes, its manifest says 10"
    with pytest.raises(DamagedError, match=rf"train-01-00000\.tokens: .*{what}; run 'gpt1 prepare' again"):
        Corpus(tmp_path).tokens("train")


def test_shard_damaged_after_opening_is_an_error_and_not_a_signal(write_corpus, tmp_path):
    stream = Corpus(write_corpus(tmp_path, [[5], [5], [5]])).tokens("train")
    stream.read(0, 5)
    os.truncate(tmp_path / "train-00-00000.tokens", 4)
    with pytest.raises(DamagedError, match=r"train-00-00000\.tokens.*ends at byte 4 of 10"):
        stream.read(0, 5)
    (tmp_path / "train-01-00000.tokens").unlink()
    with pytest.raises(DamagedError, match=r"train-01-00000\.tokens.*is missing"):
        stream.read(5, 6)


def test_unreadable_shard_is_a_storage_error(write_corpus, tmp_path):
    stream = Corpus(write_corpus(tmp_path, [[5]])).tokens("train")
    shard = tmp_path / "train-00-00000.tokens"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StorageError, match=r"train-00-00000\.tokens: cannot be read"):
        stream.read(0, 1)
