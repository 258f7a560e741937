"""Several processes of one run: how they meet, what they refuse, and that they train, stop and end together."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pydantic
import pytest

from gpt1_jax.config import Config, DistributedConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import GPT1Error, Interrupted, StalledError, UserError
from gpt1_jax.training import cluster, hub
from gpt1_jax.training import hosts as hosts_module
from gpt1_jax.training.cluster import Place, find_place
from gpt1_jax.training.hosts import Hosts, Line, join
from gpt1_jax.training.hub import Hello, Hub, listen
from gpt1_jax.training.interrupt import Interruption
from gpt1_jax.training.run import check_shared
from tests.running import Ended, Running, free_port, records

# ---- which process this is


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that tells nothing of a cluster."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    return monkeypatch


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[001-003,7],login",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


def test_alone_nothing_is_asked_or_said(bare):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    bare.setattr(socket.socket, "connect", refuse)
    bare.setattr(socket, "getaddrinfo", refuse)
    lines: list[str] = []
    with join(Config(), lines.append, Interruption()) as hosts:
        assert (hosts.process, hosts.processes, lines) == (0, 1, [])
        assert hosts.first(lambda: "x") == "x" and not hosts.due() and hosts.stopping is None


def test_slurm_gives_the_place_and_the_names(bare):
    for name, value in SLURM.items():
        bare.setenv(name, value)
    names = dict(enumerate(["gpu001", "gpu002", "gpu003", "gpu7", "login"]))
    assert find_place(DistributedConfig()) == Place("gpu001:61441", 5, 3, (0,), names)
    bare.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")  # one process drives all of a node's
    assert find_place(DistributedConfig()) == Place("gpu001:61441", 5, 3, (0, 1, 2, 3), names)
    assert find_place(DistributedConfig(processes=1)) is None
    bare.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell in the allocation
    assert find_place(DistributedConfig()) is None


def test_keys_go_before_what_is_found(bare):
    for name, value in SLURM.items():
        bare.setenv(name, value)
    assert find_place(DistributedConfig(coordinator="[::1]:99", processes=2, process=1)) == Place("[::1]:99", 2, 1)


def test_names_of_a_tpu_slice(bare):
    bare.setenv("TPU_WORKER_HOSTNAMES", "t-0.svc,t-1.svc")
    place = find_place(DistributedConfig(coordinator="t-0.svc:99", processes=2, process=1))
    assert place is not None and place.names == {0: "t-0.svc", 1: "t-1.svc"}


def test_a_pod_is_alone_unless_it_is_one_of_a_job(bare):
    bare.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    bare.setitem(sys.modules, "kubernetes", None)  # not installed
    assert find_place(DistributedConfig()) is None
    bare.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError, match=r"(?s)`kubernetes` package is not.*distributed\.processes=1"):
        find_place(DistributedConfig())


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"coordinator": "a:1"}, "give all three"),
        ({"processes": 2, "process": 0}, "give all three"),
        ({"process": 1, "processes": 1}, "give all three"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "numbered from 0 to 1"),
        ({"coordinator": "a", "processes": 2, "process": 1}, "not an address"),
        ({"coordinator": "::1:99", "processes": 2, "process": 1}, "not an address"),
        ({"coordinator": "a:70000", "processes": 2, "process": 1}, "not an address"),
    ],
)
def test_keys_that_make_no_place_are_refused(keys, problem):
    with pytest.raises(pydantic.ValidationError, match=problem):
        DistributedConfig(**keys)


# ---- how they meet


class Job:
    """Processes that are threads of this one, on one port; they meet as processes do."""

    def __init__(self, processes: int, host: str = "localhost", timeout: float = 20.0):
        self.processes, self.timeout = processes, timeout
        self.port = free_port()
        self.coordinator = f"{host}:{self.port}"
        self.said: list[str] = []
        self.left: dict[int, str] = {}  # why a process is to leave at once

    def join(self, process: int, differing: dict[str, object] | None = None) -> Hosts:
        place = Place(self.coordinator, self.processes, process, names={1: "known-1"})
        hello = {"process": process, "processes": self.processes, "host": f"name-{process}", "settings": {"jax": "1"}}
        said = Hello.model_validate(hello | (differing or {}))
        hub = Hub(listen(place), place, said, self.timeout, self.said.append) if process == 0 else None
        on_leave = lambda reason, last: self.left.update({process: reason})  # noqa: E731
        return Hosts(Line(place, said, self.timeout, lambda line: None, hub, on_leave))

    def each(self, work: Callable[[Hosts], object], differing: dict[str, object] | None = None) -> list[object]:
        """What the work gives in each process, or the error that ends it there; the last says something differing."""

        def run(process: int) -> object:
            with contextlib.ExitStack() as stack:
                try:
                    hosts = self.join(process, differing if process == self.processes - 1 else None)
                    if process:
                        stack.callback(hosts._line._close)  # which the end of a process does
                    with hosts:
                        return work(hosts)
                except GPT1Error as error:
                    return error

        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(run, range(self.processes)))


def leave(pool: ThreadPoolExecutor, hosts: list[Hosts]) -> None:
    for left in [pool.submit(each.__exit__, None, None, None) for each in hosts]:
        left.result()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_all(errors: list[object], code: int, message: str) -> None:
    for error in errors:
        assert isinstance(error, GPT1Error) and error.exit_code == code, error
        assert re.search(message, str(error)), error


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_all_meet_and_tell_each_other(host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    job = Job(3, host)
    given = job.each(lambda hosts: (hosts.gather(hosts.process**2), hosts.first(lambda: hosts.process)))
    assert given == [([0, 1, 4], 0)] * 3
    assert job.said[-1] == "3 of 3 hosts joined: 0 (name-0), 1 (name-1), 2 (name-2)"
    assert all(re.fullmatch(r"\d of 3 hosts joined: .*; waiting for .*", line) for line in job.said[:-1])


def test_who_is_missing_is_named_to_all():
    job = Job(4, timeout=1.0)
    with ThreadPoolExecutor() as pool:
        joining = [pool.submit(job.join, process) for process in (0, 2)]
        errors: list[object] = [future.exception() for future in joining]
    check_all(errors, StalledError.exit_code, r"2 of 4 hosts joined: 0 \(name-0\), 2 \(name-2\) in 1 seconds")
    check_all(errors, StalledError.exit_code, r"missing: 1 \(known-1\), 3; see that the same command runs there")
    assert any(line.endswith("waiting for 1 (known-1), 3") for line in job.said)


def test_process_0_that_is_missing_is_named():
    job = Job(2, timeout=0.7)
    with pytest.raises(StalledError, match=f"process 0 did not answer at distributed.coordinator={job.coordinator} in"):
        job.join(1)


@pytest.mark.parametrize(
    ("processes", "differing", "problem"),
    [
        (3, {"process": 1}, r"two processes have the number 1, on name-[12] and on name-[12]"),
        (2, {"processes": 4}, r"process 1 \(name-1\) was told distributed.processes=4, process 0 \(name-0\) 2"),
        (2, {"settings": {"jax": "2"}}, r"otherwise than process 0 \(name-0\):\n  jax: 1 on process 0, 2 there"),
    ],
)
def test_processes_that_do_not_belong_together_are_refused(processes, differing, problem):
    check_all(Job(processes).each(lambda hosts: None, differing), UserError.exit_code, problem)


def test_a_port_that_is_taken_is_named():
    job = Job(2)
    with socket.create_server(("", job.port)):
        with pytest.raises(UserError, match=f"{job.coordinator}: process 0 cannot listen on this port"):
            job.join(0)


def test_strangers_are_left_alone():
    job = Job(2)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = pool.submit(job.join, 0)
        wait_until(lambda: bool(job.said))
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\0\xff" * 1_000_000, b'{"process": "none"}\n', b""):
            stranger = stack.enter_context(socket.create_connection(("localhost", job.port)))
            with contextlib.suppress(ConnectionError):  # it may have been shown the door already
                stranger.sendall(said)
        second = pool.submit(job.join, 1)
        leave(pool, [first.result(), second.result()])


def test_who_leaves_before_all_are_there_may_come_again():
    job = Job(3)
    hello = Hello(process=1, processes=3, host="early", settings={"jax": "1"}).model_dump_json().encode()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(job.join, 0)
        wait_until(lambda: bool(job.said))
        with socket.create_connection(("localhost", job.port)) as early:
            early.sendall(hello + b"\n")
            wait_until(lambda: "1 (early)" in job.said[-1])
        wait_until(lambda: "1 (early)" not in job.said[-1])
        hosts = [each.result() for each in (first, pool.submit(job.join, 1), pool.submit(job.join, 2))]
        line = hosts[0]._line
        assert line and line._hub and not line._hub._empty.is_set()  # process 0 will not leave before the others
        leave(pool, hosts)
    assert job.said[-1].endswith("0 (name-0), 1 (name-1), 2 (name-2)")


def test_an_error_of_one_ends_all_with_its_exit_code():
    def work(hosts: Hosts) -> object:
        if hosts.process == 0:
            return hosts.first(lambda: fail())
        return hosts.first(lambda: None)

    def fail() -> None:
        raise UserError("no such text")

    errors = Job(3).each(work)
    check_all(errors, UserError.exit_code, "no such text")
    assert [str(error).startswith("host 0 (name-0) has failed: ") for error in errors] == [False, True, True]


def test_all_stop_after_the_same_step_wherever_they_are():
    steps: dict[int, int] = {}
    reasons = []
    barrier = threading.Barrier(3)

    def work(hosts: Hosts) -> None:
        step = 7
        barrier.wait()
        with hosts.training():
            while not hosts.due():
                if step == 20 and hosts.process in (1, 2):
                    hosts.stop("SIGTERM")
                time.sleep(0.001 * (1 + hosts.process))  # the slower ones are behind
                step += 1
        steps[hosts.process] = step
        reasons.append(hosts.stopping)

    assert Job(3).each(work) == [None] * 3
    assert len(set(steps.values())) == 1 and steps[0] >= 20
    assert set(reasons) <= {"SIGTERM on host 1 (name-1)", "SIGTERM on host 2 (name-2)"} and len(set(reasons)) == 1


@pytest.mark.parametrize("trained", [False, True])
def test_with_nothing_to_save_all_leave_at_once(trained):
    job, ended = Job(3), []

    def work(hosts: Hosts) -> None:
        if trained:
            with hosts.training():
                assert not hosts.due()
        if hosts.process == 1:
            hosts.stop("SIGTERM")
        wait_until(lambda: hosts.process in job.left)
        assert hosts._line.exit_code == Interrupted.exit_code
        if hosts.process == 0:
            hosts._line._hub.wait_for_others()
        time.sleep(0.3 * hosts.process)
        ended.append(hosts.process)

    assert job.each(work) == [None] * 3
    assert job.left == dict.fromkeys(range(3), "SIGTERM on host 1 (name-1)")
    assert ended == [1, 2, 0]  # JAX's service ends with process 0


@dataclass
class Dog:
    """What a watchdog tells the others, and what they tell it."""

    turns: int = 4
    doing: str = "making step 9"
    seconds_late: float = -1.0
    ended: str | None = None

    def late(self) -> float:
        return self.seconds_late

    def end(self, why: str, seconds: float = 0.0) -> None:
        self.ended = why

    def dump(self, why: str) -> None:
        assert self.ended is None  # first of all

    def leave(self) -> None:
        assert self.ended


@pytest.mark.parametrize(
    ("changes", "silent", "why"),
    [
        ({2: {"turns": 3, "doing": "reading the batch of step 9"}}, None, "host 2 (name-2): no progress while reading"),
        ({}, 1, "host 1 (name-1): no progress, and no answer"),
        ({}, None, "no progress while making step 9, on all hosts alike"),
    ],
)
def test_when_a_deadline_passes_all_end_and_say_on_whose_account(changes, silent, why, monkeypatch):
    for module in (hub, hosts_module):
        monkeypatch.setattr(module, "PULSE_SECONDS", 0.05)
    dogs = [Dog(**changes.get(process, {})) for process in range(3)]

    def work(hosts: Hosts) -> None:
        dog = dogs[hosts.process]
        hosts._line.watch(dog)
        time.sleep(0.2)
        if hosts.process == silent:
            dog.late = lambda: time.sleep(1.0) or -1.0  # its reports end
        time.sleep(0.5)
        dogs[0].seconds_late = 0.01
        wait_until(lambda: dog.ended is not None)
        hosts._line.exit_code = StalledError.exit_code  # which the process would end with

    Job(3).each(work)
    assert all(dog.ended and dog.ended.startswith(why) for dog in dogs), dogs


def test_process_0_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(hosts_module, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(Hub, "_stalled", lambda hub: None)
    dogs = [Dog(), Dog(seconds_late=hosts_module._BLAME_SECONDS)]

    def work(hosts: Hosts) -> None:
        if hosts.process:
            hosts._line.watch(dogs[1])
            wait_until(lambda: dogs[1].ended is not None)
        hosts._line.exit_code = StalledError.exit_code

    Job(2).each(work)
    assert dogs[1].ended == "host 0 (name-0) does not answer: no progress while making step 9"


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    def work(hosts: Hosts) -> None:
        check_shared(Config(runs_dir=str(tmp_path / f"disk-{hosts.process // 2}")), hosts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt1_jax.training.run._PATIENCE_SECONDS", 0.3)
        errors = Job(4).each(work)
    check_all(errors, UserError.exit_code, r"process\(es\) 2, 3 do not see what process 0 writes")
    assert Job(2).each(lambda hosts: check_shared(Config(runs_dir=str(tmp_path / "shared")), hosts)) == [None, None]
    assert not list((tmp_path / "shared" / "gpt1").iterdir())
    check_all(
        Job(2).each(lambda hosts: check_shared(Config(runs_dir="s3://bucket/runs"), hosts)),
        UserError.exit_code,
        "several processes cannot write a checkpoint to S3",
    )


# ---- how they train

SETTINGS = (
    "name: run\n"
    "model: {vocab_size: 320, context_length: 32, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 64,\n"
    "        dtype: float32, scan_layers: true}\n"
    "optimizer: {warmup_steps: 2, learning_rate: 1e-2}\n"
    "train: {steps: 12, batch_size: 8, log_every: 1}\n"
    "checkpoint: {every: 4}\n"
    "evaluation: {every: 12, batch_size: 8, max_tokens: 600, sample_tokens: 8}\n"
)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory, corpus_yaml: str) -> Callable[[str], Path]:
    """Makes folders to train in; what one run has compiled the others find."""
    cache = tmp_path_factory.mktemp("compiled")

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        yaml = SETTINGS.replace("log_every: 1", f"log_every: 1, compilation_cache: {cache}")
        (folder / "config.yaml").write_text(corpus_yaml + yaml)
        return folder

    return make


@pytest.fixture(scope="module")
def two_by_four(new_folder) -> tuple[Path, list[Ended]]:
    """A run of two processes with four devices each, and what they said."""
    folder = new_folder("two")
    return folder, Running(folder, processes=2, devices=4).finish()


def test_one_process_writes_what_all_have_made(two_by_four):
    folder, ((code, out, err), (code_1, out_1, err_1)) = two_by_four
    assert (code, code_1) == (0, 0), err + err_1
    steps = [record["step"] for record in records(folder)]
    assert steps == [*range(1, 13), 12]
    result = json.loads(out)
    assert result["step"] == 12 and (folder / "runs/run/report.html").exists()
    assert "2 of 2 hosts joined: 0 (" in err and "8 cpu device(s)" in err and "step       1/12" in err
    assert out_1 == "" and "step " not in err_1 and "joined" not in err_1
    config = parse_config((folder / "runs/run/config.yaml").read_text(), "run")
    assert config.distributed == DistributedConfig()  # of the start, not of the run
    assert not list((folder / "runs/run").glob(".shared-*"))


def test_a_signal_in_start_up_ends_all_at_once(two_by_four, new_folder):
    folder = new_folder("early")
    running = Running(folder, processes=2, devices=4).send(signal.SIGTERM, (folder / "runs/run/config.yaml").exists, 1)
    for code, _, err in running.finish():
        assert code == 75, err
        assert re.search(r"gpt1: SIGTERM on host 1 \(.*\): stopped, with nothing to save; run the same command", err)
    assert records(folder) == [] and not list((folder / "runs/run/checkpoints").iterdir())


# The command, in which process 1 gets a signal while JAX connects the two.
CONNECTING = """
import os, signal, time
import jax
from gpt1_jax.cli import main

def initialize(address, processes, process, **settings):
    if process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    connect(address, processes, process, **settings)

connect, jax.distributed.initialize = jax.distributed.initialize, initialize
main()
"""


def test_a_signal_while_jax_connects_ends_all_at_once(new_folder):
    folder = new_folder("connecting")
    for code, _, err in Running(folder, processes=2, program=("-c", CONNECTING)).finish():
        assert code == 75, err
        assert re.search(r"gpt1: SIGTERM on host 1 \(.*\): stopped, with nothing to save; run the same command", err)
    assert not (folder / "runs").exists()


# The command, in which process 0 gets a signal, and no signal wakes the main thread of process 1, as in native code.
COMPILING = """
import os, signal, time
import jax
from gpt1_jax.cli import main

def initialize(address, processes, process, **settings):
    connect(address, processes, process, **settings)
    if process == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

connect, jax.distributed.initialize = jax.distributed.initialize, initialize
main()
"""


def test_process_0_leaves_after_one_that_compiles(new_folder):
    """JAX's service ends with it, and JAX would abort the other one."""
    for code, _, err in Running(new_folder("compiling"), processes=2, program=("-c", COMPILING)).finish():
        assert code == 75, err
        assert re.search(r"gpt1: SIGTERM on host 0 \(.*\): stopped, with nothing to save; run the same command", err)


def test_cluster_lists_are_expanded():
    assert cluster._expand("a,b[09-11],c[1,3-4]") == ["a", "b09", "b10", "b11", "c1", "c3", "c4"]
