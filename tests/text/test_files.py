import gzip
import json
import lzma
import pickle
import tracemalloc

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gpt1_jax.errors import StorageError, UserError
from gpt1_jax.source_config import Files
from gpt1_jax.text.document import Document, Skipped
from gpt1_jax.text.files import FilesSource

COMPRESS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def source(*paths, max_chars=10_000, **settings):
    return FilesSource(Files(kind="files", paths=tuple(map(str, paths)), **settings), max_chars)


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Skipped)]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_format_plain_and_compressed(tmp_path, suffix):
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(150)], "other": range(150)}), tmp_path / "p")
    contents = {
        "a.txt": b"ein Text\nzwei",
        "b.md": b"# title",
        "c.jsonl": jsonl({"text": "one"}, {"text": "two"}),
        "d.parquet": (tmp_path / "p").read_bytes(),
    }
    (tmp_path / "p").unlink()
    for name, data in contents.items():
        (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](data))
    items = list(source(tmp_path / "*").read())
    assert texts(items) == ["ein Text\nzwei", "# title", "one", "two", *(f"row {n}" for n in range(150))]
    identities = [item.identity.removeprefix(f"{tmp_path}/") for item in items]
    assert identities[:5] == [f"a.txt{suffix}", f"b.md{suffix}", f"c.jsonl{suffix}:1", f"c.jsonl{suffix}:2",
                              f"d.parquet{suffix}:0"]  # fmt: skip


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_stream_is_never_a_shorter_document(tmp_path, suffix):
    data = COMPRESS[suffix](bytes(range(32, 127)) * 100)
    (tmp_path / f"a.txt{suffix}").write_bytes(data[:-6])
    (tmp_path / f"b.txt{suffix}").write_bytes(b"not compressed at all")
    assert reasons(source(tmp_path / "*").read()) == ["unreadable", "unreadable"]


def test_zstandard_frames_are_read_one_after_another(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(COMPRESS[".zst"](b"one ") + COMPRESS[".zst"](b"two"))
    assert texts(source(tmp_path / "*").read()) == ["one two"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"caf\xe9", "invalid_utf8"),
        ("a.txt", "utf-16".encode("utf-16"), "binary"),
        ("a.txt", b"PK\x03\x04\0\0", "binary"),
        ("a.md", b"", "empty"),
        ("a.txt", b"x" * 50_001, "oversized"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "invalid_utf8"),
        ("a.jsonl", b'{"text": ', "invalid_json"),
        ("a.jsonl", b"[1]", "invalid_json"),
        ("a.jsonl", b"[" * 100_000, "invalid_json"),
        ("a.jsonl", jsonl({"body": "x"}), "missing_field"),
        ("a.jsonl", jsonl({"text": None}), "missing_field"),
        ("a.jsonl", jsonl({"text": 7}), "not_text"),
        ("a.jsonl", jsonl({"text": ""}), "empty"),
        ("a.jsonl", jsonl({"text": "x" * 2_000_000}), "oversized"),
        ("a.parquet", b"PAR1 no", "unreadable"),
        ("a.png", b"\x89PNG", "unknown_type"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_broken_input_is_a_counted_skip(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_bytes(b"sound")
    items = list(source(tmp_path / "*").read())
    assert reasons(items) == [reason]
    assert texts(items) == ["sound"]
    assert items[0].identity.startswith(str(tmp_path / name))


def test_reading_goes_on_after_a_broken_line(tmp_path):
    data = jsonl({"text": "one"}) + b"\n{\n" + b"y" * 2_000_000 + b"\n" + jsonl({"text": "two"})
    (tmp_path / "a.jsonl").write_bytes(data)
    items = list(source(tmp_path / "a.jsonl").read())
    assert texts(items) == ["one", "two"]
    assert [item.identity.rpartition(":")[2] for item in items] == ["1", "3", "4", "5"]


def test_missing_column_says_which_there_are(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "title": ["y"]}), tmp_path / "a.parquet")
    (item,) = source(tmp_path / "a.parquet").read()
    assert item.reason == "missing_field"
    assert "'text'" in item.detail
    assert "body, title" in item.detail


def test_text_field_and_nulls_in_parquet(tmp_path):
    pq.write_table(pa.table({"body": ["x", None, "z"]}), tmp_path / "a.parquet")
    items = list(source(tmp_path / "a.parquet", text_field="body").read())
    assert texts(items) == ["x", "z"]
    assert reasons(items) == ["missing_field"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl({"text": "line"}))
    assert texts(source(tmp_path / "*").read()) == ["text", "line"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_memory_does_not_grow_with_a_line(tmp_path, name):
    data = b"x" * 200_000_000
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb", **({"compresslevel": 1} if name.endswith(".gz") else {})) as file:
        file.write(data)
    del data
    tracemalloc.start()
    try:
        assert reasons(source(tmp_path / name).read()) == ["oversized"]
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_remote_files():
    file_system = fsspec.filesystem("memory")
    with file_system.open("/corpus/a.jsonl", "wb") as file:
        file.write(jsonl({"text": "far away"}))
    remote = source("memory://corpus/*.jsonl")
    assert list(remote.read()) == [Document("far away", "memory:///corpus/a.jsonl:1")]
    assert remote.settings()["files"][0][:2] == ["memory:///corpus/a.jsonl", 21]


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError("no route")])
def test_outage_is_no_smaller_corpus(monkeypatch, error):
    file_system = fsspec.filesystem("memory")
    with file_system.open("/corpus/b.txt", "wb") as file:
        file.write(b"far away")
    remote = source("memory://corpus/b.txt")

    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(file_system), "_open", unreachable)
    with pytest.raises(StorageError, match=r"memory:///corpus/b\.txt: cannot be read: no route"):
        list(remote.read())
    monkeypatch.setattr(type(file_system), "info", unreachable)
    with pytest.raises(StorageError, match=r"memory:///corpus/b\.txt: cannot be read: no route"):
        remote.settings()


def test_damaged_remote_file_is_no_outage():
    with fsspec.filesystem("memory").open("/corpus/c.txt.gz", "wb") as file:
        file.write(b"no gzip stream")
    assert reasons(source("memory://corpus/c.txt.gz").read()) == ["unreadable"]


def test_local_file_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    local = source(tmp_path / "a.txt")

    def denied(*args, **kwargs):
        raise PermissionError("denied")

    monkeypatch.setattr(fsspec, "open", denied)
    assert reasons(local.read()) == ["unreadable"]


def test_glob_without_files_is_named(tmp_path):
    (tmp_path / "books").mkdir()
    with pytest.raises(UserError, match=r"books/\*\.txt' matches no file$"):
        source(tmp_path / "books/*.txt")
    with pytest.raises(UserError, match=r"there is no folder '.*bookz'"):
        source(tmp_path / "bookz/**/*.txt")
    with pytest.raises(UserError, match="nothing://x"):
        source("nothing://x/*.txt")


def test_order_and_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert texts(source(tmp_path / "*.md", tmp_path / "*").read()) == ["c.md", "a.txt", "b.txt"]


def test_settings_follow_the_contents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = source(path).settings()
    path.touch()
    assert source(path).settings() == before
    path.write_text("two")
    assert source(path).settings() != before


@pytest.mark.parametrize(
    ("path", "label"), [("corpora/books/*.txt", "books"), ("notes.txt.gz", "notes"), ("*.txt", "files")]
)
def test_label(tmp_path, monkeypatch, path, label):
    monkeypatch.chdir(tmp_path)
    for name in ("corpora/books/a.txt", "notes.txt.gz", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert source(path).label == label


def test_identity_from_a_field(tmp_path):
    rows = [{"text": "one", "url": "https://a.org/1"}, {"text": "two", "url": ""}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": ["one", "two"], "number": [7, None]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    assert [item.identity for item in source(tmp_path / "a.jsonl", identity_field="url").read()] == [
        "https://a.org/1",
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/a.jsonl:3",
    ]
    found = source(tmp_path / "b.parquet", identity_field="number").read()
    assert list(found) == [Document("one", "7"), Document("two", f"{tmp_path}/b.parquet:1")]
    (missing,) = source(tmp_path / "b.parquet", identity_field="url").read()
    assert missing.reason == "missing_field" and "'url' (identity_field); it has: text, number" in missing.detail


def test_parts_are_the_source_in_order(tmp_path, monkeypatch):
    for number, size in enumerate([10, 30, 5, 5, 100, 0]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    monkeypatch.setattr("gpt1_jax.text.files._GROUP_BYTES", 40)
    whole = source(tmp_path / "*.txt")
    parts = [pickle.loads(pickle.dumps(part)) for part in whole.split()]
    sizes = [[len(item.text) if isinstance(item, Document) else 0 for item in part.read()] for part in parts]
    assert sizes == [[10, 30], [5, 5], [100], [0]]
    assert [item for part in parts for item in part.read()] == list(whole.read())
    assert whole.network is None
