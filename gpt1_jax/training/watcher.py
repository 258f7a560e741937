"""The process that watches one of a run, and ends it when its deadline has passed.

It is started as a script, and knows the standard library alone, so that it is there in milliseconds. Its first argument
is the file descriptor of what :class:`gpt1_jax.training.watchdog.Watchdog` writes: the deadline and a text. Its second
is the file to write the stacks to. Its standard input is a pipe from the watched process, through which these come, and
which ends when that process does.
"""

import mmap
import os
import select
import signal
import struct
import sys
import time

DEADLINE = struct.Struct("d")  # seconds on the monotonic clock, which all processes share; the text follows
_INTERVAL = 0.5  # seconds between two looks at the deadline
_GRACE = 15.0  # seconds for the watched process to write its stacks and end


def main(memory: mmap.mmap, path: str) -> None:
    """Watches the parent until it ends."""
    watched = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are meant for the watched process
        signal.signal(number, signal.SIG_IGN)
    looked, known, slack = time.monotonic(), 0.0, 0.0
    while not select.select([0], [], [], _INTERVAL)[0]:
        now = time.monotonic()
        (deadline,) = DEADLINE.unpack_from(memory)
        if deadline != known:
            known, slack = deadline, 0.0
        # Time in which this process did not run, as after Ctrl-Z, is no time in which the other one was stuck.
        slack += max(0.0, now - looked - 2 * _INTERVAL)
        looked = now
        if now > deadline + slack:
            _end(watched, memory[DEADLINE.size :].split(b"\0")[0].decode(errors="replace"), path)
            return


def tell(why: str, path: str) -> None:
    """Says why the watched process is ended."""
    print(
        f"gpt1: {why}; the stacks of its threads are in {path}; run the same command again to go on from the newest "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )


def write(path: str, why: str, stacks: bytes) -> None:
    """Writes the file of stacks."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}: {why}\n\n".encode() + stacks)


def _end(watched: int, why: str, path: str) -> None:
    tell(why, path)
    if os.getppid() != watched:
        return
    os.kill(watched, signal.SIGTRAP)
    os.kill(watched, signal.SIGCONT)  # it may be stopped, and would not see the other one
    stacks, until = b"", time.monotonic() + _GRACE
    while select.select([0], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(0, 2**16)
        if not part:
            break
        stacks += part
    else:
        os.kill(watched, signal.SIGKILL)
    write(path, why, stacks)


if __name__ == "__main__":
    main(mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ), sys.argv[2])
