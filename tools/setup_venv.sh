#!/usr/bin/env bash
# Make a virtual environment from a lock file: tools/setup_venv.sh VENV LOCK
set -euo pipefail
venv=$1 lock=$2

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && is_312 "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 on the PATH or under pyenv; install one (pyenv install 3.12) or set PYTHON=/path/to/python3.12" >&2
  return 1
}

python=$(find_python)
echo "setting up $venv with $("$python" --version): about 6 GB and two minutes"
"$python" -m venv --clear "$venv"
# The lock was resolved as a whole: no dependency is looked up again, every file is checked by its hash.
"$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: -r "$lock"
"$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
