import gc
import hashlib
import json
import os
import shutil

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


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("readers", [0, 2])
def test_a_flipped_bit_is_found_before_a_token_of_its_shard_is_used(write_corpus, tmp_path, readers):
    shard = write_corpus(tmp_path, [[5], [5], [5]]) / "train-01-00000.tokens"
    flip(shard, 9)
    stream = Corpus(tmp_path, readers=readers).tokens("train")
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    expected = hashlib.sha256(np.arange(5, 10, dtype="<u2").tobytes()).hexdigest()
    found = hashlib.sha256(shard.read_bytes()).hexdigest()
    for windows in ([5], [10, 0, 7], [3]):  # in it, elsewhere beside it, and reaching into it
        with pytest.raises(DamagedError) as error:
            stream.gather(np.array(windows), 3)
        assert str(error.value) == (
            f"{shard}: this file of the corpus has SHA-256 {found}, its manifest says {expected}; "
            "run 'gpt1 prepare' again: it rebuilds just that file"
        )
    assert stream.read(10, 15).tolist() == [10, 11, 12, 13, 14]


def test_a_shard_of_another_corpus_is_found(write_corpus, tmp_path):
    ours = write_corpus(tmp_path / "ours", [[5], [5]])
    theirs = write_corpus(tmp_path / "theirs", [[4], [5]])
    (theirs / "train-01-00000.tokens").replace(ours / "train-01-00000.tokens")
    with pytest.raises(DamagedError, match=r"ours/train-01-00000\.tokens.*has SHA-256"):
        Corpus(ours).tokens("train").read(4, 6)


def test_a_trusted_corpus_is_read_as_it_is(write_corpus, tmp_path):
    flip(write_corpus(tmp_path, [[5]]) / "train-00-00000.tokens", 0)
    assert Corpus(tmp_path, verify=False).tokens("train").read(0, 5).tolist() == [1, 1, 2, 3, 4]


def test_a_shard_is_checked_once(write_corpus, tmp_path, monkeypatch):
    corpus = Corpus(write_corpus(tmp_path, [[5], [5]]))
    checked = []
    monkeypatch.setattr("gpt1_jax.data.corpus.damage_of", lambda path, expected: checked.append(path.name))
    for _ in range(2):
        stream = corpus.tokens("train")
        stream.gather(np.array([0, 1, 4]), 3)
    assert sorted(checked) == ["train-00-00000.tokens", "train-01-00000.tokens"]


def test_an_altered_manifest_is_damaged(write_corpus, tmp_path):
    path = write_corpus(tmp_path, [[5]]) / "manifest.json"
    content = json.loads(path.read_text())
    del content["files"]["train-00-00000.tokens"]
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=r"manifest\.json: not as it was written"):
        Corpus(tmp_path)


def test_readers_change_nothing(write_corpus, tmp_path):
    folder = write_corpus(tmp_path, [[40, 3, 50], [30]])
    starts = np.random.default_rng(0).integers(0, 115, 200)
    expected = starts[:, None] + np.arange(8)
    for readers in (0, 1, 3):
        assert np.array_equal(Corpus(folder, readers=readers).tokens("train").gather(starts, 8), expected)


def test_offsets_are_read_and_checked(write_corpus, tmp_path):
    corpus = Corpus(write_corpus(tmp_path, [[5, 2]]))
    offsets = corpus.offsets(corpus.manifest.shards[1])
    assert (offsets.dtype, offsets.tolist()) == (np.int64, [0, 2])
    path = tmp_path / "train-00-00001.offsets"
    flip(path, 8)
    assert Corpus(tmp_path, verify=False).offsets(corpus.manifest.shards[1]).tolist() == [0, 3]
    with pytest.raises(DamagedError, match=r"train-00-00001\.offsets.*has SHA-256"):
        corpus.offsets(corpus.manifest.shards[1])
    path.write_bytes(bytes(8))
    with pytest.raises(DamagedError, match=r"offsets.*has 8 bytes, its manifest says 16"):
        corpus.offsets(corpus.manifest.shards[1])
    path.unlink()
    for verify in (True, False):
        with pytest.raises(DamagedError, match=r"offsets.*is missing"):
            Corpus(tmp_path, verify).offsets(corpus.manifest.shards[1])


def test_unreadable_shard_is_a_storage_error(write_corpus, tmp_path):
    stream = Corpus(write_corpus(tmp_path, [[5]]), verify=False).tokens("train")
    shard = tmp_path / "train-00-00000.tokens"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StorageError, match=r"train-00-00000\.tokens: cannot be read"):
        stream.read(0, 1)


def test_the_tokenizer_is_compared_with_the_manifest(corpus, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(corpus.folder, folder)
    assert Corpus(folder).tokenizer().fingerprint == corpus.manifest.tokenizer_fingerprint
    content = bytearray((folder / "tokenizer.model").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(DamagedError, match=r"tokenizer\.model: the corpus's tokenizer has SHA-256"):
        Corpus(folder).tokenizer()
    (folder / "tokenizer.model").unlink()
    with pytest.raises(DamagedError, match=r"tokenizer\.model: the corpus's tokenizer is missing"):
        Corpus(folder).tokenizer()
