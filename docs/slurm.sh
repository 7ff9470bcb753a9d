#!/bin/bash
#SBATCH --job-name=latefusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one task a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@180          # three minutes before the end, to every task
#SBATCH --open-mode=append
# sbatch docs/slurm.sh recipe=late_fusion model=llava_1_5_7b data=llava_mix665k engine=deepspeed_zero2
# Every task is a process of the run, so its exit status 75 (preempted, and saved) is seen here. The output folder
# must be on a file system that all nodes share.
set -u
output=${OUTPUT:-outputs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
resume=false
compgen -G "$output/checkpoint-*" >/dev/null && resume=true
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # below the ports that Linux lends out by itself
export TRAIN="python training/train.py output_dir=$output resume=$resume engine.processes=$SLURM_NTASKS"

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec $TRAIN "$@"' train "$@"
status=$?
if [ "$status" -eq 75 ] || [ -e "$output/interrupted" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
