#!/usr/bin/env bash
# Train on one 8-GPU instance of NGC Base Command: examples/ngc/base_command.sh CONFIG [KEY=VALUE]...
# The workspace is mounted as /mnt/work; CONFIG and what it names lie there.
set -euo pipefail

printf -v config '%q ' "$@"

exec ngc base-command job run \
    --name treepo --ace "${ACE:?}" --instance "${INSTANCE:?}" --image "${IMAGE:?}" --total-runtime "${RUNTIME:-4h}" \
    --workspace "${WORKSPACE:?}:/mnt/work" --result /results \
    --commandline "cd /mnt/work && bash <(treepo-mcore launch torchrun --gpus-per-node 8 $config)"
