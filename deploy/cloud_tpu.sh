#!/usr/bin/env bash
# Trains on a Cloud TPU slice, through preemptions.
#
#   deploy/cloud_tpu.sh create                          asks for the slice and waits until it is there
#   deploy/cloud_tpu.sh run CONFIG [key=value ...]      gpt1 train on every worker, until the run is done
#   deploy/cloud_tpu.sh status | logs [WORKER] | stop   stop: a checkpoint is written, the slice stays
#   deploy/cloud_tpu.sh delete                          gives the slice back
#
# From the environment: TPU_NAME, ZONE and, to run, IMAGE; ACCELERATOR_TYPE, RUNTIME_VERSION, SPOT and POLL_SECONDS as
# below. The project is gcloud's. A slice that was taken away is asked for again, and the same command goes on from the
# run's newest checkpoint, so runs_dir and data.root must be in a bucket. Where this script's connection breaks, the
# training goes on, and the next run takes it over. End a run, with Ctrl-C, before stop: it would start it again.
set -euo pipefail

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" >&2
    exit 2
}

[[ $# -gt 0 ]] || usage
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to a zone that has such slices, as us-west4-a}"
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1} # 0: on demand
POLL_SECONDS=${POLL_SECONDS:-30}
MAX_FAULTS=3
state= # of the slice, as of the last look

say() { echo "cloud_tpu: $*" >&2; }

queued() { gcloud compute tpus queued-resources "$1" "${@:2}" --zone="$ZONE"; }

on_workers() { gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# Sets the state: of the request, and once that is granted, of the slice; empty where there is no request. With list,
# because a describe that finds nothing cannot be told from one that fails.
look() {
    state=$(queued list --filter="name~/$TPU_NAME\$" --format='value(state.state)')
    if [[ $state == ACTIVE ]]; then
        state=$(gcloud compute tpus tpu-vm list --filter="name~/$TPU_NAME\$" --format='value(state)' --zone="$ZONE")
        state=${state:-PREEMPTED}
    fi
}

request() {
    local flags=(--node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
    if [[ $SPOT == 1 ]]; then flags+=(--spot); fi
    say "asking for $ACCELERATOR_TYPE in $ZONE"
    queued create "$TPU_NAME" "${flags[@]}"
}

delete() { queued delete "$TPU_NAME" --force --quiet; }

create() {
    local shown=
    while true; do
        look
        case $state in
            READY) return ;;
            '') request ;;
            SUSPENDED | PREEMPTED | TERMINATED)
                say "the slice was taken away"
                delete
                ;;
            FAILED)
                say "the request failed: 'deploy/cloud_tpu.sh status' says why, 'delete' removes it"
                return 1
                ;;
            *)
                if [[ $state != "$shown" ]]; then say "waiting: $state"; fi
                shown=$state
                sleep "$POLL_SECONDS"
                ;;
        esac
    done
}

# Prints what a worker runs. An earlier container, whose connection broke, is stopped first and writes a checkpoint. As
# root, because the chips belong to it; on the host's network, by which the workers find each other.
container() {
    local login=:
    if [[ ${IMAGE%%/*} == *.pkg.dev ]]; then login="sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet"; fi
    cat <<END
set -eu
$login
earlier=\$(sudo docker ps --all --quiet --filter name='^gpt1\$')
if [ -n "\$earlier" ]; then sudo docker stop -t 600 gpt1; sudo docker rm gpt1; fi
sudo docker run --name gpt1 --pull always --privileged --user root --network host --log-opt max-size=100m $IMAGE train $*
END
}

run() {
    local command code started faults=0
    command=$(container "$(printf '%q ' "$@")")
    while true; do
        create
        started=$SECONDS code=0
        on_workers all "$command" || code=$?
        case $code in
            0) return ;;
            2 | 3 | 4) return "$code" ;; # the same command would end in the same way
        esac
        sleep "$POLL_SECONDS" # a slice that is being taken away is said to be ready for a moment more
        look
        if ((SECONDS - started > 3600)); then faults=0; fi
        if [[ $code != 75 && $state == READY ]] && ((++faults == MAX_FAULTS)); then
            say "ended with $code, $faults times"
            return "$code"
        fi
        say "ended with $code, the slice is ${state:-gone}; going on from the newest checkpoint"
    done
}

case $1 in
    create | delete) "$1" ;;
    run)
        [[ $# -gt 1 ]] || usage
        : "${IMAGE:?set it to the image that deploy/Dockerfile makes, in a registry}"
        run "${@:2}"
        ;;
    status) queued describe "$TPU_NAME" ;;
    logs) on_workers "${2:-0}" 'sudo docker logs --follow --tail 100 gpt1' ;;
    stop) on_workers all 'sudo docker stop -t 600 gpt1' ;;
    *) usage ;;
esac
