"""Reads a configuration: a YAML file and dotted overrides, every mistake in one message."""

import difflib
import json
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import pydantic
import yaml
from etils import epath

from gpt1_jax.config import YAML_FLOAT, Config
from gpt1_jax.errors import UserError, nearest
from gpt1_jax.outside import read_bounded
from gpt1_jax.section import Section

_MOST_CHARACTERS = 1_000_000  # of a file; in memory, YAML takes a few hundred times as much
_DEEPEST = 50  # levels
_MOST_PROBLEMS = 100  # told at once


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers and booleans of YAML 1.2: ``3e-4`` is one, ``no`` and ``1:30`` are words.

    It refuses what a short text could make large: aliases, and levels without end.
    """

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the safe loader, event by event."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):  # a few aliases of aliases are gigabytes
            problem = "anchors and aliases are not supported; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if self._level == _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} levels deep", mark)
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


_Loader.yaml_implicit_resolvers = {
    first: [(tag, p) for tag, p in resolvers if not tag.endswith((":int", ":float", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))

# A path such as ("data", "sources", 0, "kind"), and where it was written: "configs/tiny.yaml:12".
_Path = tuple[Hashable, ...]
AnyConfig = TypeVar("AnyConfig", bound=Section)
_COMMAND_LINE = "command line"
_SOURCES = ("data", "sources")
_DISCRIMINATORS = ("kind", "form", "by")  # keys that tell the members of a union apart


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads the configuration of a run, as :func:`load` any other."""
    return load(Config, path, overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """As :func:`load_config`, from YAML text; ``source`` names it in messages."""
    return parse(Config, text, source, overrides)


def load(kind: type[AnyConfig], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a configuration file and dotted overrides.

    Args:
        kind: what the file describes.
        path: YAML file that lists what differs from the defaults, local or in a bucket.
        overrides: ``section.key=value`` each, the value in YAML; a later one wins.

    Returns:
        The validated, frozen configuration.

    Raises:
        UserError: with every problem of the file and of the overrides in one message.
    """
    path = epath.Path(path)
    try:
        text = read_bounded(path, _MOST_CHARACTERS).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such configuration file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error}") from None
    return parse(kind, text, str(path), overrides)


def parse(kind: type[AnyConfig], text: str, source: str, overrides: Sequence[str] = ()) -> AnyConfig:
    """As :func:`load`, from YAML text; ``source`` names it in messages."""
    origin: dict[_Path, str] = {}
    problems: list[str] = []
    values = _parse_yaml(text, source, origin, problems)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected keys such as 'model:' at the top, found {_shown(values)}")
    for override in overrides:
        _apply_override(values, override, origin, problems)
    _expand_recipes(values, origin, problems)
    try:
        config = kind.model_validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        problems += _explain(kind, error, values, source, origin)
    except (TypeError, ValueError) as error:  # a value that JSON cannot hold
        problems.append(f"{source}: {error}")
    else:
        if not problems:
            return config
    raise UserError("\n".join(problems[:_MOST_PROBLEMS] + ["and more"] * (len(problems) > _MOST_PROBLEMS)))


def _nearest_file(path: epath.Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    return nearest(path.name, names) or (f"; {folder} has: {', '.join(sorted(names))}" if names else "")


def _parse_yaml(text: str, source: str, origin: dict[_Path, str], problems: list[str]) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader, source, origin, problems).build(node, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Builder:
    """Builds the values of a YAML document, notes the line of every key, and refuses what has no place in a config."""

    def __init__(self, loader: _Loader, source: str, origin: dict[_Path, str], problems: list[str]):
        self._loader, self._source = loader, source
        self._origin, self._problems = origin, problems

    def build(self, node: yaml.Node, path: _Path) -> Any:
        self._origin.setdefault(path, self._where(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            return self._refuse(node, path, f"the tag {node.tag} is not supported")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, "keys are words, found a list or keys of its own")
                continue
            key = self._scalar(key_node, path)
            inner = (*path, key)
            if type(key) is int:  # a step, in a schedule; JSON, which the values go through, has words alone
                key = str(key)
                inner = (*path, key)
            if not isinstance(key, str):
                self._refuse(key_node, path, f"keys are words, found {_shown(key)}")
            elif key in result:
                self._refuse(key_node, inner, "given twice; keep one of them")
            else:
                self._origin[inner] = self._where(key_node)
                result[key] = self.build(value_node, inner)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: _Path) -> Any:
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a number of thousands of digits
            return self._refuse(node, path, str(error))

    def _where(self, node: yaml.Node) -> str:
        return self._source if self._source == _COMMAND_LINE else f"{self._source}:{node.start_mark.line + 1}"

    def _refuse(self, node: yaml.Node, path: _Path, problem: str) -> None:
        self._problems.append(": ".join(filter(None, (self._where(node), _dotted(path), problem))))


def _apply_override(values: dict[str, Any], override: str, origin: dict[_Path, str], problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"{_COMMAND_LINE}: '{override}': expected key=value, e.g. train.steps=200")
        return
    path = tuple(key.strip().split("."))
    found: dict[_Path, str] = {}
    value = _parse_yaml(text, _COMMAND_LINE, found, problems)
    for known in [known for known in origin if known[: len(path)] == path]:
        del origin[known]
    origin.update(dict.fromkeys([path, *(path + inner for inner in found)], _COMMAND_LINE))
    for length in range(1, len(path)):
        origin.setdefault(path[:length], _COMMAND_LINE)
    parent: Any = values
    for part in path[:-1]:
        parent = parent.setdefault(part, {})
        if not isinstance(parent, dict):
            problems.append(f"{_COMMAND_LINE}: {key}: '{part}' is not a section")
            return
    parent[path[-1]] = value


def _expand_recipes(values: dict[str, Any], origin: dict[_Path, str], problems: list[str]) -> None:
    """Puts, in the place of every source of kind ``recipe``, the sources of its file."""
    data = values.get("data")
    listed = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(listed, list) or not any(_is_recipe(source) for source in listed):
        return
    found = list(_with_recipes(listed, origin, problems, ()))
    for path in [path for path in origin if path[:2] == _SOURCES and len(path) > 2]:
        del origin[path]
    for number, (_, where) in enumerate(found):
        for path, line in where.items():
            origin[(*_SOURCES, number, *path)] = line
    values["data"]["sources"] = [source for source, _ in found]


_Found = tuple[Any, dict[_Path, str]]  # a source, and where its keys were written


def _with_recipes(
    listed: list[Any], origin: Mapping[_Path, str], problems: list[str], inside: tuple[str, ...]
) -> Iterable[_Found]:
    """The sources of a list, those of recipes too; ``inside`` are the recipes that the list itself stands in."""
    for number, source in enumerate(listed):
        path = (*_SOURCES, number)
        where = {inner[3:]: line for inner, line in origin.items() if inner[:3] == path}
        if not _is_recipe(source):
            yield source, where
            continue
        try:
            yield from _read_recipe(source, inside, problems)
        except UserError as error:
            problems.append(f"{where.get(('file',), where.get((), 'sources'))}: {_dotted(path)}: {error}")


def _read_recipe(source: dict[str, Any], inside: tuple[str, ...], problems: list[str]) -> Iterable[_Found]:
    for key in source.keys() - {"kind", "file", "weight"}:
        raise UserError(f"{key}: unknown key of a recipe{nearest(key, ('file', 'weight'))}; it has file and weight")
    file, weight = source.get("file"), source.get("weight", 1.0)
    if not isinstance(file, str):
        raise UserError(f"file={_shown(file)}: a recipe is a YAML file, such as data/books.yaml")
    if file in inside:
        raise UserError(f"file={file}: the recipe is part of itself")
    try:
        text = read_bounded(file, _MOST_CHARACTERS).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"file={file}: there is no such recipe{_nearest_file(epath.Path(file))}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"file={file}: cannot be read as a recipe: {error}") from None
    origin: dict[_Path, str] = {}
    recipe = _parse_yaml(text, file, origin, problems)
    data = recipe.get("data") if isinstance(recipe, dict) and set(recipe) == {"data"} else None
    listed = data.get("sources") if isinstance(data, dict) and set(data) == {"sources"} else None
    if not isinstance(listed, list):
        raise UserError(f"file={file}: a recipe holds the list data.sources, and no other key")
    for found, where in _with_recipes(listed, origin, problems, (*inside, file)):
        if isinstance(found, dict) and "weight" in source:
            found = {**found, "weight": _product(weight, found.get("weight", 1.0))}
        yield found, where


def _is_recipe(source: Any) -> bool:
    return isinstance(source, dict) and source.get("kind") == "recipe"


def _product(one: Any, other: Any) -> Any:
    """The product of two weights, numbers or schedules over steps; of what is neither, the one that is amiss."""
    for weight in (one, other):
        if isinstance(weight, dict) and not all(step.isdecimal() for step in weight):
            return weight
    if isinstance(one, dict) and isinstance(other, dict):
        steps = sorted({*one, *other}, key=int)
        return {step: _product(_at(one, step), _at(other, step)) for step in steps}
    if isinstance(one, dict) or isinstance(other, dict):
        schedule, weight = (one, other) if isinstance(one, dict) else (other, one)
        return {step: _product(value, weight) for step, value in schedule.items()}
    amiss = [weight for weight in (one, other) if isinstance(weight, bool) or not isinstance(weight, int | float)]
    return amiss[0] if amiss else one * other


def _at(schedule: Mapping[str, Any], step: str) -> Any:
    begun = [begin for begin in schedule if int(begin) <= int(step)]
    return schedule[max(begun, key=int)] if begun else 0


def _explain(
    root: type[Section],
    error: pydantic.ValidationError,
    values: Mapping[str, Any],
    source: str,
    origin: Mapping[_Path, str],
) -> Iterable[str]:
    """One line a problem: where, key, value, what is wrong, and the nearest valid key."""
    found = [(tuple(_in_file(root, e["loc"])), e) for e in map(_of_key, error.errors()[: _MOST_PROBLEMS + 1])]
    named = {_dotted(path): path for path in origin}

    def where(path: _Path) -> str:
        return next((origin[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origin), source)

    for path, problem in found:
        shown = f"{where(path)}: {_dotted(path)}={_shown(problem['input'])}"
        match problem["type"]:
            case "extra_forbidden":
                yield f"{shown}: unknown key{_nearest_key(root, path, values)}"
            case "value_error":  # of our own validators, which name the keys themselves
                for line in str(problem["ctx"]["error"]).splitlines():
                    keys = [named[key] for key in re.findall(r"([a-z_0-9.]+)=", line) if key in named]
                    yield f"{where(keys[0] if keys else path)}: {line}"
            case "missing":
                yield f"{where(path)}: {_dotted(path)}: required, but not given"
            case "too_short" if any(other[: len(path)] == path and other != path for other, _ in found):
                pass  # pydantic leaves out invalid items, and then counts what is left
            case _:
                yield f"{shown}: {_message(problem)}"


def _of_key(problem: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is amiss with the key that tells the members of a union apart, as a problem of that key."""
    if not problem["type"].startswith("union_tag_"):
        return problem
    context = problem["ctx"]
    loc = (*problem["loc"], context["discriminator"].strip("'"))
    if problem["type"] == "union_tag_not_found":
        return {"type": "missing", "loc": loc, "input": None}
    return {"type": "literal_error", "loc": loc, "input": context["tag"], "ctx": {"expected": context["expected_tags"]}}


def _message(problem: Mapping[str, Any]) -> str:
    """What pydantic says of it; of a choice, what may stand there, and which of that is nearest."""
    if problem["type"] != "literal_error":
        return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    valid = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    return f"choose from {', '.join(valid)}{nearest(str(problem['input']), valid)}"


def _in_file(root: type[Section], path: _Path) -> Iterable[Hashable]:
    """The levels of a path that the file has: pydantic adds the tags of unions, and a mark of keys."""
    kinds = [root]
    for part in path:
        tagged = [kind for kind in kinds if len(kinds) > 1 and part in _tags(kind)]
        if tagged:
            kinds = tagged
        elif part not in ("a number", "a schedule", "a column", "columns", "[key]"):
            yield part
            if not isinstance(part, int):
                fields = kinds[0].model_fields if kinds else {}
                kinds = _sections_in(fields[str(part)].annotation) if part in fields else []


def _nearest_key(root: type[Section], path: _Path, values: Mapping[str, Any]) -> str:
    """The valid key nearest to the last of ``path``, in its section first, then anywhere."""
    here = {key: _dotted((*path[:-1], key)) for key in _section_at(root, path[:-1], values).model_fields}
    anywhere = {str(key[-1]): _dotted(key) for key in reversed(list(_all_keys(root)))}  # of equal ones the first
    for names in (here, anywhere):
        match = difflib.get_close_matches(str(path[-1]), names, n=1)
        if match:
            return f"; did you mean '{names[match[0]]}'?"
    return f"; valid here: {', '.join(here)}"


def _all_keys(section: type[pydantic.BaseModel], prefix: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        yield path
        kinds = _sections_in(field.annotation)
        if len(kinds) == 1:
            yield from _all_keys(kinds[0], path)


def _section_at(root: type[Section], path: _Path, values: Mapping[str, Any]) -> type[pydantic.BaseModel]:
    """The section at ``path``; of a union the member that the values there are of."""
    kinds: list[type[pydantic.BaseModel]] = [root]
    value: Any = values
    for part in path:
        value = value[part]
        if not isinstance(part, int):
            kinds = _sections_in(kinds[0].model_fields[str(part)].annotation)
        if len(kinds) > 1 and isinstance(value, dict):
            kinds = [kind for kind in kinds if any(value.get(name) in _tags(kind) for name in _DISCRIMINATORS)]
    return kinds[0]


def _sections_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The sections that a key may hold, by itself, in a list, or as one of several; none for any other value."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections_in(inner)]


def _tags(kind: type[pydantic.BaseModel]) -> tuple[Any, ...]:
    """The values of the key that tells a member of a union from the others."""
    names = [name for name in _DISCRIMINATORS if name in kind.model_fields]
    return get_args(kind.model_fields[names[0]].annotation) if names else ()


def _dotted(path: Iterable[Hashable]) -> str:
    return ".".join(map(str, path))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
