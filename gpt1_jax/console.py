"""What the commands share: the arguments that several of them take, and where they print."""

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from etils import epath

# A path may be a bucket's, whose two slashes pathlib would make one.
RunFolder = Annotated[
    epath.Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.", parser=epath.Path)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, such as train.steps=200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one object on standard output."""
    print(json.dumps(value, ensure_ascii=False))


def say(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr, flush=True)
