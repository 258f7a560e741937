import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt1_jax.data import documents
from gpt1_jax.data.documents import DocumentReader, dataset_name, read_documents
from gpt1_jax.data.duplicates import Chunk
from gpt1_jax.errors import DamagedError


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 50))
def test_files_of_a_split_hold_its_documents_in_order_and_evenly(counts, megabytes):
    chunks = [(Chunk(str(number), 0, count + 7), count) for number, count in enumerate(counts)]
    plan = documents._plan(chunks, megabytes * documents._SHARD_BYTES // 8)
    held = [[(span.chunk.name, at) for span in file for at in range(span.skip, span.skip + span.take)] for file in plan]
    assert [place for file in held for place in file] == [
        (chunk.name, at) for chunk, count in chunks for at in range(count)
    ]
    sizes = {len(file) for file in held}
    assert max(sizes) - min(sizes) <= 1
    assert len(plan) == min(sum(counts), -(-megabytes // 8))


def test_a_split_has_a_bounded_number_of_files():
    plan = documents._plan([(Chunk("0", 0, 5000), 5000)], 10**13)
    assert len(plan) == documents._MOST_SHARDS


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
