import json
import pickle
import sys
import types

import pytest

from gpt1_jax.errors import UserError
from gpt1_jax.source_config import HuggingFace
from gpt1_jax.text.document import Document, Skipped
from gpt1_jax.text.huggingface import HuggingFaceSource


def config(**settings):
    return HuggingFace(kind="huggingface", **settings)


def test_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt1-jax\[huggingface\]'"):
        HuggingFaceSource(config(dataset="wikitext"))


def test_records_and_arguments(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        shards = [[{"body": "one"}, {"other": "two"}], [{"body": "three"}]]
        return types.SimpleNamespace(num_shards=2, shard=lambda count, index: shards[index])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = HuggingFaceSource(config(dataset="me/poems", subset="en", split="test", text_field="body"))
    first, second, third = items = list(source.read())
    assert first == Document("one", "huggingface:me/poems/test:0:0")
    assert isinstance(second, Skipped)
    assert third == Document("three", "huggingface:me/poems/test:1:0")
    assert [item for part in source.split() for item in part.read()] == items
    assert "me/poems from the Hugging Face hub" in source.network
    assert calls[:1] == [(("me/poems", "en"), {"data_files": None, "split": "test", "streaming": True})]
    assert source.label == "poems"


def test_library_reads_local_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(3)))
    source = HuggingFaceSource(config(dataset="json", files=(str(tmp_path / "*.jsonl"),)))
    assert [item.text for item in source.read()] == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2"]
    parts = [pickle.loads(pickle.dumps(part)) for part in source.split()]
    assert [item for part in parts for item in part.read()] == list(source.read()) and len(parts) == 2
    assert source.network is None
    with pytest.raises(UserError, match="split 'nowhere'"):
        list(HuggingFaceSource(config(dataset="json", files=(str(tmp_path / "*"),), split="nowhere")).read())
