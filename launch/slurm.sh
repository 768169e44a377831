#!/usr/bin/env bash
# Any command on the machines of a Slurm job, with its options:
#   sbatch --nodes=2 launch/slurm.sh train +distill=live_avatar_4step checkpoint=FOLDER data.folder=data/clips
#   sbatch --nodes=2 launch/slurm.sh infer parallel=fsdp parallel.replicas=2 requests=requests.jsonl
# train, infer and bench get a torchrun on every node, with a rank for each of its GPUs (or RANKS_PER_NODE=N, which a job without GPUs
# needs: RANKS_PER_NODE=4 sbatch --gpus-per-node=0 ...). The other commands are one process on the first node.
# Slurm sends SIGUSR1 two minutes before the time is over (sbatch --signal=B:USR1@600 for large checkpoints). Then the ranks of a training
# save a checkpoint, and the job is put back into the queue, where it continues; so are ablate and precompute, which skip what is done.
#SBATCH --job-name=sonic
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=sonic-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

refuse() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}

# shellcheck disable=SC2329 # srun runs it, by its text
# Run a command and pass signals on: TERM to it, and USR1, when $1 is "ranks", to the processes that it has started, else as TERM.
on_node() {
    local whom=$1 pid='' code=0
    shift
    trap '[ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true' TERM
    trap '[ "$whom" = ranks ] && pkill -USR1 -P "$pid" || kill -TERM "${pid:-$$}" 2>/dev/null || true' USR1
    "$@" &
    pid=$!
    wait_for "$pid" || code=$?
    return "$code"
}

# Wait for a process whatever signals come meanwhile, and give its exit code.
wait_for() {
    local code=0
    while true; do
        wait "$1" && code=0 || code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

job=${1:-}
case "$job" in
    train | infer | bench) whom=ranks ;;
    plan | convert | bundle | evaluate | judge | ablate | precompute | check) whom=process ;;
    "") refuse "name a command: sbatch --nodes=2 launch/slurm.sh train +distill=live_avatar_4step" ;;
    *) refuse "$job is no command; choose one of: infer, plan, convert, train, bundle, evaluate, judge, ablate, precompute, bench, check" ;;
esac
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no Slurm job; start it with: sbatch --nodes=2 launch/slurm.sh $*"

run=(python -m sonic "$@")
nodes=1
if [ "$whom" = ranks ]; then
    nodes=$SLURM_JOB_NUM_NODES
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    port=$((20000 + SLURM_JOB_ID % 20000)) # on the first node, which is this one; the next one that nobody listens on
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    run=(python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
        --rdzv-backend c10d --rdzv-endpoint "${names%%$'\n'*}:$port" --rdzv-id "$SLURM_JOB_ID" -m sonic "$@")
elif [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    echo "slurm.sh: $job is one process: $((SLURM_JOB_NUM_NODES - 1)) of $SLURM_JOB_NUM_NODES nodes have nothing to do; use --nodes=1" >&2
fi

ending=0 code=0 step=''
trap 'ending=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1 # srun passes it on to every node
trap '[ -z "$step" ] || kill -TERM "$step" 2>/dev/null || true' TERM
srun --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=1 ${SLURM_CPUS_ON_NODE:+"--cpus-per-task=$SLURM_CPUS_ON_NODE"} \
    bash -c "$(declare -f on_node wait_for); on_node \"\$@\"" on_node "$whom" "${run[@]}" &
step=$!
wait_for "$step" || code=$?

if [ "$ending" = 1 ] && [ "$code" != 0 ]; then
    case "$job" in
        train | ablate | precompute)
            echo "slurm.sh: the time is over; job $SLURM_JOB_ID goes back into the queue, where the same command continues" >&2
            scontrol requeue "$SLURM_JOB_ID" && exit 0
            echo "slurm.sh: error: Slurm did not take job $SLURM_JOB_ID back; submit the same command again" >&2
            ;;
        *) echo "slurm.sh: the time is over, and $job starts from its beginning each time; give it more with --time" >&2 ;;
    esac
fi
exit "$code"
