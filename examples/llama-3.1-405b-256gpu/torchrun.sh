#!/usr/bin/env bash
# Made by: treepo-mcore launch torchrun examples/llama-3.1-405b-256gpu/config.yaml --nodes 32 --nvlinks 18 --disk-gib 16000 --memory-gib 1330 --head node001
# Run it on each of the 32 nodes with the node's number, 0 (on node001) to 31, from the directory that
# relative paths start from; that directory is shared by all nodes. Run it again and it continues.
# SIGUSR1 or SIGTERM to this script, on any node: all ranks finish their step, save and end. Exit status 75 on the
# nodes that got the signal, 1 on the others, where torchrun does not tell this end from an error.

set -euo pipefail

node=${1:?"usage: $0 NODE, the number of this node from 0 to 31"}

run_dir=runs/llama-3.1-405b-treepo
tracker=$run_dir/checkpoints/latest_checkpointed_iteration.txt
saved_step() { cat "$tracker" 2>/dev/null || echo none; }

# --- NCCL and the network ---
export NCCL_DEBUG=WARN # causes of failures, without the chatter of INFO
export NCCL_IB_TIMEOUT=22 # 17 s before a packet is sent again: a link that flaps must not end the job
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 # a collective that hangs leaves a record of who did not come,
export TORCH_FR_BUFFER_SIZE=2000 # of the last 2000 collectives
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication in the order of launch, up to Hopper
export PYTHONFAULTHANDLER=1 # a crash in native code shows the Python lines above it
export PYTHONUNBUFFERED=1 # what a rank said before it died is in the log

# --- A look at this node before anything is loaded ---
python -m treepo_mcore.launch.preflight --gpus 8 --nvlinks 18 \
    --disk runs/llama-3.1-405b-treepo --disk-gib 16000 --memory-gib 1330 \
    --meet node001:29500 --node "$node" --nodes 32

# --- Ranks finish their step and save when asked; they are torchrun's children, and torchrun itself would die of it ---
asked=
# shellcheck disable=SC2317,SC2329 # the trap calls it
ask() {
    asked=yes
    read -r -a ranks <"/proc/$torchrun/task/$torchrun/children" || true # no newline at its end
    if [ -n "${ranks[*]-}" ]; then
        kill -USR1 "${ranks[@]}" || true # they may just have ended
    else
        kill -TERM "$torchrun" || true # no ranks yet: nothing to save
    fi
}
trap ask USR1 TERM

before=$(saved_step)
python -m torch.distributed.run --nproc-per-node=8 \
    --nnodes=32 --node-rank="$node" --master-addr=node001 --master-port=29500 \
    -m treepo_mcore train examples/llama-3.1-405b-256gpu/config.yaml &
torchrun=$!

# A signal ends `wait` early with a status of its own: wait until torchrun is gone, then ask for its status.
wait "$torchrun" || true
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" || true; done
wait "$torchrun" && rc=0 || rc=$?

# torchrun says 1 whatever its ranks said.
if [ -n "$asked" ] && [ "$rc" -ne 0 ] && [ "$(saved_step)" != "$before" ]; then
    rc=75
fi
exit "$rc"
