import json
import shutil
from pathlib import Path

import pytest
from etils import epath

from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.statistics import origin_of, statistics
from gpt1_jax.text.tokenizer import read_tokenizer


@pytest.mark.parametrize(
    ("identity", "origin"),
    [
        ("https://en.wikipedia.org/wiki/Tea", "en.wikipedia.org"),
        ("http://a.org:8080/x:1", "a.org"),
        ("posts/a.jsonl:17", "posts/a.jsonl"),
        ("gs://bucket/b.parquet:3", "gs://bucket/b.parquet"),
        ("huggingface:me/poems/test:0:12", "huggingface:me/poems/test"),
        ("books/emma.txt", "books"),
        ("stories/77", "stories"),
        ("Emma", "Emma"),
        ("http://[broken/page", "http://[broken"),
    ],
)
def test_origin(identity, origin):
    assert origin_of(identity) == origin


def test_statistics_are_those_of_the_documents(corpus):
    found = statistics(corpus, top=3)
    tokenizer = read_tokenizer(corpus.tokenizer_file)
    texts = [text for split in ("train", "validation") for text, _ in read_documents(corpus.folder, split)]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    assert found.splits == corpus.manifest.splits
    assert found.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / sum(lengths))
    assert found.lengths == {n: sum(n <= x < 2 * n for x in lengths) for n in found.lengths}
    assert sum(found.lengths.values()) == len(texts)
    assert list(found.sources.values()) == [corpus.manifest.splits["train"].tokens]
    (source,) = corpus.manifest.sources
    assert found.origins == {str(Path(source.name.removeprefix("files:")).parent): len(texts)}
    assert found.duplicate_rate == source.dropped.get("duplicate", 0) / source.read
    assert found.dropped == source.dropped


def test_commands_by_folder_and_by_configuration(corpus, config_file, gpt1, tmp_path):
    for argument in (corpus.folder, config_file):
        result = gpt1("data", "stats", argument, "--json", "--top", 1)
        assert result.code == 0
        assert json.loads(result.out)["splits"]["train"]["tokens"] == corpus.manifest.splits["train"].tokens
    printed = gpt1("data", "stats", corpus.folder).out
    assert f"train: {corpus.manifest.splits['train'].documents:,} documents" in printed and "####" in printed
    sound = gpt1("data", "verify", corpus.folder, "--json")
    assert sound.code == 0
    assert json.loads(sound.out)["problems"] == []
    damaged = tmp_path / corpus.folder.name
    shutil.copytree(corpus.folder, damaged)
    (damaged / "train-00-00000.tokens").unlink()
    result = gpt1("data", "verify", damaged)
    assert result.code == 3
    assert "train-00-00000.tokens is missing" in result.out and "'gpt1 prepare'" in result.err
    assert gpt1("data", "verify", tmp_path / "nothing").code == 2
    refused = gpt1("data", "stats", corpus.folder, "seed=1")
    assert refused.code == 2 and "to which seed=1 means nothing" in refused.err


def test_a_prepared_corpus_is_a_tfds_dataset(corpus):
    import tensorflow_datasets as tfds

    (folder,) = epath.Path(corpus.folder / "documents").glob("*/*")
    name, version = folder.parts[-2:]
    by_name = tfds.builder(f"{name}:{version}", data_dir=str(corpus.folder / "documents"))
    by_folder = tfds.builder_from_directory(folder)
    for builder in (by_name, by_folder):
        records = builder.as_data_source("train")
        found = [(record["text"].decode(), record["identity"].decode()) for record in records]
        assert found == list(read_documents(corpus.folder, "train"))
        assert {record["source"].decode() for record in records} == {corpus.manifest.sources[0].name}
        assert set(builder.info.features) == {"text", "identity", "source"}
        assert version == str(builder.info.version) == "1.0.0"
