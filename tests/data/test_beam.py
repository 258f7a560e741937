import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.manifest import read_manifest
from gpt1_jax.data.prepare import corpus_dir, prepare
from gpt1_jax.errors import GPT1Error, UserError
from gpt1_jax.text.document import DUPLICATE, NEAR_DUPLICATE

WORDS = [f"word{n}" for n in range(300)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Six files with copies, near-copies, and lines that are no documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        lines = []
        for row in range(40):
            draw = random.Random(40 * number + row)
            words = draw.choices(WORDS, k=draw.randint(40, 200))
            lines.append(json.dumps({"text": " ".join(words)}))
            if row % 8 == 0:  # the same again, here and in the last file
                lines.append(lines[-1])
            if row % 8 == 1:
                lines.append(json.dumps({"text": " ".join(["another", *words[1:]])}))
        lines.append("{broken")
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def config(texts: Path, root: Path, *overrides: str) -> Config:
    sources = [{"kind": "files", "paths": [f"{texts}/*.jsonl"]}, {"kind": "stories", "documents": 60}]
    yaml = "model: {vocab_size: 700}\ndata: {workers: 1, validation_fraction: 0.1, shard_tokens: 20000}"
    common = [f"data.root={root}", f"data.sources={json.dumps(sources)}", "data.cleaning.near_duplicates={}"]
    return parse_config(yaml, "test", [*common, *overrides])


def beam(*options: str) -> list[str]:
    return ["data.engine=beam", f"data.beam_options={json.dumps(options)}"]


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def local(texts, tmp_path_factory):
    """What the local engine makes of it."""
    return prepare(config(texts, tmp_path_factory.mktemp("local")))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts, chunks and ranges."""
    monkeypatch.setattr("gpt1_jax.text.files._GROUP_FILES", 2)
    monkeypatch.setattr("gpt1_jax.data.collect._CHUNK_BYTES", 20_000)
    monkeypatch.setattr("gpt1_jax.data.encode._RANGE_BYTES", 30_000)


def test_local_engine_drops_copies(local):
    files, stories = read_manifest(local).sources
    assert files.dropped == {DUPLICATE: 30, "invalid_json": 6, NEAR_DUPLICATE: 30}
    assert (files.read, files.kept, stories.kept) == (306, 240, 60)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_threading"],
        pytest.param(
            ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["default", "threads", "processes"],
)
def test_beam_writes_the_same_bytes(texts, local, tmp_path, options):
    found = prepare(config(texts, tmp_path, *beam(*options)))
    assert found.name == local.name
    assert contents(found) == contents(local)


@pytest.fixture
def job_service():
    """Beam's own job service, in a process beside this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if not probe.connect_ex(("localhost", port)):
                    break
            time.sleep(0.2)
        yield f"localhost:{port}"
        process.kill()


@pytest.mark.filterwarnings("default")
def test_portable_runner_writes_the_same_bytes(texts, local, tmp_path, job_service):
    options = ["--runner=PortableRunner", f"--job_endpoint={job_service}", "--environment_type=LOOPBACK"]
    assert contents(prepare(config(texts, tmp_path, *beam(*options)))) == contents(local)


@pytest.mark.filterwarnings("default")
def test_an_engine_goes_on_where_the_other_was_stopped(texts, local, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("gpt1_jax.data.prepare.plan_shards", stop)
        with pytest.raises(Stopped):
            prepare(config(texts, tmp_path, *beam()))
    assert contents(prepare(config(texts, tmp_path))) == contents(local)


@pytest.mark.filterwarnings("default")
def test_the_users_mistake_comes_back_from_the_workers_as_it_is(texts, tmp_path):
    settings = config(texts, tmp_path, *beam(), "data.cleaning.on_invalid=error")
    with pytest.raises(UserError, match=r"\d\.jsonl:51: it is not valid JSON.*on_invalid=skip"):
        prepare(settings)
    assert not corpus_dir(settings).exists()


@pytest.mark.filterwarnings("default")
def test_another_failure_says_that_the_pipeline_failed(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt1_jax.data.beam.collect_parts", lambda *args: 1 / 0)
    with pytest.raises(GPT1Error, match="the Beam pipeline failed: ZeroDivisionError"):
        prepare(config(texts, tmp_path, *beam()))


def test_mistakes_in_the_options(texts, tmp_path):
    with pytest.raises(UserError, match=r"data\.beam_options: --runner=NoRunner"):
        prepare(config(texts, tmp_path, *beam("--runner=NoRunner")))
    with pytest.raises(UserError, match=r"data\.beam_options=.* does nothing with data\.engine=local"):
        config(texts, tmp_path, 'data.beam_options=["--runner=FlinkRunner"]')


def test_beam_is_an_extra(texts, tmp_path):
    code = (
        "import sys; sys.modules['apache_beam'] = None\n"
        "from gpt1_jax.config_file import parse_config\nfrom gpt1_jax.data.prepare import prepare\n"
        "prepare(parse_config(sys.stdin.read(), 'test'))"
    )
    yaml = config(texts, tmp_path, *beam()).to_yaml()
    run = subprocess.run([sys.executable, "-c", code], input=yaml, text=True, capture_output=True, check=False)
    assert run.returncode == 1
    assert "data.engine=beam needs Apache Beam" in run.stderr
    assert "pip install 'gpt1-jax[beam]'" in run.stderr
