#!/usr/bin/env bash
#SBATCH --job-name=mert_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on GPU nodes, one process per GPU, from a checkout that all nodes see:
#     sbatch --nodes=4 launch/slurm.sh --config=configs/large.py --workdir=/shared/runs/large \
#         --config.data.dir=/shared/prepared
# Run `source launch/environment.sh && install cuda` there once before. Three minutes before the time
# limit Slurm sends SIGTERM: the run saves and ends with 75, and the job is queued again.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 2

if [ $# -eq 0 ]; then
    echo "error: give the flags of python -m mert_jax.train" >&2
    exit 2
fi
source .venv/bin/activate
# processes find each other by Slurm's variables; if one fails, all are stopped at once
srun --kill-on-bad-exit=1 python -m mert_jax.train "$@"
code=$?
case $code in
    75 | 134 | 137 | 139 | 143)
        echo "ended with code $code: the job queues again" >&2
        scontrol requeue "$SLURM_JOB_ID"
        ;;
esac
exit "$code"
