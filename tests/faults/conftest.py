"""The faults of docs/reliability.md, injected for real: what each test tried goes into one table at the end."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import SETTINGS, Running

# The table's rows, in its order.
FAULTS = (
    "SIGKILL at random moments",
    "SIGTERM at random moments",
    "a host killed, stopped or stuck",
    "damaged checkpoint",
    "damaged shard",
    "full disk, read-only output",
    "NaN, spike, wrong arithmetic",
    "other devices and processes",
    "killed or hung data worker",
    "wall clock moved",
    "other model, tokenizer, dtype, keys",
    "two runs in one folder, finished run",
    "hostile files",
    "no network",
)


class Row:
    """The tries of one test at a fault.

    Attributes:
        tries: how many there were.
    """

    def __init__(self) -> None:
        self.tries = 0

    def tried(self, tries: int = 1) -> None:
        """Counts what has been tried, and has held."""
        self.tries += tries


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Row]:
    """Counts the tries of a test that has the mark ``fault("a row of the table")``."""
    fault = request.node.get_closest_marker("fault").args[0]
    assert fault in FAULTS
    record_property("fault", fault)
    row, begin = Row(), time.monotonic()
    yield row
    record_property("tries", row.tries)
    record_property("seconds", time.monotonic() - begin)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, corpus_yaml: str) -> Callable[..., Path]:
    """Makes folders to run in, with text to replace in their configuration; they share what was compiled."""
    cache = tmp_path_factory.mktemp("compiled")

    def make(name: str, *replaced: tuple[str, str]) -> Path:
        folder = tmp_path_factory.mktemp(name)
        yaml = SETTINGS.replace("log_every: 1", f"log_every: 1, compilation_cache: {cache}")
        for old, new in replaced:
            assert old in yaml
            yaml = yaml.replace(old, new)
        (folder / "config.yaml").write_text(corpus_yaml + yaml)
        return folder

    return make


@pytest.fixture(scope="session")
def uninterrupted(make_folder: Callable[..., Path]) -> Path:
    """A run that nothing happened to."""
    folder = make_folder("uninterrupted")
    ((code, _, err),) = Running(folder).finish()
    assert code == 0, err
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table, as it stands in docs/reliability.md."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    lines = []
    for fault in FAULTS:
        of_fault = [report for report in reports if ("fault", fault) in report.user_properties]
        ended = [dict(report.user_properties) for report in of_fault if report.when == "teardown"]
        if of_fault:
            held = "no" if any(report.failed for report in of_fault) else "yes"
            seconds = sum(each["seconds"] for each in ended)
            lines.append(f"| {fault} | {sum(each['tries'] for each in ended)} | {held} | {seconds:.0f} s |")
    if lines:
        terminalreporter.write_line("\n| fault | tries | held | time |\n| --- | --- | --- | --- |")
        terminalreporter.write_line("\n".join(lines))
