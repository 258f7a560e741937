"""What the documentation says, held against the code: keys and defaults, commands, modules, figures, exit codes."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import typer.main

from gpt1_jax import errors
from gpt1_jax.cli import app
from gpt1_jax.config import (
    Config,
    Decontamination,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    NearDuplicates,
    OptimizerConfig,
    SpikeConfig,
)
from gpt1_jax.config_file import load, load_config, parse, parse_config
from gpt1_jax.evaluation.figures import Figures
from gpt1_jax.model.transformer import num_parameters
from gpt1_jax.planning.plan import Plan
from gpt1_jax.source_config import Quality, Source
from gpt1_jax.task_config import AnyTask, Table

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def tables(page: Path) -> list[tuple[list[str], list[list[str]]]]:
    """The tables of a page: the cells of the head, and of each row."""
    found: list[tuple[list[str], list[list[str]]]] = []
    previous = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ---"):
            found.append(([cell.strip() for cell in previous.strip("| ").split("|")], []))
        elif line.startswith("|") and previous.startswith("|"):
            found[-1][1].append(cells)
        previous = line
    return found


def rows(*head: str) -> list[list[str]]:
    """The rows of every table with that head, on any page."""
    return [row for page in PAGES for found, body in tables(page) if found == list(head) for row in body]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def keys_of(section: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            found += keys_of(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


KEYS = rows("key", "default", "meaning")


def test_every_key_is_documented_once():
    assert sorted(key for key, _, _ in KEYS) == sorted(f"`{key}`" for key in keys_of(Config))


@pytest.mark.parametrize(("key", "default"), [(words(key)[0], words(default)[0]) for key, default, _ in KEYS])
def test_every_documented_default_is_the_default(key: str, default: str):
    assert parse_config("", "docs", [f"{key}={default}"]) == Config()
    section: Any = Config()
    for part in key.split("."):
        section = getattr(section, part)
    assert (default == "null") == (section is None)


def test_every_kind_of_source_is_documented_with_its_keys():
    documented = {words(kind)[0]: set(words(keys)) for kind, keys, _ in rows("kind", "keys", "reads")}
    models = get_args(get_args(Source)[0])
    kinds = {get_args(model.model_fields["kind"].annotation)[0]: set(model.model_fields) for model in models}
    of_every_kind = {"kind", "weight", "quality"}
    assert documented == {kind: keys - of_every_kind for kind, keys in kinds.items()}


FINETUNE_KEYS = rows("key of fine-tuning", "default", "meaning")
TOY = "task: {form: chat, validation: {kind: toy_dialogue, split: validation}}"


def test_every_key_of_fine_tuning_is_documented_once():
    elsewhere = ("task", "mesh.", "logging.", "distributed.", "deadlines.")
    keys = [key for key in keys_of(FinetuneConfig) if not key.startswith(elsewhere)]
    assert sorted(key for key, _, _ in FINETUNE_KEYS) == sorted(f"`{key}`" for key in keys)
    for key, default, _ in FINETUNE_KEYS:
        assert parse(FinetuneConfig, TOY, "docs", [f"{words(key)[0]}={words(default)[0]}"]) == parse(
            FinetuneConfig, TOY, "docs"
        )


def test_every_form_and_every_table_is_documented_with_its_keys():
    for models, head in ((AnyTask, ("form", "keys", "input")), (Table, ("kind of table", "keys", "reads"))):
        documented = {name: set(words(keys)) for names, keys, _ in rows(*head) for name in words(names)}
        of_all = {"form", "kind", "train", "validation", "test"}
        members = get_args(get_args(models)[0])
        tags = {
            member: get_args(member.model_fields["form" if models is AnyTask else "kind"].annotation)
            for member in members
        }
        assert documented == {tag: set(member.model_fields) - of_all for member in members for tag in tags[member]}


@pytest.mark.parametrize(
    "section", [Quality, NearDuplicates, Decontamination, LoraConfig, SpikeConfig], ids=lambda section: section.__name__
)
def test_the_sections_that_may_be_left_out_are_documented_with_their_defaults(section: type[pydantic.BaseModel]):
    names = {
        Quality: "quality",
        NearDuplicates: "near_duplicates",
        Decontamination: "decontaminate",
        LoraConfig: "lora",
        SpikeConfig: "spikes",
    }
    name = names[section]
    documented = rows(f"key of `{name}`", "default", "meaning")
    assert sorted(key for key, _, _ in documented) == sorted(f"`{key}`" for key in section.model_fields)
    for key, default, _ in documented:
        field = section.model_fields[words(key)[0]]
        assert default == "required" if field.is_required() else words(default)[0] == _shown(field.default)


def _shown(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default).replace('"', "")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[Path, list[str]]]:
    """The arguments of every ``gpt1`` in a fenced block, and its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if re.match(r"(\w+=\S+ )*(\.venv/bin/)?gpt1 ", line):
                    parts = shlex.split(line, comments=True)
                    begin = next(index for index, part in enumerate(parts) if part.rpartition("/")[2] == "gpt1")
                    found.append((page, parts[begin + 1 :]))
    return found


@pytest.mark.parametrize(("page", "arguments"), commands(), ids=lambda value: str(value) if value else None)
def test_every_command_parses_and_its_configuration_is_valid(page: Path, arguments: list[str], tmp_path: Path):
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group
        name, *arguments = arguments
        command = command.commands[name]
    parameters = command.make_context(command.name, arguments).params
    if "config" not in parameters:
        return
    path = parameters["config"]
    shown = {block.split("\n")[0].removeprefix("# "): block for block in blocks(page, "yaml")}
    if str(path) in shown:  # a file that the page tells the reader to write
        (tmp_path / path.name).write_text(shown[str(path)], encoding="utf-8")
        path = tmp_path / path.name
    if path.parts[0] == "runs":  # what a run of the shipped configuration of that name has written
        run = tmp_path / path.name
        run.write_text(load_config(Path("configs") / f"{path.parts[1]}.yaml").to_yaml(), encoding="utf-8")
        path = run
    kind = FinetuneConfig if command.name == "finetune" else Config
    load(kind, path, parameters["overrides"] or ())


def test_pages_have_commands():
    assert {page.name for page, _ in commands()} >= {"data.md", "training.md", "evaluation.md"}


def test_the_architecture_names_every_module():
    named = [words(module)[0] for module, _ in rows("module", "does")]
    modules = [path.relative_to("gpt1_jax").as_posix() for path in Path("gpt1_jax").rglob("*.py")]
    assert sorted(named) == sorted(module for module in modules if not module.endswith("__init__.py"))


def test_the_figures_are_those_that_evaluate_reports():
    assert [words(figure)[0] for figure, _ in rows("figure", "definition")] == list(Figures.__dataclass_fields__)


def test_the_keys_of_a_plan_are_those_that_plan_reports():
    assert [words(key)[0] for key, _ in rows("key of a plan", "meaning")] == list(Plan.__dataclass_fields__)


def test_the_sizes_have_the_parameters_that_are_documented():
    sizes = rows("name", "overrides", "parameters")
    assert len(sizes) == 6
    for name, overrides, parameters in sizes:
        (config,) = words(name) or ["configs/gpt1.yaml"]
        settings = load_config(config, [*overrides.strip("`").split(), "model.dtype=float32"])
        assert f"{num_parameters(settings.model):,}" == parameters


def test_every_variation_is_documented_with_its_values():
    documented = {words(row[0])[0]: row for row in rows("key", "paper", "variation", "source")}
    fields = {f"model.{name}": field for name, field in ModelConfig.model_fields.items()}
    departures = list(fields)[list(fields).index("model.objective") + 1 : list(fields).index("model.logit_cap") + 1]
    assert set(documented) == {*departures, "model.num_kv_heads"}
    for key, (_, paper, variation, _) in documented.items():
        assert words(paper)[0] == str(json.dumps(fields[key].default)).strip('"')
        for value in get_args(fields[key].annotation):
            assert f"`{value}`" in paper + variation or not isinstance(value, str)
    for head, name in (("predicts", "model.objective"), ("what it is", "rule"), ("behind the warm-up", "schedule")):
        section = ModelConfig if name == "model.objective" else OptimizerConfig
        values = get_args(section.model_fields[name.removeprefix("model.")].annotation)
        tables_of = [body for page in PAGES for found, body in tables(page) if head in found]
        assert [words(row[0])[0] for row in tables_of[0]] == list(values)


def test_the_exit_codes_are_those_of_the_errors():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GPT1Error)]
    assert {int(code) for code, _ in rows("exit code", "meaning")} == {0, *(kind.exit_code for kind in kinds)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
