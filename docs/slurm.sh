#!/usr/bin/env bash
# One training run over several nodes, requeued until it is done. From the repository's root:
#
#     sbatch docs/slurm.sh --dataset=cifar10 --lr_init=0.75 --exp_name=no_explicit_reg
#
# RUNS (default: runs/) and TFDS_DATA_DIR must be on a file system shared by all nodes. Submit with the
# library's environment active. See docs/running.md.
#
# One process per GPU: JAX reads SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NODELIST and SLURM_JOB_ID, and
# gives each process the GPU number SLURM_LOCALID. So each must see all GPUs of its node: don't use
# --gpus-per-task or --gpu-bind. (For one process per node: JAX_LOCAL_DEVICE_IDS=0,1,2,3.)
#
#SBATCH --job-name=sgd_sparse_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#
# Two minutes before the time limit, signals the processes that srun started (B:USR1 would signal only
# this shell). They save and exit, after a running evaluation or compilation, which must fit in.
#SBATCH --signal=USR1@120
#
# Slurm requeues the job after a node failure or a preemption.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -uo pipefail # not -e: the status of srun is used below

runs=${RUNS:-$PWD/runs}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$runs/compiled}

# `scancel` also sends SIGTERM to this shell: don't requeue then, but wait for srun. Traps with a command
# are not inherited by child processes, unlike ignored signals.
cancelled=
trap 'cancelled=yes' TERM
trap : USR1

# --wait=0: process 0 draws figures after the others have exited. --kill-on-bad-exit=0: processes that
# stop by a signal exit with 75 at slightly different times, and must not be killed for it.
srun --wait=0 --kill-on-bad-exit=0 \
    python -m experiments.resnet_cifar --distributed --runs_dir="$runs" "$@"
status=$?

if ((status == 75)) && [[ -z $cancelled ]]; then # stopped by a signal and saved
    echo "saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
