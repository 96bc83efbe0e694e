#!/usr/bin/env bash
# Put the image into your NGC private registry: ORG=... TEAM=... examples/ngc/registry.sh
# Log in first with an NGC API key: docker login nvcr.io --username '$oauthtoken'
set -euo pipefail

target=nvcr.io/${ORG:?}/${TEAM:?}/treepo_mcore:${TAG:-0.1.0}

docker tag treepo_mcore "$target"
docker push "$target"
echo "docker:   docker pull $target"
echo "enroot:   enroot import docker://${target/\//#}"
echo "pyxis:    treepo-mcore launch slurm CONFIG --container-image ${target/\//#} ..."
