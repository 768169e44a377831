#!/usr/bin/env bash
# Several nodes under Slurm: sbatch --nodes=2 launch/slurm.sh parallel=fsdp parallel.replicas=2 requests=requests.jsonl
# One torchrun per node with all its cores and memory, as many ranks as it has GPUs; all options are those of launch/infer.py.
#SBATCH --job-name=sonic
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=sonic-%j.log
set -euo pipefail

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
srun --kill-on-bad-exit=1 ${SLURM_CPUS_ON_NODE:+"--cpus-per-task=$SLURM_CPUS_ON_NODE"} torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    "${SLURM_SUBMIT_DIR:-.}/launch/infer.py" "$@"
