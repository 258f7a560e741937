import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gpt1_jax.errors import UserError
from gpt1_jax.source_config import Tfds
from gpt1_jax.text.document import Document
from gpt1_jax.text.tfds import TfdsSource


class Rhymes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.3")
    code_path = None

    def _info(self):
        features = {"body": tfds.features.Text(), "line": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for line in range(count):
            yield line, {"body": f"Zeile {line}, schön", "line": line}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    builder = Rhymes(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def source(dataset, **settings):
    return TfdsSource(Tfds(kind="tfds", dataset=str(dataset), **{"text_field": "body", **settings}))


def test_documents_in_the_order_of_the_split(folder):
    items = list(source(folder).read())
    assert items[3] == Document("Zeile 3, schön", f"tfds:{folder}/train:3")
    assert len(items) == 5
    assert len(list(source(folder, split="test").read())) == 2
    assert len(list(source(folder, split="train[1:3]").read())) == 2


def test_settings_name_the_version_and_the_files(folder):
    settings = source(folder).settings()
    assert settings["version"] == "rhymes/1.2.3"
    assert any("rhymes-train.array_record" in path for path, *_ in settings["files"])


def test_fields_that_are_no_text_are_skipped(folder):
    assert {item.reason for item in source(folder, text_field="line").read()} == {"not_text"}


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"text_field='text'; it has: .*body"):
        source(folder, text_field="text")
    with pytest.raises(UserError, match=r"split 'valid'.*splits: .*test"):
        list(source(folder, split="valid").read())
    with pytest.raises(UserError, match="'no_such_dataset' cannot be found"):
        source("no_such_dataset", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="cannot be found"):
        source(tmp_path)


def test_without_tensorflow(folder):
    list(source(folder).read())
    assert "tensorflow" not in sys.modules


def test_parts_are_the_source_in_order(folder, monkeypatch):
    monkeypatch.setattr("gpt1_jax.text.tfds.parts", lambda rows: [rows[:2], rows[2:]])
    whole = source(folder)
    parts = [pickle.loads(pickle.dumps(part)) for part in whole.split()]
    assert [len(list(part.read())) for part in parts] == [2, len(list(whole.read())) - 2]
    assert [item for part in parts for item in part.read()] == list(whole.read())
    assert whole.network is None


def test_identity_from_a_field(folder):
    assert [item.identity for item in source(folder, identity_field="body").read()] == [
        item.text for item in source(folder).read()
    ]
    with pytest.raises(UserError, match="no feature identity_field='url'"):
        source(folder, identity_field="url")
