"""Corpora and runs in buckets, by path alone, against emulators: moto for s3://, gcp-storage-emulator for gs://."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from gpt1_jax.config import CheckpointConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.data import storage
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.integrity import Problem, verify_corpus
from gpt1_jax.errors import DamagedError, StorageError, UserError
from gpt1_jax.training import lock
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.checkpoint_folder import CheckpointFolder
from gpt1_jax.training.metrics import METRICS
from gpt1_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("compile_once")
OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")


def download(request, response, files, *rest, _download=objects.download):
    """As the emulator, with the object's generation, without which TensorStore cannot write the object again."""
    with contextlib.suppress(NotFound):
        found = files.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["X-Goog-Generation"] = found["generation"]
    _download(request, response, files, *rest)


@pytest.fixture(scope="module")
def servers() -> Iterator[None]:
    """Both emulators, and an environment in which s3fs, gcsfs and TensorStore find them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"),  # else it asks Google what kind of bucket it is
            ("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test"),
        ):
            patch.setenv(name, value)
        s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        s3.start()
        patch.setattr(objects, "download", download)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        gs = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        gs.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*s3.get_host_and_port()))
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        storage.file_system("s3://bucket")[0].mkdir("bucket")
        yield
        gs.stop()
        s3.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request, servers) -> epath.Path:
    """An empty folder of a bucket."""
    return epath.Path(f"{request.param}://bucket/{uuid.uuid4().hex}")


def upload(folder: epath.Path, remote: epath.Path) -> epath.Path:
    """Copies a corpus into a bucket."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            storage.write_atomically(remote / path.relative_to(folder), path.read_bytes())
    return remote


def test_a_file_is_put_found_copied_and_replaced(bucket, tmp_path):
    path = bucket / "a" / "file.txt"
    assert storage.is_remote(path) and not storage.is_remote(tmp_path)
    storage.make_folder(path.parent)
    assert not path.exists() and not path.parent.exists()
    storage.write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    assert storage.names_in(path.parent) == {"file.txt"}
    copy = storage.local_copy(path)
    assert (copy.name, copy.read_bytes()) == ("file.txt", b"one")
    assert storage.local_copy(path) == copy
    local = tmp_path / "made"
    local.write_bytes(b"second")
    storage.put_file(local, path)
    assert not local.exists()
    assert storage.local_copy(path).read_bytes() == b"second"
    with storage.locked(path, lambda: pytest.fail("there is no lock to wait for")):
        assert storage.names_in(path.parent) == {"file.txt"}
    with pytest.raises(FileNotFoundError):
        storage.local_copy(bucket / "none")
    assert storage.create_file(bucket / "new", b"first") and not storage.create_file(bucket / "new", b"second")
    assert (bucket / "new").read_bytes() == b"first"


def test_a_run_has_one_writer(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 3.0)
    first, lines = lock.Lock(bucket, print), []
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    second = lock.Lock(bucket, lines.append)
    first.take()
    with pytest.raises(UserError, match=f"being written by process {os.getpid()} on"):
        second.take()
    first.release()
    assert storage.names_in(bucket) == set()
    storage.write_atomically(bucket / lock.LOCK, first._me.model_dump_json().encode())  # left behind
    second.take()
    assert lines[-1].endswith("which has not renewed lock.json for 3 seconds")
    second.release()
    assert storage.names_in(bucket) == set()


def test_a_folder_is_renamed_on_s3(servers):
    folder = epath.Path(f"s3://bucket/{uuid.uuid4().hex}")
    assert storage.names_in(folder) == set()
    for name in ("old/a", "old/b/c"):
        storage.write_atomically(folder / name, name.encode())
    (folder / "old").rename(folder / "new")
    assert storage.names_in(folder) == {"new"}
    assert storage.names_in(folder / "new") == {"a", "b"}
    assert (folder / "new" / "b" / "c").read_bytes() == b"old/b/c"


def test_a_missing_bucket_is_named_and_not_made(bucket):
    path = str(bucket).replace("bucket", "nowhere", 1)
    with pytest.raises(StorageError, match=rf"{path}/x: there is no such bucket"):
        storage.write_atomically(f"{path}/x", b"x")
    assert not epath.Path(path).exists()


def test_training_into_a_missing_bucket_ends_before_the_first_step(bucket, corpus, config_file, gpt1):
    path = str(bucket).replace("bucket", "nowhere", 1)
    trained = gpt1("train", config_file, f"runs_dir={path}")
    assert (trained.code, trained.out) == (StorageError.exit_code, "")
    assert trained.err.endswith(f"gpt1: {path}/run/lock.json: there is no such bucket; make it, or write elsewhere\n")


def test_a_corpus_is_read_where_it_lies(bucket, corpus):
    upload(corpus.folder, bucket / "corpus")
    for readers in (0, 4):
        there = Corpus(bucket / "corpus", readers=readers)
        assert verify_corpus(there) == []
        here = corpus.tokens("train")
        stream = there.tokens("train")
        starts = np.random.default_rng(0).integers(0, len(here) - 33, 20)
        assert np.array_equal(stream.gather(starts, 33), here.gather(starts, 33))
        assert np.array_equal(stream.read(0, len(here)), here.read(0, len(here)))
    shard = corpus.manifest.shards[0]
    assert np.array_equal(there.offsets(shard), corpus.offsets(shard))


def test_a_damaged_corpus_is_found_where_it_lies(bucket, corpus):
    folder = upload(corpus.folder, bucket / "corpus")
    file = corpus.manifest.shards_of("train")[0].file
    content = (corpus.folder / file).read_bytes()
    storage.write_atomically(folder / file, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedError, match=rf"{folder}/{file}: .*has SHA-256 .*, its manifest says"):
        Corpus(folder).tokens("train").read(0, 1)
    trusted = Corpus(folder, verify=False).tokens("train")
    assert trusted.read(0, 2).tolist() != corpus.tokens("train").read(0, 2).tolist()
    storage.write_atomically(folder / file, content[:-2])
    sizes = f"has {len(content) - 2} bytes, its manifest says {len(content)}"
    assert verify_corpus(Corpus(folder)) == [Problem(file, sizes)]
    with pytest.raises(DamagedError, match=sizes):
        Corpus(folder).tokens("train")
    (folder / file).unlink()
    with pytest.raises(DamagedError, match="is missing"):
        Corpus(folder).tokens("train")
    with pytest.raises(DamagedError, match="is missing"):
        trusted.read(0, 2)


def test_checkpoints_are_whole_and_the_newest_ones_kept(bucket):
    state = TrainState(
        step=jnp.int32(1), params={"w": jnp.arange(6.0).reshape(2, 3)}, opt_state={"m": jnp.ones(3)}, key=jnp.arange(2)
    )
    files = RunFiles(config="a: 1\n", tokenizer=b"\0model", examples=8, data="f" * 16, corpus="f" * 16)
    keep = CheckpointConfig(keep=2, keep_every=3)
    with Checkpoints(bucket, keep) as checkpoints:
        assert checkpoints.latest() is None
        for step in range(1, 6):
            checkpoints.save(step, state, files)
        checkpoints.wait()
        assert checkpoints.latest() == 5
    assert storage.names_in(bucket / "checkpoints") == {"3", "4", "5"}
    for path in ("9/params/_METADATA", "9/run/config.yaml"):  # what a process that was killed while it saved leaves
        storage.write_atomically(bucket / "checkpoints" / path, b"x")
    with Checkpoints(bucket) as reader:
        assert reader.latest() == 5
        assert reader.read_files(5) == files
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = reader.restore_state(5, abstract)
        assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))
    with Checkpoints(bucket, keep) as checkpoints:
        checkpoints.save(7, state, files)
        checkpoints.wait()
    assert storage.names_in(bucket / "checkpoints") == {"3", "5", "7"}
    (bucket / "checkpoints/7/params/manifest.ocdbt").unlink()
    with (
        Checkpoints(bucket) as reader,
        pytest.raises(DamagedError, match=r"7: .*damaged:\n  params/manifest.ocdbt is m"),
    ):
        reader.restore_params(7, abstract.params)
    for config in (None, keep):
        with Checkpoints(bucket, config) as checkpoints:
            assert checkpoints.newest_sound() == 5
    assert storage.names_in(bucket / "checkpoints") == {"3", "5", "damaged-7"}
    assert storage.names_in(bucket / "checkpoints/damaged-7/run") == storage.names_in(bucket / "checkpoints/5/run")
    states = [(each.name, each.state) for each in CheckpointFolder(bucket).listed()]
    assert states == [("3", "complete"), ("5", "complete"), ("damaged-7", "damaged")]


@pytest.fixture(scope="session")
def run_yaml(run_yaml) -> str:
    """Of a model that can be exported, too."""
    return run_yaml.replace("mlp_dim: 64", "mlp_dim: 128")


def losses(run: epath.Path | Path) -> list[dict]:
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in OF_THE_CLOCK} for record in records]


@pytest.fixture(scope="module")
def local_run(tmp_path_factory, corpus, run_yaml) -> Path:
    """The run that those in buckets must equal, uninterrupted."""
    from gpt1_jax.finish import finish, validation_figures
    from gpt1_jax.text.tokenizer import read_tokenizer
    from gpt1_jax.training.choices import resolve
    from gpt1_jax.training.loop import train
    from gpt1_jax.training.mesh import make_mesh

    folder = tmp_path_factory.mktemp("runs")
    config, _ = resolve(parse_config(f"name: run\nruns_dir: {folder}\n{run_yaml}", "test"))
    mesh = make_mesh(config.mesh)
    figures = validation_figures(config, corpus, mesh)
    train(config, corpus, read_tokenizer(corpus.tokenizer_file), mesh, figures)
    finish(config.run_dir, corpus, mesh)
    return folder / "run"


@pytest.fixture
def config_there(bucket, config_file) -> Path:
    """A configuration whose corpora and runs are in the bucket."""
    content = re.sub(r"(root|runs_dir): .*", rf"\1: {bucket}/\1", config_file.read_text())
    config_file.write_text(content.replace("tensorboard: false", "tensorboard: true"))
    return config_file


@pytest.mark.slow  # on gs:// alone: the emulator does not know the request that moves an object, which is tried again
def test_a_corpus_is_prepared_in_a_bucket_with_the_same_bytes(bucket, config_there, corpus, gpt1):
    prepared = gpt1("prepare", config_there, "--json")
    assert prepared.code == 0, prepared.err
    folder = epath.Path(json.loads(prepared.out)["path"])
    assert folder == bucket / "root" / corpus.folder.name
    assert Corpus(folder).manifest == corpus.manifest
    assert verify_corpus(Corpus(folder)) == []
    shards = corpus.manifest.shards
    storage.write_atomically(folder / shards[0].file, b"damaged")
    (folder / shards[-1].offsets_file).unlink()
    assert gpt1("prepare", config_there).code == 0
    assert verify_corpus(Corpus(folder)) == []


@pytest.mark.filterwarnings("default")  # of Beam's own packages
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_beam_prepares_in_a_bucket_too(bucket, config_there, corpus, gpt1):
    prepared = gpt1("prepare", config_there, "data.engine=beam", "--json")
    assert prepared.code == 0, prepared.err
    assert Corpus(json.loads(prepared.out)["path"]).manifest == corpus.manifest


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_a_local_one(bucket, local_run, corpus, config_there, gpt1, tmp_path, monkeypatch):
    """Trained, killed, trained on, evaluated, sampled, reported, exported and imported by path alone."""
    run, config_file = bucket / "runs_dir" / "run", config_there
    storage.local_copy(upload(corpus.folder, bucket / "root" / corpus.folder.name) / "manifest.json")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    killed = kill_at_step(9, config_file, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Checkpoints(run) as checkpoints:
        begin = checkpoints.latest()
    assert begin in (4, 8)
    assert begin <= losses(run)[-1]["step"] <= 8

    trained = gpt1("train", config_file, "--json")
    assert trained.code == 0, trained.err
    assert losses(run) == losses(local_run)
    for name in ("samples.jsonl", "evaluation.json"):
        assert (run / name).read_bytes() == (local_run / name).read_bytes()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.latest() == 12
    assert storage.names_in(run / "checkpoints") == {"4", "8", "12"}
    events = [storage.local_copy(path) for path in (run / "tensorboard").iterdir()]
    assert len(events) == 2 and all(path.stat().st_size > 100 for path in events)
    assert b"<html" in (run / "report.html").read_bytes()
    assert (run / "report" / "loss_by_step.png").read_bytes().startswith(b"\x89PNG")

    evaluated = gpt1("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.err
    final = json.loads((local_run / "evaluation.json").read_bytes())
    assert json.loads(evaluated.out) == {key: value for key, value in final.items() if key != "step"}
    generated = [gpt1("generate", path, "The cat", "--tokens", 5, "--json") for path in (run, local_run)]
    completions = [json.loads(each.out)["completion"] for each in generated]
    assert completions[0] == completions[1]
    reported = gpt1("report", run, local_run, "--out", bucket / "both.html")
    assert (reported.code, reported.out) == (0, f"{bucket}/both.html\n"), reported.err
    exported = gpt1("export", run, tmp_path / "exported")
    assert exported.code == 0, exported.err
    imported = gpt1("import", tmp_path / "exported", bucket / "runs_dir" / "imported")
    assert imported.code == 0, imported.err
    again = gpt1("generate", bucket / "runs_dir" / "imported", "The cat", "--tokens", 5, "--json")
    assert json.loads(again.out)["completion"] == completions[0]
    refused = gpt1("export", run, bucket / "exported")
    assert refused.code == 2 and "a run is exported to this machine" in refused.err
    assert not list(scratch.iterdir())  # nothing that passed through this machine is left on it


def kill_at_step(step: int, config_file: Path, scratch: Path) -> subprocess.CompletedProcess:
    """Trains in another process, which gets SIGKILL when it would write the record of a step."""
    code = f"""
import os, signal, sys
from gpt1_jax import cli
from gpt1_jax.training.metrics import MetricsLog
write = MetricsLog.write
def write_or_die(self, record):
    if record["step"] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, record)
MetricsLog.write = write_or_die
sys.argv = ["gpt1", "train", {str(config_file)!r}]
cli.main()
"""
    environment = os.environ | {"TMPDIR": str(scratch)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)


def test_a_run_that_is_not_there_is_the_users_mistake(bucket, gpt1):
    for command in (("evaluate",), ("generate", "The"), ("report",)):
        found = gpt1(command[0], bucket / "none", *command[1:])
        assert found.code == 2
        assert f"{bucket}/none: no run here" in found.err


@pytest.mark.parametrize(
    "error",
    [
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
        ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403']"),
        PermissionError(13, "Forbidden"),
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
    ],
)
def test_faults_of_storage_have_their_own_exit_code(gpt1, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("gpt1_jax.reporting.report.write_report", fail)
    found = gpt1("report", "s3://bucket/run")
    assert found.code == StorageError.exit_code
    assert f"gpt1: {error}; make room, get access" in found.err
    with pytest.raises(StorageError, match="s3://bucket/run: "), storage.storage_errors("s3://bucket/run"):
        raise error


def test_other_errors_are_not_the_storages():
    for error in (
        ValueError("x"),
        ValueError("[os_error_code='2']"),
        FileNotFoundError(2, "none"),
        ImportError("x"),
        UserError("UNAVAILABLE: x"),
    ):
        assert storage.storage_fault(error) is None
        with pytest.raises(type(error)), storage.storage_errors("s3://bucket/run"):
            raise error


@pytest.mark.parametrize("package, path", [("s3fs", "s3://bucket/run"), ("gcsfs", "gs://bucket/run")])
def test_a_package_that_is_not_installed_is_named(package, path):
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['gpt1', 'report', {path!r}]; "
    code += "from gpt1_jax import cli; cli.main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == UserError.exit_code, found.stderr
    assert package in found.stderr and "pip install 'gpt1-jax[cloud]'" in found.stderr
