import subprocess
import sys
from importlib import metadata

import pytest

from gpt1_jax.text import python_docs
from gpt1_jax.text.document import Document, Skipped
from gpt1_jax.text.python_docs import PythonDocsSource, runtime_closure

MODULE = '''"""About the module."""

class Shape:
    """A shape.

        Indented.
    """

    def area(self):
        """The area."""

        def inner():
            """Inside."""

    if True:
        async def area_later(self):
            "\\\\d is an invalid escape: \\d"

def again():
    """The area."""

def silent(): pass
'''


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs distributions into a folder of their own; returns the function that does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path / "stdlib"))
    monkeypatch.setattr(python_docs, "_PROJECT", "project")

    def install(name, files, requires=()):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, content in files.items():
            if file.startswith(".."):
                continue
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content)

    return install


def test_documents_of_a_module(packages):
    packages("alpha", {"alpha/__init__.py": MODULE})
    packages("project", {"project.py": '"""Not read."""'}, ["alpha"])
    (document,) = PythonDocsSource().read()
    assert document.identity == "python_docs:alpha/__init__.py"
    assert document.text == (
        "alpha\nAbout the module.\n\nShape\nA shape.\n\nIndented.\n\nShape.area\nThe area.\n\n"
        "Shape.area.inner\nInside.\n\nShape.area_later\n\\d is an invalid escape: \\d"
    )


def test_only_what_is_required_and_recorded_is_read(packages, tmp_path):
    (tmp_path / "stdlib/test").mkdir(parents=True)
    (tmp_path / "stdlib/os.py").write_text('"""System."""')
    (tmp_path / "stdlib/test/test_os.py").write_text('"""Tests."""')
    packages("project", {}, ["Zeta_X[fast]", "old; python_version < '3'", "opt; extra == 'more'", "absent-package"])
    packages("zeta-x", {"zeta/b.py": '"""B."""', "zeta/a.py": '"""A."""', "zeta/tests/t.py": '"""T."""',
                        "../../bin/x.py": '"""Script."""', "zeta/data.txt": "x"},
             ["quick; extra == 'fast'", "slow; extra == 'slow'"])  # fmt: skip
    for name in ("quick", "slow", "old", "opt", "other"):
        packages(name, {f"{name}.py": f'"""{name}."""'})
    (tmp_path / "zeta/left_behind.py").write_text('"""Not in the record."""')
    assert list(runtime_closure("project")) == ["quick", "zeta-x"]
    assert [item.identity for item in PythonDocsSource().read()] == [
        "python_docs:os.py", "python_docs:quick.py", "python_docs:zeta/a.py", "python_docs:zeta/b.py",
    ]  # fmt: skip
    assert PythonDocsSource().settings()["distributions"] == {"quick": "1.0", "zeta-x": "1.0"}


def test_files_that_are_not_python_are_counted(packages):
    packages("alpha", {"a.py": "print 'old'", "b.py": "x = '\0'", "c.py": '"""Half \\ud800."""'})
    packages("project", {}, ["alpha"])
    items = list(PythonDocsSource().read())
    assert [item.reason for item in items[:2]] == ["not_python", "not_python"]
    assert all(isinstance(item, Skipped) for item in items[:2])
    assert items[2] == Document("c\nHalf ?.", "python_docs:c.py")


def test_closure_of_the_project_is_its_run_time_requirements():
    closure = runtime_closure("gpt1-jax")
    assert {"jax", "numpy", "sentencepiece", "jaxlib"} <= set(closure)
    assert not {"gpt1-jax", "pytest", "hypothesis", "ruff", "pip"} & set(closure)
    assert list(closure) == sorted(closure)
    assert closure["numpy"].version == metadata.version("numpy")


def test_nothing_is_imported():
    code = (
        "import sys, itertools; from gpt1_jax.text.python_docs import PythonDocsSource\n"
        "before = set(sys.modules); list(itertools.islice(PythonDocsSource().read(), 30))\n"
        "sys.exit(bool({'antigravity', 'this', 'turtle', 'jax'} & (set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
