#!/usr/bin/env bash
# The image as a squashfs file for enroot and pyxis, and a look into it: examples/ngc/enroot.sh FILE.sqsh
# Put it where all nodes see it. Then: treepo-mcore launch slurm CONFIG --container-image FILE.sqsh ...
# (examples/slurm/eight_nodes_container.sh is what that prints.)
set -euo pipefail

file=${1:?"usage: $0 FILE.sqsh"}
image=${IMAGE:-dockerd://treepo_mcore} # or docker://nvcr.io#ORG/TEAM/treepo_mcore:0.1.0, with ~/.config/enroot/.credentials

enroot import --output "$file" "$image"
enroot create --force --name treepo_mcore "$file"
enroot start treepo_mcore treepo-mcore doctor
