import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt1_jax.data import documents
from gpt1_jax.data.documents import DocumentReader, dataset_name, read_documents
from gpt1_jax.data.duplicates import Chunk
from gpt1_jax.errors import DamagedError


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 2_000_000)), min_size=1, max_size=12), st.integers(1, 5))
def test_files_of_a_split_hold_its_documents_in_order_and_evenly(counts, megabytes):
    chunks = [(Chunk(str(number), 0, count + 7), count, count * size) for number, (count, size) in enumerate(counts)]
    total, most = sum(size for _, _, size in chunks), max(size for _, size in counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_SHARD_BYTES", megabytes * 1_000_000)
        plan = documents._plan(chunks)
    held = [[(span.chunk.name, at) for span in file for at in range(span.skip, span.skip + span.take)] for file in plan]
    assert [place for file in held for place in file] == [(c.name, at) for c, count, _ in chunks for at in range(count)]
    sizes = [sum(counts[int(name)][1] for name, _ in file) for file in held]
    files = -(-total // (megabytes * 1_000_000))
    assert all(held) and len(plan) <= files
    assert max(sizes) <= total / files + 2 * most


def test_a_split_has_a_bounded_number_of_files():
    assert len(documents._plan([(Chunk("0", 0, 5000), 5000, 10**13)])) == documents._MOST_SHARDS


def test_reader_reads_any_range(corpus):
    everything = list(read_documents(corpus.folder, "train"))
    reader = DocumentReader(corpus.folder, "train")
    assert len(reader) == len(everything) > documents._RECORDS
    for start, stop in ((0, 1), (3, 3), (5, 70), (len(everything) - 2, len(everything))):
        assert list(reader.read(start, stop)) == everything[start:stop]
    assert reader[7] == everything[7]


def test_missing_documents_say_what_to_do(tmp_path):
    with pytest.raises(DamagedError, match=r"documents: the documents cannot be read: .*'gpt1 prepare' again"):
        DocumentReader(tmp_path, "train")


@pytest.mark.parametrize(
    ("corpus_name", "name"),
    [("python_docs", "python_docs"), ("Books+wiki-2.txt", "books_wiki_2_txt"), ("1984", "corpus_1984")],
)
def test_name_of_the_dataset(corpus_name, name):
    assert dataset_name(corpus_name) == name
