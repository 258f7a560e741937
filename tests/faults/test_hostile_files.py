"""Files that mean harm or are just broken, made from a seed: refused in bounded memory, and nothing in them is run.

Each generator makes the cases of one format. What runs code when it is read leaves the file ``MARK`` behind in the
working folder. Another process reads them all (hostile_reader.py), and a few are given to the commands.
"""

import io
import json
import math
import pickle
import random
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save

from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.text.sentencepiece import train_tokenizer
from tests.faults.conftest import Row

MARK = "code_has_run"
READER = Path(__file__).with_name("hostile_reader.py")
DEEP = 100_000  # levels of nesting


class Case(NamedTuple):
    """One attempt.

    Attributes:
        name: of the attempt, without spaces.
        files: by name, what the folder holds.
        sound: whether it may be one that the reader takes: damage to bytes that nothing checks.
    """

    name: str
    files: dict[str, bytes]
    sound: bool = False


class _Bomb:
    """Unpickled, it runs code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({MARK!r}, 'w').close()",)


def damaged(seed: random.Random, content: bytes) -> bytes:
    """The content cut off, with flipped bits, a zeroed block, a repeated or a random part."""
    data = bytearray(content)
    at = seed.randrange(len(data))
    match seed.randrange(6):
        case 0:
            del data[at:]
        case 1:
            for _ in range(seed.choice((1, 8, 64))):
                data[seed.randrange(len(data))] ^= 1 << seed.randrange(8)
        case 2:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case 3:
            data[at:at] = data[at : at + seed.randrange(1, 4096)]
        case 4:
            data[at : at + 16] = seed.randbytes(16)
        case 5:
            data[at : at + 8] = b"\xff" * 8
    return bytes(data)


def safetensors(sound: bytes, seed: random.Random) -> Iterator[Case]:
    """``sound`` is a sound file."""

    def file(header: Any, body: bytes = bytes(16), length: int | None = None) -> dict[str, bytes]:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return {"model.safetensors": struct.pack("<Q", len(text) if length is None else length) + text + body}

    def tensor(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    for length in (0, 1, 7, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1):
        yield Case(f"header-length-{length}", file({"a": tensor()}, length=length))
    bad = {
        "overlap": {"a": tensor(), "b": tensor()},
        "hole": {"a": tensor(0, 4, (1,)), "b": tensor(12, 16, (1,))},
        "beyond": {"a": tensor(0, 2**40, (2**38,))},
        "negative": {"a": tensor(-16, 0)},
        "reversed": {"a": tensor(16, 0)},
        "dtype": {"a": tensor(dtype="OBJECT")},
        "no-dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}},
        "shape-of-others": {"a": tensor(shape=(5,))},
        "shape-overflows": {"a": tensor(shape=(2**33, 2**33))},
        "shape-wraps-to-zero": {"a": tensor(0, 0, (2**32, 2**32, 2**32))},
        "shape-of-words": {"a": tensor(shape=("4",))},
        "shape-negative": {"a": tensor(shape=(-4,))},
        "list": [1, 2],
        "null": None,
        "metadata-of-lists": {"__metadata__": {"a": []}, "a": tensor()},
        "trailing": {"a": tensor(0, 4, (1,))},
    }
    for name, header in bad.items():
        yield Case(name, file(header))
    yield Case("deep", file(b'{"a":' + b"[" * DEEP))
    yield Case("not-utf8", file(b'{"\xff\xfe": 1}'))
    yield Case("twice", file(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2)), sound=True)
    yield Case("empty", {"model.safetensors": b""})
    yield Case("many", file({f"{n}": tensor(0, 0, (0,)) for n in range(20_000)}, b""), sound=True)
    yield Case("index-leaves", {"model.safetensors.index.json": b'{"weight_map": {"a": "../model.safetensors"}}'})
    yield Case("index-parent", {"model.safetensors.index.json": b'{"weight_map": {"a": ".."}}'})
    yield Case("index-absolute", {"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/passwd"}}'})
    yield Case("index-empty-name", {"model.safetensors.index.json": b'{"weight_map": {"a": ""}}'})
    yield Case("index-nul", {"model.safetensors.index.json": b'{"weight_map": {"a": "a\\u0000b"}}'})
    yield Case("index-deep", {"model.safetensors.index.json": b'{"weight_map":' + b"[" * DEEP})
    yield Case("index-words", {"model.safetensors.index.json": b'{"weight_map": {"a": 7}}'})
    for number in range(25):
        yield Case(f"damaged-{number}", {"model.safetensors": damaged(seed, sound)}, sound=True)


def pickles() -> Iterator[Case]:
    """Pickles in the place of weights, of a tokenizer, of numbers, and under names that invite to unpickle them."""
    names = ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json")
    for protocol in range(6):
        bomb = pickle.dumps(_Bomb(), protocol)
        for name in names:
            yield Case(f"{name}-{protocol}", {name: bomb})


def yamls(seed: random.Random) -> Iterator[Case]:
    """Configurations."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    texts = {
        "object": f"seed: !!python/object/apply:builtins.exec [\"open('{MARK}', 'w')\"]",
        "name": "seed: !!python/name:os.system",
        "module": "seed: !!python/module:os",
        "new": f"seed: !!python/object/new:os.system [touch {MARK}]",
        "laughs": laughs,
        "laughs-in-a-key": laughs + "? *a39\n: 1\n",
        "scalars": "a: &a " + "x" * 100_000 + "\ndata: {sources: [" + "*a, " * 20_000 + "]}",
        "itself": "a: &a [*a]",
        "itself-in-a-key": "? &a [*a]\n: 1",
        "merged": "a: &a {x: 1}\nb: {<<: *a}",
        "deep-lists": "a: " + "[" * DEEP,
        "deep-maps": "a: " + "{a: " * DEEP,
        "deep-blocks": "\n".join(" " * n + "a:" for n in range(2000)),
        "deep-keys": "? " * DEEP,
        "number": "seed: " + "9" * 100_000,
        "float": "train: {steps: 1e999999}",
        "infinity": "train: {steps: .inf}",
        "binary": "seed: !!binary /w==",
        "set": "seed: !!set {a}",
        "nul": "seed: \0",
        "surrogate": 'name: "\\ud800"',
        "huge": "name: " + "x" * 2_000_000,
        "many": "".join(f"k{n}: 1\n" for n in range(3000)),
        "duplicate": "seed: 1\nseed: 2",
        "two": "seed: 1\n---\nseed: 2",
        "directive": "%YAML 9.9\n---\nseed: 1",
        "anchors": "seed: " + "&a " * 10_000,
        "folder": "name: ../../etc",
    }
    for name, text in texts.items():
        yield Case(name, {"config.yaml": text.encode()})
    yield Case("not-utf8", {"config.yaml": b"name: \xff\xfe"})
    yield Case("zeros", {"config.yaml": bytes(1000)})
    sound = b"name: run\nmodel: {num_layers: 2, embed_dim: 32}\ntrain: {steps: 3}\n"
    for number in range(10):
        yield Case(f"damaged-{number}", {"config.yaml": damaged(seed, sound)}, sound=True)


def tokenizers(sound: bytes, fast: bytes, seed: random.Random) -> Iterator[Case]:
    """``sound`` is a SentencePiece model, ``fast`` a tokenizer.json."""

    def field(number: int, length: int) -> bytes:
        found = bytes([number << 3 | 2])
        while length > 127:
            found += bytes([length & 127 | 128])
            length >>= 7
        return found + bytes([length])

    contents = {
        "empty": b"",
        "zeros": bytes(1000),
        "newlines": b"\n" * 1000,
        "long": field(1, 2**40) + b"x",
        "longer-than-it-is": field(1, 2**31 - 1) + b"x" * 100,
        "deep": b"".join(field(1, 50_000 - 4 * n) for n in range(10_000)),
        "pickle": pickle.dumps(_Bomb()),
        "json": b"{}",
        "json-deep": b'{"a":' + b"[" * DEEP,
        "json-null": b'{"model": null}',
        "json-number": b'{"a": ' + b"9" * 100_000 + b"}",
        "json-not-utf8": b'{"\xff": 1}',
        "json-huge-id": fast.replace(b'"<|endoftext|>":0', b'"<|endoftext|>":4294967295'),
        "json-bad-pattern": json.dumps(
            json.loads(fast) | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"}}
        ).encode(),
    }
    for name, content in contents.items():
        yield Case(name, {"tokenizer.model": content}, sound=name == "json-huge-id")
    for number in range(30):
        content = damaged(seed, sound if number % 3 else fast)
        yield Case(f"damaged-{number}", {"tokenizer.model": content}, sound=True)


def release() -> dict[str, bytes]:
    """A sound release of the authors', as small as it can be, by file name."""
    width, layer = 4, [[1, 4, 12], [12], [1, 4, 4], [4], [4], [4], [1, 4, 16], [16], [1, 16, 4], [4], [4], [4]]
    shapes = [[5, width], [4, width], *layer]
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(sum(map(math.prod, shapes)), np.float32))
    return {
        "params_shapes.json": json.dumps(shapes).encode(),
        "params_0.npy": buffer.getvalue(),
        "encoder_bpe_40000.json": b'{"<unk>": 0, "a": 1, "b</w>": 2, "ab</w>": 3}',
        "vocab_40000.bpe": b"#version: 0.2\na b</w>\n",
    }


def npys(release: dict[str, bytes], seed: random.Random) -> Iterator[Case]:
    """``release`` is a small release of the authors', by file name."""

    def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> dict[str, bytes]:
        text = header.encode("latin1") + b"\n"
        length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
        return release | {"params_0.npy": b"\x93NUMPY" + version + length + text + body}

    def described(descr: str = "'<f4'", shape: str = "(4,)") -> str:
        return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"

    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb()], object), allow_pickle=True)
    yield Case("pickled", release | {"params_0.npy": buffer.getvalue()})
    yield Case("bare-pickle", release | {"params_0.npy": pickle.dumps(_Bomb())})
    for name, header in {
        "huge": described(shape=f"({2**60},)"),
        "overflow": described(shape=f"({10**40},)"),
        "negative": described(shape="(-4,)"),
        "true": described(shape="(True,)"),
        "nested": described(shape="(" * 5000 + ")" * 5000),
        "call": described(shape=f"open('{MARK}', 'w')"),
        "objects": described("'|O'"),
        "structured": described("[('a', '<f4')]"),
        "recursive": described("[('a', " * 500 + "'<f4'" + ")]" * 500),
        "unfinished": "{'descr': '<f4', ",
        "quoted": "'''",
        "number": "9" * 9000,
        "nul": "\0",
        "null": "None",
        "keys": "{'descr': '<f4'}",
    }.items():
        yield Case(name, npy(header, bytes(16)))
    yield Case("long-header", npy(described() + " " * 10**6, bytes(16), b"\x02\x00"))
    yield Case("version-9", npy(described(), bytes(16), b"\x09\x00"))
    yield Case("empty", release | {"params_0.npy": b""})
    for name, content in {
        "shapes-deep": b"[" * DEEP,
        "shapes-number": b"[[" + b"9" * 100_000 + b"]]",
        "shapes-huge": b"[[2147483647, 2147483647], [2147483647, 2147483647]]",
        "shapes-null": b"null",
    }.items():
        yield Case(name, release | {"params_shapes.json": content})
    for name, content in {"deep": b'{"a":' + b"[" * DEEP, "list": b"[]", "ids": b'{"<unk>": [0]}'}.items():
        yield Case(f"vocabulary-{name}", release | {"encoder_bpe_40000.json": content})
    for number in range(20):
        name = seed.choice(sorted(release))
        yield Case(f"damaged-{number}-{name}", release | {name: damaged(seed, release[name])}, sound=True)


def archives() -> Iterator[Case]:
    """Archives in the place of texts: their members would leave the folder."""

    def tar(name: str, mode: str = "w", link: str | None = None) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            member.size = 0 if link else 4
            archive.addfile(member, io.BytesIO(b"text"))
        return buffer.getvalue()

    for name in ("../outside", "/tmp/outside", "a/../../outside", "inside"):
        for link in (None, "/etc/passwd"):
            label = f"{name.replace('/', '_')}{'-link' if link else ''}"
            yield Case(f"{label}.tar", {"a.tar": tar(name, link=link)})
            yield Case(f"{label}.txt", {"a.txt": tar(name, link=link)})
            yield Case(f"{label}.jsonl.gz", {"a.jsonl.gz": tar(name, "w:gz", link)})
            yield Case(f"{label}.parquet", {"a.parquet": tar(name, link=link)})


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Case]]:
    """All of them, by format."""
    seed = random.Random(0)
    sound = save({"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.zeros(5, np.float16)})
    tokenizer = train_tokenizer(["The quick brown fox jumps over the lazy dog.\n" * 40], 300)
    return {
        "safetensors": list(safetensors(sound, seed)),
        "pickle": list(pickles()),
        "yaml": list(yamls(seed)),
        "model": list(tokenizers(tokenizer.to_bytes(), fast_tokenizer_json(tokenizer), seed)),
        "npy": list(npys(release(), seed)),
        "tar": list(archives()),
    }


def write(folder: Path, case: Case) -> Path:
    """Writes the files of a case into a folder of its own."""
    path = folder / case.name
    path.mkdir(parents=True)
    for name, content in case.files.items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.fault("hostile files")
def test_nothing_hostile_is_run_or_taken(cases, tmp_path, row: Row):
    written = {(kind, case.name): case for kind, found in cases.items() for case in found}
    for (kind, _), case in written.items():
        write(tmp_path / kind, case)
    before = sorted(tmp_path.rglob("*"))
    read = subprocess.run([sys.executable, READER, *cases], cwd=tmp_path, capture_output=True, text=True)
    assert read.returncode == 0, f"it died of what comes last: {read.stderr[-1000:]}"
    found = [json.loads(line) for line in read.stdout.splitlines()]
    assert len(found) == len(written) >= 200
    wrong = [
        one
        for one in found
        if one["outcome"] not in (2, 3) and not (one["outcome"] == 0 and written[one["kind"], one["case"]].sound)
    ]
    assert not wrong
    assert sorted(tmp_path.rglob("*")) == before  # no code has run, nothing has been unpacked
    row.tried(len(found))


def case_of(cases: dict[str, list[Case]], kind: str, name: str) -> Case:
    return next(case for case in cases[kind] if case.name == name)


@pytest.mark.fault("hostile files")
@pytest.mark.parametrize(
    ("kind", "name", "code"),
    [
        ("pickle", "pytorch_model.bin-2", 2),
        ("pickle", "model.safetensors-2", 3),
        ("safetensors", "overlap", 3),
        ("safetensors", "index-leaves", 3),
        ("npy", "pickled", 3),
    ],
)
def test_import_ends_with_a_message(cases, tmp_path, gpt1, row: Row, kind, name, code):
    folder = write(tmp_path, case_of(cases, kind, name))
    if kind != "npy":
        (folder / "config.json").write_text('{"model_type": "openai-gpt"}')
    ended = gpt1("import", folder, tmp_path / "run")
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("gpt1: ") and str(folder) in ended.err
    assert not (tmp_path / "run").exists()
    row.tried()


@pytest.mark.fault("hostile files")
@pytest.mark.parametrize("name", ["object", "laughs", "deep-lists", "number"])
def test_train_ends_with_a_message(cases, tmp_path, gpt1, row: Row, name):
    config = write(tmp_path, case_of(cases, "yaml", name)) / "config.yaml"
    ended = gpt1("train", config)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"gpt1: {config}:")
    row.tried()


@pytest.mark.fault("hostile files")
def test_prepare_ends_with_a_message(cases, tmp_path, gpt1, row: Row):
    folder = write(tmp_path, case_of(cases, "tar", ".._outside.jsonl.gz"))
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{root: {tmp_path}/p, workers: 1, sources: [{{kind: files, paths: ['{folder}/*']}}]}}")
    ended = gpt1("prepare", config)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "outside").exists()
    row.tried()
