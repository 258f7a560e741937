"""Commands of ``gpt1``, one after the other, in a process that cannot reach anything: their arguments, in JSON.

With the word ``pretend`` before them, connections are refused by this process, where the system could not be asked to.
"""

import json
import socket
import sys
from typing import Any

from gpt1_jax import cli


def refuse() -> None:
    """Refuses every connection, and every look-up of a name."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError(101, "Network is unreachable")

    for way in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, way, unreachable)
    socket.getaddrinfo = unreachable


def main() -> int:
    """The exit code of the first command that fails."""
    *pretend, commands = sys.argv[1:]
    if pretend:
        refuse()
    with socket.socket() as outside:
        try:
            outside.connect(("192.0.2.1", 80))  # an address for documentation (RFC 5737)
            sys.exit("there is a network")
        except OSError:
            pass
    for arguments in json.loads(commands):
        sys.argv = ["gpt1", *arguments]
        try:
            cli.main()
        except SystemExit as ended:
            print(f"{ended.code}: {' '.join(arguments)}", file=sys.stderr, flush=True)
            if ended.code:
                return int(ended.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
