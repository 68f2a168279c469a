#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or a whole pod slice, from your own machine:
#     TPU=my-tpu ZONE=us-east5-b bash launch/tpu_vm.sh --config=configs/large.py \
#         --workdir=/mnt/disk/runs/large --config.data.dir=/mnt/disk/prepared
# Sends the checkout to every worker, sets up .venv there, and starts the same command on all of them,
# again whenever it asks for it. The workdir and the dataset must be seen by every worker at the same
# path (a Filestore share). TPU hosts find each other by their metadata. Log: ~/mert_jax.log of each
# worker. `TPU=... ZONE=... bash launch/tpu_vm.sh --stop` saves and ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone, such as us-east5-b}"
everywhere() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${1:-}" = --stop ]; then
    everywhere 'pkill -TERM -f "[m]ert_jax.train" || echo "nothing runs here"'
    exit
fi
if [ $# -eq 0 ]; then
    echo "error: give the flags of python -m mert_jax.train, or --stop" >&2
    exit 2
fi

archive=$(mktemp -d)/mert_jax.tar.gz
git archive --prefix=mert_jax/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":mert_jax.tar.gz --zone="$ZONE" --worker=all
everywhere "tar -xzf mert_jax.tar.gz && cd mert_jax && source launch/environment.sh && install tpu"
train=$(printf ' %q' python -m mert_jax.train "$@")
everywhere "cd mert_jax && source .venv/bin/activate &&
    nohup bash launch/again.sh$train >> ~/mert_jax.log 2>&1 < /dev/null & sleep 1"
echo "started on every worker of $TPU; follow it with:"
echo "  gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=0 --command='tail -f mert_jax.log'"
