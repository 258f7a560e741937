"""The recipes in data/: each is read, says what it is, and its command works."""

import re
import shlex
from pathlib import Path

import pytest

from gpt1_jax.config import HuggingFace
from gpt1_jax.config_file import load_config, parse_config

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
