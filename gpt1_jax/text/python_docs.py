"""The embedded corpus: documentation strings of Python's library and of the project's run-time dependencies.

Nothing is imported or downloaded: files are parsed. Only what the project itself requires is read, so installing an
extra, or another package, changes nothing.
"""

import ast
import inspect
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpt1_jax.text.document import Document, Skipped

_PROJECT = "gpt1-jax"
_NOT_DOCUMENTATION = frozenset({"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"})
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PythonDocsSource:
    """One document a module: its documentation strings in the order of the file, each under the name it documents."""

    name = label = "python_docs"
    network = None

    def settings(self) -> dict[str, Any]:
        """Versions of Python and of every distribution that is read."""
        return {
            "kind": "python_docs",
            "python": f"{platform.python_implementation()} {platform.python_version()} {sys.platform}",
            "distributions": {name: found.version for name, found in runtime_closure(_PROJECT).items()},
        }

    def read(self) -> Iterator[Document | Skipped]:
        """The modules by distribution and path, the standard library first; each string once in the corpus."""
        seen: set[str] = set()
        for module in map(_parse, self._modules()):
            if isinstance(module, Skipped):
                yield module
                continue
            new = []
            for heading, text in module.sections:
                if text not in seen:
                    seen.add(text)
                    new.append(f"{heading}\n{text}")
            if new:
                yield Document("\n\n".join(new), module.identity)

    def split(self) -> Sequence["PythonDocsSource"]:
        """The source itself: whether a string has been seen before depends on all modules before it."""
        return [self]

    def _modules(self) -> Iterator[tuple[str, Path]]:
        library = Path(sysconfig.get_path("stdlib"))
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library).as_posix()
            if _wanted(name):
                yield name, path
        for distribution in runtime_closure(_PROJECT).values():
            for file in sorted(distribution.files or (), key=lambda file: file.as_posix()):
                name = file.as_posix()
                if name.endswith(".py") and not name.startswith("..") and _wanted(name):
                    path = Path(str(distribution.locate_file(file)))
                    if path.is_file():
                        yield name, path


def runtime_closure(project: str) -> dict[str, metadata.Distribution]:
    """The installed distributions that a project requires at run time, directly or not, by name, in order.

    Markers are evaluated for this environment, and without extras except those that a requirement asks for itself.
    The project's own distribution is left out.
    """
    found: dict[str, metadata.Distribution] = {}
    todo, done = [(canonicalize_name(project), "")], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # pip would have complained; there is nothing to read
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                required = canonicalize_name(requirement.name)
                todo += [(required, wanted) for wanted in ("", *requirement.extras)]
    found.pop(canonicalize_name(project), None)
    return dict(sorted(found.items()))


def _wanted(name: str) -> bool:
    return _NOT_DOCUMENTATION.isdisjoint(name.split("/")[:-1])


def _dotted(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Module(NamedTuple):
    identity: str
    sections: list[tuple[str, str]]  # heading and text of every documentation string


def _parse(module: tuple[str, Path]) -> _Module | Skipped:
    name, path = module
    identity = f"python_docs:{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:  # templates, files of other versions
        return Skipped(identity, "not_python", f"it cannot be parsed: {error}")
    return _Module(identity, list(_sections(tree, _dotted(name))))


def _sections(node: ast.AST, module: str, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *_NAMED)):
        raw = ast.get_docstring(node, clean=False)
        # A lone surrogate, from an escape such as "\\ud800", would make the whole module no text.
        text = inspect.cleandoc(raw).encode("utf-8", "replace").decode("utf-8") if raw else ""
        if text.strip():
            yield name or module, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _NAMED):
            yield from _sections(child, module, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _sections(child, module, name)
