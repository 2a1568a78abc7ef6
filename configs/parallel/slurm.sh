#!/bin/bash
# A run on a SLURM cluster, on 8 nodes of 8 GPUs:
#   sbatch configs/parallel/slurm.sh CONFIG.yaml NAME [more words for memlm fit]
# A job with the same NAME goes on from the last checkpoint, if there is one. Lightning reads SLURM's variables
# (a job must not be named bash or interactive); tasks a node and nodes must be those of the Trainer. Submit it from
# the folder that has configs/ and runs/: sbatch copies this file elsewhere.
#SBATCH --job-name=memlm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

config=$1 name=$2
resume=()
if [ -e "runs/$name/checkpoints/last.ckpt" ]; then resume=(--ckpt_path last); fi

# Where one process ends with an error, the others, which would wait for it, are ended too.
srun --kill-on-bad-exit=1 memlm fit --config "$config" --config configs/parallel/memory_parallel.yaml \
    --run.name "$name" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" \
    "${resume[@]}" "${@:3}"
code=$?
# Ended by the signal above, five minutes before its time was up: there is more to do.
if [ $code -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
