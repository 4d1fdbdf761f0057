#!/bin/sh
#SBATCH --job-name=flare-clef
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=04:00:00
# sbatch deploy/slurm-array.sh INPUTS OUTPUTS
# Task K of N takes every N-th scan from the K-th on; tasks count from 0, as 1-8 would leave out
# share 0. A task that is started again skips what is done. Some tasks of 8 alone:
# sbatch --array=3,5 deploy/slurm-array.sh INPUTS OUTPUTS 8
# For a GPU add --gres=gpu:1.
set -eu
refuse() {
  echo "slurm-array.sh: $1: sbatch --array=0-7 deploy/slurm-array.sh INPUTS OUTPUTS [N]" >&2
  exit 2
}
[ $# -ge 2 ] || refuse 'INPUTS or OUTPUTS is missing'
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || refuse 'not a task of a Slurm array'
if [ $# -lt 3 ] && [ "$SLURM_ARRAY_TASK_MAX" -ne $((SLURM_ARRAY_TASK_COUNT - 1)) ]; then
  refuse "tasks do not count from 0 to N - 1; for some of N shares alone give N"
fi
exec flare-clef predict "$1" "$2" --skip-existing \
  --shard "$SLURM_ARRAY_TASK_ID/${3:-$SLURM_ARRAY_TASK_COUNT}"
