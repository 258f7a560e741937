"""The recipes in data/: each is read, says what it is, and its command works."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import load_config, parse_config
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.manifest import read_manifest
from gpt1_jax.data.prepare import prepare
from gpt1_jax.data.statistics import origin_of
from gpt1_jax.source_config import HuggingFace

RECIPES = sorted(Path("data").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_and_its_command_reads_it(path: Path):
    header = "".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert re.findall(r"^ (\w+)  ", header, re.MULTILINE) == ["Source", "Licence", "Size", "Needs", "Command"]
    command, config, *overrides = shlex.split(header.partition(" Command ")[2].replace("\\\n", " "))[1:]
    assert command == "prepare"
    read = load_config(config, overrides)
    assert str(path) in " ".join(overrides)
    assert read.data.sources == parse_config(path.read_text(encoding="utf-8"), str(path)).data.sources
    needed = header.partition(" Needs ")[2].partition(" Command ")[0]
    assert ("huggingface" in needed) == any(isinstance(source, HuggingFace) for source in read.data.sources)
    assert ("quality" in needed) == any(source.quality.languages for source in read.data.sources)


def test_the_readme_names_every_recipe():
    named = re.findall(r"^\| `(\w+\.yaml)` \|", Path("data/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == [path.name for path in RECIPES]


PROSE = Path("docs/architecture.md").read_text(encoding="utf-8").partition("## Decisions")[2]
WORDS = re.findall(r"[a-z]{2,}", PROSE)  # real English


def article(number: int) -> str:
    return f"Article {number}: " + " ".join(WORDS[20 * number : 20 * number + 80]) + "."


def prepared(recipe: str, tmp_path: Path, **changes: object) -> list[tuple[str, str]]:
    """Identity and text of what a recipe makes of a local dataset, put in the place of its own."""
    config = load_config(f"data/{recipe}.yaml", [f"data.root={tmp_path / 'prepared'}", "data.validation_fraction=0.2"])
    (source,) = config.data.sources
    sources = [source.model_copy(update=changes).model_dump(mode="json")]
    yaml = config.to_yaml()
    local: Config = parse_config(yaml, "c", [f"data.sources={json.dumps(sources)}", "model.vocab_size=400"])
    corpus = prepare(local)
    return [(name, text) for split in ("train", "validation") for text, name in read_documents(corpus, split)]


def test_wikipedia_reads_files_of_its_form(tmp_path):
    for file in range(2):
        numbers = range(20 * file, 20 * file + 20)
        columns = {
            "id": [str(n) for n in numbers],
            "url": [f"https://en.wikipedia.org/wiki/{n}" for n in numbers],
            "title": [f"Title {n}" for n in numbers],
            "text": [article(n) for n in numbers],
        }
        pq.write_table(pa.table(columns), tmp_path / f"train-{file}.parquet")
    found = prepared("wikipedia", tmp_path, dataset="parquet", subset=None, files=(f"{tmp_path}/*.parquet",))
    assert dict(found) == {f"https://en.wikipedia.org/wiki/{n}": article(n) for n in range(40)}
    assert {origin_of(name) for name, _ in found} == {"en.wikipedia.org"}


def test_webtext_reads_files_of_its_form(tmp_path):
    rows = [{"text": article(n), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://a{n}.org/"} for n in range(40)]
    rows.append({"text": "Der Schnee lag auf den Bergen und auf dem Dach der Hütte. " * 9, "url": "https://b.de/"})
    rows.append({"text": "Buy the cheap shoes now and be happy to have them. " * 40, "url": "https://c.com/"})
    with gzip.open(tmp_path / "c4-train.00000-of-00001.json.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = prepared("webtext", tmp_path, dataset="json", subset=None, files=(f"{tmp_path}/*.json.gz",))
    assert dict(found) == {row["url"]: row["text"] for row in rows[:40]}


def test_pg19_and_books_read_files_of_their_form(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(article(number))
    paths = (f"{tmp_path}/*.txt",)
    assert dict(prepared("pg19", tmp_path, paths=paths)) == {f"{tmp_path}/{n}.txt": article(n) for n in range(40)}
    marks = "*** START OF THE PROJECT GUTENBERG EBOOK {} ***", "*** END OF THE PROJECT GUTENBERG EBOOK {} ***"
    for number in range(40):
        begin, end = (mark.format(number) for mark in marks)
        (tmp_path / f"{number}.txt").write_text(f"Licence.\n{begin}\n\n{article(number)}\n\n{end}\nLicence.\n")
    assert {text.strip() for _, text in prepared("books", tmp_path, paths=paths)} == set(map(article, range(40)))
    manifests = [read_manifest(path.parent) for path in (tmp_path / "prepared").glob("*/manifest.json")]
    cut = [source.cut for manifest in manifests for source in manifest.sources]
    assert sorted(cut, key=len) == [{}, {"gutenberg": 40}]


def test_what_needs_the_network_says_so_before_anything_is_read(tmp_path, monkeypatch):
    import fsspec

    files = fsspec.filesystem("memory")
    for number in range(20):
        files.pipe(f"/bucket/{number}.txt", article(number).encode())
    config = load_config(
        "data/pg19.yaml",
        [
            f"data.root={tmp_path}",
            'data.sources=[{kind: files, paths: ["memory://bucket/*.txt"]}]',
            "model.vocab_size=400",
            "data.validation_fraction=0.2",
        ],
    )
    stages: list[str] = []
    prepare(config, lambda stage, *_: stages.append(stage))
    assert stages[0].startswith("files:memory://bucket/*.txt needs the network: 20 files, the first of them memory://")
