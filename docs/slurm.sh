#!/usr/bin/env bash
# One training run over several nodes, requeued until it is done. From the repository's root:
#
#     sbatch docs/slurm.sh --dataset=cifar10 --lr_init=0.75 --exp_name=no_explicit_reg
#
# RUNS (default: runs/) and TFDS_DATA_DIR have to be on a file system that all nodes see, and the
# environment with the library active where this is submitted. docs/running.md says the rest.
#
# One process per GPU: JAX reads SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NODELIST and SLURM_JOB_ID, and
# gives each process the GPU number SLURM_LOCALID. So each has to see all GPUs of its node: no
# --gpus-per-task, no --gpu-bind. (One process per node: JAX_LOCAL_DEVICE_IDS=0,1,2,3.)
#
#SBATCH --job-name=sgd_sparse_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#
# Two minutes before the end, to the processes that srun started (B:USR1 would be for this shell
# alone). They save and leave. An evaluation or a compilation is not broken off: it has to fit in.
#SBATCH --signal=USR1@120
#
# A lost node, or a preemption, puts the job back into the queue by itself.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -uo pipefail # no -e: the status of srun is read

runs=${RUNS:-$PWD/runs}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$runs/compiled}

# `scancel` asks this shell to end, too, and the next start is not wanted then. The shell waits for
# srun all the same; a trap that does something is not passed on to what it starts.
cancelled=
trap 'cancelled=yes' TERM
trap : USR1

# --wait=0: process 0 draws figures when the others are done. --kill-on-bad-exit=0: processes that
# stop for a signal all end with 75, one a little before another, and none may be killed for it.
srun --wait=0 --kill-on-bad-exit=0 \
    python -m experiments.resnet_cifar --distributed --runs_dir="$runs" "$@"
status=$?

if ((status == 75)) && [[ -z $cancelled ]]; then # stopped by a signal, saved: to be continued
    echo "saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
