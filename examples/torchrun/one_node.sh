#!/usr/bin/env bash
# Made by: treepo-mcore launch torchrun examples/presets/paper.yaml actor.tp=2 --disk-gib 300 --memory-gib 480
# Run it from the directory that relative paths start from. Run it again and it continues.
# SIGUSR1 or SIGTERM to this script, on any node: all ranks finish their step, save and end. Exit status 75.

set -euo pipefail

run_dir=runs/treepo
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
python -m treepo_mcore.launch.preflight --gpus 8 \
    --disk runs/treepo --disk-gib 300 --memory-gib 480

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
    --standalone \
    -m treepo_mcore train examples/presets/paper.yaml actor.tp=2 &
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
