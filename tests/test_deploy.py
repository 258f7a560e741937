"""The files of deploy/: the scripts run beside a gcloud, a Docker and a SLURM that are played; the rest is parsed."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from gpt1_jax import errors
from gpt1_jax.config_file import load_config

DEPLOY = Path("deploy").absolute()
TRAIN = ["configs/gpt1.yaml", "runs_dir=gs://bucket/runs", 'evaluation.prompts=[The, "Once upon"]']

# Every player writes down its arguments, a line a call, tabs between them.
CALL = r"""#!/usr/bin/env bash
set -euo pipefail
printf '%s' "${0##*/}" >>"$STAGE/calls"
printf '\t%s' "${@//$'\n'/;}" >>"$STAGE/calls"
echo >>"$STAGE/calls"
"""
# `slice` is the state of the request, and once that is granted of the slice.
GCLOUD = r"""
if [[ -e $STAGE/broken ]]; then echo 'gcloud: no credentials' >&2; exit 7; fi
slice=$(cat "$STAGE/slice")
if [[ $1 == auth ]]; then exit; fi
case "$3 $4" in
    'queued-resources list')
        case $slice in
            '' | FAILED | SUSPENDED) echo "$slice" ;;
            WAITING_FOR_RESOURCES) echo "$slice"; echo READY >"$STAGE/slice" ;;
            *) echo ACTIVE ;;
        esac ;;
    'queued-resources create') [[ -z $slice ]]; echo WAITING_FOR_RESOURCES >"$STAGE/slice" ;;
    'queued-resources delete') [[ -n $slice ]]; : >"$STAGE/slice" ;;
    'queued-resources describe' | 'tpu-vm list') echo "$slice" ;;
    'tpu-vm ssh') [[ $slice == READY ]]; command=${*: -1}; bash -c "${command#--command=}" ;;
    *) exit 2 ;;
esac
"""
# `fates` has what becomes of each training in turn: an exit code, or PREEMPTED.
DOCKER = r"""
case $1 in
    ps) if [[ -e $STAGE/container ]]; then echo 1f2e3d; fi ;;
    stop) [[ -e $STAGE/container ]] ;;
    rm) rm "$STAGE/container" ;;
    run)
        [[ ! -e $STAGE/container ]]
        touch "$STAGE/container"
        fate=$(head -n 1 "$STAGE/fates")
        sed -i 1d "$STAGE/fates"
        if [[ $fate != PREEMPTED ]]; then exit "$fate"; fi
        echo PREEMPTED >"$STAGE/slice"
        rm "$STAGE/container"
        exit 255 ;;
    *) exit 2 ;;
esac
"""
PLAYERS = {
    "gcloud": CALL + GCLOUD,
    "docker": CALL + DOCKER,
    "sudo": '#!/usr/bin/env bash\nexec "$@"\n',
    "srun": CALL + 'echo "$JAX_LOCAL_DEVICE_IDS" >"$STAGE/devices"\nexit "$(cat "$STAGE/fates")"\n',
    "scontrol": CALL,
}


class Stage:
    """Where the scripts run."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name, player in PLAYERS.items():
            (folder / "bin" / name).write_text(player)
            (folder / "bin" / name).chmod(0o755)
        self.set("slice", "")
        self.set("calls", "")
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "STAGE": str(folder),
            "TPU_NAME": "books",
            "ZONE": "us-west4-a",
            "IMAGE": "us-docker.pkg.dev/project/images/gpt1",
            "POLL_SECONDS": "0",
        }

    def set(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines if line))

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(DEPLOY / script), *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self, of: str) -> list[list[str]]:
        """The arguments of each call of a program, without those that say which slice."""
        lines = (self.folder / "calls").read_text().splitlines()
        calls = [line.split("\t")[1:] for line in lines if line.split("\t")[0] == of]
        return [
            [word for word in call if word not in ("compute", "tpus", "books", "--zone=us-west4-a")] for call in calls
        ]

    def verbs(self) -> list[str]:
        """What was done to the slice, looks apart."""
        return [call[1] for call in self.calls("gcloud") if call[0] != "auth" and call[1] != "list"]

    def trainings(self) -> list[list[str]]:
        """The arguments of each `docker run`, those of Docker apart."""
        runs = [call for call in self.calls("docker") if call[0] == "run"]
        return [call[call.index(self.environment["IMAGE"]) + 1 :] for call in runs]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_run_asks_for_the_slice_and_trains_on_every_worker(stage: Stage):
    stage.set("fates", "0")
    done = stage.run("cloud_tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert stage.verbs() == ["create", "ssh"]
    create, ssh = (call for call in stage.calls("gcloud") if call[1] in ("create", "ssh"))
    assert {"--spot", "--accelerator-type=v5litepod-16", "--node-id=books"} <= set(create)
    assert "--worker=all" in ssh
    assert stage.trainings() == [["train", *TRAIN]]  # every argument whole, through two shells
    assert ["auth", "configure-docker", "us-docker.pkg.dev", "--quiet"] in stage.calls("gcloud")


def test_a_slice_on_demand_and_an_image_without_login(stage: Stage):
    stage.environment |= {"SPOT": "0", "IMAGE": "gpt1:1"}
    stage.set("fates", "0")
    assert stage.run("cloud_tpu.sh", "run", *TRAIN).returncode == 0
    calls = stage.calls("gcloud")
    assert not [call for call in calls if call[0] == "auth" or "--spot" in call]


def test_a_slice_that_was_taken_away_is_asked_for_again_and_the_same_command_goes_on(stage: Stage):
    stage.set("fates", "PREEMPTED", "PREEMPTED", "PREEMPTED", "PREEMPTED", "0")  # more often than faults are forgiven
    done = stage.run("cloud_tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert stage.verbs() == ["create", "ssh", *(["delete", "create", "ssh"] * 4)]
    assert stage.trainings() == [["train", *TRAIN]] * 5


def test_an_interrupted_training_goes_on_where_the_slice_is_still_there(stage: Stage):
    stage.set("slice", "READY")
    stage.set("fates", "75", "75", "75", "75", "0")
    assert stage.run("cloud_tpu.sh", "run", *TRAIN).returncode == 0
    assert stage.verbs() == ["ssh"] * 5
    # The container of the training before is stopped and removed, so that one at a time has the chips.
    verbs = [call[0] for call in stage.calls("docker")]
    assert verbs == ["ps", "run", *(["ps", "stop", "rm", "run"] * 4)]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_would_end_in_the_same_way_is_not_run_again(stage: Stage, code: int):
    stage.set("fates", str(code), "0")
    assert stage.run("cloud_tpu.sh", "run", *TRAIN).returncode == code
    assert len(stage.trainings()) == 1


def test_faults_are_forgiven_twice(stage: Stage):
    stage.set("fates", "1", "137", "6", "0")
    done = stage.run("cloud_tpu.sh", "run", *TRAIN)
    assert done.returncode == 6
    assert "ended with 6, 3 times" in done.stderr
    assert len(stage.trainings()) == 3


@pytest.mark.parametrize("command", [["create"], ["run", *TRAIN], ["status"], ["logs"], ["stop"], ["delete"]])
def test_a_failure_of_gcloud_ends_the_script(stage: Stage, command: list[str]):
    stage.set("broken", "yes")
    done = stage.run("cloud_tpu.sh", *command)
    assert (done.returncode, done.stderr) == (7, "gcloud: no credentials\n")
    assert len(stage.calls("gcloud")) == 1


def test_a_request_that_failed_is_not_repeated(stage: Stage):
    stage.set("slice", "FAILED")
    done = stage.run("cloud_tpu.sh", "create")
    assert done.returncode == 1 and "the request failed" in done.stderr
    assert stage.verbs() == []


def test_the_other_commands(stage: Stage):
    stage.set("slice", "READY")
    stage.set("container", "yes")
    assert stage.run("cloud_tpu.sh", "status").stdout == "READY\n"
    assert stage.run("cloud_tpu.sh", "stop").returncode == 0
    assert stage.calls("docker") == [["stop", "-t", "600", "gpt1"]]
    assert stage.run("cloud_tpu.sh", "delete").returncode == 0
    assert stage.verbs() == ["describe", "ssh", "delete"]


@pytest.mark.parametrize("arguments", [[], ["run"], ["start"]])
def test_usage(stage: Stage, arguments: list[str]):
    done = stage.run("cloud_tpu.sh", *arguments)
    assert done.returncode == 2
    assert "deploy/cloud_tpu.sh run CONFIG [key=value ...]" in done.stderr and "#" not in done.stderr
    assert stage.calls("gcloud") == []


def test_a_name_that_is_missing_is_asked_for(stage: Stage):
    del stage.environment["ZONE"]
    done = stage.run("cloud_tpu.sh", "create")
    assert done.returncode != 0 and "ZONE: set it to a zone" in done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (4, 0, False), (75, 99, True), (5, 19, True), (5, 20, False)],
)
def test_slurm_requeues_what_may_end_better(stage: Stage, code: int, restarts: int, again: bool):
    stage.environment |= {"SLURM_SUBMIT_DIR": str(stage.folder), "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"}
    stage.environment |= {"SLURM_RESTART_COUNT": str(restarts)}
    stage.set("fates", str(code))
    assert stage.run("slurm.sbatch", *TRAIN).returncode == code
    assert stage.calls("scontrol") == ([["requeue", "17"]] if again else [])
    (srun,) = stage.calls("srun")
    assert srun[srun.index(".venv/bin/gpt1") :] == [".venv/bin/gpt1", "train", *TRAIN]
    assert (stage.folder / "devices").read_text() == "0,1,2,3\n"


def test_slurm_reads_every_directive():
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = {number: line for number, line in enumerate(lines) if line.startswith("#SBATCH")}
    assert max(directives) < first_command  # it stops reading there
    options = {line.split()[1].partition("=")[0]: line.partition("=")[2] for line in directives.values()}
    assert options["--ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d+", options["--signal"])  # to the processes; B: would be to the script alone
    assert "--requeue" in options


JOBSET: dict[str, Any] = yaml.safe_load((DEPLOY / "gke_jobset.yaml").read_text())


def test_the_jobset_has_the_fields_and_types_of_the_api_and_no_others():
    parsed = JobsetV1alpha2JobSet.from_dict(JOBSET)
    assert parsed is not None
    assert parsed.to_dict() == JOBSET  # fields that the API does not know are dropped on the way


class Ended(NamedTuple):
    """How a pod ended: its exit code, and whether its node was taken away."""

    code: int
    disrupted: bool = False


def action_after(pod: Ended) -> str:
    """What JobSet does, by the rules of Kubernetes' Job controller (pod_failure_policy.go) and then its own."""
    (job,) = JOBSET["spec"]["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in job["template"]["spec"]["podFailurePolicy"]["rules"]:
        if pod.code in rule.get("onExitCodes", {}).get("values", ()):
            reason, message = "PodFailurePolicy", f"failed with exit code {pod.code} matching FailJob rule at index 0"
            break
        if "onPodConditions" in rule and pod.disrupted:
            reason, message = "PodFailurePolicy", "has condition DisruptionTarget matching FailJob rule at index 1"
            break
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_the_jobset_restarts_what_another_start_can_mend():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GPT1Error)]
    hopeless = {errors.UserError, errors.RefusedError, errors.DamagedError, errors.DivergedError}
    for kind in kinds:
        expected = "FailJobSet" if kind in hopeless else "RestartJobSet"
        if kind is errors.Interrupted:
            expected = "RestartJobSetAndIgnoreMaxRestarts"
        assert action_after(Ended(kind.exit_code)) == expected, kind
    assert action_after(Ended(137)) == "RestartJobSet"
    assert action_after(Ended(137, disrupted=True)) == "RestartJobSetAndIgnoreMaxRestarts"


def test_every_pod_of_the_jobset_trains_and_has_a_host_of_the_slice():
    (job,) = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:2] == ["train", "configs/gpt1.yaml"]
    assert container["name"] == spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert spec["parallelism"] == spec["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]


def test_the_documented_commands_have_valid_configurations():
    page = Path("docs/deploy.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:deploy/cloud_tpu.sh run|sbatch|docker run) .*?(configs/.*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        path, *overrides = command.split()
        load_config(Path(path), overrides)


def test_the_image_is_made_of_files_that_are_there_and_are_sent():
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copies).split():
        assert list(Path().glob(source)), source
        assert f"!{source}" in sent
