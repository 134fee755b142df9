#!/bin/bash
# One run on several nodes under Slurm, one process for each GPU:
#   sbatch experiments/cluster/slurm.sh FILE DIR [--set KEY=VALUE ...]
# On fewer nodes later: sbatch --nodes=1 experiments/cluster/slurm.sh FILE DIR
#SBATCH --job-name=fedjax-llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
set -euo pipefail

# JAX numbers the GPUs of a node by SLURM_LOCALID: all tasks of a node have to see all of them
# (--gpus-per-node, not --gpus-per-task). DIR, the data and the model lie where all nodes see them.
# One task that fails ends the others, and the job; a job that was requeued goes on by itself.
srun --kill-on-bad-exit=1 --label experiments/cluster/run_or_resume.sh "$@"
