import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from etils import epath

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data import documents, encode
from gpt1_jax.data import prepare as preparation
from gpt1_jax.data.collect import split_of
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.manifest import read_manifest, sha256_of
from gpt1_jax.data.prepare import corpus_dir, prepare
from gpt1_jax.errors import DamagedError, GPT1Error, StorageError, UserError
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.pool import Pool
from gpt1_jax.text.sentencepiece import train_tokenizer
from gpt1_jax.text.tokenizer import read_tokenizer

WORDS = "the of and to in is was he for it with as his on be at by had not are but from or have an they which".split()


def story(number: int, words: int = 60) -> str:
    draw = random.Random(number)
    return f"Story {number}: " + " ".join(draw.choices(WORDS, k=words)) + ".\nThe end.\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(120)))
    pq.write_table(pa.table({"text": [story(n) for n in range(100, 200)]}), folder / "b.parquet")
    (folder / "c.txt").write_text(story(0) + "ﬁn — schÃ¶n\u2581")
    (folder / "d.txt").write_text("short")
    (folder / "e.txt").write_bytes(b"\xff\xfe")
    return folder


def config(texts: Path, root: Path, *overrides: str, paths: str = "['*.jsonl', '*.parquet', '*.txt']") -> Config:
    globs = [str(texts / name) for name in json.loads(paths.replace("'", '"'))]
    sources = [{"kind": "files", "paths": globs[:1]}] + ([{"kind": "files", "paths": globs[1:]}] if globs[1:] else [])
    return parse_config(
        "model: {vocab_size: 400}\ndata: {workers: 1, validation_fraction: 0.1, shard_tokens: 3000}",
        "test",
        [f"data.root={root}", f"data.sources={json.dumps(sources)}", *overrides],
    )


def contents(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


write = encode._write


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory) -> epath.Path:
    return prepare(config(texts, tmp_path_factory.mktemp("root")))


def test_manifest_counts_what_was_read_and_dropped(corpus):
    manifest = read_manifest(corpus)
    first, second = manifest.sources
    assert (first.read, first.kept, first.dropped) == (120, 120, {})
    assert (second.read, second.kept) == (103, 81)
    assert second.dropped == {"duplicate": 20, "invalid_utf8": 1, "too_short": 1}
    assert sum(split.documents for split in manifest.splits.values()) == 201
    for split, counts in manifest.splits.items():
        found = [text for text, _ in read_documents(corpus, split)]
        assert counts.documents == len(found)
        assert counts.bytes == sum(len(text.encode()) for text in found)
        assert counts.words == sum(len(text.split()) for text in found)
        assert counts.tokens == sum(shard.tokens for shard in manifest.shards_of(split))


def test_checksums_cover_every_file(corpus):
    files = contents(corpus)
    del files["manifest.json"]
    manifest = read_manifest(corpus)
    assert {name: found.sha256 for name, found in manifest.files.items()} == files
    assert all(Path(corpus / name).stat().st_size == found.bytes for name, found in manifest.files.items())
    assert corpus.name == f"{manifest.name}-{manifest.fingerprint}"
    assert [path.name for path in corpus.parent.iterdir()] == [corpus.name]


def test_tokens_are_those_of_the_documents(corpus):
    manifest = read_manifest(corpus)
    tokenizer = read_tokenizer(corpus / "tokenizer.model")
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint
    assert (manifest.vocab_size, manifest.separator_id) == (400, tokenizer.separator_id)
    for split in ("train", "validation"):
        documents = [text for text, _ in read_documents(corpus, split)]
        first = 0
        for shard in manifest.shards_of(split):
            tokens = np.fromfile(corpus / shard.file, manifest.dtype)
            offsets = np.fromfile(corpus / shard.offsets_file, "<i8")
            assert shard.first_document == first
            assert len(tokens) == shard.tokens == offsets[-1] <= 3000
            assert len(offsets) == shard.documents + 1
            for number, (start, end) in enumerate(itertools.pairwise(offsets)):
                assert tokens[end - 1] == tokenizer.separator_id
                assert np.array_equal(tokens[start : end - 1], tokenizer.encode(documents[first + number]))
            first += shard.documents
        assert first == len(documents)
    numbers = [(shard.split, shard.source, shard.file) for shard in manifest.shards]
    assert len(numbers) > 4
    assert numbers == sorted(numbers)


def test_documents_keep_order_identity_and_split(corpus, texts):
    found = {split: list(read_documents(corpus, split)) for split in ("train", "validation")}
    for split, pairs in found.items():
        assert all(split_of(text, 0.1) == split for text, _ in pairs)
        lines = [int(identity.rpartition(":")[2]) for _, identity in pairs if "a.jsonl" in identity]
        assert lines == sorted(lines)
    everything = dict(identity_text[::-1] for split in found.values() for identity_text in split)
    assert everything[f"{texts}/a.jsonl:3"] == story(2)
    assert everything[f"{texts}/b.parquet:25"] == story(125)
    assert everything[f"{texts}/c.txt"] == story(0) + "fin — schön\u2581"
    with pytest.raises(UserError, match="'test'"):
        read_documents(corpus, "test")


def test_a_document_stays_in_its_split_when_others_come():
    assert split_of("abc", 0.72) == "train"  # SHA-256 of abc begins with ba7816bf: 0.728...
    assert split_of("abc", 0.73) == "validation"
    assert hashlib.sha256(b"abc").hexdigest().startswith("ba7816bf")
    share = sum(split_of(story(n), 0.1) == "validation" for n in range(3000)) / 3000
    assert 0.08 < share < 0.12


def never(*args, **kwargs):
    raise AssertionError("called")


def test_second_call_does_nothing(corpus, texts, monkeypatch):
    monkeypatch.setattr(preparation, "_prepare", never)
    monkeypatch.setattr(preparation, "rebuild_shard", never)
    times = {path: path.stat().st_mtime_ns for path in Path(corpus).rglob("*")}
    for check in (False, True):
        assert prepare(config(texts, corpus.parent), check=check) == corpus
    assert {path: path.stat().st_mtime_ns for path in Path(corpus).rglob("*")} == times


def test_folder_depends_on_contents_alone(corpus, texts):
    def folder(*overrides):
        return corpus_dir(config(texts, corpus.parent, *overrides))

    assert folder() == corpus
    assert folder("data.workers=2", "data.prefetch=7", "train.steps=5000", "seed=3") == corpus
    sources = [{**source.model_dump(mode="json"), "weight": 2.5} for source in config(texts, corpus).data.sources]
    assert folder(f"data.sources={json.dumps(sources)}") == corpus
    changes = ["model.vocab_size=401", "data.cleaning.standardize=true", "data.validation_fraction=0.2",
               "data.shard_tokens=4000", "data.tokenizer.sample_bytes=9", "data.cleaning.min_chars=3"]  # fmt: skip
    assert len({folder(change) for change in changes} | {corpus}) == 1 + len(changes)


def test_result_does_not_depend_on_workers_or_size(corpus, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt1_jax.data.collect._BATCH_CHARS", 5000)
    monkeypatch.setattr("gpt1_jax.data.collect._CHUNK_BYTES", 9000)
    monkeypatch.setattr("gpt1_jax.data.encode._RANGE_BYTES", 5000)
    monkeypatch.setattr("gpt1_jax.text.files._GROUP_FILES", 1)
    assert contents(prepare(config(texts, tmp_path, "data.workers=2"))) == contents(corpus)


# Runs in a process of its own, which kills itself at the n-th call of one of the named functions.
KILLED = """
import os, signal, sys
from gpt1_jax.config_file import parse_config
from gpt1_jax.data import collect, counts, documents, encode, prepare, storage
if __name__ == "__main__":
    module, name, calls, yaml = sys.argv[1:]
    owner, left = sys.modules["gpt1_jax.data." + module], int(calls)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    function = getattr(owner, name.split(".")[-1])
    def deadly(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name.split(".")[-1], deadly)
    prepare.prepare(parse_config(yaml, "test"))
"""


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        ("collect", "_PartWriter.add", 1),
        ("collect", "_PartWriter.close", 1),
        ("collect", "write_array", 1),
        ("prepare", "count_collected", 0),
        ("documents", "_ordered", 60),
        ("prepare", "train_tokenizer", 0),
        ("encode", "encoded", 1),
        ("encode", "_write", 2),
        ("encode", "put_file", 3),
        ("prepare", "sha256_of", 3),
        ("prepare", "write_atomically", 2),
        ("prepare", "write_manifest", 0),
    ],
)
def test_killed_preparation_goes_on_to_the_same_bytes(corpus, texts, tmp_path, module, name, calls):
    settings = config(texts, tmp_path)
    command = [sys.executable, "-c", KILLED, module, name, str(calls), settings.to_yaml()]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no prepared corpus here"):
        read_manifest(corpus_dir(settings))
    assert contents(prepare(settings)) == contents(corpus)
    assert [path.name for path in tmp_path.iterdir()] == [corpus.name]


def test_stages_that_are_done_are_not_redone(texts, tmp_path, monkeypatch):
    settings = config(texts, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(settings)
    for stage in ("make_parts", "count_collected", "write_documents", "train_tokenizer", "encode_range", "write_shard"):
        monkeypatch.setattr(preparation, stage, never)
    assert prepare(settings) == corpus_dir(settings)


def test_two_preparers_at_once(corpus, texts, tmp_path):
    results, waited = [], []

    def run():
        results.append(prepare(config(texts, tmp_path), lambda stage, *_: waited.append(stage.startswith("waiting"))))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 == len(results) // 3
    assert any(waited)
    assert contents(results[0]) == contents(corpus)
    assert [path.name for path in tmp_path.iterdir()] == [corpus.name]


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif how == "truncated":
        file.write_bytes(content[:-2])
    elif how == "foreign":
        file.write_bytes(bytes(len(content)))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "foreign"])
@pytest.mark.parametrize(
    "name", ["train-00-00001.tokens", "validation-01-00000.offsets", "tokenizer.model", "manifest.json"]
)
def test_damage_is_mended(corpus, texts, tmp_path, monkeypatch, name, how):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    damage(folder / name, how)
    written = []
    monkeypatch.setattr("gpt1_jax.data.encode._write", lambda *args: written.append(args[0].file) or write(*args))
    if name != "manifest.json":
        assert prepare(config(texts, tmp_path)) == epath.Path(folder)  # does not look
    elif how != "missing":
        with pytest.raises(DamagedError, match=r"manifest\.json: not as it was written"):
            prepare(config(texts, tmp_path))
    assert not written
    stages = []
    assert prepare(config(texts, tmp_path), lambda *args: stages.append(args), check=True) == epath.Path(folder)
    assert contents(folder) == contents(corpus)
    assert [path.name for path in tmp_path.iterdir()] == [corpus.name]
    if name == "manifest.json" and how == "missing":
        assert stages[0][0].startswith("reading")  # as if nothing were there
    elif name in ("tokenizer.model", "manifest.json"):
        assert any("preparing the corpus again" in stage for stage, *_ in stages)
    else:
        assert [Path(file).stem for file in written] == [Path(name).stem]  # this shard alone


def test_the_command_looks_unless_the_storage_is_trusted(corpus, texts, tmp_path, gpt1):
    folder, file = tmp_path / corpus.name, tmp_path / "config.yaml"
    shutil.copytree(corpus, folder)
    damage(folder / "train-00-00001.tokens", "flipped")
    file.write_text(config(texts, tmp_path).to_yaml())
    assert gpt1("prepare", file, "data.verify=false").code == 0
    assert contents(folder) != contents(corpus)
    result = gpt1("prepare", file)
    assert result.code == 0 and "rebuilding train-00-00001.tokens" in result.err
    assert contents(folder) == contents(corpus)


def test_damaged_documents_are_prepared_again(corpus, texts, tmp_path):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    (file,) = folder.glob("documents/*/*/*train*")
    damage(file, "flipped")
    with pytest.raises(UserError, match="there is no"):  # what is gone cannot be read again: nothing is lost
        prepare(config(tmp_path / "gone", tmp_path), check=True)
    prepare(config(texts, tmp_path), check=True)
    assert contents(folder) == contents(corpus)


def test_a_damaged_corpus_is_kept_until_the_new_one_is_whole(corpus, texts, tmp_path, monkeypatch):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    damage(folder / "tokenizer.model", "flipped")
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "count_collected", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config(texts, tmp_path), check=True)
    assert contents(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "train_tokenizer", lambda texts, size: train_tokenizer(list(texts)[:90], size))
        with pytest.raises(DamagedError, match=r"it is another corpus \(.*tokenizer\.model"):
            prepare(config(texts, tmp_path), check=True)
    assert contents(folder) == before
    shutil.rmtree(tmp_path / f".{folder.name}.rebuilt")
    prepare(config(texts, tmp_path), check=True)
    assert contents(folder) == contents(corpus)


def test_what_fails_for_another_reason_is_not_done_again(texts, tmp_path, monkeypatch):
    def outage(*args):
        raise UserError("the hub is out of reach")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "plan_shards", outage)
        with pytest.raises(UserError, match="out of reach"):
            prepare(config(texts, tmp_path))
    monkeypatch.setattr(preparation, "make_parts", never)
    prepare(config(texts, tmp_path))


def test_what_a_kill_after_the_manifest_left_goes(corpus, texts, tmp_path):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    (folder / ".work" / "text").mkdir(parents=True)
    (folder / ".work" / "text" / "000000.json").write_text("{}")
    prepare(config(texts, tmp_path))
    assert contents(folder) == contents(corpus)


def test_leftovers_do_not_enter_the_manifest(corpus, texts, tmp_path, monkeypatch):
    def with_leftovers(*args, **kwargs):
        documents.write_documents(*args, **kwargs)
        (folder,) = args[0].glob("documents/*/1.0.0")
        (folder / "tmpabc").mkdir()
        (folder.parent / "1.0.0.incompleteXYZ").mkdir()
        (args[0] / "train-00-00000.offsets.1234.tmp").write_bytes(b"half")

    monkeypatch.setattr(preparation, "write_documents", with_leftovers)
    assert contents(prepare(config(texts, tmp_path))) == contents(corpus)


def test_a_file_that_goes_is_no_smaller_corpus(texts, tmp_path, monkeypatch):
    shutil.copytree(texts, tmp_path / "texts")
    settings = config(tmp_path / "texts", tmp_path / "root")
    plan = preparation._plan

    def goes(config):
        found = plan(config)
        (tmp_path / "texts" / "b.parquet").unlink()
        return found

    monkeypatch.setattr(preparation, "_plan", goes)
    with pytest.raises(StorageError, match=r"b\.parquet: has gone"):
        prepare(settings)


def test_names_that_are_no_unicode(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts" / os.fsdecode(b"caf\xe9.txt")).write_text(story(777))
    rows = [{"text": story(n), "name": "half \ud83d"} for n in (800, 801)] + [{"\ud800": "no text"}]
    (tmp_path / "texts" / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(tmp_path / "texts", tmp_path / "root")
    sources = [
        source.model_copy(update={"identity_field": "name"}).model_dump(mode="json") for source in settings.data.sources
    ]
    named = config(tmp_path / "texts", tmp_path / "root", f"data.sources={json.dumps(sources)}")
    found = [name for split in ("train", "validation") for _, name in read_documents(prepare(named), split)]
    assert any(name.endswith("caf\\udce9.txt") for name in found)
    assert found.count("half \\ud83d") == 2


def test_a_shard_that_comes_out_otherwise_is_an_error(corpus, texts, tmp_path, monkeypatch):
    folder = tmp_path / corpus.name
    shutil.copytree(corpus, folder)
    damage(folder / "train-00-00001.tokens", "flipped")
    monkeypatch.setattr("gpt1_jax.data.encode.encoded", lambda *args: (np.zeros(3, "<u2"), np.array([3])))
    with pytest.raises(DamagedError, match=r"train-00-00001\.tokens: made again, it has"):
        prepare(config(texts, tmp_path), check=True)


def test_given_tokenizer(texts, tmp_path):
    model = train_tokenizer([story(n) for n in range(50)], 350)
    (tmp_path / "my.model").write_bytes(model.to_bytes())
    given = f"data.tokenizer.file={tmp_path / 'my.model'}"
    with pytest.raises(UserError, match=r"has 350 tokens, but model\.vocab_size=400"):
        prepare(config(texts, tmp_path / "root", given))
    assert not (tmp_path / "root").exists()
    folder = prepare(config(texts, tmp_path / "root", given, "model.vocab_size=350"))
    assert (folder / "tokenizer.model").read_bytes() == model.to_bytes()


def test_given_fast_tokenizer(corpus, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt1_jax.data.encode._RANGE_BYTES", 5000)
    content = fast_tokenizer_json(read_tokenizer(corpus / "tokenizer.model"))
    (tmp_path / "my.json").write_bytes(content)
    given = f"data.tokenizer.file={tmp_path / 'my.json'}"
    with pytest.raises(UserError, match=r"my\.json has 400 tokens, but model\.vocab_size=401"):
        prepare(config(texts, tmp_path / "root", given, "model.vocab_size=401"))
    folder = prepare(config(texts, tmp_path / "root", given, "data.workers=2"))
    assert (folder / "tokenizer.model").read_bytes() == content
    assert read_manifest(folder).tokenizer_fingerprint == hashlib.sha256(content).hexdigest()
    tokens = {path.name: path.read_bytes() for path in folder.glob("*.tokens")}
    assert tokens == {path.name: path.read_bytes() for path in corpus.glob("*.tokens")}


def test_packed_windows_need_a_separator_that_no_text_holds(texts, tmp_path):
    words = {word: number for number, word in enumerate(["<unk>", "the", *map(str, range(398))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.save(str(tmp_path / "my.json"))
    given = f"data.tokenizer.file={tmp_path / 'my.json'}"
    with pytest.raises(UserError, match=r"data\.windows=packed: .*my\.json has its unknown token between documents"):
        prepare(config(texts, tmp_path / "root", given, "data.windows=packed"))
    assert not (tmp_path / "root").exists()
    assert corpus_dir(config(texts, tmp_path / "root", given))


def test_tokenizer_is_trained_on_a_bounded_sample(texts, tmp_path, monkeypatch):
    samples = []
    monkeypatch.setattr(
        preparation,
        "train_tokenizer",
        lambda texts, size: train_tokenizer(samples.append(list(texts)) or samples[-1], size),
    )
    folder = prepare(config(texts, tmp_path, "data.tokenizer.sample_bytes=10000", "model.vocab_size=320"))
    (sample,) = samples
    train = [text for text, _ in read_documents(folder, "train")]
    assert 5000 < sum(len(text.encode()) for text in sample) <= 10_000
    assert set(sample[:-1]) <= set(train)
    places = [train.index(text) for text in sample[:-1]]
    assert places[0] == 0
    assert places[-1] > 0.9 * len(train) - len(train) / len(sample)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.cleaning.on_invalid=error"], r"e\.txt: .*invalid_utf8.*on_invalid=skip"),
        (["data.cleaning.min_chars=100000"], r"no document is left; dropped:\n  too_short, e\.g\. .*a\.jsonl:1"),
        (["data.validation_fraction=0.0001"], r"validation split is empty: .*validation_fraction=0\.0001; raise it"),
        (["data.validation_fraction=0.99999"], r"train split is empty: .*validation_fraction=0\.99999; lower it"),
        (["model.vocab_size=9000"], r"largest possible vocabulary is \d+"),
    ],
)
def test_mistakes_are_explained(texts, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        prepare(config(texts, tmp_path, *overrides))
    assert not list(tmp_path.iterdir())


def test_long_documents_are_whole(tmp_path):
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": story(n, 50 * n)}) + "\n" for n in range(1, 60)))
    settings = config(tmp_path, tmp_path / "root", "data.shard_tokens=500", "model.vocab_size=380", paths="['*.jsonl']")
    manifest = read_manifest(prepare(settings))
    assert all(shard.tokens <= 500 or shard.documents == 1 for shard in manifest.shards)
    assert any(shard.tokens > 2000 for shard in manifest.shards)


def test_large_vocabulary_takes_four_bytes():
    assert preparation.token_dtype(65536) == np.dtype("<u2")
    assert preparation.token_dtype(65537) == np.dtype("<u4")


def test_full_disk_is_a_storage_error(texts, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("gpt1_jax.data.storage.os.fsync", full)
        with pytest.raises(StorageError, match=re.escape(str(tmp_path))):
            prepare(config(texts, tmp_path))
    prepare(config(texts, tmp_path))


FULL = """
import resource, signal, sys
from gpt1_jax.config_file import parse_config
from gpt1_jax.data import prepare
from gpt1_jax.errors import StorageError
if __name__ == "__main__":
    name, size, yaml = sys.argv[1:]
    stage = getattr(prepare, name)
    def limited(*args, **kwargs):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        return stage(*args, **kwargs)
    setattr(prepare, name, limited)
    try:
        prepare.prepare(parse_config(yaml, "test"))
    except StorageError as error:
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("stage", "size"), [("_collect", 9000), ("write_documents", 9000), ("_encode", 900)])
def test_every_stage_reports_a_file_that_cannot_grow(corpus, texts, tmp_path, stage, size):
    settings = config(texts, tmp_path)
    command = [sys.executable, "-c", FULL, stage, str(size), settings.to_yaml()]
    assert subprocess.run(command, check=False).returncode == StorageError.exit_code
    assert contents(prepare(settings)) == contents(corpus)


def square(number: int) -> int:
    if number == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == -2:
        raise UserError("minus two")
    return number * number


def test_map_keeps_order_and_is_lazy():
    with Pool(2) as pool:
        assert list(pool.map(square, range(50))) == [n * n for n in range(50)]
        taken = []
        results = pool.map(square, (taken.append(n) or n for n in range(1000)))
        next(results)
        assert len(taken) < 20
        results.close()
        assert list(pool.map(square, [])) == []
        assert list(pool.map(square, range(5))) == [0, 1, 4, 9, 16]


def test_killed_or_failing_worker_is_an_error_and_no_hang():
    with Pool(2) as pool, pytest.raises(GPT1Error, match="worker process was killed"):
        list(pool.map(square, [1, 2, 3, -1, 4, 5]))
    with Pool(2) as pool, pytest.raises(UserError, match="minus two"):
        list(pool.map(square, [1, 2, -2, 4]))


ORPHANS = """
import os, signal, time
from gpt1_jax.pool import Pool
if __name__ == "__main__":
    results = Pool(2).map(os.getpgid, [0] * 100)
    next(results)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "orphans.py"], stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _group_lives(process.pid):
        time.sleep(0.1)
    assert not _group_lives(process.pid)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
