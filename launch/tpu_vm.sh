#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or a whole pod slice, controlled from your own machine:
#     TPU=my-tpu ZONE=us-east5-b bash launch/tpu_vm.sh --config=configs/large.py \
#         --workdir=/mnt/disk/runs/large --config.data.dir=/mnt/disk/prepared
# Copies the checkout to every worker, sets up .venv there and starts the same command on all of them with
# launch/again.sh. All workers must see the workdir and the dataset at the same path (a Filestore share).
# TPU hosts find each other by their metadata. The log of each worker is ~/mert_jax.log. In place of flags:
#     --create    requests the TPU as a queued resource: TYPE=v5litepod-64, and SPOT=1 for a spot TPU
#     --keep ...  (followed by the flags) creates the TPU, starts the run and checks once a minute for a
#                 preemption, after which it starts again and the run resumes from its last checkpoint
#     --stop      saves and ends the run
#     --delete    deletes the TPU
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone, such as us-east5-b}"
minute=${MERT_JAX_PAUSE:-60} # seconds between checks

cloud() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' gcloud compute tpus "$@" && echo
    else
        gcloud compute tpus "$@"
    fi
}
everywhere() {
    cloud tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}
state() { # of the queued resource: ACTIVE once the TPU is ready, empty if there is none
    gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" \
        --format='value(state.state)' 2>/dev/null || true
}

create() {
    : "${TYPE:?set TYPE to the accelerator type, such as v5litepod-64, v4-32, v5p-16 or v6e-16}"
    case $TYPE in # https://cloud.google.com/tpu/docs/runtimes
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v4-*) runtime=tpu-ubuntu2204-base ;;
        *) echo "error: TYPE=$TYPE is none of v4-N, v5litepod-N, v5p-N, v6e-N" >&2 && exit 2 ;;
    esac
    cloud queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$runtime" ${SPOT:+--spot}
}
delete() {
    cloud queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
}
start() {
    local archive train
    archive=$(mktemp -d)/mert_jax.tar.gz
    train=$(printf ' %q' python -m mert_jax.train "$@")
    # joined by && because set -e is off when `keep` tests the result
    git archive --prefix=mert_jax/ --output="$archive" HEAD &&
        cloud tpu-vm scp "$archive" "$TPU":mert_jax.tar.gz --zone="$ZONE" --worker=all &&
        everywhere "tar -xzf mert_jax.tar.gz && cd mert_jax &&
            source launch/environment.sh && install tpu" &&
        everywhere "cd mert_jax && source .venv/bin/activate &&
            nohup bash launch/again.sh$train >> ~/mert_jax.log 2>&1 < /dev/null & sleep 1" || return
    [ -z "${DRY_RUN:-}" ] || return 0
    echo "started on every worker of $TPU; follow it with:"
    echo "  gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=0 --command='tail -f mert_jax.log'"
}
keep() {
    local now started=
    while true; do
        now=$(state)
        case $now in
            ACTIVE) [ -n "$started" ] || { start "$@" && started=1; } ;;
            '') create && started= ;;
            FAILED | SUSPENDED)
                echo "$TPU is $now: asking for it again" >&2
                delete && started=
                ;;
        esac
        sleep "$minute"
    done
}

case ${1:-} in
    '') echo "error: give the flags of python -m mert_jax.train, or --create, --keep, --stop, --delete" >&2 && exit 2 ;;
    --create) create ;;
    --delete) delete ;;
    --stop) everywhere 'pkill -TERM -f "[m]ert_jax.train" || echo "nothing runs here"' ;;
    --keep)
        shift
        [ $# -gt 0 ] || { echo "error: give the flags of python -m mert_jax.train after --keep" >&2 && exit 2; }
        if [ -n "${DRY_RUN:-}" ]; then create && start "$@"; else keep "$@"; fi
        ;;
    *) start "$@" ;;
esac
