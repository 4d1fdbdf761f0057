#!/bin/sh
#SBATCH --job-name=flare-clef
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=04:00:00
# sbatch deploy/slurm-array.sh INPUTS OUTPUTS
# Task K of N takes every N-th scan from the K-th on; a task that is started again skips what is
# done. Some tasks of 8 alone: sbatch --array=3,5 deploy/slurm-array.sh INPUTS OUTPUTS 8
# For a GPU add --gres=gpu:1.
set -eu
exec flare-clef predict "$1" "$2" --skip-existing \
  --shard "$SLURM_ARRAY_TASK_ID/${3:-$SLURM_ARRAY_TASK_COUNT}"
