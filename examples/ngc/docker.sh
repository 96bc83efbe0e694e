#!/usr/bin/env bash
# Train on this machine's GPUs in a container: examples/ngc/docker.sh CONFIG [KEY=VALUE]...
# CONFIG and what it names lie below the current directory, which the container sees as /workspace/here.
set -euo pipefail

image=${IMAGE:-treepo_mcore} # docker build --tag treepo_mcore .
gpus=$(nvidia-smi --list-gpus | wc -l)

options=(
    --rm --gpus all
    --ipc=host             # NCCL's and torch's shared memory; docker's own /dev/shm has 64 MB
    --ulimit memlock=-1    # pinned memory for InfiniBand and for offloading
    --ulimit stack=67108864
    --stop-timeout=1800    # after `docker stop`: time to finish a step and save before it is killed
    --user "$(id -u):$(id -g)" # what the run writes belongs to you
    --env HOME=/tmp --env USER="$(id -un)" # who the image does not know has no name; torch asks for one
    --volume "$PWD:/workspace/here" --workdir /workspace/here
)
script=$(docker run "${options[@]}" "$image" treepo-mcore launch torchrun --gpus-per-node "$gpus" "$@")
exec docker run --init "${options[@]}" "$image" bash -c "$script"
