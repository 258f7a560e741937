import json
import sys
import types

import pytest

from gpt1_jax.config import HuggingFace
from gpt1_jax.errors import UserError
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
        return iter([{"body": "one"}, {"other": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = HuggingFaceSource(config(dataset="me/poems", subset="en", split="test", text_field="body"))
    first, second = source.read()
    assert first == Document("one", "huggingface:me/poems/test:0")
    assert isinstance(second, Skipped)
    assert calls == [(("me/poems", "en"), {"data_files": None, "split": "test", "streaming": True})]
    assert source.label == "poems"


def test_library_reads_local_files(tmp_path):
    pytest.importorskip("datasets", reason="an optional extra")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(3)))
    source = HuggingFaceSource(config(dataset="json", files=(str(tmp_path / "*.jsonl"),)))
    assert [item.text for item in source.read()] == ["number 0", "number 1", "number 2"]
    with pytest.raises(UserError, match="split 'nowhere'"):
        list(HuggingFaceSource(config(dataset="json", files=(str(tmp_path / "*"),), split="nowhere")).read())
