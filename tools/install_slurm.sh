#!/usr/bin/env bash
# Install Slurm for tests/launch/test_slurm.py, where that is possible: a Debian or Ubuntu, as root. No service starts
# that the tests need; they start their own.
set -euo pipefail
if command -v slurmctld >/dev/null; then
    echo "Slurm is installed: $(slurmctld -V)"
elif [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
else
    echo "not root, or no apt-get: the Slurm tests will be skipped"
fi
