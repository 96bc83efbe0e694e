#!/usr/bin/env bash
# Made by: treepo-mcore launch slurm examples/llama-3.1-405b-256gpu/config.yaml --nodes 32 --nvlinks 18 --disk-gib 16000 --memory-gib 1330 --job-name treepo-llama-405b --partition h100 --time 1-00:00:00 --signal-seconds 3600
# Submit it with `sbatch` from the directory that relative paths start from. Submit it again and it continues.
#
#SBATCH --job-name=treepo-llama-405b
#SBATCH --partition=h100
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --output=%x-%j.out
# A requeued job goes on in the same log.
#SBATCH --open-mode=append
# Back into the queue when a node is lost, and when this script asks for it.
#SBATCH --requeue
# To this script, 3600 s before the end: a step and a checkpoint must fit into that.
#SBATCH --signal=B:USR1@3600

set -euo pipefail

run_dir=runs/llama-3.1-405b-treepo
tracker=$run_dir/checkpoints/latest_checkpointed_iteration.txt
logs=$run_dir/logs/$SLURM_JOB_ID # one file a node, all its ranks in it
mkdir -p "$logs"

say() { echo "$(date +%FT%T) $*"; }
saved_step() { cat "$tracker" 2>/dev/null || echo none; }

say "attempt ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, newest checkpoint: $(saved_step)"

# --- Where the ranks meet: the first node, by the address that Slurm itself uses ---
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$head" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs on the same nodes do not meet
export MASTER_ADDR MASTER_PORT

# --- NCCL and the network ---
export NCCL_DEBUG=WARN # causes of failures, without the chatter of INFO
export NCCL_IB_TIMEOUT=22 # 17 s before a packet is sent again: a link that flaps must not end the job
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 # a collective that hangs leaves a record of who did not come,
export TORCH_FR_BUFFER_SIZE=2000 # of the last 2000 collectives
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication in the order of launch, up to Hopper
export PYTHONFAULTHANDLER=1 # a crash in native code shows the Python lines above it
export PYTHONUNBUFFERED=1 # what a rank said before it died is in the log

# --- A look at every node before anything is loaded; one that will not do is named, and the job ends ---
# shellcheck disable=SC2016 # $SLURM_NODEID is each node's own
if ! srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c 'exec "$@" --node "$SLURM_NODEID"' - \
    python -m treepo_mcore.launch.preflight --gpus 8 --nvlinks 18 \
    --disk runs/llama-3.1-405b-treepo --disk-gib 16000 --memory-gib 1330 \
    --meet "$MASTER_ADDR:$MASTER_PORT" --nodes "$SLURM_JOB_NUM_NODES"; then
    say "preflight failed, see above; leave a bad node out with: sbatch --exclude=NODE"
    exit 1
fi

# --- Signals: Slurm warns this script, the script asks the ranks, the ranks finish their step and save ---
# shellcheck disable=SC2317,SC2329 # the trap calls it
ask() {
    say "the time is nearly up: asking the ranks to finish the step and save"
    kill -USR1 "$step" || true # it may just have ended
}
trap ask USR1
# scancel or preemption: Slurm has told the ranks itself, and after a preemption it requeues.
cancelled=
trap 'cancelled=yes; say "SIGTERM: waiting for the ranks to save"' TERM

# One task a rank, without torchrun between: signals and exit statuses pass unchanged. Ranks share the node's cores.
before=$(saved_step)
# shellcheck disable=SC2016 # these are each task's own
srun --kill-on-bad-exit=1 --cpu-bind=none --label --open-mode=append --output="$logs/%n-%N.log" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
             export LOCAL_WORLD_SIZE=8; exec "$@"' - \
    python -m treepo_mcore train examples/llama-3.1-405b-256gpu/config.yaml &
step=$!

# A signal ends `wait` early with a status of its own: wait until the step is gone, then ask for its status.
wait "$step" || true
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
wait "$step" && rc=0 || rc=$?

after=$(saved_step)
say "the ranks ended with status $rc, newest checkpoint: $after"
# They were asked to stop (then they end with 75, but srun reports whichever rank it hears last), or a rank or a node
# was lost: go on from the new checkpoint. Without one the next attempt would end the same way again, but for the first,
# which a bad node may have cost: that one is tried once more.
if [ "$rc" -ne 0 ] && [ -z "$cancelled" ]; then
    if [ "$rc" -eq 2 ] && [ "$after" = "$before" ]; then
        say "the configuration or a file was refused: not requeued"
    elif [ "$after" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
        say "requeued"
        scontrol requeue "$SLURM_JOB_ID"
    else
        say "no new checkpoint in this attempt: not requeued"
    fi
fi
exit "$rc"
