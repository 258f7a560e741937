import gzip
import json
import lzma
import sys
from collections.abc import Iterator

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
import tensorflow_datasets as tfds
import zstandard

from gpt1_jax.data.tables import Row, read_table, value
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.task_config import Table

CELLS = [{"a": "one", "b": "1"}, {"a": 'say "two"', "b": "2"}]


def read(columns=("a", "b"), key="task.train", **table):
    table = pydantic.TypeAdapter(Table).validate_json(json.dumps(table))
    return list(read_table(table, key, columns))


def read_file(path, text, columns=("a", "b"), **settings):
    path.write_text(text, encoding="utf-8", newline="")
    return read(columns, kind="files", paths=[str(path)], **settings)


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}
TEXTS = {
    "csv": b'a,b\r\none,1\r\n"say ""two""",2\r\n',
    "tsv": b'\xef\xbb\xbfa\tb\none\t1\n\nsay "two"\t2\n',
    "jsonl": b'{"a": "one", "b": "1"}\n\n{"a": "say \\"two\\"", "b": "2"}\n',
}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", [*TEXTS, "parquet"])
def test_every_kind_of_file_plain_and_compressed(tmp_path, kind, suffix):
    pq.write_table(pa.Table.from_pylist(CELLS), tmp_path / "cells")
    content = TEXTS.get(kind) or (tmp_path / "cells").read_bytes()
    path = tmp_path / f"rows.{kind}{suffix}"
    path.write_bytes(PACKED[suffix](content))
    rows = read(kind="files", paths=[str(tmp_path / "rows.*")])
    assert [row.cells for row in rows] == CELLS
    second = {"csv": 3, "tsv": 4, "jsonl": 3, "parquet": 1}[kind]
    assert rows[1].where == f"task.train: {path}:{second}"


def test_quotation_marks_and_headers(tmp_path):
    path = tmp_path / "rows.tsv"
    assert read_file(path, 'a\tb\n"x\ty"\tz\n', quoted=True)[0].cells == {"a": "x\ty", "b": "z"}
    assert read_file(path, 'gj04\t1\t\t"Why not?"\n', ("3",), header=False)[0].cells["3"] == '"Why not?"'
    rows = read_file(tmp_path / "rows.csv", 'a,b\n"two\nlines",1\nx,2\n')
    assert [(row.cells["a"], row.where[-2:]) for row in rows] == [("two\nlines", ":2"), ("x", ":4")]


def test_files_in_the_order_of_the_globs_and_the_first_rows_alone(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.csv").write_text(f"a\n{name}1\n{name}2\n")
    paths = [str(tmp_path / "b.csv"), str(tmp_path / "*.csv")]
    assert [row.cells["a"] for row in read("a", kind="files", paths=paths)] == ["b1", "b2", "a1", "a2"]
    assert [row.cells["a"] for row in read("a", kind="files", paths=paths, rows=3)] == ["b1", "b2", "a1"]
    (tmp_path / "a.csv").write_text("what is not read is not looked at")
    assert len(read("a", kind="files", paths=paths, rows=2)) == 2


def test_remote_files():
    fsspec.filesystem("memory").pipe("/tables/x.jsonl", TEXTS["jsonl"])
    assert [row.cells for row in read(kind="files", paths=["memory://tables/*.jsonl"])] == CELLS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "a,b\n1,2\n1,2,3\n", r"task\.train: .*r\.csv:3: 3 cells, but 2 columns; 'quoted' .* is true"),
        ("r.tsv", "a\tb\n\n1\n", r"r\.tsv:3: 1 cells, but 2 columns; .* is false"),
        ("r.csv", 'a,b\n1,2\n"1,2\n', r"r\.csv:3: unexpected end of data; 'quoted'"),
        ("r.csv", "a,B\n1,2\n", r"r\.csv:1: there is no column 'b'; there are: a, B"),
        ("r.csv", "a,a\n1,2\n", r"r\.csv:1: two columns are called 'a'; header: false"),
        (
            "r.jsonl",
            '{"a": 1, "b": 1}\n{"a": 1, "bb": 2}\n',
            r"r\.jsonl:2: there is no column 'b'; there are: a, bb; did you mean 'bb'",
        ),
        ("r.jsonl", '{"a": 1, "b": 1}\n{"a"\n', r"r\.jsonl:2: it is not valid JSON"),
        ("r.jsonl", "[1]\n", r"r\.jsonl:1: it is not a JSON object"),
        ("r.txt", "one", r"r\.txt: its name ends in none of \.csv \.tsv \.jsonl \.parquet"),
    ],
)
def test_mistakes_in_files_name_the_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_file(tmp_path / name, text)


def test_other_mistakes_in_files(tmp_path):
    with pytest.raises(UserError, match=r"task\.test\.paths: '.*none\*' matches no file"):
        read(key="task.test", kind="files", paths=[str(tmp_path / "none*")])
    path = tmp_path / "latin.csv"
    path.write_bytes("a,b\nGrüße,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv: it is not UTF-8"):
        read(kind="files", paths=[str(path)])
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(TEXTS["csv"])[:-5])
    with pytest.raises(DamagedError, match=r"cut\.csv\.gz: it is damaged"):
        read(kind="files", paths=[str(path)])
    path = tmp_path / "cut.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match=r"cut\.parquet: it is not a sound Parquet file"):
        read(kind="files", paths=[str(path)])
    pq.write_table(pa.table({"a": ["one"]}), path)
    with pytest.raises(UserError, match=r"cut\.parquet: there is no column 'b'"):
        read(kind="files", paths=[str(path)])


def test_dotted_names_are_fields_of_records(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"translation": [{"de": "Hund", "en": "dog"}], "unread": [1]}), path)
    (row,) = read(["translation.de", "translation.en"], kind="files", paths=[str(path)])
    assert (value(row, "translation.de"), list(row.cells)) == ("Hund", ["translation"])
    with pytest.raises(UserError, match=r"rows\.parquet:0: there is no column 'translation.fr'; there are: de, en"):
        value(row, "translation.fr")
    with pytest.raises(UserError, match=r"there is no column 'text.de'; there are: text"):
        value(Row("row 1", {"text": "Hund"}), "text.de")
    assert value(Row("row 1", {"a.b": "a name with a dot"}), "a.b") == "a name with a dot"


class Talks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "messages": tfds.features.Sequence(message),
            "answers": tfds.features.Sequence(tfds.features.Text()),
            "translation": tfds.features.Translation(("de", "en")),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "score": np.float32,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for number in range(3):
            yield (
                number,
                {
                    "messages": [{"role": "user", "content": "schön"}, {"role": "assistant", "content": str(number)}],
                    "answers": ["ä", "b"],
                    "translation": {"de": "Bär", "en": "bear"},
                    "label": "yes",
                    "score": 0.5,
                },
            )


def test_tfds_records_are_plain_values(tmp_path):
    builder = Talks(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    folder = str(builder.data_dir)
    rows = read(["messages", "translation.de"], kind="tfds", dataset=folder, split="train", rows=2)
    assert [row.where for row in rows] == [f"task.train: {folder}/train:{number}" for number in range(2)]
    assert rows[1].cells == {
        "messages": [{"role": "user", "content": "schön"}, {"role": "assistant", "content": "1"}],
        "answers": ["ä", "b"],
        "translation": {"de": "Bär", "en": "bear"},
        "label": 1,
        "score": 0.5,
    }
    with pytest.raises(UserError, match=r"there is no column 'mesages'; there are: .*; did you mean 'messages'"):
        read(["mesages"], kind="tfds", dataset=folder, split="train")
    with pytest.raises(UserError, match=r"task\.train: dataset 'snly' cannot be found by tfds; did you mean 'snli'"):
        read(kind="tfds", dataset="snly", split="train")


class Latin(Talks):
    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for number, record in super()._generate_examples():
            yield (
                number,
                record | {"translation": {"de": "Bär".encode("latin-1" if number == 1 else "utf-8"), "en": ""}},
            )


def test_tfds_texts_that_are_not_utf8_are_named(tmp_path):
    builder = Latin(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    table = {"kind": "tfds", "dataset": str(builder.data_dir), "split": "train"}
    assert read(["label"], rows=1, **table)[0].cells["translation"]["de"] == "Bär"
    with pytest.raises(UserError, match=r"/train:1: it is not UTF-8: .* can't decode byte 0xe4 in position 1"):
        read(["label"], **table)


def test_hugging_face_rows(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"a": f"{n}", "list": ["x", "y"]}) + "\n" for n in range(3)))
    table = {"kind": "huggingface", "dataset": "json", "files": [str(path)], "split": "train"}
    rows = read(["a", "list"], rows=2, **table)
    assert rows == [Row(f"task.train: json/train:{n}", {"a": f"{n}", "list": ["x", "y"]}) for n in range(2)]
    with pytest.raises(UserError, match=r"task\.train: json/train: there is no column 'b'"):
        read(["b"], **table)
    with pytest.raises(UserError, match=r"task\.train: dataset 'json', split 'no'"):
        read(["a"], **{**table, "split": "no"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"task\.train: kind 'huggingface' needs .*pip install 'gpt1-jax\[huggingface\]'"
    ):
        read(["a"], **table)


def test_toy_rows():
    rows = read(["english", "toy"], kind="toy_language", split="validation", rows=3)
    assert [row.where for row in rows] == [f"task.train: toy_language/validation:{n}" for n in range(3)]
    with pytest.raises(UserError, match=r"there is no column 'french'; there are: english, toy"):
        read(["french"], kind="toy_language", split="validation", rows=3)
